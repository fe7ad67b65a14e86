# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A `TrainerCallback` that measures routing fluctuation (StableMoE, figures 2 and 7)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from modeling_stablemoe.checkpoints.finding import find_stablemoe
from modeling_stablemoe.measure.fluctuation import RoutingHistory
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin

from .logging_callback import LoggingCallback


class RoutingFluctuationCallback(LoggingCallback):
    """Measures routing fluctuation on fixed validation tokens (StableMoE, figures 2 and 7).

    At every check it notes the expert of each token that is not padding: the backbone router's greedy choice in stage 1,
    the table's in stage 2. Logs `routing_fluctuation`, the share of tokens whose expert changed since the last
    check; at the end of training writes `routing_fluctuation.json` and, where matplotlib
    is installed, `routing_fluctuation.png` to the output folder. A resumed run continues the history.

    Args:
        dataset (iterable of `Mapping`): validation examples with `input_ids`, and `labels` for an encoder-decoder; the
            first ones are used, in order. Where there is an `attention_mask`, its zeros are padding; labels that are no
            token ids, as a classifier's, are left alone.
        check_steps (`int`): optimizer steps between checks (the paper: 500). The transition is a check of its own.
        num_tokens (`int`): tokens of `input_ids` to watch, without padding, rounded up to whole examples.
        batch_size (`int`): examples of one forward pass.
        data_collator (`Callable`, *optional*): makes a padded batch of examples; without one, examples of different
            lengths go one by one.

    Raises:
        ValueError: for numbers < 1 or an empty data set; at the start of training for a model of another kind.
    """

    def __init__(
        self,
        dataset: Iterable[Mapping],
        check_steps: int = 500,
        num_tokens: int = 8192,
        batch_size: int = 8,
        data_collator: Callable[[list[Mapping]], Mapping] | None = None,
    ):
        for name, value in (("check_steps", check_steps), ("num_tokens", num_tokens), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}.")
        self.check_steps = check_steps
        self.history = RoutingHistory()
        rows = _first_rows(dataset, num_tokens)
        same_length = len({tuple(len(values) for values in row.values()) for row in rows}) == 1
        batch_size = batch_size if same_length or data_collator is not None else 1
        groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        self._batches = [(data_collator or _stack)(group) for group in groups]
        self._model: TwoStageRoutingMixin | None = None
        self._is_reported = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Make the first check, or take up the history of the run that is resumed."""
        self._model = find_stablemoe(model)
        self._is_reported = False
        self.history = RoutingHistory()
        path = self._history_path(args)
        if state.global_step > 0 and path.exists():
            self.history.load(path, last_step=state.global_step)
        if not self.history.steps:
            self._check(args, state, control)
        elif len(self.history.experts[0]) != sum(int(mask.sum()) for mask in self._masks()):
            raise ValueError(
                f"The routing history in {str(path)!r} is of other tokens than this run's. Resume with the `num_tokens` "
                "and the validation data of the start, or delete the file to begin a new history."
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Check every `check_steps` steps, at the transition and after the last step; write the report then."""
        is_last = state.global_step == state.max_steps
        due = is_last or state.global_step % self.check_steps == 0
        if due or self._model.routing_stage != self.history.stages[-1]:
            self._check(args, state, control)
        if is_last:  # at the end of training others may want to show the figure
            self._report(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        """Write the report of a run that was stopped early, or was finished when it was resumed."""
        if self.history.steps[-1] < state.global_step:
            self._check(args, state, control)
        if not self._is_reported:
            self._report(args, state)

    def _report(self, args, state):
        if state.is_world_process_zero:
            self.history.write_report(args.output_dir)
        self._is_reported = True

    def _check(self, args, state, control):
        change = self.history.record(state.global_step, self._model.routing_stage, self._experts())
        if state.is_world_process_zero:
            self.history.save(self._history_path(args))
        if change is not None:
            self._log(state, control, {"routing_fluctuation": change})

    def _masks(self) -> Iterator[Tensor]:
        """Yield for each batch and MoE layer which of the tokens are real, `(batch, sequence)`."""
        for batch in self._inputs():
            for token_ids, mask in self._model.routed_tokens(**batch):
                yield torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask

    @torch.no_grad()
    def _experts(self) -> Tensor:
        """Route the fixed tokens by the backbone, or by what is frozen: one `torch.LongTensor`, layer by layer.

        `(tokens,)`, or `(tokens, K)` where a token has K > 1 experts.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            self._model.eval()  # no dropout
            return self._forward()
        finally:
            for module, mode in modes:
                module.training = mode

    def _forward(self) -> Tensor:
        experts: list[list[Tensor]] = [[] for _ in self._model.moe_layers_by_name]
        masks = self._masks()
        for batch in self._inputs():
            batch = {name: values.to(self._model.device) for name, values in batch.items()}
            # In every layer: what one sees depends on the routing before it.
            output = self._model(**batch, use_cache=False, output_router_logits=True, route_by_backbone=True)
            for of_layer, index in zip(experts, output.expert_indices, strict=True):
                of_layer.append(index.cpu()[next(masks)])
        return torch.cat([index for of_layer in experts for index in of_layer])

    def _inputs(self) -> Iterator[dict[str, Tensor]]:
        """Yield what the model takes of each batch: the labels of a language model or a classifier route nothing."""
        has_targets = self._model.config.is_encoder_decoder
        for batch in self._batches:
            yield {name: values for name, values in batch.items() if has_targets or name != "labels"}

    @staticmethod
    def _history_path(args: TrainingArguments) -> Path:
        return Path(args.output_dir) / "routing_fluctuation.safetensors"


def _first_rows(dataset: Iterable[Mapping], num_tokens: int) -> list[dict]:
    """Return the first examples that hold `num_tokens` tokens, with nothing but their ids, masks and targets."""
    rows, count = [], 0
    for example in dataset:
        if "input_ids" not in example:
            raise ValueError(f"Validation examples need a column `input_ids`; there are {sorted(example)}.")
        mask = example.get("attention_mask", [1] * len(example["input_ids"]))
        if not any(mask):
            continue
        names = ["input_ids", "attention_mask", *(["labels"] if _are_token_ids(example.get("labels")) else [])]
        rows.append({name: example[name] for name in names if name in example})
        count += sum(int(is_real) for is_real in mask)
        if count >= num_tokens:
            return rows
    if not rows:
        raise ValueError("The data set to watch routing fluctuation on holds no tokens.")
    return rows


def _are_token_ids(labels: Any) -> bool:
    """Return True for a row of integers: a classifier's labels are one number, or a row of floats."""
    if labels is None:
        return False
    values = torch.as_tensor(labels)
    return values.dim() == 1 and (values.numel() == 0 or not values.is_floating_point())


def _stack(rows: list[dict]) -> dict[str, Tensor]:
    """Make a batch of examples that need no padding."""
    return {name: torch.stack([torch.as_tensor(row[name], dtype=torch.long) for row in rows]) for name in rows[0]}


__all__ = ["RoutingFluctuationCallback"]
