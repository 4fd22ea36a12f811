"""What tests run on ranks: calls described as data, the inputs of all ranks, what the contract expects of them, and how
far the `collective` backend may be from that.

Every row is dominated by one rank, another one from row to row: with as many rows as ranks, a rank that is left out
of a sum shows in some row as a factor of ten or more, and no tolerance hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from ulps import assert_within, spacing

import tpfuse
from tpfuse import Communicator, Rope, reference
from tpfuse.launch import Rank

OPS = ("rms_norm", "qk_rms_norm", "all_reduce", "all_reduce_rms_norm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
U = 2.0**-24  # the relative error of one rounding to fp32


@dataclass(frozen=True)
class Case:
    """One call. `width` is one rank's; `width2` is k's width in qk_rms_norm."""

    op: str = "rms_norm"
    rows: tuple[int, ...] = (5,)
    width: int = 48
    width2: int = 16
    dtype: torch.dtype = torch.bfloat16
    gamma: torch.dtype = torch.bfloat16
    residual: torch.dtype | None = None  # all_reduce_rms_norm without a residual: None
    eps: float | tuple[float, float] = 1e-6
    weight_bias: float = 0.0
    strided: bool = False  # the inputs are views of wider rows, q and k of one qkv
    permuted: bool = False  # two leading dimensions lie in memory the other way round
    out: str = "new"  # "new", "given" or "in place"
    alike: bool = False  # every rank brings the same tensors
    seed: int = 0

    @property
    def sharded(self) -> bool:
        """gamma and the row are split over the ranks."""
        return self.op in ("rms_norm", "qk_rms_norm")


@dataclass
class Inputs:
    """One rank's tensors. `wide` is what x (and k) are views of when the case is strided."""

    x: Tensor
    gamma: Tensor
    k: Tensor | None = None
    k_gamma: Tensor | None = None
    residual: Tensor | None = None
    wide: Tensor | None = None
    outs: Any = None  # where the results are to go: as many tensors as the op has results, or None


Outputs = tuple[Tensor, ...]


def inputs(case: Case, rank: int, world: int) -> Inputs:
    """The same wherever it is called, so that the caller of the ranks knows what each of them had."""
    shared = torch.Generator().manual_seed(case.seed)
    own = torch.Generator().manual_seed(1000 * case.seed + (0 if case.alike else 1 + rank))
    rows = prod(case.rows)
    magnitude = 10.0 ** torch.randint(-1, 2, (rows, 1), generator=shared)
    dominant = (torch.arange(rows) + case.seed) % world == rank
    scale = magnitude * torch.where(dominant | case.alike, 30.0, 1.0).unsqueeze(-1)
    widths = (case.width, case.width2) if case.op == "qk_rms_norm" else (case.width,)

    left, right = (3, 5) if case.strided else (0, 0)  # odd offsets and strides: nothing is aligned
    data = torch.randn(rows, left + sum(widths) + right, generator=own) * scale
    wide = data.to(case.dtype).view(*case.rows, data.shape[-1])
    parts = wide[..., left : left + sum(widths)].split(widths, dim=-1)
    if not case.strided:
        parts = tuple(part.contiguous() for part in parts)
    if case.permuted:
        parts = tuple(part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts)
    weights = own if case.sharded else shared  # a gamma that is not split is the same everywhere
    gammas = [(torch.randn(width, generator=weights) * 0.5 - case.weight_bias + 1).to(case.gamma) for width in widths]
    given = Inputs(parts[0], gammas[0], wide=wide)
    if case.op == "qk_rms_norm":
        given.k, given.k_gamma = parts[1], gammas[1]
    if case.op == "all_reduce_rms_norm" and case.residual is not None:
        stream = torch.randn(rows, case.width, generator=shared) * magnitude * 10
        given.residual = stream.to(case.residual).view(*case.rows, case.width)
    if case.out != "new":
        places = (given.x,) if given.k is None else (given.x, given.k)
        given.outs = places if case.out == "in place" else tuple(torch.full(x.shape, 7, dtype=x.dtype) for x in places)
    return given


def call(comm: Communicator, case: Case, given: Inputs) -> Outputs:
    """Make the call, without looking at the result."""
    eps: Any = case.eps
    settings: dict[str, Any] = {"eps": eps, "weight_bias": case.weight_bias}
    outs = given.outs
    if case.op == "all_reduce":
        return (comm.all_reduce(given.x, out=outs and outs[0]),)
    if case.op == "rms_norm":
        return (comm.rms_norm(given.x, given.gamma, out=outs and outs[0], **settings),)
    if case.op == "qk_rms_norm":
        assert given.k is not None
        assert given.k_gamma is not None
        return comm.qk_rms_norm(given.x, given.k, given.gamma, given.k_gamma, out=outs, **settings)
    y = comm.all_reduce_rms_norm(given.x, given.gamma, residual=given.residual, **settings)
    assert y.norm is not None
    return (y.norm,) if y.residual is None else (y.norm, y.residual)


def expected(case: Case, world: int, without: int | None = None) -> list[Outputs]:
    """What the contract says each rank gets. `without`: as if that rank had brought nothing."""
    given = [inputs(case, rank, world) for rank in range(world)]
    if without is not None:
        given[without].x = torch.zeros_like(given[without].x)
        if given[without].k is not None:
            given[without].k = torch.zeros_like(given[without].k)
    xs, gammas = [g.x for g in given], [g.gamma for g in given]
    if case.op == "all_reduce":
        return [(reference.all_reduce(xs),)] * world
    if case.op == "rms_norm":
        return [(y,) for y in reference.rms_norm(xs, gammas, eps=case.eps, weight_bias=case.weight_bias)]
    if case.op == "qk_rms_norm":
        ks, k_gammas = [g.k for g in given], [g.k_gamma for g in given]
        return reference.qk_rms_norm(xs, ks, gammas, k_gammas, eps=case.eps, weight_bias=case.weight_bias)
    y = reference.all_reduce_rms_norm(
        xs, gammas[0], residual=given[0].residual, eps=case.eps, weight_bias=case.weight_bias
    )
    return [(y.norm,) if y.residual is None else (y.norm, y.residual)] * world


def slack(case: Case, world: int, wanted: Outputs) -> Outputs:
    """What `collective` may be off beside 1 ulp of the result, absolute, in float64: the order of fp32 additions.

    Sums of partials: (W - 1) 2^-24 sum |x_r|, nothing for two ranks; where a norm follows, that and the ulp of the
    rounded sum, carried through `r / rms(r) * gamma`. Sums of squares: two trees of about log2(width) fp32 additions
    and W - 1 more, of which the root halves the error; 16-bit results don't show it, fp32 results do.
    """
    squares = (log2(case.width) + world / 2 + 3) * U if case.dtype == torch.float32 else 0.0
    if case.sharded:
        return tuple(y.double().abs() * squares for y in wanted)
    given = [inputs(case, rank, world) for rank in range(world)]
    total = reference.all_reduce([g.x for g in given]).double()
    reorder = (world - 1) * U * sum(g.x.double().abs() for g in given) if world > 2 else torch.zeros_like(total)
    if case.op == "all_reduce":
        return (reorder,)
    moved = reorder + spacing(total, case.dtype) if world > 2 else reorder  # of the rounded sum, and so of r
    r = total if given[0].residual is None else total + given[0].residual.double()
    length = r.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    inverse = (r.square().mean(-1, keepdim=True) + case.eps).rsqrt()
    gamma = (given[0].gamma.double() + case.weight_bias).abs()
    y = r.abs() * inverse * gamma
    norm = moved * inverse * gamma + y * (moved.norm(dim=-1, keepdim=True) / length)
    norm = norm + y * squares
    return (norm,) if case.residual is None else (norm, moved)


def check(case: Case, world: int, results: Sequence[Outputs], without: int | None = None) -> None:
    """Hold the results of all ranks against the contract."""
    for rank, (got, wanted) in enumerate(zip(results, expected(case, world, without), strict=True)):
        assert len(got) == len(wanted)
        for i, (y, e, s) in enumerate(zip(got, wanted, slack(case, world, wanted), strict=True)):
            assert_within(y, e, 1, s, f"{case}, rank {rank} of {world}, output {i}")


# Jobs


_communicators: dict[tuple[str, str], Communicator] = {}


def communicator(mode: str, backend: str = "auto") -> Communicator:
    """This rank's communicator of the whole group, made once: making one is collective, so every rank makes it now."""
    if (mode, backend) not in _communicators:
        _communicators[mode, backend] = Communicator(mode=mode, backend=backend, timeout=20.0)
    return _communicators[mode, backend]


def run_cases(rank: Rank, cases: Sequence[Case], mode: str = "fused") -> list[Outputs]:
    """The calls one after another, on one communicator."""
    comm = communicator(mode)
    return [call(comm, case, inputs(case, rank.rank, rank.world)) for case in cases]


def run_looking_at_memory(rank: Rank, case: Case, mode: str = "fused") -> dict[str, Any]:
    """A call, where its results lie, and which of the caller's tensors it changed."""
    given, before = inputs(case, rank.rank, rank.world), inputs(case, rank.rank, rank.world)
    outputs = call(communicator(mode), case, given)
    results = tuple(y.clone() for y in outputs)
    for x in given.outs or ():  # it is what surrounds them that must stay
        x.zero_()
    for x in before.outs or ():
        x.zero_()
    tensors = {name: x for name, x in vars(given).items() if isinstance(x, Tensor)}
    return {
        "outputs": results,
        "places": [y.data_ptr() for y in outputs],
        "inputs": [x.data_ptr() for x in tensors.values()],
        "outs": [x.data_ptr() for x in given.outs or ()],
        "contiguous": all(y.is_contiguous() for y in outputs),
        "changed": [name for name, x in tensors.items() if not torch.equal(x, vars(before)[name])],
    }


class Exchanges(TorchDispatchMode):
    """Records what goes through torch.distributed as the dispatcher sees it, whichever function was called:
    (operation, shape, dtype) of each exchange, and `signatures`, the small ones that announce a call."""

    def __init__(self) -> None:
        super().__init__()
        self.data: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        self.signatures = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = torch.utils._pytree.tree_leaves(args)
            sent = [t for t in tensors if isinstance(t, Tensor)][-1]  # outputs come first, inputs last
            if sent.dtype == torch.uint8 and sent.numel() < 128:
                self.signatures += 1
            else:
                name = str(function).removeprefix("c10d.").partition(".")[0].strip("_")
                self.data.append((name, tuple(sent.shape), sent.dtype))
        return function(*args, **(kwargs or {}))


def exchanges(rank: Rank, case: Case, mode: str = "fused") -> Exchanges:
    comm, given = communicator(mode), inputs(case, rank.rank, rank.world)
    with Exchanges() as seen:
        call(comm, case, given)
    return _plain(seen)


def exchanges_of_double_reduction(rank: Rank, case: Case) -> tuple[Exchanges, Tensor]:
    """The mistake that RMSNorm hides: partial sums reduced, and then reduced again in front of the norm."""
    comm, given = communicator("fused"), inputs(case, rank.rank, rank.world)
    with Exchanges() as seen:
        norm = comm.all_reduce_rms_norm(comm.all_reduce(given.x), given.gamma, eps=0.0).norm
    return _plain(seen), norm


def _plain(seen: Exchanges) -> Any:
    """As data: the mode itself does not travel between processes."""
    return {"data": seen.data, "signatures": seen.signatures}


def report_of(rank: Rank, cases: Sequence[Case], mode: str) -> dict[str, Any]:
    """The report of a fresh communicator after these calls."""
    with Communicator(mode=mode, timeout=20.0) as comm:
        for case in cases:
            call(comm, case, inputs(case, rank.rank, rank.world))
        return comm.report().as_dict()


def in_groups(rank: Rank, members: Sequence[Sequence[int]], cases: Sequence[Sequence[Case]]) -> list[Outputs]:
    """Groups side by side: each rank joins the one that names it and makes that group's calls there."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    mine = next(i for i, ranks in enumerate(members) if rank.rank in ranks)
    with Communicator(groups[mine], timeout=20.0) as comm:
        return [call(comm, case, inputs(case, comm.rank, comm.world)) for case in cases[mine]]


def in_crossed_groups(rank: Rank, rows: Case, columns: Case) -> tuple[Outputs, Outputs]:
    """Ranks 0..3 as a 2 x 2 square, each in a row and in a column group; calls of both alternate."""
    row_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    column_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    with (
        Communicator(row_groups[rank.rank // 2], timeout=20.0) as row,
        Communicator(column_groups[rank.rank % 2], timeout=20.0) as column,
    ):
        for _ in range(3):
            first = call(row, rows, inputs(rows, row.rank, 2))
            second = call(column, columns, inputs(columns, column.rank, 2))
        return first, second


def pipeline(rank: Rank, case: Case) -> Outputs | None:
    """TP x PP: ranks 0 and 1 reduce, and send their result to ranks 2 and 3, which reduce what they got."""
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stage, place = divmod(rank.rank, 2)
    with Communicator(stages[stage], timeout=20.0) as comm:
        if stage == 0:
            (y,) = call(comm, case, inputs(case, place, 2))
            dist.send(y, rank.rank + 2)
            return None
        received = torch.empty(*case.rows, case.width, dtype=case.dtype)
        dist.recv(received, rank.rank - 2)
        return (comm.all_reduce(received),)


def several_communicators(rank: Rank, case: Case) -> list[tuple[str, Outputs, int]]:
    """One group, one communicator a mode, calls interleaved: name, result and number of calls counted."""
    comms = [Communicator(mode=mode, timeout=20.0) for mode in ("off", "control", "fused", "fused")]
    given = inputs(case, rank.rank, rank.world)
    results = [[call(comm, case, given) for comm in comms] for _ in range(2)]
    found = [(c.name, y, c.report().counters[0].calls) for c, y in zip(comms, results[1], strict=True)]
    for comm in comms:
        comm.close()
    return found


def add_all_patterns(rank: Rank, dtype: torch.dtype, times: int = 1) -> tuple[Tensor, Tensor]:
    """The ranks add every 16-bit pattern, `times` times, each in an order of its own; sum and expectation."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).repeat(times).view(dtype)
    shuffle = torch.Generator().manual_seed(0)
    orders = [torch.randperm(patterns.numel(), generator=shuffle) for _ in range(rank.world - 1)]
    xs = [x.view(16 * times, -1) for x in (patterns, *(patterns[order] for order in orders))]
    return communicator("fused").all_reduce(xs[rank.rank]), reference.all_reduce(xs)


def run_spoiled(rank: Rank, case: Case, mode: str, bad: float) -> Outputs:
    """A call in which the last rank's row 1 holds one bad number."""
    given = inputs(case, rank.rank, rank.world)
    if rank.rank == rank.world - 1:
        for x in (given.x, given.k):
            if x is not None:
                x[1, 4] = bad
    return call(communicator(mode), case, given)


def run_zeros(rank: Rank, case: Case, mode: str) -> Outputs:
    """A call with zeros of both signs."""
    given = inputs(case, rank.rank, rank.world)
    for x in (given.x, given.k, given.residual):
        if x is not None:
            x.zero_()[1] = -0.0
    return call(communicator(mode), case, given)


# Modules and operators


def shards_of(rank: Rank, module: str, sizes: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a module holds after it has loaded a state."""
    made = getattr(tpfuse.nn, module)(comm=communicator("fused"), **sizes)
    made.load_state_dict(state)
    return made.state_dict()


def qk_norm_of_heads(
    rank: Rank, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, head: int, eps: float
) -> tuple[Tensor, Tensor]:
    """This rank's heads of full q and k `[T, heads, head]` through a ShardedQKNorm with full gammas loaded."""
    q_heads, kv_heads = q.shape[1], k.shape[1]
    norm = tpfuse.nn.ShardedQKNorm(q_heads, kv_heads, head, communicator("fused"), eps=eps, dtype=q_weight.dtype)
    norm.load_state_dict({"q_weight": q_weight, "k_weight": k_weight})
    per_rank = max(1, kv_heads // rank.world)
    first = rank.rank * kv_heads // rank.world
    own_q = q.chunk(rank.world, dim=1)[rank.rank].flatten(1)
    return norm(own_q, k[:, first : first + per_rank].flatten(1))


def sharded_norm(rank: Rank, x: Tensor, weight: Tensor, settings: dict[str, Any]) -> Tensor:
    """This rank's columns of full rows through a ShardedRMSNorm inside a model that loads the full gamma."""
    model = torch.nn.Module()
    model.norm = tpfuse.nn.ShardedRMSNorm(x.shape[-1], communicator("fused"), dtype=weight.dtype, **settings)
    model.load_state_dict({"norm.weight": weight})
    return model.norm(x.chunk(rank.world, dim=-1)[rank.rank])


def layer_boundary(rank: Rank, partials: list[Tensor], residual: Tensor | None, weight: Tensor) -> Outputs:
    norm = tpfuse.nn.AllReduceRMSNorm(weight.numel(), communicator("fused"), weight_bias=1.0, dtype=weight.dtype)
    norm.load_state_dict({"weight": weight})
    return tuple(norm(partials[rank.rank], residual))


def compiled_and_eager(rank: Rank, cases: Sequence[Case], mode: str = "fused") -> list[tuple[Outputs, Outputs]]:
    """Each call under torch.compile(fullgraph=True), and eagerly."""
    comm, pairs = communicator(mode), []
    for case in cases:
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        first, second = (inputs(case, rank.rank, rank.world) for _ in range(2))
        pairs.append((compiled(comm, case, first), call(comm, case, second)))
    return pairs


def compiled_layer(rank: Rank, case: Case) -> tuple[Outputs, Outputs, int]:
    """Modules with torch ops between them as one compiled graph, beside the same eagerly; and the counted calls."""
    with Communicator(timeout=20.0) as comm:
        norm = tpfuse.nn.AllReduceRMSNorm(case.width, comm, dtype=case.gamma)
        qk = tpfuse.nn.ShardedQKNorm(4 * rank.world, rank.world, case.width // 8, comm, dtype=case.gamma)

        def layer(x: Tensor, residual: Tensor) -> Outputs:
            y, residual, *_ = norm(torch.relu(x), residual)
            q, k = qk(*(y * 2).split((case.width // 2, case.width // 8, 3 * case.width // 8), dim=-1)[:2])
            return q, k, residual + 1

        given = inputs(case, rank.rank, rank.world)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(given.x, given.residual)
        eager = layer(given.x, given.residual)
        return compiled, eager, sum(counter.calls for counter in comm.report().counters)


def rotated_in_mode_off(rank: Rank) -> tuple[Tensor, Tensor]:
    """q of this rank with RoPE and an eps that counts, and the reference."""
    rope = Rope(torch.ones(32, 4), torch.zeros(32, 4), torch.arange(6), head_dim=8, rotary_dim=8)
    parts = list(torch.randn(rank.world, 6, 8, generator=torch.Generator().manual_seed(0)))
    gamma = torch.ones(8)
    with Communicator(mode="off") as comm:
        y, _ = comm.qk_rms_norm(parts[rank.rank], parts[rank.rank].clone(), gamma, gamma, eps=0.5, rope=rope)
    gammas = [gamma] * rank.world
    exact = reference.qk_rms_norm(parts, parts, gammas, gammas, eps=0.5, rope=rope)
    return y, exact[rank.rank][0]
