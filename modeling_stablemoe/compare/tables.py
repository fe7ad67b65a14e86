# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What tables are worth in the MoE models of transformers: from the start, from the middle of training, after it, or never."""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.checkpoints.manifests import CheckpointManifestCallback
from modeling_stablemoe.measure.figures import save_figure
from modeling_stablemoe.measure.meter import imbalance
from modeling_stablemoe.model.frozen_stablemoe import random_table
from modeling_stablemoe.runs.recipes import HASH_TABLES, NamesImplementations, model_fields
from modeling_stablemoe.runs.run import RunFolder
from modeling_stablemoe.solvers.hash_tables import count_tokens
from modeling_stablemoe.tables import (
    FreezingReport,
    LayerFreezing,
    TableTransitionCallback,
    count_routes,
    format_freezing,
    hash_tables,
    install_tables,
    learned_layers,
    make_tables,
    measure_freezing,
    moe_layers,
    plot_freezing,
    save_tables,
)
from modeling_stablemoe.training.exact_evaluation import BlockTrainer

from .comparison import Comparison, System, check_config
from .comparison_report import format_comparison, summarize_systems, write_figures, write_results


logger = logging.getLogger(__name__)


@dataclass
class TableArguments(NamesImplementations):
    """The tables, and implementations."""

    max_load: float = field(default=1.2, metadata={"help": "Tokens allowed on one expert by a table, in mean loads."})
    count_steps: int = field(
        default=200, metadata={"help": "Steps whose routes a table is made of, or as many tokens of a teacher's."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ...; default: the best there is."}
    )
    experts_implementation: str | None = field(
        default=None, metadata={"help": "eager, grouped_mm or batched_mm; default: grouped_mm."}
    )

    def __post_init__(self):
        """Check the numbers."""
        if self.max_load < 1:
            raise ValueError(f"`--max_load` must be at least 1, the mean load, got {self.max_load}.")
        if self.count_steps < 1:
            raise ValueError(f"`--count_steps` must be at least 1, got {self.count_steps}.")


@dataclass
class TableSystem(System):
    """One of the systems: a model of transformers, and when which tables choose its experts.

    `config` names its `model_type`. With `stage1_steps` its routing is frozen at that step. A `hash_table`, random or balanced, or
    the tables of a teacher choose from the start, where the model has `hash_moe` layers.

    Args:
        tables_of (`str`, *optional*): an earlier system whose finished model, of the same seed, the tables are made of.
        model_of (`str`, *optional*): an earlier system whose finished model is frozen, and not trained.
        max_load (`float`, *optional*): tokens allowed on one expert by its tables, in mean loads. Default: that of all systems.
    """

    tables_of: str | None = None
    model_of: str | None = None
    max_load: float | None = None

    def __post_init__(self):
        """Check that the settings go together."""
        super().__post_init__()
        if self.hash_table not in (None, *HASH_TABLES):
            raise ValueError(
                f"`hash_table` of the system {self.name!r} must be one of {list(HASH_TABLES)}, got {self.hash_table!r}. Tables of "
                "another system are named by `tables_of`."
            )
        names = ("stage1_steps", "hash_table", "tables_of", "model_of")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"The system {self.name!r} has {' and '.join(given)}: its tables come from one of them.")
        if self.max_load is not None and self.max_load < 1:
            raise ValueError(
                f"`max_load` of the system {self.name!r} must be at least 1, the mean load, got {self.max_load}."
            )
        if self.settled_change is not None or self.hold_until_ready is not None:
            raise ValueError(
                f"The system {self.name!r} has `settled_change` or `hold_until_ready`, which are a StableMoE's: leave them out."
            )

    @property
    def source(self) -> str | None:
        """`str` or `None`: the system whose finished model this one needs."""
        return self.tables_of or self.model_of


class TableComparison(Comparison):
    """A comparison of models of transformers that route by tables at some time, or never; its systems are `TableSystem`."""

    model_args: TableArguments

    def check_sources(self, systems: Sequence[TableSystem], seeds: Sequence[int]):
        """Check that what a system needs of another will be there; a ValueError names both."""
        names: list[str] = []
        for system in systems:
            source = system.source
            if source is not None and source not in names:
                if not all(self.results_of(source, seed).is_file() for seed in seeds):
                    raise ValueError(f"System {system.name!r} needs {source!r} trained: put that before it.")
            names.append(system.name)

    def config_of(self, system: TableSystem) -> PreTrainedConfig:
        """Make the config of a system; a ValueError names the system."""
        values = {**model_fields(self.tokenizer), **system.config}
        model_type = values.pop("model_type", None)
        try:
            check_config(model_type, values)
            return AutoConfig.for_model(model_type, **values)
        except ValueError as error:
            raise ValueError(f"System {system.name!r}: {error}") from error

    def run(self, system: TableSystem, seed: int) -> dict:
        """Train and measure a system, or freeze and measure the model that another has come to; or read what was measured.

        Args:
            system (`TableSystem`): what to train, or to freeze.
            seed (`int`): of the initial weights, the order of batches and the tables.

        Returns:
            `dict`, JSON-ready: that of `Comparison.run`. Of a system with `model_of` the training is that of the other, and
                `freezing` is the `FreezingReport` as a mapping.

        Raises:
            ValueError: if the folder of the run holds one with other settings.
        """
        if system.model_of is None:
            return super().run(system, seed)
        path, args = self.results_of(system.name, seed), self.arguments_of(system.name, seed)
        folder = RunFolder(args, False, self.model_args, self.data_args, system)
        if path.is_file():
            logger.info("%s, seed %d: finished before, %s.", system.name, seed, path)
            return json.loads(path.read_text())
        logger.info("%s, seed %d: freezing %s.", system.name, seed, system.model_of)
        with folder:
            folder.claim()
            results = json.loads(self.results_of(system.model_of, seed).read_text())
            model = self._trained(system.model_of, seed)
            counted, held_out = self._counted(seed), self._batches(self.blocks["validation"])
            report, made = measure_freezing(model, counted, held_out, self._max_load(system), path.parent)
            install_tables(model, made.tables, [row.layer for row in report.layers])
            save_tables(model, path.parent)
            load = self._load(model)
            perplexity = report.layers[-1].perplexity_up_to
            end = {"step": args.max_steps, "perplexity": perplexity, "seconds": results["seconds"]}
            results |= {
                "system": system.name,
                "family": system.family,
                "perplexity": {"validation": perplexity},
                "validation_curve": [end],
                "transition": {"table_agreement": mean(row.kept for row in report.layers)},
                "load": (load / load.sum(-1, keepdim=True)).tolist(),
                "load_max_over_mean": imbalance(load),
                "freezing": asdict(report),
            }
            replace_file(path, lambda partial: partial.write_text(json.dumps(results, indent=1) + "\n"))
        return results

    def prepare(self, model: PreTrainedModel, system: TableSystem, seed: int) -> list:
        """Install the tables that a model begins with, if any, and build the callbacks of the run."""
        tables = self._first_tables(model, system, seed)
        if tables is not None:
            install_tables(model, tables)
        callbacks = []
        stage1 = system.routing(0, 0).stage1
        if stage1 is not None:
            callbacks = [TableTransitionCallback(stage1, self.model_args.count_steps, self._max_load(system))]
        return [*callbacks, CheckpointManifestCallback()]

    def _max_load(self, system: TableSystem) -> float:
        return self.model_args.max_load if system.max_load is None else system.max_load

    def _first_tables(self, model: PreTrainedModel, system: TableSystem, seed: int) -> Tensor | None:
        if system.hash_table is None and system.tables_of is None:
            return None
        layers = sorted(set(moe_layers(model)) - set(learned_layers(model)))
        if not layers:
            raise ValueError(
                f"System {system.name!r}: a {type(model).__name__} like this one has no layers that route by a table from the "
                "start (`mlp_layer_types` with `hash_moe`). Freeze its routing with `stage1_steps`."
            )
        num_experts, k = model.config.num_local_experts, model.config.num_experts_per_tok
        if system.hash_table == "random":
            tables = [random_table(model.config.vocab_size, num_experts, k) for _ in layers]
            return torch.stack(tables).view(len(layers), -1, k)
        if system.hash_table == "balanced":
            counts = count_tokens(self.blocks["train"], model.config.vocab_size)
            return hash_tables(counts, len(layers), num_experts, k, seed)
        counts = count_routes(self._trained(system.tables_of, seed), self._counted(seed), layers)
        return make_tables(counts, self._max_load(system)).tables

    def measure_routing(self, trainer: BlockTrainer) -> dict:
        """Measure the load of the experts on the validation text; every process must call this."""
        return {"load": self._load(trainer.model), "mean_gate": None, "closed_gates": None}

    def _load(self, model: PreTrainedModel) -> Tensor:
        return count_routes(model, self._batches(self.blocks["validation"])).chosen.sum(1).double()

    def _trained(self, name: str, seed: int) -> PreTrainedModel:
        folder = self.results_of(name, seed).parent
        model = AutoModelForCausalLM.from_pretrained(folder, **self.model_args.implementations)
        return model.to(self.training_args.device)

    def _counted(self, seed: int) -> list[dict[str, Tensor]]:
        """Draw as many training blocks as the counted steps have."""
        rows, args = self.blocks["train"], self.training_args
        steps = self.model_args.count_steps * args.gradient_accumulation_steps * args.world_size
        number = min(len(rows), steps * args.train_batch_size)
        return self._batches(rows.select(sorted(random.Random(seed).sample(range(len(rows)), number))))

    def _batches(self, rows: Dataset) -> list[dict[str, Tensor]]:
        size = self.training_args.eval_batch_size
        return [{"input_ids": torch.as_tensor(batch["input_ids"])} for batch in rows.iter(batch_size=size)]


def write_table_report(comparison: TableComparison, runs: Sequence[dict]) -> str:
    """Write `results.json`, `results.md` and figures of the runs so far, each family of models by itself.

    Args:
        comparison (`TableComparison`): of the runs.
        runs (sequence of `dict`): of `TableComparison.run`.

    Returns:
        `str`: Markdown without a newline at the end: for each family a table in which its first system is the reference,
            and, for each model that was frozen after training, one of its layers, means over seeds.
    """
    families: dict[str, list[dict]] = {}
    for run in runs:
        families.setdefault(run["config"]["model_type"], []).append(run)
    rows, parts = [], []
    for model_type, group in families.items():
        folder = Path(comparison.training_args.output_dir) / model_type
        folder.mkdir(parents=True, exist_ok=True)
        reference = group[0]["system"]
        summary = summarize_systems(group, reference)
        parts += [f"## {model_type}", format_comparison(summary, reference)]
        drawn = write_figures(group, folder)
        frozen: dict[str, list[dict]] = {}
        for run in group:
            if "freezing" in run:
                frozen.setdefault(run["system"], []).append(run["freezing"])
        for system, reports in frozen.items():
            report = mean_report(reports)
            parts += [f"### {system}, by layer", format_freezing(report)]
            if drawn:  # with matplotlib
                save_figure(plot_freezing(report), folder / f"{system}.png")
        rows += summary
    page = "\n\n".join(parts)
    write_results(comparison, runs, rows, page)
    return page


def mean_report(reports: Sequence[dict]) -> FreezingReport:
    """Average freezing reports of models of one shape, as mappings."""
    layers = []
    for rows in zip(*(report["layers"] for report in reports), strict=True):
        means = {name: mean(row[name] for row in rows) for name in rows[0]}
        layers.append(LayerFreezing(**means | {"layer": rows[0]["layer"], "alone": round(means["alone"])}))
    perplexity = mean(report["perplexity"] for report in reports)
    return FreezingReport(**reports[0] | {"perplexity": perplexity, "layers": layers})


__all__ = ["TableArguments", "TableComparison", "TableSystem", "mean_report", "write_table_report"]
