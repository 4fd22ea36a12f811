"""`tpfuse check`: every op against the reference, on real ranks, over dtypes, widths, row counts and awkward values.

A case is one op, dtype and width. It makes `ROWS[-1]` rows for every rank, with very different scales per rank (a sum
that misses a rank can't pass) and special rows among them, computes the reference once for all rows, and then calls
the op on slices of every size in ROWS: the result of a row may depend neither on its neighbours nor on the batch. Every
other slice is a view into wider rows, as q and k are views of one qkv tensor.

Distances are in units of what the contract allows (docs/contract.md): for own kernels nothing, for the `collective`
backend one ulp of the result beside the rounding of fp32 sums in another order. So "1.00" is the limit everywhere.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tpfuse import reference
from tpfuse.backends.collective import first_line
from tpfuse.communicator import Communicator
from tpfuse.errors import TpfuseError
from tpfuse.launch import Rank
from tpfuse.plan import OPS

ROWS = (0, 1, 2, 3, 5, 7, 16, 33, 129, 1000)
WIDTHS = (24, 1000, 2688, 2880, 3072, 4096, 5120, 6144, 7168, 8192)
QK_WIDTHS = ((6144, 1024), (2048, 256), (72, 40))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6
FP32_NOISE = 8 * 2.0**-24  # relative; the sums and products of a norm in another order
SUBNORMAL_NOISE = 8 * 2.0**-149  # absolute: one fp32 step before the product with gamma, which may be several times 1


@dataclass(frozen=True)
class Case:
    """One line of the check. `width`: the full width of a sharded norm, H of the others; `width2`: k's of QK."""

    op: str
    dtype: torch.dtype
    width: int
    width2: int
    gamma: torch.dtype
    residual: torch.dtype | None
    weight_bias: float

    def __str__(self) -> str:
        return f"{self.op} {self.widths} {name(self.dtype)}"

    @property
    def widths(self) -> str:
        return f"{self.width}+{self.width2}" if self.width2 else f"{self.width}"


@dataclass
class Outcome:
    """What a case came to on one rank: the largest distance and where it was, or the error."""

    case: Case
    rank: int
    distance: float
    where: str
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and self.distance <= 1.0


def cases() -> list[Case]:
    """All cases; gamma's and the residual's dtype and the weight bias change from case to case."""
    gammas, residuals, biases = cycle(DTYPES), cycle((None, torch.float32, torch.bfloat16)), cycle((0.0, 1.0))
    found = []
    for op in OPS:
        for width, width2 in QK_WIDTHS if op == "qk_rms_norm" else [(width, 0) for width in WIDTHS]:
            for dtype in DTYPES:
                residual = next(residuals) if op == "all_reduce_rms_norm" else None
                found.append(Case(op, dtype, width, width2, next(gammas), residual, next(biases)))
    return found


def job(rank: Rank, mode: str, backend: str) -> tuple[list[Outcome], str]:
    """Run all cases on this rank; returns of each the worst outcome of all ranks, and the effective mode."""
    with Communicator(device=rank.device_type, mode=mode, backend=backend) as comm:
        comm.prepare()
        outcomes = []
        todo = cases()
        for done, case in enumerate(todo):
            rank.progress(done, len(todo), str(case))
            outcomes.append(run_case(comm, case))
        rank.progress(len(todo), len(todo), "done")
        return worst_of_all_ranks(outcomes), comm.report().effective_mode


def run_case(comm: Communicator, case: Case) -> Outcome:
    try:
        run = _RUNNERS[case.op]
        return run(comm, case, Inputs(case, comm.world, comm.device))
    except (TpfuseError, RuntimeError) as error:
        return Outcome(case, comm.rank, math.inf, "", f"{type(error).__name__}: {error}")


class Inputs:
    """The tensors of all ranks of a case, the same on every rank, and views of them."""

    def __init__(self, case: Case, world: int, device: torch.device) -> None:
        sharded = case.op in ("rms_norm", "qk_rms_norm")
        self.n = share(case.width, world) if sharded else case.width
        self.m = share(case.width2, world) if case.width2 else 0
        generator = torch.Generator(device).manual_seed(hash_of(case))
        self._device, self._generator = device, generator
        self.xs = [self._rows(self.n + self.m, case.dtype, 4.0**r) for r in range(world)]
        for r, x in enumerate(self.xs):
            plant_specials(x, r)
        self.weights = [self._rows(self.n + self.m, case.gamma, 1.0)[0] for _ in range(world if sharded else 1)]
        self.residual = None if case.residual is None else self._rows(self.n, case.residual, 2.0)

    def _rows(self, n: int, dtype: torch.dtype, scale: float) -> Tensor:
        """`[ROWS[-1], n]` inside wider rows."""
        wide = torch.randn(ROWS[-1], n + 8, generator=self._generator, device=self._device) * scale
        return wide.to(dtype)[:, :n]


def plant_specials(x: Tensor, rank: int) -> None:
    """Zeros, negative zeros, subnormals, huge values, infinities and NaN, each in rows of its own."""
    tiny = torch.finfo(x.dtype).smallest_normal
    huge = min(torch.finfo(x.dtype).max, 1e30) / 16
    x[4::97] = 0.0
    x[9::97] = -0.0
    x[14::97] *= tiny / 64
    x[19::97, ::2] = tiny / 2
    x[24::97, ::3] = huge
    x[29::97, 1] = math.inf
    x[34::97, 2] = math.nan
    x[39::97, 3] = math.inf if rank % 2 else -math.inf  # infinities that cancel between ranks: NaN


def slices(rows: Sequence[int] = ROWS) -> list[tuple[slice, bool]]:
    """For every row count, which rows are taken, and whether as a view of wider rows."""
    return [
        (slice((7 * i) % (ROWS[-1] - t + 1), (7 * i) % (ROWS[-1] - t + 1) + t), i % 2 == 1) for i, t in enumerate(rows)
    ]


def take(x: Tensor, rows: slice, strided: bool) -> Tensor:
    return x[rows] if strided else x[rows].contiguous()


def _rms_norm(comm: Communicator, case: Case, inputs: Inputs) -> Outcome:
    want = reference.rms_norm(inputs.xs, inputs.weights, eps=EPS, weight_bias=case.weight_bias)[comm.rank]
    worst = Worst(comm, case)
    for rows, strided in slices():
        x = take(inputs.xs[comm.rank], rows, strided)
        y = comm.rms_norm(x, inputs.weights[comm.rank], eps=EPS, weight_bias=case.weight_bias)
        worst.see("norm", y, want[rows], None, strided)
    return worst.outcome()


def _qk_rms_norm(comm: Communicator, case: Case, inputs: Inputs) -> Outcome:
    n, own = inputs.n, inputs.xs[comm.rank]
    qs, ks = [x[:, :n] for x in inputs.xs], [x[:, n:] for x in inputs.xs]
    q_weights, k_weights = [w[:n] for w in inputs.weights], [w[n:].contiguous() for w in inputs.weights]
    eps = (EPS, 10 * EPS)
    every = reference.qk_rms_norm(qs, ks, q_weights, k_weights, eps=eps, weight_bias=case.weight_bias)
    q_want, k_want = every[comm.rank]
    worst = Worst(comm, case)
    for rows, strided in slices():
        q, k = take(own[:, :n], rows, strided), take(own[:, n:], rows, strided)
        out = (q.clone(), k.clone()) if not strided else None
        q_in, k_in = out or (q, k)
        weights = q_weights[comm.rank], k_weights[comm.rank]
        y = comm.qk_rms_norm(q_in, k_in, *weights, eps=eps, weight_bias=case.weight_bias, out=out)
        worst.see("q", y[0], q_want[rows], None, strided)
        worst.see("k", y[1], k_want[rows], None, strided)
    return worst.outcome()


def _all_reduce(comm: Communicator, case: Case, inputs: Inputs) -> Outcome:
    want, slack = reference.all_reduce(inputs.xs), sum_slack(inputs.xs)
    worst = Worst(comm, case)
    for rows, strided in slices():
        y = comm.all_reduce(take(inputs.xs[comm.rank], rows, strided))
        worst.see("sum", y, want[rows], slack[rows], strided)
        worst.same_on_all_ranks("sum", y)
    return worst.outcome()


def _all_reduce_rms_norm(comm: Communicator, case: Case, inputs: Inputs) -> Outcome:
    weight, residual = inputs.weights[0], inputs.residual
    want = reference.all_reduce_rms_norm(inputs.xs, weight, residual=residual, eps=EPS, weight_bias=case.weight_bias)
    total = reference.all_reduce(inputs.xs)
    moved = sum_slack(inputs.xs) + (ulp(total) if comm.world > 2 else 0.0)
    r = total.float() if residual is None else total.float() + residual.float()
    assert want.norm is not None
    slack = norm_slack(moved, r, weight.float() + case.weight_bias, want.norm)
    worst = Worst(comm, case)
    for rows, strided in slices():
        x = take(inputs.xs[comm.rank], rows, strided)
        given = None if residual is None else take(residual, rows, strided)
        y = comm.all_reduce_rms_norm(x, weight, residual=given, eps=EPS, weight_bias=case.weight_bias)
        assert y.norm is not None
        worst.see("norm", y.norm, want.norm[rows], slack[rows], strided)
        worst.same_on_all_ranks("norm", y.norm)
        if y.residual is not None and want.residual is not None:
            worst.see("residual", y.residual, want.residual[rows], moved[rows], strided)
            worst.same_on_all_ranks("residual", y.residual)
    return worst.outcome()


_RUNNERS = {
    "rms_norm": _rms_norm,
    "qk_rms_norm": _qk_rms_norm,
    "all_reduce": _all_reduce,
    "all_reduce_rms_norm": _all_reduce_rms_norm,
}


class Worst:
    """Collects the largest distance of a case."""

    def __init__(self, comm: Communicator, case: Case) -> None:
        self._comm, self._case = comm, case
        self._distance, self._where = 0.0, ""

    def see(self, what: str, got: Tensor, want: Tensor, slack: Tensor | None, strided: bool) -> None:
        exact = self._comm.plan.route(self._case.op, got.shape[0]).backend != "collective"
        found = distance(got, want, slack, exact=exact)
        if found > self._distance:
            layout = "strided" if strided else "contiguous"
            self._distance, self._where = found, f"{what}, {got.shape[0]} rows, {layout}"

    def same_on_all_ranks(self, what: str, y: Tensor) -> None:
        """Compare a checksum of the bits of y with the other ranks'."""
        if not y.numel():
            return
        bits = y.contiguous().view(torch.int16 if y.element_size() == 2 else torch.int32).to(torch.int64)
        weights = torch.arange(1, bits.numel() + 1, device=bits.device)
        own = (bits.flatten() * weights).sum().reshape(1)
        every = [torch.empty_like(own) for _ in range(self._comm.world)]
        dist.all_gather(every, own, group=self._comm.group)
        if any(not torch.equal(other, own) for other in every):
            self._distance, self._where = math.inf, f"{what}, {y.shape[0]} rows: ranks differ"

    def outcome(self) -> Outcome:
        return Outcome(self._case, self._comm.rank, self._distance, self._where)


def sum_slack(xs: Sequence[Tensor]) -> Tensor:
    """What fp32 additions in another order may change: (W-1) 2^-24 sum |x_r|."""
    return torch.stack([x.double().abs() for x in xs]).sum(0) * ((len(xs) - 1) * 2.0**-24)


def norm_slack(moved: Tensor, r: Tensor, gamma: Tensor, y: Tensor) -> Tensor:
    """What a norm y of r may change when r is `moved` by that much: directly, and through the root mean square."""
    square = r.double().square()
    inverse = (square.mean(-1, keepdim=True) + EPS).rsqrt()
    lost = (moved.square().sum(-1, keepdim=True) / square.sum(-1, keepdim=True)).sqrt()
    return moved * inverse * gamma.abs() + y.double().abs() * torch.nan_to_num(lost)


def ulp(x: Tensor) -> Tensor:
    """Distance of neighbouring values of x's dtype at x, as fp64; subnormals included."""
    info = torch.finfo(x.dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.smallest_normal))
    return info.eps * torch.exp2((exponent - 1).double())


def distance(got: Tensor, want: Tensor, slack: Tensor | None, *, exact: bool) -> float:
    """Largest |got - want| in units of what is allowed, or infinity.

    exact: nothing is allowed. Else: one ulp, FP32_NOISE of the value for fp32 arithmetic in another order, and `slack`.
    NaN must stand where NaN stands; the sign of a zero is free.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    differs = ~((got == want) | (got.isnan() & want.isnan()))
    if not bool(differs.any()):
        return 0.0
    a, b = got[differs].double(), want[differs].double()
    if exact or not bool((a.isfinite() & b.isfinite()).all()):
        return math.inf
    allowed = ulp(want[differs]) + FP32_NOISE * b.abs() + SUBNORMAL_NOISE + (0.0 if slack is None else slack[differs])
    return float(torch.nan_to_num((a - b).abs() / allowed, nan=math.inf).max())


def share(width: int, world: int) -> int:
    """A rank's part of a width, rounded up to whole 8 elements where it does not come out even."""
    return width // world if width % world == 0 else math.ceil(width / world / 8) * 8


def hash_of(case: Case) -> int:
    """A seed that is the same in every process."""
    return zlib.crc32(str(case).encode())


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def worst_of_all_ranks(own: Sequence[Outcome]) -> list[Outcome]:
    """Collective. Where the other ranks' outcomes don't come, this rank's own, the last one as failed."""
    every: list[Sequence[Outcome]] = [own] * dist.get_world_size()
    try:
        dist.all_gather_object(every, own)
    except RuntimeError as error:
        lost = f"the outcomes of the other ranks did not come: {first_line(error)}"
        return [*own[:-1], replace(own[-1], distance=math.inf, error=own[-1].error or lost)]
    return merge(every)


def merge(per_rank: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """For every case the worst of these ranks'."""
    return [max(same, key=lambda o: (not o.ok, o.distance)) for same in zip(*per_rank, strict=True)]


def show(console: Console, outcomes: Sequence[Outcome], title: str) -> None:
    """Print a line for each op and dtype, the widths, every failure, and what all came to."""
    table = Table(title=title)
    for column in ("op", "dtype", "widths", "worst", "result"):
        table.add_column(column, justify="right" if column == "worst" else "left", overflow="fold")
    ops_of: dict[str, list[str]] = {}  # by their widths
    for op in OPS:
        every = [o.case.widths for o in outcomes if o.case.op == op and o.case.dtype == DTYPES[0]]
        ops_of.setdefault(", ".join(every), []).append(op)
        for dtype in DTYPES:
            group = [o for o in outcomes if o.case.op == op and o.case.dtype == dtype]
            bad = sum(not o.ok for o in group)
            verdict = f"[red]{bad} failed[/]" if bad else "[green]ok[/]"
            table.add_row(op, name(dtype), span(group), compact(max(o.distance for o in group)), verdict)
    console.print(table)
    for widths, ops in ops_of.items():
        console.print(f"widths of {', '.join(ops)}: {widths}", highlight=False)
    failed = [o for o in outcomes if not o.ok]
    for o in failed:
        what = o.error or f"{compact(o.distance)} of the allowed distance at {o.where}"
        console.print(f"[red]failed[/] {o.case} on rank {o.rank}: {escape(what)}")
    console.print(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} cases passed; each over {len(ROWS)} row counts "
        f"from {ROWS[0]} to {ROWS[-1]}, contiguous and strided. "
        "worst: 1.00 is what the contract allows, 0.00 is bit for bit."
    )


def span(outcomes: Sequence[Outcome]) -> str:
    """The narrowest and the widest case."""
    rising = sorted((o.case for o in outcomes), key=lambda case: case.width)
    return rising[0].widths if len(rising) == 1 else f"{rising[0].widths} to {rising[-1].widths}"


def compact(distance: float) -> str:
    return f"{distance:.2f}" if distance < 1000 else f"{distance:.1e}"
