"""`rms_norm` and `qk_rms_norm` of the cuda backend on real GPUs: bit for bit the reference, eager and replayed,
whatever else runs beside it, and an error instead of a hang when a rank does not come."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import Communicator, Rope, check, reference
from tpfuse.errors import TpfuseError
from tpfuse.launch import Rank, RankFailed, Ranks

GUARD = 1234.0


@pytest.fixture(scope="module", params=[pytest.param(w, marks=pytest.mark.gpu(w)) for w in (2, 3, 4)])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param, "cuda") as started:
        yield started


class Problem:
    """Rows of q and k of all ranks, of very different scale, and what this rank must get."""

    def __init__(self, rank: Rank, rows: int, n: int = 1536, m: int = 256, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator("cuda").manual_seed(1000 * rows + n)
        qkv = [torch.randn(rows, n + 2 * m, generator=generator, device="cuda") * 4.0**r for r in range(rank.world)]
        self.qkv = [x.to(dtype) for x in qkv]
        self.weights = [torch.randn(n + m, generator=generator, device="cuda") for _ in range(rank.world)]
        self.n, self.m, self.rank = n, m, rank.rank
        qs, ks = [x[:, :n] for x in self.qkv], [x[:, n : n + m] for x in self.qkv]
        q_weights, k_weights = [w[:n] for w in self.weights], [w[n:] for w in self.weights]
        self.want = reference.qk_rms_norm(qs, ks, q_weights, k_weights)[rank.rank]
        self.own = self.qkv[rank.rank].clone()

    def run(self, comm: Communicator, x: Tensor, out: Tensor) -> None:
        n, end = self.n, self.n + self.m
        w = self.weights[self.rank]
        comm.qk_rms_norm(x[:, :n], x[:, n:end], w[:n], w[n:], out=(out[:, :n], out[:, n:end]))

    def right(self, out: Tensor) -> bool:
        """Every element is the reference's, and v, which lies behind k in the same rows, is what it was."""
        n, end = self.n, self.n + self.m
        whole = torch.equal(out[:, :n], self.want[0]) and torch.equal(out[:, n:end], self.want[1])
        return whole and bool((out[:, end:] == GUARD).all())


def guarded(x: Tensor) -> Tensor:
    return torch.full_like(x, GUARD)


def check_against_the_reference(rank: Rank) -> list[str]:
    with Communicator(backend="cuda") as comm:
        outcomes = [check.run_case(comm, case) for case in check.cases() if case.op in ("rms_norm", "qk_rms_norm")]
        for counter in comm.report().counters:
            assert counter.route.backend == "cuda" or "cuda kernels rotate heads of" in counter.route.reason
        return [f"{o.case}: {o.error or o.where}" for o in outcomes if not o.ok]


def test_every_case_of_the_check_is_bit_for_bit_the_reference(ranks: Ranks) -> None:
    assert ranks.run(check_against_the_reference) == [[]] * ranks.world


def rotated(rank: Rank) -> list[str]:
    """qk_rms_norm with a rotation, few and many rows, against the reference; and what it reports for a head of 96."""
    wrong = []
    with Communicator(backend="cuda") as comm:
        for rows, dtype, (head_dim, rotary_dim), interleaved in product(
            (1, 5, 300, 2500), check.DTYPES, ((128, 64), (64, 64), (256, 32)), (False, True)
        ):
            problem = Problem(rank, rows, n=1536, m=256, dtype=dtype)
            n, end = problem.n, problem.n + problem.m
            angles = torch.rand(4096, rotary_dim // 2, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
            positions = torch.randint(4096, (rows,), generator=torch.Generator("cuda").manual_seed(2), device="cuda")
            rope = Rope(angles.cos(), angles.sin(), positions, head_dim, rotary_dim, interleaved)
            qs, ks = [x[:, :n] for x in problem.qkv], [x[:, n:end] for x in problem.qkv]
            q_weights, k_weights = [w[:n] for w in problem.weights], [w[n:] for w in problem.weights]
            want = reference.qk_rms_norm(qs, ks, q_weights, k_weights, rope=rope)[rank.rank]
            w = problem.weights[rank.rank]
            got = comm.qk_rms_norm(qs[rank.rank], ks[rank.rank], w[:n], w[n:], rope=rope)
            if not (torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])):
                wrong.append(f"{rows} rows, {dtype}, {head_dim}, {rotary_dim}, {interleaved}")
        assert comm.report().effective_mode == "fused"
        angles = torch.rand(8, 48, device="cuda")
        odd = Rope(angles, angles, torch.zeros(3, dtype=torch.int64, device="cuda"), 96, 96)
        x, w = torch.ones(3, 192, device="cuda"), torch.ones(192, device="cuda")
        comm.qk_rms_norm(x, x, w, w, rope=odd)
        assert comm.report().effective_mode == "mixed"
        assert any("given head_dim=96" in c.route.reason for c in comm.report().counters)
    return wrong


def test_rotated_rows_are_bit_for_bit_the_reference(ranks: Ranks) -> None:
    assert ranks.run(rotated) == [[]] * ranks.world


def replays(rank: Rank, times: int) -> list[int]:
    """A graph of calls of mixed sizes on one workspace, replayed many times on outputs that are poisoned each time."""
    with Communicator(backend="cuda") as comm:
        problems = [Problem(rank, rows) for rows in (1, 700, 3, 2500, 64, 1, 129)]
        outs = [guarded(p.own) for p in problems]
        for problem, out in zip(problems, outs, strict=True):
            problem.run(comm, problem.own, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for problem, out in zip(problems, outs, strict=True):
                problem.run(comm, problem.own, out)
        wrong = 0
        for turn in range(times):
            if turn % 100 == 0:
                for out in outs:
                    out.fill_(GUARD)
            graph.replay()
            if turn % 100 == 0:
                problems[1].run(comm, problems[1].own, outs[1])  # an eager call between replays
                wrong += sum(not p.right(out) for p, out in zip(problems, outs, strict=True))
        torch.cuda.synchronize()
        wrong += sum(not p.right(out) for p, out in zip(problems, outs, strict=True))
        return [wrong, sum(c.captured for c in comm.report().counters)]


def test_thousands_of_replays_of_mixed_sizes(ranks: Ranks) -> None:
    assert ranks.run(replays, 2000) == [[0, 7]] * ranks.world


def guard_bands(rank: Rank) -> list[str]:
    """Outputs lie in the middle of poisoned memory: what surrounds them stays as it is, and so do the inputs."""
    wrong = []
    with Communicator(backend="cuda") as comm:
        for rows, (n, m), dtype, band in product((1, 6, 2100), ((1536, 256), (100, 36), (7, 1)), check.DTYPES, (8, 3)):
            problem = Problem(rank, rows, n, m, dtype)
            width = problem.own.shape[1]
            space = torch.full((rows + 2, width + 2 * band), GUARD, dtype=dtype, device="cuda")
            out = space[1:-1, band:-band]
            problem.run(comm, problem.own, out)
            right = problem.right(out) and torch.equal(problem.own, problem.qkv[rank.rank])
            out.fill_(GUARD)
            if not (right and bool((space == GUARD).all())):
                wrong.append(f"{rows} rows of {n} + {m}, {dtype}, band of {band}")
    return wrong


def test_nothing_but_the_outputs_is_written(ranks: Ranks) -> None:
    assert ranks.run(guard_bands) == [[]] * ranks.world


def in_place(rank: Rank) -> bool:
    with Communicator(backend="cuda") as comm:
        problem = Problem(rank, 40)
        x = problem.own.clone()
        x[:, problem.n + problem.m :] = GUARD
        problem.run(comm, x, x)
        return problem.right(x)


def test_in_place(ranks: Ranks) -> None:
    assert ranks.run(in_place) == [True] * ranks.world


def two_streams(rank: Rank) -> int:
    """Calls hop between two streams; each stream delays itself now and then."""
    with Communicator(backend="cuda") as comm:
        comm.prepare()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        problems = [Problem(rank, rows) for rows in (5, 300, 1, 2200)] * 5
        outs = [guarded(p.own) for p in problems]
        torch.cuda.synchronize()
        for i, (problem, out) in enumerate(zip(problems, outs, strict=True)):
            with torch.cuda.stream(streams[i % 2]):
                if i % 3 == rank.rank % 3:
                    torch.cuda._sleep(1_000_000)
                problem.run(comm, problem.own, out)
        torch.cuda.synchronize()
        return sum(not p.right(out) for p, out in zip(problems, outs, strict=True))


def test_calls_from_two_streams_keep_their_order(ranks: Ranks) -> None:
    assert ranks.run(two_streams) == [0] * ranks.world


def several_communicators(rank: Rank) -> int:
    """Two communicators of one group, with calls of one between calls of the other; and late ranks."""
    with Communicator(backend="cuda") as one, Communicator(backend="cuda") as other:
        wrong = 0
        for i in range(30):
            problem = Problem(rank, 1 + 37 * i % 500, dtype=torch.float16)
            out = guarded(problem.own)
            if i % rank.world == rank.rank:
                torch.cuda._sleep(3_000_000)
            problem.run((one, other)[i % 2], problem.own, out)
            wrong += not problem.right(out)
        return wrong


def test_two_communicators_and_late_ranks(ranks: Ranks) -> None:
    assert ranks.run(several_communicators) == [0] * ranks.world


def two_groups(rank: Rank) -> list[int]:
    """Two pairs of ranks and a group of all four, each process with one stream for its pair and one for all. Nothing
    orders the streams; some ranks are late. Few enough rows that the blocks of both calls have seats at once
    (docs/protocol.md)."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number, place = divmod(rank.rank, 2)
    inside = Rank(place, 2, rank.device_type, rank.progress)
    with Communicator(pairs[number], backend="cuda") as pair, Communicator(backend="cuda") as world:
        pair.prepare()
        world.prepare()
        works = [
            (pair, torch.cuda.Stream(), [Problem(inside, 1 + 41 * i % 400, n=1536 + 512 * number) for i in range(60)]),
            (world, torch.cuda.Stream(), [Problem(rank, 1 + 29 * i % 400, dtype=torch.float16) for i in range(60)]),
        ]
        outs = [[guarded(problem.own) for problem in problems] for _, _, problems in works]
        torch.cuda.synchronize()
        for i in range(60):
            for (comm, stream, problems), results in zip(works, outs, strict=True):
                with torch.cuda.stream(stream):
                    if i % 5 == rank.rank:
                        torch.cuda._sleep(300_000)
                    problems[i].run(comm, problems[i].own, results[i])
        torch.cuda.synchronize()
        return [
            sum(not problem.right(out) for problem, out in zip(problems, results, strict=True))
            for (_, _, problems), results in zip(works, outs, strict=True)
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
        assert ranks.run(replays_in_expandable_segments) == [[0, 7, True]] * 2


def few_calls(rank: Rank) -> list[int]:
    """Both kernels, with whole vectors and without."""
    with Communicator(backend="cuda", timeout=200.0) as comm:
        problems = [Problem(rank, rows, n, m) for rows in (5, 2100) for n, m in ((1536, 256), (100, 36))]
        outs = [guarded(problem.own) for problem in problems]
        for problem, out in zip(problems, outs, strict=True):
            problem.run(comm, problem.own, out)
        return [int(problem.right(out)) for problem, out in zip(problems, outs, strict=True)]


@pytest.mark.gpu(2)
@pytest.mark.timeout(900)
def test_memcheck() -> None:
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    # Only our kernels: torch's and NCCL's are not what is tested, and they probe for what a driver lacks.
    options = "--tool memcheck --target-processes all --kernel-regex kns=norm_by --report-api-errors no"
    command = [sanitizer, *options.split(), "--error-exitcode", "9", sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "right: [[1, 1, 1, 1], [1, 1, 1, 1]]" in output, output
    assert "ERROR SUMMARY: 0 errors" in output, output


def uncompiled_in_a_capture(rank: Rank) -> str:
    with Communicator(backend="cuda") as comm:
        comm.prepare()
        x, weight = torch.ones(3, 512, device="cuda"), torch.ones(512, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                comm.rms_norm(x, weight)
            except TpfuseError as error:
                return str(error)
        return ""


def test_a_kernel_that_is_not_compiled_yet_is_an_error_inside_a_capture(ranks: Ranks) -> None:
    for message in ranks.run(uncompiled_in_a_capture):
        assert "Call it once with this dtype and these widths, and as many rows, before the capture" in message


def lonely_call(rank: Rank, absent: int) -> tuple[str, float]:
    """All ranks but one make a call; then each asks what came of it."""
    with Communicator(backend="cuda", timeout=2.0) as comm:
        problem = Problem(rank, 6)
        out = guarded(problem.own)
        problem.run(comm, problem.own, out)  # all take part: kernels are compiled now
        torch.cuda.synchronize()
        dist.barrier()
        began = time.monotonic()
        if rank.rank == absent:
            return "", 0.0
        problem.run(comm, problem.own, out)
        torch.cuda.synchronize()
        return error_of(comm), time.monotonic() - began


def error_of(comm: Communicator) -> str:
    try:
        comm.prepare()
    except TpfuseError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rows_that_differ(rank: Rank) -> str:
    with Communicator(backend="cuda", timeout=2.0) as comm:
        problem = Problem(rank, 3 if rank.rank == 0 else 9)
        problem.run(comm, problem.own, guarded(problem.own))
        torch.cuda.synchronize()
        return error_of(comm)


@pytest.fixture(params=[pytest.param(w, marks=pytest.mark.gpu(w)) for w in (2, 4)])
def fresh(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Ranks of their own, for what leaves a rank behind."""
    with Ranks(request.param, "cuda") as started:
        yield started


def test_a_rank_that_does_not_come_is_an_error_that_names_it(fresh: Ranks) -> None:
    results: list[Any] = fresh.run(lonely_call, fresh.world - 1)
    for message, seconds in results[:-1]:
        assert message.startswith("PeerTimeout: ")
        assert f"rank {fresh.world - 1} did not" in message
        assert 1.5 < seconds < 15


def test_rows_that_differ_between_ranks_are_an_error(fresh: Ranks) -> None:
    messages: list[str] = fresh.run(rows_that_differ)
    assert any(m.startswith(("PeerTimeout: ", "RankMismatch: ")) for m in messages), messages


def call_until_one_dies(rank: Rank, folder: str) -> None:
    """The last rank's process is killed after a second; the others go on calling and write down what they get."""
    with Communicator(backend="cuda", timeout=2.0) as comm:
        problem = Problem(rank, 6)
        out = guarded(problem.own)
        began = time.monotonic()
        try:
            while time.monotonic() - began < 60:
                problem.run(comm, problem.own, out)
                torch.cuda.synchronize()
                if rank.rank == rank.world - 1 and time.monotonic() - began > 1:
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


if __name__ == "__main__":  # what test_memcheck runs
    with Ranks(2, "cuda") as started:
        print("right:", started.run(few_calls))
