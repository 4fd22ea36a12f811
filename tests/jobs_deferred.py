"""What tests of deferral run on ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse import Communicator
from tpfuse.deferred import Deferral
from tpfuse.launch import Rank
from tpfuse.quant import FP8PerToken
from tpfuse.reference import NormOutput

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


def quantised_boundary(rank: Rank) -> tuple[NormOutput, NormOutput]:
    """The same boundary, deferred and called: FP8 by token, the residual sharded by rows."""
    with Communicator() as comm, (deferral := Deferral(comm)).forward():
        own = comm.shard_rows(RESIDUAL)
        partial = partials(rank.world)[rank.rank]
        pending = deferral.pending(partial, "attention").onto(own)
        how = {"eps": 1e-5, "weight_bias": 1.0, "quant": FP8PerToken(), "residual_layout": "row_sharded"}
        deferred = pending.boundary(WEIGHT, **how)
        assert pending.total is deferred.residual
        return deferred, comm.all_reduce_rms_norm(partial, WEIGHT, residual=own, **how)
