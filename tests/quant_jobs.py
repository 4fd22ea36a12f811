"""What tests of quantised outputs and of row-sharded residuals run on ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jobs
import torch
from torch import Tensor

from tpfuse import Communicator, NormOutput
from tpfuse.errors import InvalidArgument, RankMismatch
from tpfuse.launch import Rank
from tpfuse.quant import FORMATS, Format

GLOBAL = 0.3  # of whatever a format is given


@dataclass(frozen=True)
class Boundary:
    """A call of all_reduce_rms_norm: what `jobs.Case` says, and the format."""

    case: jobs.Case
    quant: str = ""
    keep_norm: bool = False
    row_sharded: bool = False


def boundary(rows: int | tuple[int, ...] = 5, **settings: Any) -> Boundary:
    """By default 256 bf16 elements and an fp32 residual."""
    own = {name: settings.pop(name) for name in ("quant", "keep_norm", "row_sharded") if name in settings}
    shape = (rows,) if isinstance(rows, int) else rows
    of_case = {"width": 256, "residual": torch.float32} | settings
    return Boundary(jobs.Case("all_reduce_rms_norm", shape, **of_case), **own)


def made(name: str) -> Format | None:
    return FORMATS[name](torch.tensor([GLOBAL])) if name else None


def apply(comm: Communicator, b: Boundary, given: jobs.Inputs) -> NormOutput:
    """The call; a row-sharded residual is made before it and gathered after it."""
    residual, layout = given.residual, "row_sharded" if b.row_sharded else "replicated"
    if b.row_sharded:
        residual = comm.shard_rows(residual)
    y = comm.all_reduce_rms_norm(
        given.x,
        given.gamma,
        residual=residual,
        eps=b.case.eps,
        quant=made(b.quant),
        keep_norm=b.keep_norm,
        residual_layout=layout,
    )
    if b.row_sharded:
        assert y.residual.shape == residual.shape
        y = y._replace(residual=comm.gather_rows(y.residual, given.x.numel() // b.case.width).view(given.x.shape))
    return y


def call(rank: Rank, b: Boundary, mode: str = "fused") -> NormOutput:
    return apply(jobs.communicator(mode), b, jobs.inputs(b.case, rank.rank, rank.world))


def run(rank: Rank, boundaries: list[Boundary], mode: str = "fused") -> list[tuple[Tensor | None, ...]]:
    return [tuple(call(rank, b, mode)) for b in boundaries]


def replicated_and_sharded(rank: Rank, boundaries: list[Boundary], mode: str) -> list[Any]:
    return [(tuple(call(rank, b, mode)), tuple(call(rank, replace(b, row_sharded=True), mode))) for b in boundaries]


def there_and_back(rank: Rank, x: Tensor) -> tuple[Tensor, Tensor]:
    """A rank's rows of x, and all of them again."""
    comm = jobs.communicator("fused")
    shard = comm.shard_rows(x)
    return shard, comm.gather_rows(shard, x.numel() // x.shape[-1])


def compiled_and_eager(rank: Rank, boundaries: list[Boundary]) -> list[Any]:
    comm, pairs = jobs.communicator("fused"), []
    for b in boundaries:
        torch.compiler.reset()
        compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
        given = jobs.inputs(b.case, rank.rank, rank.world)
        pairs.append((tuple(compiled(comm, b, given)), tuple(apply(comm, b, given))))
    return pairs


def exchanged(rank: Rank, b: Boundary) -> list[Any]:
    """What the call exchanges, and the gathering if it is row-sharded: shape and dtype of each."""
    with jobs.Exchanges() as seen:
        call(rank, b)
    return seen.data


def report(rank: Rank, b: Boundary) -> dict[str, Any]:
    """The report of a communicator that did nothing but the call, and a gathering if it is row-sharded."""
    with Communicator(mode="control", timeout=20.0) as comm:
        apply(comm, b, jobs.inputs(b.case, rank.rank, rank.world))
        return comm.report().as_dict()


def different(rank: Rank, field: str) -> str:
    """Each rank asks for something else; the message of the error."""
    one, other = {
        "quant": (boundary(quant="mxfp8"), boundary(quant="fp8_per_token")),
        "keep_norm": (boundary(quant="mxfp8"), boundary(quant="mxfp8", keep_norm=True)),
        "row_sharded": (boundary(), boundary(row_sharded=True)),
    }[field]
    try:
        call(rank, other if rank.rank else one)
    except RankMismatch as error:
        return str(error)
    return "nothing"


def shard_of_another(rank: Rank) -> str:
    """Rows that are those of another rank: 5 rows of 3 ranks are 2, 2 and 1. The message of the error."""
    comm = jobs.communicator("fused")
    x = torch.ones(5, 8)
    wrong = x[(rank.rank + 1) % 3 :: 3] if rank.rank else x[:4]
    try:
        comm.all_reduce_rms_norm(x, torch.ones(8), residual=wrong, residual_layout="row_sharded")
    except InvalidArgument as error:
        return str(error)
    return "nothing"
