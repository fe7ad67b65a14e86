# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The memory that a model takes, and how long it takes to load: measured in a process of its own."""

import gc
import time

import torch
from transformers import AutoModelForCausalLM

from modeling_stablemoe.measure.machine import peak_memory, reset_peak_memory

from .models import EQUAL_DENSE, EQUAL_SIZE, Preset, TrainingStep, build_model


# What is measured, and of which models. `SAVE` makes the checkpoint that others load.
TRAINING, INFERENCE, LOADING, SAVE = "training", "inference", "loading", "save"
ARMS = {
    TRAINING: ("stage 1", "stage 2", "hash", EQUAL_DENSE, "olmoe"),
    INFERENCE: ("stage 2", EQUAL_DENSE, "olmoe"),
    LOADING: ("stage 2", EQUAL_SIZE, "olmoe"),
}


def too_large(needed: float, available: int, share: float = 0.8) -> str | None:
    """Return why so many bytes do not fit into a share of what is available; `None` if they do, or nothing tells (0)."""
    if not available or needed <= share * available:
        return None
    return f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"


def measure_memory(
    preset: Preset, name: str, what: str, batch_size: int, dtype: torch.dtype, device: torch.device, folder: str
) -> dict[str, float]:
    """Measure one model in this process, which must be fresh.

    `what` is `TRAINING` (two steps, as the optimizer's state comes with the first; `dtype` is that of autocast),
    `INFERENCE` (a forward pass), `LOADING` (of the checkpoint in `folder`, with the first token) or `SAVE` (into it).

    Returns:
        `dict[str, float]`: `peak`, bytes above what Python and its libraries take; `parameters`, their bytes; `seconds`.
    """
    if device.type == "cuda":
        torch.cuda.init()
    reset_peak_memory(device)
    before, began = peak_memory(device), time.perf_counter()
    config = preset.config()
    if what == LOADING:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        with torch.no_grad():
            model(torch.zeros((1, 1), dtype=torch.long, device=device)).logits.sum().item()
    else:
        model = build_model(preset, name, torch.device("cpu"))
        if what == SAVE:
            model.to(dtype).save_pretrained(folder)
            return {}
        model = model.to(device, torch.float32 if what == TRAINING else dtype)
        ids = torch.randint(config.vocab_size, (batch_size, config.max_position_embeddings)).to(device)
        gc.collect()
        reset_peak_memory(device)  # building the model does not count
        if what == TRAINING:
            step = TrainingStep(model, ids, dtype)
            for _ in range(2):
                step.run()
        else:
            with torch.no_grad():
                model.eval()(ids)
    seconds = time.perf_counter() - began
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"peak": float(peak_memory(device) - before), "parameters": parameters, "seconds": seconds}
