# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as folders: whole or not, written at once, of which model and engine; the routing beside adapters."""

from .adapters import load_routing, save_routing
from .architectures import load_saved, read_saved_class
from .atomic_files import replace_file, require_new_folder
from .engines import check_engine
from .finding import find_stablemoe
from .folders import last_complete_checkpoint
from .manifests import CheckpointManifestCallback


__all__ = [
    "CheckpointManifestCallback",
    "check_engine",
    "find_stablemoe",
    "last_complete_checkpoint",
    "load_routing",
    "load_saved",
    "read_saved_class",
    "replace_file",
    "require_new_folder",
    "save_routing",
]
