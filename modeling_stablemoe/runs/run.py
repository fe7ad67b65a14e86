# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share: the run folder, the model, the callbacks, and training through both stages."""

import errno
import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub import HfApi
from safetensors import SafetensorError
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerState

from modeling_stablemoe.checkpoints.architectures import CONFIGS
from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.checkpoints.engines import translated
from modeling_stablemoe.checkpoints.folder_lock import LOCK_FILE, FolderLock
from modeling_stablemoe.checkpoints.folders import (
    check_run_folder,
    claim_run_folder,
    last_complete_checkpoint,
    remove_incomplete_checkpoints,
    require_optimizer,
    restore_finished_run,
    run_identity,
    what_is_missing,
)
from modeling_stablemoe.checkpoints.manifests import CheckpointManifestCallback
from modeling_stablemoe.hub.cards import CARD_FILE, CardFacts, build_model_card
from modeling_stablemoe.measure import report
from modeling_stablemoe.measure.fluctuation import FIGURE_FILE
from modeling_stablemoe.model.configuration_stablemoe import StableMoEBaseConfig
from modeling_stablemoe.model.frozen_stablemoe import FrozenRouter, random_table
from modeling_stablemoe.solvers.hash_tables import balanced_hash_table, count_tokens, least_load
from modeling_stablemoe.training import (
    ModelCardCallback,
    RoutingFluctuationCallback,
    RoutingStatisticsCallback,
    StageTransitionCallback,
)

from .recipes import (
    ModelArguments,
    RoutingArguments,
    change_checkpoint,
    load_preset,
    model_fields,
    read_preset,
)


logger = logging.getLogger(__name__)

# Values of `--resume_from_checkpoint` that mean the last whole checkpoint of the run.
LATEST = ("latest", "true", "True")
# Files of the output folder that are never uploaded: a pickle, and what is of this machine.
NOT_SHARED = ("training_args.bin", "run.json", LOCK_FILE)


@dataclass
class FolderArguments:
    """How to treat the output folder."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what --output_dir holds and start from the beginning."}
    )


def _what_is_wrong(checkpoint: str) -> str | None:
    """Say why a checkpoint that the user has named cannot be resumed, None where it can."""
    if not Path(checkpoint).is_dir():
        return "there is no such folder; name a checkpoint of the run, or `latest`"
    return what_is_missing(checkpoint)


class RunFolder:
    """The output folder of one run: checked when this is made, changed only by `claim`.

    Used as a context, it is free for other processes at the end.

    Args:
        training_args (`TrainingArguments`): name the folder and the checkpoint, and identify the run.
        overwrite (`bool`): delete what the folder holds.
        *settings (dataclass instances): everything else that the run depends on.

    Raises:
        ValueError: if this run may not write to the folder, another one does, or the checkpoint to resume from is not
            whole.
    """

    def __init__(self, training_args: TrainingArguments, overwrite: bool, *settings: Any):
        self.args = training_args
        named = training_args.resume_from_checkpoint
        self._run = {
            "folder": training_args.output_dir,
            "identity": run_identity(
                training_args, {k: v for part in settings for k, v in _as_settings(part).items()}
            ),
            "resume": named is not None,
            "overwrite": overwrite,
        }
        self._lock = FolderLock(training_args.output_dir)
        if training_args.process_index == 0:
            self._lock.check()
        check_run_folder(**self._run)
        problem = None if named in (None, *LATEST) else _ask_first(self.args, lambda: _what_is_wrong(named))
        if problem is not None:
            raise ValueError(f"The checkpoint {named!r} cannot be resumed: {problem}.")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._lock.release()

    def claim(self) -> str | None:
        """Claim the folder for this run; return the checkpoint to resume from, if any."""
        checkpoint = _ask_first(self.args, self._claim)
        requested = self.args.resume_from_checkpoint
        if requested not in (None, *LATEST):
            checkpoint = requested
        if checkpoint is not None:
            require_optimizer(checkpoint)
        elif requested is not None:
            logger.info("There is no whole checkpoint in %s yet: the run begins at step 0.", self.args.output_dir)
        return None if checkpoint is None else str(checkpoint)

    def _claim(self) -> Path | None:
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        checkpoint = claim_run_folder(**self._run)
        if self.args.push_to_hub:
            # During training `Trainer` uploads the whole folder, except what this file names.
            ignored = "".join(f"/{name}\n" for name in NOT_SHARED)
            replace_file(Path(self.args.output_dir) / ".gitignore", lambda path: path.write_text(ignored))
        return checkpoint


def _ask_first(args: TrainingArguments, find: Callable[[], Any]) -> Any:
    """Let the first process decide for all: reading a checkpoint takes time, and folders change."""
    found = [find() if args.process_index == 0 else None]
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def _as_settings(part: Any) -> dict:
    if not isinstance(part, RoutingArguments):
        return asdict(part)
    # Only these change what is trained; the others measure, or choose among checkpoints.
    names = ("stage1_steps", "settled_change", "hold_until_ready", "hash_table")
    return {name: getattr(part, name) for name in names}


def build_model(
    model_args: ModelArguments, auto_class: type, tokenizer: PreTrainedTokenizerBase, **fields: Any
) -> PreTrainedModel:
    """Build the model that the preset describes, or load the checkpoint.

    Args:
        model_args (`ModelArguments`): preset or checkpoint, overrides and implementations.
        auto_class (`type`): `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`.
        tokenizer (`PreTrainedTokenizerBase`): gives a new model its vocabulary and special tokens.
        **fields: more config fields of a new model, which `--config_overrides` may change.

    Raises:
        OSError: if there is no such preset or checkpoint.
        ValueError: if it is damaged or of another kind, or for an invalid override.
    """
    config = check_model(model_args, auto_class)
    if config is not None:
        config = change_checkpoint(config, model_args.overrides)
        return auto_class.from_pretrained(model_args.model_name_or_path, config=config, **model_args.implementations)
    fields = {**model_fields(tokenizer), **fields, **model_args.overrides}
    return auto_class.from_config(load_preset(model_args.model_preset, **fields), **model_args.implementations)


def check_model(model_args: ModelArguments, auto_class: type) -> StableMoEBaseConfig | None:
    """Return the config of the checkpoint that is named, if one is; arguments and errors are those of `build_model`."""
    if model_args.model_name_or_path is None:
        _require_kind(read_preset(model_args.model_preset)[0], auto_class, f"The preset {model_args.model_preset!r}")
        return None
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    if config.model_type not in CONFIGS:
        raise ValueError(
            f"{model_args.model_name_or_path!r} is a {config.model_type!r} model, not one of this package: "
            f"{', '.join(CONFIGS)}. Give it experts first, with scripts/convert_dense.py."
        )
    _require_kind(type(config), auto_class, f"The checkpoint {model_args.model_name_or_path!r}")
    return config


def _require_kind(config_class: type, auto_class: type, what: str):
    if config_class not in auto_class._model_mapping:
        raise ValueError(
            f"{what} is of a {config_class.model_type!r} model, which {auto_class.__name__} does not load. Language "
            "models are trained with scripts/run_clm.py, translation models with scripts/run_translation.py."
        )


def set_hash_tables(model: PreTrainedModel, routing_args: RoutingArguments, train_rows: Dataset):
    """Split the most frequent ids of a new model, and route it by hash tables, as the routing arguments say.

    Args:
        model (`PreTrainedModel`): with any router; the tables freeze one that is not a hash.
        routing_args (`RoutingArguments`): the kind of table.
        train_rows (`Dataset`): data to balance the tables for: `input_ids` and, for a decoder, `labels`.

    Raises:
        OSError: if the folder of tables is no checkpoint.
        ValueError: if there is also a stage 1; for a streamed corpus, which cannot be counted; for a checkpoint
        without
            tables or with those of another model.
    """
    config = model.config
    if not config.num_moe_layers:
        return
    columns = _columns_of_layers(config)
    if routing_args.split_tokens:
        _split_heaviest(model, routing_args.split_tokens, train_rows, columns)
    # The rows of split ids begin alike: those of a hash are drawn again.
    kind = routing_args.hash_table or (
        "random" if routing_args.split_tokens and config.router_type == "hash" else None
    )
    if kind is None:
        return
    if routing_args.stage1 is not None:
        raise ValueError(
            "`--hash_table` fixes the routing from the start: there is no stage 1, unset `--stage1_steps`."
        )
    if kind == "random":
        sizes = config.num_routing_rows, config.num_experts, config.num_experts_per_tok
        model.set_routing_tables(torch.stack([random_table(*sizes) for _ in range(config.num_moe_layers)]))
        return
    if kind != "balanced":
        model.set_routing_tables(_tables_of_checkpoint(model, kind))
        return
    split = config.split_token_ids or ()
    counts = {column: count_tokens(train_rows, config.vocab_size, column, split) for column in set(columns)}
    # The layers differ in how ids of equal frequency are spread.
    k = config.num_experts_per_tok
    tables = [balanced_hash_table(counts[column], config.num_experts, seed, k) for seed, column in enumerate(columns)]
    model.set_routing_tables(torch.stack(tables))


def _columns_of_layers(config: StableMoEBaseConfig) -> list[str]:
    """Name the column of the data that each MoE layer routes."""
    if not config.is_encoder_decoder:
        return ["input_ids"] * config.num_moe_layers
    of_encoder, of_decoder = config.encoder_moe_layer_positions, config.decoder_moe_layer_positions
    return ["input_ids"] * len(of_encoder) + ["labels"] * len(of_decoder)


def _split_heaviest(model: PreTrainedModel, num_ids: int, train_rows: Dataset, columns: list[str]):
    """Route the most frequent ids of the training data by the token before them, too, and say what that makes possible."""
    config = model.config
    by_id = sum(count_tokens(train_rows, config.vocab_size, column) for column in sorted(set(columns)))
    heaviest = by_id.argsort(descending=True, stable=True)[:num_ids].tolist()
    if config.split_token_ids != heaviest:  # a checkpoint that is trained further may hold them
        model.split_tokens(heaviest)
    by_row = sum(count_tokens(train_rows, config.vocab_size, column, heaviest) for column in sorted(set(columns)))
    before, after = (least_load(counts, config.num_experts, config.num_experts_per_tok) for counts in (by_id, by_row))
    logger.info(
        "The %d most frequent token ids, %.0f %% of all tokens, are routed by the token before them, too: the least load "
        "max/mean that a table can have goes from %.2f to %.2f.",
        len(heaviest),
        100 * by_id[heaviest].sum() / by_id.sum().clamp(min=1),
        before,
        after,
    )


def _tables_of_checkpoint(model: PreTrainedModel, folder: str) -> torch.Tensor:
    """Read the frozen tables of a checkpoint, as `set_routing_tables` takes them."""
    teacher = type(model).from_pretrained(folder)
    if teacher.config.split_token_ids != model.config.split_token_ids:
        raise ValueError(
            f"The tables of {folder!r} split other token ids than this model: train it with the `--split_tokens` of that one."
        )
    routers = [layer.frozen_router for layer in teacher.moe_layers_by_name.values()]
    if not routers or not all(isinstance(router, FrozenRouter) and router.is_frozen for router in routers):
        raise ValueError(f"The checkpoint {folder!r} has no frozen routing tables that `--hash_table` could take.")
    return torch.stack([router.values() for router in routers])


def build_callbacks(
    routing_args: RoutingArguments,
    config: StableMoEBaseConfig,
    max_steps: int,
    validation_rows,
    data_collator=None,
    facts: CardFacts | None = None,
) -> list:
    """Build the callbacks of a run: those that the routing arguments name, model cards, and manifests of checkpoints.

    The logs of every MoE model get routing statistics.

    Args:
        routing_args (`RoutingArguments`): length of stage 1, checks of fluctuation.
        config (`StableMoEBaseConfig`): of the model.
        max_steps (`int`): steps of the whole training; <= 0 if only Trainer will know.
        validation_rows (iterable of `Mapping`): data on which fluctuation is measured.
        data_collator (`Callable`, *optional*): makes a padded batch of them.
        facts (`CardFacts`, *optional*): what model cards say besides what was measured.

    Returns:
        `list[TrainerCallback]`: `CheckpointManifestCallback` is the last.

    Raises:
        ValueError: if stage 1 would outlast training.
    """
    callbacks = []
    if routing_args.stage1 is not None:
        callbacks.append(
            StageTransitionCallback(
                routing_args.stage1,
                routing_args.settled_change,
                routing_args.hold,
                best_of_stage2=routing_args.best_of_stage2,
                expert_load=routing_args.expert_load,
            )
        )
        if max_steps > 0:
            callbacks[0].resolve_last_step(max_steps)
    elif config.num_moe_layers:
        callbacks.append(RoutingStatisticsCallback(routing_args.expert_load))
    if routing_args.fluctuation_check_steps:
        callbacks.append(
            RoutingFluctuationCallback(
                validation_rows,
                routing_args.fluctuation_check_steps,
                routing_args.fluctuation_tokens,
                data_collator=data_collator,
            )
        )
    return [*callbacks, ModelCardCallback(facts), CheckpointManifestCallback()]


class SaveError(OSError):
    """Saving failed, most often for lack of space; earlier checkpoints are unchanged."""


def train(trainer: Trainer, checkpoint: str | None):
    """Train to the end, from a checkpoint if there is one, and save the model and the Trainer's state.

    Args:
        trainer (`Trainer`): not trained yet.
        checkpoint (`str`, *optional*): a whole one, of any engine that `check_engine` accepts.

    Raises:
        SaveError: if a checkpoint or the model cannot be saved.
    """
    step = -1
    if checkpoint is not None:
        step = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step
        logger.info("Resuming from %s: the run goes on from step %d.", checkpoint, step)
    if (
        trainer.args.max_steps > 0
        and (warmup := trainer.args.get_warmup_steps(trainer.args.max_steps)) >= trainer.args.max_steps
    ):
        logger.warning(
            "Lower `--warmup_steps` or train longer: %d steps of warm-up are all of this run, %d steps, which never reaches its "
            "learning rate.",
            warmup,
            trainer.args.max_steps,
        )
    with trainer.args.main_process_first(desc="cut-off checkpoints"):
        if trainer.is_world_process_zero():
            remove_incomplete_checkpoints(trainer.args.output_dir, step)
    with _interruptible(trainer), _explained(trainer), logging_redirect_tqdm():
        if checkpoint is None:
            trainer.train()
        elif not restore_finished_run(trainer, checkpoint):
            with translated(trainer, checkpoint) as folder, _without_tied_keys(trainer.model):
                trainer.train(resume_from_checkpoint=folder)
        # An internal call does not upload: `push` does that later, with the card.
        trainer.save_model(trainer.args.output_dir, _internal_call=True)
        trainer.save_state()
    # A pickle, which must not be shared; checkpoints keep theirs.
    (Path(trainer.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


def step_of_model(trainer: Trainer) -> int:
    """Return the step of the Trainer's weights: after training, that of the best checkpoint if it was loaded."""
    state = trainer.state
    is_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if is_best else state.global_step


def evaluate_saved_model(trainer: Trainer) -> float:
    """Return the perplexity of the final model; the history keeps it only if that is of the last step."""
    loss = trainer.evaluate()["eval_loss"]
    if step_of_model(trainer) != trainer.state.global_step:
        trainer.state.log_history.pop()
    return report.perplexity_of(loss)


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process with one line: the step, the last whole checkpoint, how to go on."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        if not trainer.is_world_process_zero():
            raise SystemExit(1) from None
        whole = last_complete_checkpoint(trainer.args.output_dir)
        remedy = (
            "There is no whole checkpoint yet: begin again with `--overwrite_output_dir`, and with smaller `--save_steps` than "
            f"{trainer.args.save_steps:g} to have one earlier."
            if whole is None
            else f"{whole.name} is whole: go on by the same command with `--resume_from_checkpoint latest` at its end."
        )
        raise SystemExit(
            f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}. {remedy}"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _without_tied_keys(model: PreTrainedModel) -> Iterator[None]:
    """Let Trainer resume without a warning of keys that no checkpoint holds, as they are tied to others.

    Only here: a model that is untied later must save them.
    """
    given, tied = model._keys_to_ignore_on_save, set(model.all_tied_weights_keys)
    model._keys_to_ignore_on_save = tied | set(given or ())
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = given


@contextmanager
def _explained(trainer: Trainer) -> Iterator[None]:
    """Turn a failure to save into a `SaveError` with the remedy; other errors pass unchanged."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        folder, step = Path(trainer.args.output_dir), trainer.state.global_step
        unfinished = folder / f"checkpoint-{step}"
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        is_cut_off = unfinished.is_dir() and what_is_missing(unfinished, checksums=False) is not None
        is_final = 0 < trainer.state.max_steps <= step
        if not (is_full or is_cut_off or (is_final and isinstance(error, (OSError, SafetensorError)))):
            raise
        whole = last_complete_checkpoint(folder)
        raise SaveError(
            f"Saving to {str(folder)!r} failed at step {step}, with {shutil.disk_usage(folder).free / 1e6:.0f} MB free "
            f"({error}). {'There is no whole checkpoint yet' if whole is None else f'{whole.name} is whole'}. Make room "
            "(or mend what the message says) and continue with `--resume_from_checkpoint latest`."
        ) from error


def summarize_run(trainer: Trainer) -> dict:
    """Gather the results of a run, JSON-ready.

    `step` and `routing_stage` (`None` for a dense model) are those of the saved model, which may be the best
    checkpoint.
    """
    return report.summarize_run(trainer.model, trainer.state, step_of_model(trainer))


def write_results(
    trainer: Trainer,
    results: dict,
    card_template: str | Path | None = None,
    dataset_name: str | None = None,
    facts: CardFacts | None = None,
):
    """Write `results.json` and the model card to the output folder.

    Args:
        trainer (`Trainer`): after training.
        results (`dict`): of `summarize_run`, with what was evaluated.
        card_template (`str` or `Path`, *optional*): default: `hub_card.md`.
        dataset_name (`str`, *optional*): evaluation data, for the card. Default: that of `facts`.
        facts (`CardFacts`, *optional*): what else the card says.
    """
    folder = Path(trainer.args.output_dir)
    replace_file(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    card = build_model_card(
        card_template,
        model_name=trainer.hub_model_id or folder.resolve().name,
        config=trainer.model.config,
        results=results,
        model_class=type(trainer.model),
        dataset_name=dataset_name,
        facts=facts,
        figure=FIGURE_FILE if (folder / FIGURE_FILE).exists() else None,
    )
    replace_file(folder / CARD_FILE, card.save)


def push(trainer: Trainer):
    """Upload model, card and results to the Hub, from the main process and only with `push_to_hub`.

    `Trainer.push_to_hub` would replace the card by its own draft.
    """
    args = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero():
        return
    HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=args.output_dir,
        commit_message="End of training",
        token=args.hub_token,
        revision=args.hub_revision,
        ignore_patterns=["_*", "checkpoint-*", *NOT_SHARED],
    )


__all__ = [
    "FolderArguments",
    "RunFolder",
    "SaveError",
    "build_callbacks",
    "build_model",
    "check_model",
    "evaluate_saved_model",
    "push",
    "set_hash_tables",
    "step_of_model",
    "summarize_run",
    "train",
    "write_results",
]
