"""`all_reduce` and `all_reduce_rms_norm` of the cuda backend on real GPUs: bit for bit the reference in every variant,
eager and replayed, whatever ran before on the same workspace, and an error instead of a hang when a rank does not come.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import Communicator, NormOutput, check, communicator, reference
from tpfuse.backends.cuda import tuning
from tpfuse.backends.cuda.all_reduce import DEFAULTS, MAX_BLOCKS, Thresholds, limits, ring_rows
from tpfuse.backends.cuda.compile import arch_of, compile_kernel, load
from tpfuse.backends.cuda.launch import Launcher
from tpfuse.backends.cuda.workspace import place
from tpfuse.bench import tune
from tpfuse.checks import own_rows
from tpfuse.errors import TpfuseError
from tpfuse.launch import Rank, RankFailed, Ranks
from tpfuse.plan import slot_bytes
from tpfuse.quant import FORMATS, Format

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GUARD = 0xA5  # a byte; as bf16 and fp16 a tiny negative number, as fp32 too
BAND = 4096


@pytest.fixture(scope="module", params=[pytest.param(w, marks=pytest.mark.gpu(w)) for w in (2, 3, 4)])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param, "cuda") as started:
        yield started


@pytest.fixture(params=[pytest.param(w, marks=pytest.mark.gpu(w)) for w in (2, 4)])
def fresh(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Ranks of their own, for what leaves a rank behind."""
    with Ranks(request.param, "cuda") as started:
        yield started


# ---------------------------------------------------------------------------------------------------------------------
# Calls, and what they must give.


@dataclass(frozen=True)
class Spec:
    """One call."""

    rows: int
    width: int = 3072
    dtype: torch.dtype = BF16
    residual: torch.dtype | None = BF16
    quant: str = ""
    keep_norm: bool = False
    row_sharded: bool = False
    plain: bool = False  # all_reduce
    offset: int = 0  # elements before each row of x and of the residual
    top_k: int | None = None


class Problem:
    """A call with the tensors of all ranks, of very different scale, and what this rank must get."""

    def __init__(self, rank: Rank, spec: Spec, change: Callable[[Tensor, int], Tensor] | None = None) -> None:
        self.spec, self.rank = spec, rank.rank
        generator = torch.Generator("cuda").manual_seed(hash_of(spec))

        def rows(dtype: torch.dtype, scale: float, *terms: int) -> Tensor:
            wide = torch.randn(spec.rows, *terms, spec.width + spec.offset, generator=generator, device="cuda") * scale
            return wide.to(dtype)[..., spec.offset :]

        terms = () if spec.top_k is None else (spec.top_k,)
        self.xs = [rows(spec.dtype, 4.0**r, *terms) for r in range(rank.world)]
        if change is not None:
            self.xs = [change(x, r) for r, x in enumerate(self.xs)]
        self.weight = torch.randn(spec.width, generator=generator, device="cuda").to(spec.dtype)
        whole = None if spec.residual is None or spec.plain else rows(spec.residual, 2.0)
        mine = slice(self.rank if spec.row_sharded else 0, None, rank.world if spec.row_sharded else 1)
        self.residual = None if whole is None else whole[mine]
        self.format = format_of(spec.quant)
        if spec.plain:
            self.want = NormOutput(reference.all_reduce(self.xs), None, None, None)
        else:
            want = reference.all_reduce_rms_norm(
                self.xs,
                self.weight,
                residual=whole,
                quant=self.format,
                keep_norm=spec.keep_norm,
                top_k=spec.top_k,
            )
            self.want = want._replace(residual=None if want.residual is None else want.residual[mine])
        self.own = self.xs[self.rank]
        self._before = [t.clone() for t in (self.own, self.weight, self.residual) if t is not None]

    def run(self, comm: Communicator) -> NormOutput:
        if self.spec.plain:
            return NormOutput(comm.all_reduce(self.own), None, None, None)
        return comm.all_reduce_rms_norm(
            self.own,
            self.weight,
            residual=self.residual,
            quant=self.format,
            keep_norm=self.spec.keep_norm,
            residual_layout="row_sharded" if self.spec.row_sharded else "replicated",
            top_k=self.spec.top_k,
        )

    def right(self, y: NormOutput) -> bool:
        """Every result is the reference's, and the inputs are what they were."""
        inputs = (t for t in (self.own, self.weight, self.residual) if t is not None)
        return equal(y, self.want, self.format) and all(map(same, inputs, self._before))


def hash_of(spec: Spec) -> int:
    """The same in every process, unlike hash()."""
    return sum(number * ord(letter) for number, letter in enumerate(str(spec), 1))


def format_of(name: str) -> Format | None:
    given = check.GIVEN.get(name.partition("_swizzled")[0], 1.0)
    return FORMATS[name](torch.full((1,), given, device="cuda")) if name else None


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit, but for the sign of a zero and the payload of a NaN."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        a, b = a.float(), b.float()
    return bool(((a == b) | ((a != a) & (b != b))).all())


def equal(y: NormOutput, want: NormOutput, fmt: Format | None) -> bool:
    if not (same(y.norm, want.norm) and same(y.residual, want.residual)):
        return False
    if fmt is None:
        return y.quant is None and y.scale is None
    if y.quant is None or y.scale is None or want.quant is None or want.scale is None:
        return False
    one_byte = y.scale.element_size() == 1  # padding included
    if one_byte and not torch.equal(y.scale.view(torch.uint8), want.scale.view(torch.uint8)):
        return False
    return all(map(same, fmt.unpack(y.quant, y.scale), fmt.unpack(want.quant, want.scale)))


def poison(y: NormOutput, fmt: Format | None) -> None:
    """Results as if nobody had written them. The scale of fp8_static is an input."""
    given = None if fmt is None else fmt.given
    for t in y:
        if t is not None and t is not given:
            t.untyped_storage().fill_(GUARD)


def cuda_only(comm: Communicator) -> bool:
    return all(c.route.backend == "cuda" for c in comm.report().counters if c.route.op != "gather_rows")


def last_of_one_shot(thresholds: Thresholds, width: int, dtype: torch.dtype) -> int:
    """The most rows that go one-shot."""
    return (thresholds.one_shot_kib << 10) // slot_bytes(width, dtype.itemsize)


def edges(world: int, width: int, dtype: torch.dtype) -> list[int]:
    """Row counts around what decides: ranks, thresholds."""
    thresholds = DEFAULTS[world]
    around = (world, last_of_one_shot(thresholds, width, dtype), thresholds.split_rows)
    return sorted({1, *(n + d for n in around for d in (-1, 0, 1))} - {0})


# ---------------------------------------------------------------------------------------------------------------------
# Right.


def check_against_the_reference(rank: Rank) -> list[str]:
    with Communicator(backend="cuda") as comm:
        outcomes = [check.run_case(comm, case) for case in check.cases() if case.op.startswith("all_reduce")]
        assert cuda_only(comm)
        return [f"{o.case}: {o.error or o.where}" for o in outcomes if not o.ok]


@pytest.mark.timeout(900)
def test_every_case_of_the_check_is_bit_for_bit_the_reference(ranks: Ranks) -> None:
    assert ranks.run(check_against_the_reference) == [[]] * ranks.world


def shapes(world: int) -> list[Spec]:
    """Rows around the thresholds; residuals, layouts and alignment change. `tpfuse check` has more widths."""
    residuals = cycle(((None, False), (BF16, False), (F32, True), (F32, False), (F16, True)))
    offsets = cycle((0, 3))
    found = []
    for width, dtype in ((3072, BF16), (3584, F16), (16384, F32), (100, BF16), (1, F32)):
        kinds = [Spec(1, width, dtype, residual, row_sharded=sharded) for residual, sharded in islice(residuals, 2)]
        for kind, rows in product((*kinds, Spec(1, width, dtype, plain=True)), edges(world, width, dtype)):
            found.append(replace(kind, rows=rows, offset=next(offsets)))
    return found


def beyond_the_slots(world: int) -> list[Spec]:
    """More rows than have slots at once: just so, a few turns, and more than a launch has blocks."""
    found = []
    for width, dtype in ((3072, BF16), (16384, F32), (16384, F16)):
        ring = ring_rows(width, dtype.itemsize, world, 1)
        for rows in (ring // 2, ring // 2 + 1, ring, ring + 1, 2 * ring + world + 1):
            found.append(Spec(rows, width, dtype, plain=True))
            found.append(Spec(rows, width, dtype))
            found.append(Spec(rows, width, dtype, F32, "fp8_per_token", row_sharded=True))
    many = MAX_BLOCKS + 4000 + 1
    found += [Spec(many, 128, plain=True), Spec(many, 128), Spec(many, 128, residual=None, quant="mxfp8_swizzled")]
    return [*found, Spec(many, 128, BF16, F32, "fp8_per_group_tma_aligned", keep_norm=True, row_sharded=True)]


def unquantised_and_without_residual(world: int) -> list[Spec]:
    """What `tpfuse check` has no cases of: formats without a residual, where the norm comes before the gather."""
    found = []
    for number, (which, quant) in enumerate(product(range(4), FORMATS)):
        width, dtype = 2688 if number % 2 else 3072, (BF16, F16, F32)[number % 3]
        last = last_of_one_shot(DEFAULTS[world], width, dtype)
        rows = (1, last, last + 1, 300)[which]
        found.append(Spec(rows, width, dtype, None, quant, keep_norm=number % 4 == 3))
    return found


def outputs_of_experts(world: int) -> list[Spec]:
    kinds = (
        Spec(1, 3072, top_k=8),
        Spec(1, 6144, residual=None, top_k=3),
        Spec(1, 3584, F16, F32, row_sharded=True, offset=8, top_k=10),
        Spec(1, 16384, F32, top_k=32),
        Spec(1, 100, residual=F32, offset=3, top_k=1),
        Spec(1, 3072, residual=F32, quant="fp8_per_token", top_k=8),
    )
    found = [replace(kind, rows=rows) for kind in kinds for rows in edges(world, kind.width, kind.dtype)]
    return [*found, Spec(2 * ring_rows(3072, 2, world, 1) + world + 1, top_k=8)]


SETS: dict[str, Callable[[int], list[Spec]]] = {
    "experts": outputs_of_experts,
    "shapes": shapes,
    "beyond the slots": beyond_the_slots,
    "without residual": unquantised_and_without_residual,
}


def wrong_results(rank: Rank, name: str) -> list[str]:
    with Communicator(backend="cuda") as comm:
        wrong = []
        for spec in SETS[name](rank.world):
            problem = Problem(rank, spec)
            if not problem.right(problem.run(comm)):
                wrong.append(str(spec))
        assert cuda_only(comm)
        return wrong


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SETS)
def test_results_are_the_references(ranks: Ranks, name: str) -> None:
    assert ranks.run(wrong_results, name) == [[]] * ranks.world


class Guarded:
    """In place of the communicator's allocation: results lie in the middle of poisoned memory, poisoned as well."""

    def __init__(self) -> None:
        self._spaces: list[tuple[Tensor, int]] = []

    def like(self, t: Tensor) -> Tensor:
        size = t.untyped_storage().nbytes()
        space = torch.full((size + 2 * BAND,), GUARD, dtype=torch.uint8, device=t.device)
        self._spaces.append((space, size))
        return space[BAND : BAND + size].view(t.dtype).as_strided(t.shape, t.stride(), BAND // t.element_size())

    def outputs(self, x: Tensor, residual: Tensor | None, quant: Format | None, keep_norm: bool) -> NormOutput:
        made = boundary_outputs(x, residual, quant, keep_norm)
        given = None if quant is None else quant.given
        return NormOutput(*(t if t is None or t is given else self.like(t) for t in made))

    def whole(self) -> bool:
        return all(
            bool((space[:BAND] == GUARD).all()) and bool((space[BAND + size :] == GUARD).all())
            for space, size in self._spaces
        )


boundary_outputs, empty = communicator.boundary_outputs, communicator.empty


def guard_bands(rank: Rank) -> list[str]:
    wrong = []
    guarded = Guarded()
    communicator.boundary_outputs = guarded.outputs
    communicator.empty = lambda x: guarded.like(empty(x))
    try:
        with Communicator(backend="cuda") as comm:
            for rows, (width, dtype), residual in product(
                (1, 6, 40, 300, 2600), ((3072, BF16), (100, F16), (7, F32)), (None, BF16, F32)
            ):
                specs = [
                    Spec(rows, width, dtype, residual),
                    Spec(rows, width, dtype, residual, "fp8_per_token", keep_norm=rows % 4 == 0),
                    Spec(rows, width, dtype, plain=True),
                ]
                if residual is not None:
                    specs.append(Spec(rows, width, dtype, residual, row_sharded=True, offset=3))
                if width % 128 == 0:
                    specs += [Spec(rows, width, dtype, residual, quant) for quant in FORMATS]
                for spec in specs:
                    problem = Problem(rank, spec)
                    if not (problem.right(problem.run(comm)) and guarded.whole()):
                        wrong.append(str(spec))
                    guarded._spaces.clear()
    finally:
        communicator.boundary_outputs, communicator.empty = boundary_outputs, empty
    return wrong


@pytest.mark.timeout(900)
def test_nothing_but_the_outputs_is_written(ranks: Ranks) -> None:
    assert ranks.run(guard_bands) == [[]] * ranks.world


def in_place(rank: Rank) -> list[bool]:
    with Communicator(backend="cuda") as comm:
        found = []
        for rows in (3, 40, 300, 2600):
            problem = Problem(rank, Spec(rows, plain=True))
            x = problem.own.clone()
            found.append(comm.all_reduce(x, out=x) is x and same(x, problem.want.norm))
        return found


def test_in_place(ranks: Ranks) -> None:
    assert ranks.run(in_place) == [[True] * 4] * ranks.world


# Values that peers' kernels have taken for their sentinel, or lost.


def filled(value: float, every: int = 1) -> Callable[[Tensor, int], Tensor]:
    def change(x: Tensor, rank: int) -> Tensor:
        y = x.clone()
        y[:, ::every] = value
        return y

    return change


def bits(word: int) -> Callable[[Tensor, int], Tensor]:
    """Every 32-bit word of x: the kernels' own mark, or half of it."""

    def change(x: Tensor, rank: int) -> Tensor:
        y = x.clone()
        y.view(torch.int32).fill_(struct.unpack("i", struct.pack("I", word))[0])
        return y

    return change


def one_rank(change: Callable[[Tensor, int], Tensor], only: int) -> Callable[[Tensor, int], Tensor]:
    return lambda x, rank: change(x, rank) if rank == only else torch.zeros_like(x)


VALUES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "zeros": filled(0.0),
    "negative zeros": filled(-0.0),
    "every other a negative zero": filled(-0.0, 2),
    "the mark": bits(0x80000000),
    "both halves of the mark": bits(0x80008000),
    "low half": bits(0x00008000),
    "the least subnormal": bits(0x00010001),
    "the least negative subnormal": bits(0x80018001),
    "NaN with the mark's sign": bits(0xFFFFFFFF),
    "infinities": filled(float("inf"), 3),
    "one rank has zeros with signs": one_rank(filled(-0.0), 1),
    "one rank has marks": one_rank(bits(0x80000000), 0),
}


def odd_values(rank: Rank) -> list[str]:
    wrong = []
    with Communicator(backend="cuda") as comm:
        for (name, change), dtype, rows in product(VALUES.items(), (BF16, F16, F32), (5, 40, 300)):
            for spec in (
                Spec(rows, 2048, dtype, plain=True),
                Spec(rows, 2048, dtype, None),
                Spec(rows, 2048, dtype, F32),
                Spec(rows, 2048, dtype, None, "fp8_per_token"),
                Spec(rows, 2048, dtype, F32, "nvfp4_swizzled", row_sharded=True),
            ):
                problem = Problem(rank, spec, change)
                if not problem.right(problem.run(comm)):
                    wrong.append(f"{name}: {spec}")
        torch.cuda.synchronize()
        comm.prepare()  # no kernel gave up
    return wrong


@pytest.mark.timeout(900)
def test_no_value_is_taken_for_the_mark(ranks: Ranks) -> None:
    assert ranks.run(odd_values) == [[]] * ranks.world


# ---------------------------------------------------------------------------------------------------------------------
# One workspace, many calls.


def mixed(world: int) -> list[Spec]:
    """Ops, sizes, types and layouts that share a workspace. Odd grids among them, and more rows than have slots."""
    ring = ring_rows(16384, 4, world, 1)
    return [
        Spec(1),
        Spec(2600),
        Spec(3, 2880, F16, F32),
        Spec(1, 4096, F32, plain=True),
        Spec(17, 6144, F32),
        Spec(63, 100, F32, plain=True, offset=3),
        Spec(ring + 5, 16384, F32, plain=True),
        Spec(41, 3072, BF16, F32, "fp8_per_token", row_sharded=True),
        Spec(129, 3072, BF16, None, "nvfp4_swizzled"),
        Spec(1, 7, F16, None),
        Spec(130, 7168, F16, F16, row_sharded=True),
        Spec(5, 3072, BF16, BF16, "fp8_static", keep_norm=True),
        Spec(701, 8192, BF16, F32),
        Spec(2, 16384, BF16, plain=True),
        Spec(9, top_k=8),
        Spec(300, 2880, F16, F32, top_k=3),
    ]


def eager_calls_in_any_order(rank: Rank) -> int:
    """Back to back, without a pause in which the workspace could come to rest."""
    with Communicator(backend="cuda") as comm:
        problems = [Problem(rank, spec) for spec in mixed(rank.world)]
        order = random.Random(7).choices(problems, k=500)
        results = [(problem, problem.run(comm)) for problem in order]
        torch.cuda.synchronize()
        assert cuda_only(comm)
        return sum(not problem.right(y) for problem, y in results)


@pytest.mark.timeout(600)
def test_calls_of_all_kinds_in_any_order(ranks: Ranks) -> None:
    assert ranks.run(eager_calls_in_any_order) == [0] * ranks.world


def captured(comm: Communicator, problems: list[Problem], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outs = [problem.run(comm) for problem in problems]
    return graph, outs


def replays(rank: Rank, times: int) -> list[int]:
    """A graph of calls of all kinds, replayed many times over results that are poisoned now and then, with an eager
    call between."""
    with Communicator(backend="cuda") as comm:
        problems = [Problem(rank, spec) for spec in mixed(rank.world)]
        for problem in problems:
            problem.run(comm)
        graph, outs = captured(comm, problems)
        wrong = 0
        for turn in range(times):
            look = turn % 100 == 0
            if look:
                for problem, y in zip(problems, outs, strict=True):
                    poison(y, problem.format)
            graph.replay()
            if look:
                eager = problems[turn // 100 % len(problems)]
                wrong += not eager.right(eager.run(comm))
                wrong += sum(not problem.right(y) for problem, y in zip(problems, outs, strict=True))
        torch.cuda.synchronize()
        wrong += sum(not problem.right(y) for problem, y in zip(problems, outs, strict=True))
        comm.prepare()
        return [wrong, sum(c.captured for c in comm.report().counters)]


@pytest.mark.timeout(600)
def test_thousands_of_replays_of_mixed_calls(ranks: Ranks) -> None:
    assert ranks.run(replays, 3000) == [[0, len(mixed(ranks.world))]] * ranks.world


def two_graphs_of_one_pool(rank: Rank) -> list[int]:
    """Intermediate results are freed at once and their memory is used again, in a graph and between two of them.

    A peer that still read or wrote them would spoil the sums (AITER's missing exit barrier).
    """
    with Communicator(backend="cuda") as comm:
        problems = [Problem(rank, Spec(rows, plain=True)) for rows in (2, 40, 300)]
        want = [problem.want.norm.float() * 10 for problem in problems if problem.want.norm is not None]
        for problem in problems:
            problem.run(comm)

        def tenfold(problem: Problem) -> Tensor:
            total = torch.zeros(problem.own.shape, device="cuda")
            for _ in range(10):
                x = problem.own + 0  # memory that an earlier turn may have had
                total += comm.all_reduce(x).float()
                x.fill_(torch.nan)
            return total

        graphs, totals, pool = [], [], torch.cuda.graph_pool_handle()
        for order in (problems, problems[::-1]):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                made = [tenfold(problem) for problem in order]
            graphs.append(graph)
            totals.append(made if order is problems else made[::-1])
        wrong = 0
        for turn in range(200):
            graphs[turn % 2].replay()
            for total, right in zip(totals[turn % 2], want, strict=True):
                wrong += not torch.allclose(total, right, rtol=1e-6, atol=0)
        return [wrong]


def test_a_graph_pool_that_is_used_again(ranks: Ranks) -> None:
    assert ranks.run(two_graphs_of_one_pool) == [[0]] * ranks.world


# ---------------------------------------------------------------------------------------------------------------------
# Programmatic dependent launch: what stands right before a call, and right behind it.

PRODUCER = """
#include "platform.h"
namespace tpfuse {
struct Copy { u64 from, to, words, delay_ns; };
// Lets the next grid start at once, and writes long after that.
TPF_KERNEL(256, 1) void produce(TPF_GRID_CONSTANT const Copy a) {
  dependency_trigger();
  dependency_wait();
  u64 start = clock_ns();
  while (clock_ns() - start < a.delay_ns) spin_pause();
  for (u64 i = u64(block_index()) * 256 + thread_index(); i < a.words; i += u64(grid_size()) * 256)
    store_global(reinterpret_cast<u32*>(a.to) + i, load_global(reinterpret_cast<const u32*>(a.from) + i));
}
}
"""


class Producer:
    """A kernel with an early trigger that copies memory, late."""

    def __init__(self) -> None:
        device = torch.cuda.current_device()
        function = load(compile_kernel(PRODUCER, "tpfuse::produce", arch=arch_of(device)), device)
        self._start = Launcher(function, "4Q", block=256, pdl=True)

    def __call__(self, source: Tensor, target: Tensor, delay_ns: int) -> None:
        assert source.is_contiguous()
        assert target.is_contiguous()
        stream = torch.cuda.current_stream().cuda_stream
        words = source.numel() * source.element_size() // 4
        self._start(32, stream, source.data_ptr(), target.data_ptr(), words, delay_ns)


def fresh_inputs(rank: Rank, rows: int, row_sharded: bool) -> list[int]:
    """x, residual and the scale of a format are written right before each call, by a kernel that triggers early. What a
    call reads too soon is what the call before had."""
    width, steps = 3072, 6
    own = own_rows(rows, rank.rank, rank.world) if row_sharded else rows
    residual_layout = "row_sharded" if row_sharded else "replicated"
    with Communicator(backend="cuda") as comm:
        produce = Producer()
        # One piece of memory, so that one kernel writes all of it: x, then the residual, then the scale.
        x_bytes, residual_bytes = rows * width * 2, own * width * 4
        arena = torch.zeros(x_bytes + residual_bytes + 16, dtype=torch.uint8, device="cuda")
        x = arena[:x_bytes].view(BF16).view(rows, width)
        residual = arena[x_bytes : x_bytes + residual_bytes].view(F32).view(own, width)
        scale = arena[x_bytes + residual_bytes :][:4].view(F32)
        fmt = FORMATS["fp8_static"](scale)
        weight = torch.randn(width, generator=torch.Generator("cuda").manual_seed(3), device="cuda")
        sources, wants = [], []
        for step in range(steps):
            generator = torch.Generator("cuda").manual_seed(100 * rows + step)
            xs = [
                (torch.randn(rows, width, generator=generator, device="cuda") * 4.0**r).bfloat16()
                for r in range(rank.world)
            ]
            whole = torch.randn(rows, width, generator=generator, device="cuda")
            given = torch.full((1,), 0.02 * (1 + step), device="cuda")
            made = FORMATS["fp8_static"](given)
            mine = slice(rank.rank, None, rank.world) if row_sharded else slice(None)
            want = reference.all_reduce_rms_norm(xs, weight, residual=whole, quant=made, keep_norm=True)
            assert want.residual is not None
            wants.append(want._replace(residual=want.residual[mine]))
            parts = (xs[rank.rank], whole[mine].contiguous(), torch.cat((given, given, given, given)))
            sources.append(torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]))

        def steps_in_a_row() -> list[NormOutput]:
            found = []
            for source in sources:
                produce(source, arena, 20_000)
                y = comm.all_reduce_rms_norm(
                    x, weight, residual=residual, quant=fmt, keep_norm=True, residual_layout=residual_layout
                )
                found.append(y)
            return found

        def wrong(results: list[NormOutput]) -> int:
            # The scale is an input here, and by now that of the last step.
            pairs = zip(results, wants, strict=True)
            return sum(not all(map(same, y[:3], want[:3])) for y, want in pairs)

        found = [wrong(steps_in_a_row())]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outs = steps_in_a_row()
        for _ in range(50):
            arena.fill_(0)
            for y in outs:
                poison(y, fmt)
            graph.replay()
            found.append(wrong(outs))
        return [sum(found)]


@pytest.mark.parametrize("row_sharded", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 40, 300])
def test_inputs_that_were_written_right_before_are_not_stale(ranks: Ranks, rows: int, row_sharded: bool) -> None:
    assert ranks.run(fresh_inputs, rows, row_sharded) == [[0]] * ranks.world


def chain(rank: Rank, rows: int) -> list[int]:
    """Each call takes what the one before has just written, as layers of a model do; each kernel triggers the next one
    at its start. A call that read too soon would take poison, or rows of an older replay."""
    width, length = 3072, 8
    with Communicator(backend="cuda") as comm:
        problem = Problem(rank, Spec(rows, width, residual=F32))
        assert problem.residual is not None

        def run() -> list[NormOutput]:
            x, residual, found = problem.own, problem.residual, []
            for _ in range(length):
                y = comm.all_reduce_rms_norm(x, problem.weight, residual=residual)
                x, residual = y.norm, y.residual
                found.append(y)
            return found

        wants, xs, residual = [], problem.xs, problem.residual
        for _ in range(length):
            want = reference.all_reduce_rms_norm(xs, problem.weight, residual=residual)
            assert want.norm is not None
            xs, residual = [want.norm] * rank.world, want.residual
            wants.append(want)

        wrong = sum(not equal(y, want, None) for y, want in zip(run(), wants, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outs = run()
        for turn in range(300):
            if turn % 10 == 0:
                for y in outs:
                    poison(y, None)
            graph.replay()
            if turn % 10 == 0:
                wrong += sum(not equal(y, want, None) for y, want in zip(outs, wants, strict=True))
        return [wrong]


@pytest.mark.parametrize("rows", [1, 6, 40, 300, 2600])
def test_a_chain_of_calls_sees_what_the_call_before_wrote(ranks: Ranks, rows: int) -> None:
    assert ranks.run(chain, rows) == [[0]] * ranks.world


# ---------------------------------------------------------------------------------------------------------------------
# Streams, groups, late ranks.


def two_streams(rank: Rank) -> int:
    """Calls hop between two streams; each stream delays itself now and then."""
    with Communicator(backend="cuda") as comm:
        comm.prepare()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        problems = [
            Problem(rank, spec) for spec in (Spec(5), Spec(300, 2880, F16), Spec(1, plain=True), Spec(2600))
        ] * 5
        results = []
        torch.cuda.synchronize()
        for i, problem in enumerate(problems):
            with torch.cuda.stream(streams[i % 2]):
                if i % 3 == rank.rank % 3:
                    torch.cuda._sleep(1_000_000)
                results.append(problem.run(comm))
        torch.cuda.synchronize()
        return sum(not problem.right(y) for problem, y in zip(problems, results, strict=True))


def test_calls_from_two_streams_keep_their_order(ranks: Ranks) -> None:
    assert ranks.run(two_streams) == [0] * ranks.world


def several_communicators(rank: Rank) -> int:
    """Two communicators of one group, with calls of one between calls of the other; and late ranks."""
    with Communicator(backend="cuda") as one, Communicator(backend="cuda") as other:
        wrong = 0
        for i in range(40):
            spec = Spec(1 + 37 * i % 500, dtype=F16, row_sharded=i % 3 == 0, plain=i % 5 == 0)
            problem = Problem(rank, spec)
            if i % rank.world == rank.rank:
                torch.cuda._sleep(3_000_000)
            wrong += not problem.right(problem.run((one, other)[i % 2]))
        return wrong


def test_two_communicators_and_late_ranks(ranks: Ranks) -> None:
    assert ranks.run(several_communicators) == [0] * ranks.world


def two_groups(rank: Rank) -> list[int]:
    """Two pairs of ranks and a group of all four, each process with one stream for its pair and one for all. Nothing
    orders the streams; some ranks are late. Few enough rows that the blocks of both streams have seats at once, also of
    the calls that have started early (docs/protocol.md)."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number, inside = divmod(rank.rank, 2)
    in_pair = Rank(inside, 2, rank.device_type, rank.progress)
    with Communicator(pairs[number], backend="cuda") as pair, Communicator(backend="cuda") as world:
        pair.prepare()
        world.prepare()
        works: list[tuple[Communicator, torch.cuda.Stream, list[Problem], list[NormOutput]]] = [
            (pair, torch.cuda.Stream(), [Problem(in_pair, Spec(1 + 41 * i % 23, 1536)) for i in range(60)], []),
            (world, torch.cuda.Stream(), [Problem(rank, Spec(1 + 29 * i % 23, dtype=F16)) for i in range(60)], []),
        ]
        torch.cuda.synchronize()
        for i in range(60):
            for comm, stream, problems, results in works:
                with torch.cuda.stream(stream):
                    if i % 5 == rank.rank:
                        torch.cuda._sleep(300_000)
                    results.append(problems[i].run(comm))
        torch.cuda.synchronize()
        return [
            sum(not problem.right(y) for problem, y in zip(problems, results, strict=True))
            for _, _, problems, results in works
        ]


@pytest.mark.gpu(4)
def test_two_groups_and_the_world_on_two_streams() -> None:
    with Ranks(4, "cuda") as ranks:
        assert ranks.run(two_groups) == [[0, 0]] * 4


def replays_in_expandable_segments(rank: Rank) -> list[Any]:
    found = replays(rank, 100)
    return [*found, any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())]


@pytest.mark.gpu(2)
def test_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator then maps memory that can't be exported through IPC; the workspace is not from there."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with Ranks(2, "cuda") as ranks:
        assert ranks.run(replays_in_expandable_segments) == [[0, len(mixed(2)), True]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds.


def under_thresholds(rank: Rank, folder: str) -> list[str]:
    """Whatever the thresholds are, results are the reference's."""
    most, default = limits(rank.world), DEFAULTS[rank.world]
    path = Path(folder) / f"tuning-{rank.rank}.json"
    wrong = []
    os.environ["TPFUSE_TUNING"] = str(path)
    try:
        for thresholds in (Thresholds(1, 0), most, Thresholds(30, 40), default):
            tuning.save(path, place(torch.cuda.current_device()).model, rank.world, thresholds)
            with Communicator(backend="cuda") as comm:
                path.unlink()  # a living communicator keeps what it has read
                assert comm.plan.of("all_reduce")[0].max_kib == thresholds.one_shot_kib
                for width, dtype in ((3072, BF16), (16384, F32), (8, F16)):
                    last = last_of_one_shot(thresholds, width, dtype)  # of narrow rows as many as have slots
                    for rows, like in product(
                        sorted({1, 6, 45, 300, last, last + 1} - {0}),
                        (Spec(1), Spec(1, plain=True), Spec(1, residual=None, quant="fp8_per_token")),
                    ):
                        spec = replace(like, rows=rows, width=width, dtype=dtype)
                        problem = Problem(rank, spec)
                        if not problem.right(problem.run(comm)):
                            wrong.append(f"{thresholds}: {spec}")
    finally:
        del os.environ["TPFUSE_TUNING"]
    return wrong


@pytest.mark.timeout(600)
def test_thresholds_change_no_bit(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(under_thresholds, str(tmp_path)) == [[]] * ranks.world


def other_thresholds_on_each_rank(rank: Rank, folder: str) -> str:
    path = Path(folder) / f"tuning-{rank.rank}.json"
    tuning.save(path, place(torch.cuda.current_device()).model, rank.world, Thresholds(8 + rank.rank, 128))
    os.environ["TPFUSE_TUNING"] = str(path)
    try:
        Communicator(backend="cuda").close()
    except TpfuseError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        del os.environ["TPFUSE_TUNING"]
    return ""


def test_other_thresholds_on_each_rank_are_a_mismatch(ranks: Ranks, tmp_path: Path) -> None:
    for message in ranks.run(other_thresholds_on_each_rank, str(tmp_path)):
        assert message.startswith("RankMismatch: ")
        assert "rank 1 has one_shot_kib=9, rank 0 has 8" in message


def tuned(rank: Rank) -> tune.Tuning:
    with torch.no_grad(), tune.GpuTimer(rank) as timer:
        model = place(torch.cuda.current_device()).model
        return tune.tune(rank, timer, model, rows=(1, 8, 16, 24, 32, 64, 128, 256), widths=(3072,))


@pytest.mark.timeout(600)
def test_tuning_gives_all_ranks_the_same_thresholds(fresh: Ranks) -> None:
    found = fresh.run(tuned)
    assert found == found[:1] * fresh.world
    assert 1 <= found[0].thresholds.one_shot_kib <= limits(fresh.world).one_shot_kib
    assert all(0 < us < 1000 for ways in found[0].times.values() for us in ways.values())


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, and ranks that do not come.


def too_wide(rank: Rank) -> list[str]:
    with Communicator(backend="cuda", max_hidden=20_000) as comm:
        x = torch.full((3, 16392), float(rank.rank + 1), device="cuda")
        y = comm.all_reduce(x)
        total = rank.world * (rank.world + 1) / 2
        assert bool((y == total).all())
        return [c.route.reason for c in comm.report().counters]


def test_wider_rows_than_the_kernels_take_are_served_by_collective(ranks: Ranks) -> None:
    for (reason,) in ranks.run(too_wide):
        assert reason == "cuda kernels reduce rows of up to 16384 elements; given 16392"


def no_rows(rank: Rank) -> list[int]:
    with Communicator(backend="cuda") as comm:
        found = [Problem(rank, spec) for spec in (Spec(0), Spec(0, plain=True), Spec(0, quant="mxfp8_swizzled"))]
        wrong = [not problem.right(problem.run(comm)) for problem in found]
        few = Problem(rank, Spec(1, 3072, BF16, F32, "fp8_per_token", row_sharded=True))  # most ranks have no rows
        return [sum(wrong) + (not few.right(few.run(comm)))]


def test_no_rows_launch_nothing(ranks: Ranks) -> None:
    assert ranks.run(no_rows) == [[0]] * ranks.world


def uncompiled_in_a_capture(rank: Rank) -> list[str]:
    """The first call that torch.distributed serves, and the first of a kernel. Then kernels alone, in a communicator
    that was never prepared."""
    messages = []
    x, weight = torch.ones(3, 512, device="cuda"), torch.ones(512, device="cuda")
    with Communicator(backend="cuda") as comm:
        own = comm.shard_rows(x)
        for call in (lambda: comm.gather_rows(own, len(x)), lambda: comm.all_reduce_rms_norm(x, weight)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                try:
                    call()
                except TpfuseError as error:
                    messages.append(f"{type(error).__name__}: {error}")
        comm.all_reduce_rms_norm(x, weight)  # and it goes on
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = comm.all_reduce_rms_norm(torch.cat((x, x)), weight).norm  # other rows, the same kernels
        graph.replay()
        torch.cuda.synchronize()
        assert y is not None
        messages.append(f"{bool(y.isfinite().all())}, prepared {comm._prepared}")
    return messages


def test_a_first_call_inside_a_capture_is_an_error(ranks: Ranks) -> None:
    for first, second, finite in ranks.run(uncompiled_in_a_capture):
        assert first.startswith("Unsupported: gather_rows: first call of ")
        assert "that torch.distributed serves, inside a CUDA graph capture" in first
        assert "Call prepare() on every rank before" in first
        assert second.startswith("Unsupported: all_reduce_rms_norm: the kernel for torch.float32")
        assert "Call it once with these dtypes, this width, format and top_k before the capture" in second
        assert finite == "True, prepared False"


def error_of(comm: Communicator) -> str:
    try:
        comm.prepare()
    except TpfuseError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def lonely_call(rank: Rank, absent: int, rows: int) -> tuple[str, float]:
    """All ranks but one make a call; then each asks what came of it."""
    with Communicator(backend="cuda", timeout=2.0) as comm:
        problem = Problem(rank, Spec(rows))
        problem.run(comm)  # all take part: kernels are compiled now
        torch.cuda.synchronize()
        dist.barrier()
        began = time.monotonic()
        if rank.rank == absent:
            return "", 0.0
        problem.run(comm)
        torch.cuda.synchronize()
        return error_of(comm), time.monotonic() - began


@pytest.mark.parametrize("rows", [6, 90, 300])  # one-shot, two-shot with rows split and whole
def test_a_rank_that_does_not_come_is_an_error_that_names_it(fresh: Ranks, rows: int) -> None:
    absent = fresh.world - 1
    results: list[Any] = fresh.run(lonely_call, absent, rows)
    for message, seconds in results[:absent]:
        assert message.startswith("PeerTimeout: ")
        assert f"rank {absent} did not" in message
        assert 1.5 < seconds < 25


def call_until_one_dies(rank: Rank, folder: str) -> None:
    """The last rank's process is killed after a second; the others go on calling and write down what they get."""
    with Communicator(backend="cuda", timeout=2.0) as comm:
        problems = [Problem(rank, spec) for spec in (Spec(6), Spec(90), Spec(40, row_sharded=True, residual=F32))]
        began = time.monotonic()
        try:
            while time.monotonic() - began < 60:
                for problem in problems:
                    problem.run(comm)
                    torch.cuda.synchronize()
                if rank.rank == rank.world - 1 and time.monotonic() - began > 5:
                    os.kill(os.getpid(), signal.SIGKILL)
        except TpfuseError as error:
            (Path(folder) / str(rank.rank)).write_text(f"{type(error).__name__}: {error}")


def test_a_killed_rank_gives_peer_timeout_on_the_others(fresh: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="died with exit code -9"):
        fresh.run(call_until_one_dies, str(tmp_path))
    for rank in range(fresh.world - 1):
        message = (tmp_path / str(rank)).read_text()
        assert message.startswith("PeerTimeout: ")
        assert f"rank {fresh.world - 1} did not" in message


# ---------------------------------------------------------------------------------------------------------------------
# Memory accesses, as a tool sees them.


def few_calls(rank: Rank) -> list[int]:
    """Both algorithms, with and without split rows, whole vectors and a norm before the gather."""
    specs = (
        Spec(3), Spec(3, 100, F16, F32, offset=3), Spec(70, 16384), Spec(140, 100, F32), Spec(300, 3072, plain=True),
        Spec(70, 16384, BF16, None, "nvfp4_swizzled"), Spec(140, 2688, BF16, F32, "fp8_per_token", row_sharded=True),
    )  # fmt: skip
    with Communicator(backend="cuda", timeout=200.0) as comm:
        problems = [Problem(rank, spec) for spec in specs]
        return [int(problem.right(problem.run(comm))) for problem in problems]


@pytest.mark.gpu(2)
@pytest.mark.timeout(900)
def test_memcheck() -> None:
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    # Only our kernels: torch's and NCCL's are not what is tested, and they probe for what a driver lacks.
    options = "--tool memcheck --target-processes all --kernel-regex kns=reduce_ --report-api-errors no"
    command = [sanitizer, *options.split(), "--error-exitcode", "9", sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert f"right: {[[1] * 7] * 2}" in output, output
    assert "ERROR SUMMARY: 0 errors" in output, output


if __name__ == "__main__":  # what test_memcheck runs
    with Ranks(2, "cuda") as started:
        print("right:", started.run(few_calls))
