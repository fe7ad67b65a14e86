# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""How much the routing of a model depends on how it is run: two ways of running it, the same tokens.

Shape suffixes: L layers with experts, B sequences, S tokens of a sequence, T tokens, K experts of a token, P predictions,
V vocabulary.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from modeling_stablemoe.measure.report import format_table
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin

from .installing import facts_of, install_tables, learned_layers, load_tables, remove_tables
from .making import count_routes, make_tables
from .recording import RoutedPass, RouteRecorder, choosers_of


# Tokens whose distributions over the vocabulary are compared at a time.
COMPARED_AT_ONCE = 256
# Tokens of a page of the key/value cache, which continuous batching hands out as a whole.
PAGE_SIZE = 256


@dataclass(frozen=True)
class PairMismatch:
    """How two ways of running a model differ on the same tokens.

    Attributes:
        pair (`str`): key of `PAIRS`.
        ways (`str`): the two, in words.
        tokens (`int`): that were routed.
        differing_tokens (`int`): those whose experts differ in at least one layer, in whatever order a layer names them.
        differing_choices (`float`): share of all pairs of token and layer whose experts differ, in [0, 1].
        kl (`float`): mean divergence of the second's next-token distributions from the first's, in nats.
        reason (`str`, *optional*): why the model cannot be run in one of the ways; the numbers are 0 then.
    """

    pair: str
    ways: str
    tokens: int = 0
    differing_tokens: int = 0
    differing_choices: float = 0.0
    kl: float = 0.0
    reason: str | None = None


class _Seen(NamedTuple):
    """What one way of running a model has made of tokens."""

    routes_LTK: Tensor
    logits_PV: Tensor


def _forward(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None = None) -> _Seen:
    """Run whole sequences without a cache; padding is left out of what was seen."""
    passes: list[RoutedPass] = []
    with RouteRecorder(model, passes.append):
        logits = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
    is_real = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
    return _Seen(passes[-1].routes[:, is_real], logits[is_real])


def _dtypes(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[tuple[_Seen, _Seen]]:
    first, second = (
        model if model.dtype == dtype else copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    for ids_BS in batches:
        yield _forward(first, ids_BS), _forward(second, ids_BS)


def _batches(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[tuple[_Seen, _Seen]]:
    for ids_BS in batches:
        size, length = ids_BS.shape
        # From half as long to as long as they are.
        start_B = torch.arange(size, device=ids_BS.device) * (length // 2) // size
        mask_BS = (torch.arange(length, device=ids_BS.device) >= start_B.unsqueeze(-1)).long()
        alone = [_forward(model, ids_BS[row : row + 1, start:]) for row, start in enumerate(start_B.tolist())]
        first = _Seen(torch.cat([each.routes_LTK for each in alone], 1), torch.cat([each.logits_PV for each in alone]))
        yield first, _forward(model, ids_BS, mask_BS)


def _experts(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[tuple[_Seen, _Seen]]:
    before = model.get_experts_implementation()
    try:
        for ids_BS in batches:
            seen = []
            for implementation in ("eager", "grouped_mm"):
                model.set_experts_implementation(implementation)
                if model.get_experts_implementation()[""] != implementation:
                    raise ValueError(
                        f"The experts of a {type(model).__name__} have no implementation {implementation!r}."
                    )
                seen.append(_forward(model, ids_BS))
            yield seen[0], seen[1]
    finally:
        model.set_experts_implementation(before)


def _sampling(num_tokens: int, **options) -> GenerationConfig:
    """Sample from the model's own distribution, as many tokens for each sequence."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=num_tokens,
        eos_token_id=-1,
        pad_token_id=0,
        **options,
    )


def _generated(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[tuple[_Seen, _Seen]]:
    for ids_BS in batches:
        num_given = ids_BS.shape[1] // 2
        prompt = ids_BS[:, :num_given]
        options = _sampling(ids_BS.shape[1] - num_given, return_dict_in_generate=True, output_logits=True)
        passes: list[RoutedPass] = []
        with RouteRecorder(model, passes.append):
            outputs = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)
        routes_LBSK = torch.cat([each.routes for each in passes], dim=2)
        logits_BPV = torch.stack(outputs.logits, dim=1)
        again = _forward(model, outputs.sequences[:, :-1])
        logits_BSV = again.logits_PV.view(len(ids_BS), -1, logits_BPV.shape[-1])
        first = _Seen(routes_LBSK.flatten(1, 2), logits_BPV.flatten(0, 1))
        yield first, again._replace(logits_PV=logits_BSV[:, num_given - 1 :].flatten(0, 1))


class _Chunk(NamedTuple):
    """Tokens of one sequence in a pass."""

    position: int  # of the first
    ids: list[int]
    routes_LTK: Tensor
    logits_V: Tensor | None  # of the last, where a token is sampled from them


class _InFlight:
    """The passes of continuous batching: chunks of several sequences in one row.

    A chunk does not say which sequence it is of. It is found by its position and its tokens, once these are known.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.chunks: list[_Chunk] = []
        self._passes: list[RoutedPass] = []

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Generate; return prompts with what follows."""
        length = max(map(len, prompts)) + num_tokens
        options = ContinuousBatchingConfig(
            num_blocks=2 * len(prompts) * (length // PAGE_SIZE + 1),
            max_batch_tokens=max(sum(map(len, prompts)), PAGE_SIZE),  # so that all prompts are read in one pass
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,  # which would be replayed past the hooks
        )
        attention = self.model.config._attn_implementation
        handle = self.model.register_forward_hook(self._take_apart, with_kwargs=True)
        try:
            with RouteRecorder(self.model, self._passes.append):
                outputs = self.model.generate_batch(
                    prompts,
                    generation_config=_sampling(num_tokens),
                    continuous_batching_config=options,
                    progress_bar=False,
                )
        finally:
            handle.remove()
            self.model.set_attn_implementation(attention)  # which a run that fails leaves as it needs it
        outputs = list(outputs.values())
        failed = next((each.error for each in outputs if each.error), None)
        if failed is not None or len(outputs) != len(prompts):
            raise ValueError(f"`generate_batch` failed: {failed or 'no result'}")
        return [prompt + output.generated_tokens for prompt, output in zip(prompts, outputs, strict=True)]

    def _take_apart(self, model, args: tuple, kwargs: dict, output):
        """Note the chunks of a pass; the arguments are written over by the next one."""
        routed = self._passes.pop()
        ends, last = kwargs["cu_seq_lens_q"].tolist(), kwargs["logits_indices"].tolist()
        logits_PV = output.logits[0] if output.logits.shape[1] == len(last) else output.logits[0, last]
        for start, end in zip(ends, ends[1:], strict=False):
            if start < end:
                ids = routed.input_ids[0, start:end].tolist()
                logits = logits_PV[last.index(end - 1)] if end - 1 in last else None
                position = int(kwargs["position_ids"][0, start])
                self.chunks.append(_Chunk(position, ids, routed.routes[:, 0, start:end], logits))

    def assemble(self, sequences: list[list[int]]) -> list[_Seen]:
        """Return what was seen of each sequence, without its last token, which no pass has read."""
        done = [0] * len(sequences)
        routes: list[list[Tensor]] = [[] for _ in sequences]
        logits: list[list[Tensor]] = [[] for _ in sequences]
        for chunk in self.chunks:
            start, end = chunk.position, chunk.position + len(chunk.ids)
            fitting = [row for row, ids in enumerate(sequences) if done[row] == start and ids[start:end] == chunk.ids]
            if len(fitting) != 1:
                raise ValueError(
                    f"Tokens at position {start} fit {len(fitting)} sequences: they cannot be told apart."
                )
            (row,) = fitting
            done[row] = end
            routes[row].append(chunk.routes_LTK)
            if chunk.logits_V is not None:
                logits[row].append(chunk.logits_V)
        return [
            _Seen(torch.cat(of_routes, 1), torch.stack(of_logits))
            for of_routes, of_logits in zip(routes, logits, strict=True)
        ]


def _continuous(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[tuple[_Seen, _Seen]]:
    for ids_BS in batches:
        num_given = ids_BS.shape[1] // 2
        for part in ids_BS.split(num_given):
            # All of different lengths, so that no two sequences are ever at the same position.
            prompts = [ids[: num_given - row] for row, ids in enumerate(part.tolist())]
            flight = _InFlight(model)
            sequences = flight.generate(prompts, ids_BS.shape[1] - num_given)
            for prompt, sequence, first in zip(prompts, sequences, flight.assemble(sequences), strict=True):
                again = _forward(model, torch.tensor([sequence[:-1]], device=ids_BS.device))
                yield first, again._replace(logits_PV=again.logits_PV[len(prompt) - 1 :])


class _Pair(NamedTuple):
    ways: str
    run: Callable[[PreTrainedModel, Sequence[Tensor]], Iterator[tuple[_Seen, _Seen]]]


PAIRS = {
    "dtype": _Pair("float32 / bfloat16", _dtypes),
    "batch": _Pair("alone / in a padded batch", _batches),
    "experts": _Pair("eager / grouped_mm experts", _experts),
    "generate": _Pair("generate / forward", _generated),
    "continuous": _Pair("continuous batching / forward", _continuous),
}


@torch.no_grad()
def measure_mismatch(
    model: PreTrainedModel,
    sequences: Tensor,
    pairs: Sequence[str] | None = None,
    batch_size: int = 32,
    show_progress: bool = False,
) -> list[PairMismatch]:
    """Run a model in eval mode in two ways on the same tokens, and compare experts and predictions; pair by pair.

    - `dtype`: weights in float32, in bfloat16.
    - `batch`: each sequence alone, and as many as `batch_size` together, of different lengths, padded on the left.
    - `experts`: `experts_implementation` "eager", "grouped_mm".
    - `generate`: the second half of the sequences is sampled with a cache; the whole is run again in one pass. Predictions are
      those that were sampled from.
    - `continuous`: the same with `generate_batch`, which schedules sequences of different lengths.

    What is not said of dtype, attention and experts is as the model has it. Afterwards the model is as it was.

    Args:
        model (`PreTrainedModel`): a decoder of transformers with experts, or a StableMoE, with a language head.
        sequences (`torch.LongTensor` of shape `(sequences, tokens)`): at least 4 tokens of each.
        pairs (sequence of `str`, *optional*): keys of `PAIRS`. Default: all.
        batch_size (`int`): sequences of a pass.
        show_progress (`bool`): show a progress bar.

    Returns:
        `list[PairMismatch]`: one per pair. Where the model cannot be run in a way, the reason is in place of the numbers.

    Raises:
        ValueError: for a pair that there is not, sequences too short, or a model without experts or with an encoder.
    """
    pairs = list(PAIRS if pairs is None else pairs)
    unknown = [pair for pair in pairs if pair not in PAIRS]
    if unknown:
        raise ValueError(f"There is no pair {unknown[0]!r}; choose of {', '.join(PAIRS)}.")
    if sequences.dim() != 2 or sequences.shape[1] < 4 or not len(sequences):
        raise ValueError(
            f"`sequences` is of shape {tuple(sequences.shape)}; pass (sequences, tokens), 4 tokens or more."
        )
    choosers_of(model)  # refuses what cannot be recorded
    batches = sequences.to(model.device).split(batch_size)
    was_training, asked_for_balance = model.training, getattr(model.config, "output_router_logits", False)
    model.eval()
    if asked_for_balance:  # no loss is looked at, and continuous batching cannot compute this one
        model.config.output_router_logits = False
    measured = []
    with tqdm(pairs, desc="Running", unit=" pairs", disable=not show_progress) as progress, torch.random.fork_rng():
        for pair in progress:
            progress.set_postfix_str(PAIRS[pair].ways)
            torch.manual_seed(0)
            try:
                measured.append(_compare(pair, PAIRS[pair].run(model, batches)))
            except (ValueError, TypeError, RuntimeError) as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                measured.append(PairMismatch(pair, PAIRS[pair].ways, reason=reason))
    model.train(was_training)
    if asked_for_balance:
        model.config.output_router_logits = True
    return measured


def _compare(pair: str, runs: Iterator[tuple[_Seen, _Seen]]) -> PairMismatch:
    tokens = differing = choices = predictions = num_layers = 0
    divergence = 0.0
    for first, second in runs:
        differs_LT = (first.routes_LTK != second.routes_LTK).any(-1)
        num_layers = len(differs_LT)
        tokens += differs_LT.shape[1]
        differing += int(differs_LT.any(0).sum())
        choices += int(differs_LT.sum())
        predictions += len(first.logits_PV)
        divergence += _divergence(first.logits_PV, second.logits_PV)
    return PairMismatch(
        pair, PAIRS[pair].ways, tokens, differing, choices / (tokens * num_layers), divergence / predictions
    )


def _divergence(first_PV: Tensor, second_PV: Tensor) -> float:
    """Sum the Kullback-Leibler divergences KL(first || second) of the softmaxes of logits, in nats."""
    total = 0.0
    for first, second in zip(first_PV.split(COMPARED_AT_ONCE), second_PV.split(COMPARED_AT_ONCE), strict=True):
        log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return total


def compare_routings(
    model: PreTrainedModel,
    sequences: Tensor,
    pairs: Sequence[str] | None = None,
    batch_size: int = 32,
    tables: str | Path | None = None,
    show_progress: bool = False,
) -> dict[str, list[PairMismatch]]:
    """Measure the mismatch of a model as it is, and again with its routing frozen, which it is afterwards.

    A StableMoE in stage 1 is frozen by `freeze_router()`; layers of other models that route by a learned choice get tables: those of
    `tables`, and where that has none, of the routes that `sequences` take, within 1.2 mean loads per expert.

    Args:
        model (`PreTrainedModel`): as of `measure_mismatch`.
        sequences (`torch.LongTensor` of shape `(sequences, tokens)`): as there.
        pairs (sequence of `str`, *optional*): as there.
        batch_size (`int`): as there.
        tables (`str` or `Path`, *optional*): a folder or file of `save_tables`, for a model that is not a StableMoE.
        show_progress (`bool`): show progress bars.

    Returns:
        `dict[str, list[PairMismatch]]`: under "learned", unless the routing is frozen already, and under "frozen"; of a routing that
        cannot be frozen with the reason in place of the numbers.

    Raises:
        ValueError: as `measure_mismatch`, and for tables that do not fit, or with a StableMoE.
    """
    is_stable = isinstance(model, TwoStageRoutingMixin)
    if tables is not None and is_stable:
        raise ValueError(
            "`tables` are for other models: a StableMoE has its own (`freeze_router()`, `set_routing_tables()`)."
        )
    if tables is not None:  # an error now, not after the first half
        load_tables(model, tables)
        remove_tables(model)
    options = (sequences, pairs, batch_size, show_progress)
    if (model.routing_stage == 2) if is_stable else not learned_layers(model):
        return {"frozen": measure_mismatch(model, *options)}
    measured = {"learned": measure_mismatch(model, *options)}
    try:
        if is_stable:
            model.require_distillation()
        else:
            list(map(partial(facts_of, model), learned_layers(model)))
    except ValueError as error:
        frozen = [PairMismatch(each.pair, each.ways, reason=str(error)) for each in measured["learned"]]
    else:
        model.freeze_router() if is_stable else _freeze(model, sequences, batch_size, tables, show_progress)
        frozen = measure_mismatch(model, *options)
    return measured | {"frozen": frozen}


def _freeze(
    model: PreTrainedModel, sequences: Tensor, batch_size: int, tables: str | Path | None, show_progress: bool
):
    """Install tables in all layers that route by a learned choice."""
    if tables is not None:
        load_tables(model, tables)
    layers = learned_layers(model)
    if layers:
        batches = [{"input_ids": ids_BS} for ids_BS in sequences.split(batch_size)]
        counts = count_routes(model, batches, layers, show_progress=show_progress)
        install_tables(model, make_tables(counts, max_load=1.2, show_progress=show_progress).tables, layers)


def format_mismatch(measured: dict[str, list[PairMismatch]]) -> str:
    """Format what was measured as a Markdown table, one row per routing and pair, and the reasons under it.

    Args:
        measured (`dict[str, list[PairMismatch]]`): of `compare_routings`.

    Returns:
        `str`: Markdown without a newline at the end.
    """
    rows = [
        {
            "routing": routing,
            "ways": each.ways,
            "tokens": None if each.reason else f"{each.tokens:,}",
            "differing": None
            if each.reason
            else f"{each.differing_tokens:,} ({each.differing_tokens / each.tokens:.2%})",
            "choices": None if each.reason else f"{each.differing_choices:.2%}",
            "kl": None if each.reason else f"{each.kl:.2g}",
        }
        for routing, pairs in measured.items()
        for each in pairs
    ]
    headings = {
        "routing": "routing",
        "ways": "two ways of running it",
        "tokens": "tokens",
        "differing": "other experts in some layer",
        "choices": "in a layer",
        "kl": "KL of predictions, nats",
    }
    lines = []
    for routing, pairs in measured.items():
        for reason in dict.fromkeys(each.reason for each in pairs if each.reason):
            ways = [each.ways for each in pairs if each.reason == reason]
            which = routing if len(ways) == len(pairs) else f"{routing}, {'; '.join(ways)}"
            lines.append(f"\nNot measured ({which}): {reason}")
    return "\n".join([format_table(rows, headings), *lines])


def mismatch_json(measured: dict[str, list[PairMismatch]]) -> str:
    """Write what was measured as JSON, with all numbers under their names.

    Args:
        measured (`dict[str, list[PairMismatch]]`): of `compare_routings`.

    Returns:
        `str`: one object of lists of objects.
    """
    return json.dumps({routing: list(map(asdict, pairs)) for routing, pairs in measured.items()}, indent=2) + "\n"


__all__ = [
    "PAIRS",
    "PairMismatch",
    "compare_routings",
    "format_mismatch",
    "measure_mismatch",
    "mismatch_json",
]
