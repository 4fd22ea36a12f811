"""`tpfuse tune`: up to which size one way of reducing is faster than the next, measured on the user's GPUs.

The ways are one-shot and two-shot, each with whole rows or with rows split over blocks. All give the same bits, which
is looked at before anything is timed. Each is timed at each of ROWS, in the widths of the presets, as `bench ops` does
it: CUDA graphs, inputs hot in the L2, the maximum over ranks of their medians.

Chosen are the thresholds that make the geometric mean of all these times least: where the curves cross, without one
noisy point deciding. One-shot ends at the KiB of one of these sizes, splitting at one of ROWS. Rank 0 chooses, the
others take over its choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log
from statistics import fmean
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Group, RenderableType
from rich.table import Table

from tpfuse.agreement import Board
from tpfuse.backends.cuda.all_reduce import (
    DEFAULTS,
    MAX_SPLIT_ROWS,
    WORKSPACE_BYTES,
    AllReduce,
    Thresholds,
    algorithm_for,
    fills,
    limits,
)
from tpfuse.backends.cuda.workspace import MAX_WORLD, Workspace, availability, place
from tpfuse.bench.cases import Case, Inputs, Outputs, make_inputs
from tpfuse.bench.implementations import Ran
from tpfuse.bench.method import CudaMethod, State, first_error, gathered, measure
from tpfuse.errors import PeerTimeout, TpfuseError, Unsupported
from tpfuse.launch import Progress, Rank, resolve_world, run_ranks
from tpfuse.plan import slot_bytes
from tpfuse.presets import PRESETS

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WIDTHS = tuple(sorted({preset.hidden for preset in PRESETS.values()}))
DTYPE = torch.bfloat16
WORTH = 1.01  # other thresholds than the defaults must be so many times faster where they differ
TIMEOUT = 30.0


class Size(NamedTuple):
    rows: int
    width: int

    @property
    def size_in_bytes(self) -> int:
        """Of one rank's rows, as thresholds count them."""
        return self.rows * slot_bytes(self.width, DTYPE.itemsize)

    @property
    def kib(self) -> int:
        """The least bound, in KiB, that this size is within."""
        return -(-self.size_in_bytes >> 10)


class Way(NamedTuple):
    """How a call is served: what the thresholds decide."""

    algorithm: str
    split: bool

    def __str__(self) -> str:
        return f"{self.algorithm.replace('_', '-')}, {'split' if self.split else 'whole'} rows"

    @property
    def forced(self) -> Thresholds:
        """Those that send every call this way, of the sizes that are measured."""
        most = Size(ROWS[-1], WIDTHS[-1]).kib
        return Thresholds(most if self.algorithm == "one_shot" else 0, MAX_SPLIT_ROWS if self.split else 0)


WAYS = tuple(Way(algorithm, split) for algorithm, split in product(("one_shot", "two_shot"), (True, False)))

Times = Mapping[Size, Mapping[Way, float]]  # µs
Timer = Callable[[Size], Mapping[Way, float]]  # the maximum over ranks; collective


@dataclass(frozen=True)
class Tuning:
    """What was measured, and what follows from it."""

    model: str  # of the GPUs, as workspace.Place has it
    world: int
    times: Times
    thresholds: Thresholds


def run(world: int | None = None, device_type: str = "cuda", *, progress: Progress | None = None) -> Tuning:
    """Tune on W GPUs of this machine (None: all), or under torchrun. Raises Unsupported where there are none."""
    if device_type != "cuda":
        raise Unsupported(f"tune: it measures kernels of GPUs; --device {device_type} has none of them.")
    if torch.cuda.device_count() < 2:
        raise Unsupported(f"tune: needs at least 2 GPUs that reach each other; torch sees {torch.cuda.device_count()}.")
    ranks = resolve_world(world, device_type)
    if not 2 <= ranks <= MAX_WORLD:
        raise Unsupported(f"tune: {ranks} ranks; the kernels serve 2 to {MAX_WORLD}. Use --world.")
    results: list[Tuning] = run_ranks(job, world=ranks, device_type=device_type, progress=progress)
    return results[0]


def job(rank: Rank) -> Tuning:
    """What each rank runs. Collective throughout."""
    with torch.no_grad(), GpuTimer(rank) as timer:
        return tune(rank, timer, place(timer.device.index).model)


def tune(rank: Rank, timer: Timer, model: str, rows: Sequence[int] = ROWS, widths: Sequence[int] = WIDTHS) -> Tuning:
    sizes = [Size(count, width) for width, count in product(widths, rows)]
    times = {}
    for done, size in enumerate(sizes):
        rank.progress(done, len(sizes), f"{size.rows} x {size.width}")
        times[size] = timer(size)
    rank.progress(len(sizes), len(sizes), "done")
    chosen: Thresholds = gathered(choose(times, rank.world))[0]
    return Tuning(model, rank.world, times, chosen)


def choose(times: Times, world: int) -> Thresholds:
    """The thresholds that the times speak for; the defaults unless others are faster by WORTH."""
    default, most = DEFAULTS[world], limits(world).one_shot_kib
    sizes = sorted({size.kib for size in times if size.kib <= most})
    pairs = [Thresholds(*pair) for pair in product(sizes, (0, *sorted({size.rows for size in times})))]
    best = min((default, *pairs), key=lambda pair: fmean(log(us) for us in served(times, pair).values()))
    before, after = served(times, default), served(times, best)
    changed = [log(before[size] / after[size]) for size in times if before[size] != after[size]]
    return best if changed and exp(fmean(changed)) > WORTH else default


def served(times: Times, thresholds: Thresholds) -> dict[Size, float]:
    """The times that calls take under these thresholds."""
    return {size: ways[way_of(size, thresholds)] for size, ways in times.items()}


def way_of(size: Size, thresholds: Thresholds) -> Way:
    return Way(algorithm_for(size.size_in_bytes, "norm", thresholds), size.rows <= thresholds.split_rows)


class GpuTimer:
    """Times all_reduce_rms_norm in every way there is for a size. All ways share one workspace, as calls do."""

    def __init__(self, rank: Rank) -> None:
        assert dist.group.WORLD is not None
        self._rank = rank
        self.device = torch.device("cuda", torch.cuda.current_device())
        index, board = self.device.index, Board(dist.group.WORLD, "tune")
        reason = availability(board, index, TIMEOUT)
        if reason is not None:
            raise Unsupported(f"tune: the cuda backend can't work here: {reason}.")
        self._space = Workspace(board, index, WORKSPACE_BYTES, TIMEOUT, fills=fills())
        self._method = CudaMethod(self.device)
        self._candidates = [
            Candidate(way, AllReduce(self.device, rank.rank, rank.world, self._space, TIMEOUT, way.forced))
            for way in WAYS
        ]

    def __call__(self, size: Size) -> dict[Way, float]:
        world = self._rank.world
        case = Case("all_reduce_rms_norm", size.rows, (size.width,), world, 1e-6, 0.0, DTYPE, DTYPE)
        fits = size.kib <= limits(world).one_shot_kib
        able = [c for c in self._candidates if fits or c.way.algorithm == "two_shot"]
        error = first_error(self._different_bits(case, able))
        figures = [] if error else measure(case, State("hot", 1), able, self._method, self._rank.rank, self.device)
        self._check()
        times = {}
        for candidate, figure in zip(able, figures, strict=False):
            error = error or figure.error
            if figure.us is not None:
                times[candidate.way] = figure.us
        if error:
            raise TpfuseError(f"tune: {case}: {error}. Nothing was stored; run `tpfuse check`.")
        return times

    def _different_bits(self, case: Case, able: Sequence[Candidate]) -> str:
        inputs = make_inputs(case, self._rank.rank, 0, self.device)
        first, *others = ((c, c.step(case, inputs)) for c in able)
        return next(
            (
                f"{other.name} and {first[0].name} differ"
                for other, results in others
                if not all(map(torch.equal, results, first[1]))
            ),
            "",
        )

    def _check(self) -> None:
        torch.cuda.synchronize()
        record = self._space.read_error()
        if record is not None:
            raise PeerTimeout(f"tune: rank {record.peer} did not arrive within {TIMEOUT:g} s. Look at its own log.")

    def __enter__(self) -> GpuTimer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._space.close()


@dataclass(frozen=True)
class Candidate:
    """One way, as something that the method measures."""

    way: Way
    reduce: AllReduce
    in_place: bool = False

    @property
    def name(self) -> str:
        return str(self.way)

    def serves(self, op: str) -> bool:
        return op == "all_reduce_rms_norm"

    def step(self, case: Case, inputs: Inputs) -> Outputs:
        x, residual = inputs["x"], inputs["residual"]
        norm, new = torch.empty_like(x), torch.empty_like(residual)
        self.reduce.all_reduce_rms_norm(
            {}, x, 0, inputs["weight"], residual, new, norm, None, None, None, case.eps, case.weight_bias, False,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        return norm, new

    def ran(self, case: Case) -> Ran:
        return Ran("cuda", self.name, "", "", "")


def report(tuning: Tuning) -> RenderableType:
    """µs of both algorithms by rows and width, and of split and whole rows in the geometric mean over widths, each with
    the other choice made. What the thresholds take is bold."""
    times, now, default = tuning.times, tuning.thresholds, DEFAULTS[tuning.world]
    widths = sorted({size.width for size in times})
    table = Table(title=f"all_reduce_rms_norm, {tuning.world} x {tuning.model}, µs: one-shot / two-shot")
    table.add_column("rows", justify="right")
    for width in widths:
        kib = Size(1, width).size_in_bytes / 1024
        table.add_column(f"{width} wide\n{kib:g} KiB a row", justify="right")
    table.add_column("all widths\nsplit / whole", justify="right")
    for rows in sorted({size.rows for size in times}):
        sizes = [Size(rows, width) for width in widths]
        chosen = {size: way_of(size, now) for size in sizes}
        split = rows <= now.split_rows
        one, two = Way("one_shot", split), Way("two_shot", split)
        cells = [_pair(times[size].get(one), times[size][two], way == one) for size, way in chosen.items()]
        parts, whole = (
            exp(fmean(log(times[size][way._replace(split=either)]) for size, way in chosen.items()))
            for either in (True, False)
        )
        table.add_row(str(rows), *cells, _pair(parts, whole, split))
    same = "as by default" if now == default else f"by default {default.one_shot_kib} KiB and {default.split_rows}"
    return Group(table, f"one-shot up to {now.one_shot_kib} KiB, rows split up to {now.split_rows} ({same})")


def _pair(first: float | None, second: float, takes_first: bool) -> str:
    """Two times; the one that is taken is bold."""
    a, b = "-" if first is None else f"{first:.2f}", f"{second:.2f}"
    return f"[bold]{a}[/] / {b}" if takes_first else f"{a} / [bold]{b}[/]"
