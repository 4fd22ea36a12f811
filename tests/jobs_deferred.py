"""What tests of deferral run on ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse import Communicator
from tpfuse.deferred import Deferral
from tpfuse.launch import Rank

WEIGHT = torch.linspace(-0.5, 0.5, 24)
RESIDUAL = torch.linspace(-3, 3, 120).view(5, 24)


def partials(world: int) -> list[Tensor]:
    """Every rank's partial sum, of very different scales."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 24, generator=generator) * 10.0 ** (rank - 1) for rank in range(world)]


def boundary(rank: Rank) -> dict[str, Any]:
    """The same partial sums, once normed and once reduced."""
    with Communicator() as comm, (deferral := Deferral(comm)).forward():
        normed = deferral.pending(partials(rank.world)[rank.rank], "attention").onto(RESIDUAL)
        norm = normed.norm(WEIGHT, eps=1e-5, weight_bias=1.0)
        summed = deferral.pending(partials(rank.world)[rank.rank], "mlp").onto(RESIDUAL).reduce()
        calls = {counter.route.op: counter.calls for counter in comm.report().counters}
        return {"norm": norm, "total": normed.total, "reduced": summed, "calls": calls}
