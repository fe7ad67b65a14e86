# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What several processes that train one model have to agree on."""

import torch.distributed as dist

from modeling_stablemoe.model.losses_stablemoe import is_distributed
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin


def check_same_routing(model: TwoStageRoutingMixin, moment: str):
    """Check that all processes are in the same stage and, when it is frozen, hold the same routing.

    Every process must call this; each gets the same answer. The error says at which `moment`: "at the transition", say.

    Raises:
        ValueError: naming the ranks whose routing is not that of rank 0.
    """
    if not is_distributed():
        return
    fingerprints: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(fingerprints, model.router_fingerprint())
    differing = {rank: own for rank, own in enumerate(fingerprints) if own != fingerprints[0]}
    if differing:
        ranks = ", ".join(f"rank {rank} has {_describe(own)}" for rank, own in differing.items())
        raise ValueError(
            f"The processes do not route alike {moment}: rank 0 has {_describe(fingerprints[0])}, {ranks}. Their weights "
            "have parted: resume from the last checkpoint, with the same versions and kind of device on all ranks, and "
            "change weights, if at all, on all ranks alike."
        )


def _describe(fingerprint: str | None) -> str:
    return "a routing that is still learned" if fingerprint is None else f"the frozen routing {fingerprint[:12]}..."


__all__ = ["check_same_routing"]
