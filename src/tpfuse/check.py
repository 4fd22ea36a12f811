"""`tpfuse check`: every op against the reference, on real ranks, over dtypes, widths, row counts and awkward values.

A case is one op, dtype and width. It makes `ROWS[-1]` rows for every rank, with very different scales per rank (a sum
that misses a rank can't pass) and special rows among them, computes the reference once for all rows, and then calls
the op on slices of every size in ROWS: the result of a row may depend neither on its neighbours nor on the batch. Every
other slice is a view into wider rows, as q and k are views of one qkv tensor. Cases of a variant (a rotation, a
quantised output, a residual that is sharded by rows) have it in their name.

Distances are in units of what the contract allows (docs/contract.md): for own kernels nothing, for the `collective`
backend one ulp of the result beside the rounding of fp32 sums in another order. So "1.00" is the limit everywhere.
A quantised output must be that of the returned norm, bit for bit, on every backend.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tpfuse import reference
from tpfuse.communicator import Communicator
from tpfuse.errors import TpfuseError, first_line
from tpfuse.launch import Rank
from tpfuse.plan import OPS
from tpfuse.quant import FORMATS, Format, named
from tpfuse.reference import NormOutput
from tpfuse.rope import Rope, rotate

ROWS = (0, 1, 2, 3, 5, 7, 16, 33, 129, 1000)
LAYOUTS = ("batched", "strided", "contiguous")
WIDTHS = (24, 1000, 2688, 2880, 3072, 4096, 5120, 6144, 7168, 8192)
QK_WIDTHS = ((6144, 1024), (2048, 256), (72, 40))
QUANT_WIDTHS = (384, 2048, 2688)
EXPERTS = ((8, "", False), (1, "", False), (3, "fp8_per_token", False), (10, "", True))  # top_k, quant, row_sharded
GIVEN = {"fp8_static": 0.07, "nvfp4": 448 * 6 / 32.0}  # what a format is given: a scale, a global scale
POSITIONS = 4096
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
    rope: str = ""  # "halves" or "neighbours": which elements are a pair
    quant: str = ""  # a key of FORMATS
    row_sharded: bool = False
    top_k: int | None = None  # of x [T, top_k, n], outputs of experts

    def __str__(self) -> str:
        return " ".join((self.op, self.widths, name(self.dtype), *self.variants))

    @property
    def variants(self) -> tuple[str, ...]:
        experts = f"experts-{self.top_k}" if self.top_k else ""
        rope, rows = f"rope-of-{self.rope}" if self.rope else "", "row-sharded" if self.row_sharded else ""
        parts = (rope, self.quant, rows, experts)
        return tuple(part for part in parts if part)

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
    return [*found, *variants()]


def variants() -> list[Case]:
    """Each rotation for each pair of widths; each format, and none, with the residual replicated and sharded; sums over
    experts."""
    gammas, dtypes, widths = cycle(DTYPES), cycle(DTYPES), cycle(QUANT_WIDTHS)
    residuals, biases = cycle((torch.float32, torch.bfloat16)), cycle((0.0, 1.0))
    found = [
        Case("qk_rms_norm", next(dtypes), *both, next(gammas), None, next(biases), rope=rope)
        for both, rope in product(QK_WIDTHS, ("halves", "neighbours"))
    ]
    for row_sharded, quant in product((False, True), ("", *FORMATS)):
        if quant or row_sharded:
            settings = (next(dtypes), next(widths), 0, next(gammas), next(residuals), next(biases))
            found.append(Case("all_reduce_rms_norm", *settings, quant=quant, row_sharded=row_sharded))
    for top_k, quant, row_sharded in EXPERTS:
        settings = (next(dtypes), next(widths), 0, next(gammas), next(residuals), next(biases))
        found.append(Case("all_reduce_rms_norm", *settings, quant=quant, row_sharded=row_sharded, top_k=top_k))
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
        self.device, self._generator = device, generator
        terms = () if case.top_k is None else (case.top_k,)
        self.xs = [self._rows(self.n + self.m, case.dtype, 4.0**r, terms) for r in range(world)]
        for r, x in enumerate(self.xs):
            plant_specials(x, r)
        self.weights = [self._rows(self.n + self.m, case.gamma, 1.0)[0] for _ in range(world if sharded else 1)]
        self.residual = None if case.residual is None else self._rows(self.n, case.residual, 2.0)

    def _rows(self, n: int, dtype: torch.dtype, scale: float, terms: tuple[int, ...] = ()) -> Tensor:
        """`[ROWS[-1], *terms, n]` inside wider rows."""
        wide = torch.randn(ROWS[-1], *terms, n + 8, generator=self._generator, device=self.device) * scale
        return wide.to(dtype)[..., :n]


def plant_specials(x: Tensor, rank: int) -> None:
    """Zeros, negative zeros, subnormals, huge values, infinities and NaN, each in rows of its own."""
    tiny = torch.finfo(x.dtype).smallest_normal
    huge = min(torch.finfo(x.dtype).max, 1e30) / 16
    x[4::97] = 0.0
    x[9::97] = -0.0
    x[14::97] *= tiny / 64
    x[19::97, ..., ::2] = tiny / 2
    x[24::97, ..., ::3] = huge
    x[29::97, ..., 1] = math.inf
    x[34::97, ..., 2] = math.nan
    x[39::97, ..., 3] = math.inf if rank % 2 else -math.inf  # infinities that cancel between ranks: NaN


def slices(rows: Sequence[int] = ROWS) -> list[tuple[slice, str]]:
    """For every row count, which rows are taken, and in which of LAYOUTS."""
    starts = [(7 * i) % (ROWS[-1] - t + 1) for i, t in enumerate(rows)]
    return [(slice(s, s + t), LAYOUTS[i % len(LAYOUTS)]) for i, (s, t) in enumerate(zip(starts, rows, strict=True))]


def take(x: Tensor, rows: slice, layout: str) -> Tensor:
    """These rows: a view of wider ones, a copy `[T, ..., n]`, or a copy `[batch, T / batch, ..., n]`, as models have
    it."""
    taken = x[rows]
    if layout == "strided":
        return taken
    if layout == "contiguous":
        return taken.contiguous()
    batch = 1 if taken.shape[0] % 2 else 2
    return taken.contiguous().view(batch, taken.shape[0] // batch, *taken.shape[1:])


def _rms_norm(comm: Communicator, case: Case, inputs: Inputs) -> Outcome:
    want = reference.rms_norm(inputs.xs, inputs.weights, eps=EPS, weight_bias=case.weight_bias)[comm.rank]
    worst = Worst(comm, case)
    for rows, layout in slices():
        x = take(inputs.xs[comm.rank], rows, layout)
        y = comm.rms_norm(x, inputs.weights[comm.rank], eps=EPS, weight_bias=case.weight_bias)
        worst.called()
        worst.see("norm", y, want[rows], None, layout)
    return worst.outcome()


def _qk_rms_norm(comm: Communicator, case: Case, inputs: Inputs) -> Outcome:
    n, own = inputs.n, inputs.xs[comm.rank]
    qs, ks = [x[:, :n] for x in inputs.xs], [x[:, n:] for x in inputs.xs]
    q_weights, k_weights = [w[:n] for w in inputs.weights], [w[n:].contiguous() for w in inputs.weights]
    eps = (EPS, 10 * EPS)
    rope = rotation(case, inputs) if case.rope else None
    q_want, k_want = reference.qk_rms_norm(
        qs, ks, q_weights, k_weights, eps=eps, weight_bias=case.weight_bias, rope=rope
    )[comm.rank]
    q_slack: Tensor | None = None
    k_slack: Tensor | None = None
    if rope is not None:
        wide_q, wide_k = [q.float() for q in qs], [k.float() for k in ks]
        unturned = reference.qk_rms_norm(wide_q, wide_k, q_weights, k_weights, eps=eps, weight_bias=case.weight_bias)
        q_slack, k_slack = (rope_slack(y, rope) for y in unturned[comm.rank])
    worst = Worst(comm, case)
    for rows, layout in slices():
        q, k = take(own[:, :n], rows, layout), take(own[:, n:], rows, layout)
        out = (q.clone(), k.clone()) if layout != "strided" else None
        q_in, k_in = out or (q, k)
        weights = q_weights[comm.rank], k_weights[comm.rank]
        turn = None if rope is None else replace(rope, positions=rope.positions[rows])
        y = comm.qk_rms_norm(q_in, k_in, *weights, eps=eps, weight_bias=case.weight_bias, rope=turn, out=out)
        worst.called()
        worst.see("q", y[0], q_want[rows], of(q_slack, rows), layout)
        worst.see("k", y[1], k_want[rows], of(k_slack, rows), layout)
    return worst.outcome()


def rotation(case: Case, inputs: Inputs) -> Rope:
    """Heads as large as the widths allow, positions in no order; the last element pairs of a large head stay."""
    head = math.gcd(inputs.n, inputs.m, 128)
    turned = head // 2 if head >= 64 and case.rope == "neighbours" else head
    generator = torch.Generator().manual_seed(hash_of(case))
    angles = torch.arange(POSITIONS).unsqueeze(-1) * 10000.0 ** (-torch.arange(0, turned, 2) / turned)
    positions = torch.randint(POSITIONS, (ROWS[-1],), generator=generator)
    cos, sin, positions = (t.to(inputs.device) for t in (angles.cos(), angles.sin(), positions))
    return Rope(cos, sin, positions, head_dim=head, rotary_dim=turned, interleaved=case.rope == "neighbours")


def rope_slack(y: Tensor, rope: Rope) -> Tensor:
    """What a rotation makes of FP32_NOISE in what it is given: the two products may cancel, their errors don't."""
    nothing = torch.zeros_like(rope.cos)
    cosines = replace(rope, cos=rope.cos.abs(), sin=nothing)
    sines = replace(rope, cos=nothing, sin=rope.sin.abs())
    return FP32_NOISE * (rotate(y.abs(), cosines).double() + rotate(y.abs(), sines).double().abs())


def of(slack: Tensor | None, rows: slice) -> Tensor | None:
    return None if slack is None else slack[rows]


def _all_reduce(comm: Communicator, case: Case, inputs: Inputs) -> Outcome:
    want, slack = reference.all_reduce(inputs.xs), sum_slack(inputs.xs)
    worst = Worst(comm, case)
    for rows, layout in slices():
        y = comm.all_reduce(take(inputs.xs[comm.rank], rows, layout))
        worst.called()
        worst.see("sum", y, want[rows], slack[rows], layout)
        worst.same_on_all_ranks("sum", y)
    return worst.outcome()


def _all_reduce_rms_norm(comm: Communicator, case: Case, inputs: Inputs) -> Outcome:
    weight, residual = inputs.weights[0], inputs.residual
    partials = inputs.xs if case.top_k is None else [reference.sum_of_experts(x) for x in inputs.xs]
    want = reference.all_reduce_rms_norm(partials, weight, residual=residual, eps=EPS, weight_bias=case.weight_bias)
    total = reference.all_reduce(partials)
    moved = sum_slack(partials) + (ulp(total) if comm.world > 2 else 0.0)
    r = total.float() if residual is None else total.float() + residual.float()
    assert want.norm is not None
    slack = norm_slack(moved, r, weight.float() + case.weight_bias, want.norm)
    worst = Worst(comm, case)
    fmt = named(case.quant, given_to(case, comm.device))
    for rows, layout in slices():
        x = take(inputs.xs[comm.rank], rows, layout)
        stream = None if residual is None else take(residual, rows, layout)
        if case.row_sharded and stream is not None:
            stream = comm.shard_rows(stream)

        y = boundary(comm, case, x, weight, stream, fmt, keep_norm=True)
        worst.called()
        assert y.norm is not None
        worst.see("norm", y.norm, want.norm[rows], slack[rows], layout)
        worst.same_on_all_ranks("norm", y.norm)
        if y.residual is not None and want.residual is not None:
            new = comm.gather_rows(y.residual, rows.stop - rows.start) if case.row_sharded else y.residual
            worst.see("residual", new, want.residual[rows], moved[rows], layout)
            worst.same_on_all_ranks("residual", new)
        if fmt is not None:
            encoded = fmt.encode(y.norm)
            worst.quantised(fmt, "quant beside the norm", y, encoded)
            worst.quantised(fmt, "quant", boundary(comm, case, x, weight, stream, fmt, keep_norm=False), encoded)
    return worst.outcome()


def boundary(
    comm: Communicator,
    case: Case,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    fmt: Format | None,
    keep_norm: bool,
) -> NormOutput:
    return comm.all_reduce_rms_norm(
        x,
        weight,
        residual=residual,
        eps=EPS,
        weight_bias=case.weight_bias,
        quant=fmt,
        keep_norm=keep_norm,
        residual_layout="row_sharded" if case.row_sharded else "replicated",
        top_k=case.top_k,
    )


def given_to(case: Case, device: torch.device) -> Tensor:
    """The tensor that a format may need."""
    return torch.full((1,), GIVEN.get(case.quant.partition("_swizzled")[0], 1.0), device=device)


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
        self._collective, self._exact = self._collective_calls(), False

    def called(self) -> None:
        """A call was made; whoever served it decides what is allowed."""
        before, self._collective = self._collective, self._collective_calls()
        self._exact = self._collective == before

    def _collective_calls(self) -> int:
        routes = [c for c in self._comm.report().counters if c.route.op == self._case.op]
        return sum(c.calls for c in routes if c.route.backend == "collective")

    def see(self, what: str, got: Tensor, want: Tensor, slack: Tensor | None, layout: str) -> None:
        got = got.flatten(0, -2)
        found = distance(got, want, slack, exact=self._exact)
        if found > self._distance:
            self._distance, self._where = found, f"{what}, {got.shape[0]} rows, {layout}"

    def quantised(self, fmt: Format, what: str, y: NormOutput, encoded: tuple[Tensor, Tensor]) -> None:
        """Elements and scales must be the encoder's, but for the sign of a zero and the payload of a NaN. Scales of
        one byte have neither, so these are compared as they lie, with their padding."""
        assert y.quant is not None
        assert y.scale is not None
        pairs = zip(fmt.unpack(y.quant, y.scale), fmt.unpack(*encoded), strict=True)
        alike = y.quant.shape == encoded[0].shape and y.scale.stride() == encoded[1].stride()
        if alike and y.scale.element_size() == 1:
            alike = torch.equal(y.scale.view(torch.uint8), encoded[1].view(torch.uint8))
        if not alike or any(distance(got, want, None, exact=True) for got, want in pairs):
            self._distance, self._where = (
                math.inf,
                f"{what}, {y.quant.flatten(0, -2).shape[0]} rows: not the encoded norm",
            )

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
            self._distance, self._where = math.inf, f"{what}, {y.flatten(0, -2).shape[0]} rows: ranks differ"

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
        plain = [o.case.widths for o in outcomes if o.case.op == op and not o.case.variants]
        ops_of.setdefault(", ".join(dict.fromkeys(plain)), []).append(op)
        for dtype in DTYPES:
            group = [o for o in outcomes if o.case.op == op and o.case.dtype == dtype]
            bad = sum(not o.ok for o in group)
            verdict = f"[red]{bad} failed[/]" if bad else "[green]ok[/]"
            table.add_row(op, name(dtype), span(group), compact(max(o.distance for o in group)), verdict)
    console.print(table)
    for widths, ops in ops_of.items():
        console.print(f"widths of {', '.join(ops)}: {widths}", highlight=False)
    for op in OPS:
        parts = dict.fromkeys(part for o in outcomes if o.case.op == op for part in o.case.variants)
        if parts:
            console.print(f"variants of {op}: {', '.join(parts)}", highlight=False)
    failed = [o for o in outcomes if not o.ok]
    for o in failed:
        what = o.error or f"{compact(o.distance)} of the allowed distance at {o.where}"
        console.print(f"[red]failed[/] {o.case} on rank {o.rank}: {escape(what)}")
    console.print(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} cases passed; each over {len(ROWS)} row counts "
        f"from {ROWS[0]} to {ROWS[-1]}, {' and '.join(LAYOUTS)}. "
        "worst: 1.00 is what the contract allows, 0.00 is bit for bit."
    )


def span(outcomes: Sequence[Outcome]) -> str:
    """The narrowest and the widest case."""
    rising = sorted((o.case for o in outcomes), key=lambda case: case.width)
    return rising[0].widths if len(rising) == 1 else f"{rising[0].widths} to {rising[-1].widths}"


def compact(distance: float) -> str:
    return f"{distance:.2f}" if distance < 1000 else f"{distance:.1e}"
