# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The version, importable without importing torch."""

__version__ = "0.1.0"
