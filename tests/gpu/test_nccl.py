"""The `collective` backend over NCCL: asynchronous, so a rank that does not come is found by the watchdog, and calls
may be captured into CUDA graphs. The numbers are `tpfuse check --device cuda`'s."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tpfuse import Communicator, reference
from tpfuse.errors import TpfuseError
from tpfuse.launch import Rank, Ranks

pytestmark = pytest.mark.gpu(2)

WIDTH = 256


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """Two ranks of their own: the tests break their groups."""
    with Ranks(2, "cuda") as running:
        yield running


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except TpfuseError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rows(count: int, rank: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rank)
    return torch.randn(count, WIDTH, generator=generator, device="cuda").bfloat16() * 10**rank


def call_with_rows(rank: Rank, counts: list[int], timeout: float) -> tuple[str, float]:
    """Each rank calls all_reduce with its own number of rows (0: not at all), then waits for the outcome."""
    with Communicator(backend="collective", timeout=timeout) as comm:
        comm.prepare()
        began = time.monotonic()
        if counts[rank.rank]:
            comm.all_reduce(rows(counts[rank.rank], rank.rank))
        torch.cuda.synchronize()
        deadline = time.monotonic() + 4 * timeout
        message = ""
        while not message and time.monotonic() < deadline and counts[rank.rank]:
            message = error_of(comm.check)
            time.sleep(0.05)
        return message, time.monotonic() - began


def test_rows_that_differ_end_in_an_error_and_not_in_a_hang(ranks: Ranks) -> None:
    # Far apart in size, so that NCCL can't mistake one for the other.
    results = ranks.run(call_with_rows, [3, 40_000], 2.0)
    assert any("rank 1 is in all_reduce(40000 rows" in message for message, _ in results), results
    assert all(seconds < 20 for _, seconds in results)


def test_a_rank_that_does_not_come_is_named(ranks: Ranks) -> None:
    (message, seconds), _ = ranks.run(call_with_rows, [3, 0], 2.0)
    assert message.startswith("PeerTimeout: ")
    assert "rank 1 did not arrive within 2 s" in message
    assert seconds < 15


def capture_without_prepare(rank: Rank) -> str:
    with Communicator(backend="collective") as comm:
        x = rows(3, rank.rank)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            return error_of(lambda: comm.all_reduce(x))


def test_first_use_inside_a_capture_is_an_error(ranks: Ranks) -> None:
    for message in ranks.run(capture_without_prepare):
        assert "inside a CUDA graph capture. Call prepare()" in message


def replay(rank: Rank) -> tuple[bool, int]:
    """Capture all-reduce + norm, replay it on new data, compare with the reference."""
    with Communicator(backend="collective") as comm:
        comm.prepare()
        x, weight = rows(5, rank.rank), torch.ones(WIDTH, device="cuda")
        comm.all_reduce_rms_norm(x, weight, residual=x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = comm.all_reduce_rms_norm(x, weight, residual=x)
        x.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        want = reference.all_reduce_rms_norm([rows(5, r) * 2 for r in range(rank.world)], weight, residual=x)
        assert out.norm is not None
        assert want.norm is not None
        dist.barrier()
        captured = sum(counter.captured for counter in comm.report().counters)
        return torch.allclose(out.norm.float(), want.norm.float(), rtol=2**-7, atol=0), captured


def test_calls_can_be_captured_and_replayed(ranks: Ranks) -> None:
    assert ranks.run(replay) == [(True, 1)] * 2
