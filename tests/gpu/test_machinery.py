"""Compiling, loading, launching and the shared workspace on real GPUs, with the smallest kernel that needs all of it.

The kernel adds one number of every rank: a packet {number, step} to each peer, a bounded wait for theirs. The step
comes from a counter in device memory, so replays of a graph just work.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tpfuse.agreement import Board
from tpfuse.backends.cuda import check, driver, on_device
from tpfuse.backends.cuda.compile import Function, arch_of, compile_kernel, load
from tpfuse.backends.cuda.launch import Launcher
from tpfuse.backends.cuda.workspace import ErrorRecord, Fill, Workspace, availability
from tpfuse.errors import InvalidArgument, TpfuseError, Unsupported
from tpfuse.launch import Rank, Ranks

SOURCE = """
#include "platform.h"
namespace tpfuse {
struct Args {
  u64* spaces[8];
  Vec16* error;
  u32 rank, world;
  const u32* x;
  u32* sum;
  u32* counter;
  u64 timeout_ns;
};
// One warp, one lane a rank. Slots: two generations of one packet a rank.
TPF_KERNEL(32, 1) void add_numbers(TPF_GRID_CONSTANT const Args a) {
  dependency_wait();
  u32 peer = lane(), step = load_global(a.counter) + 1, x = load_global(a.x), number = 0;
  bool late = false;
  if (peer < a.world) {
    u32 slots = step % 2 * 8;
    store_system(a.spaces[peer] + slots + a.rank, u64(x) << 32 | step);
    u64 start = clock_ns(), packet = 0;
    while (!late) {
      packet = load_system(a.spaces[a.rank] + slots + peer);
      if (u32(packet) == step) break;
      u64 waited = clock_ns() - start;
      late = waited > a.timeout_ns;
      if (late) {
        store_system(a.error + 1, Vec16{{block_index(), step, u32(waited), u32(waited >> 32)}});
        store_system(a.error, Vec16{{1, 42, a.rank, peer}});
      }
    }
    number = u32(packet >> 32);
  }
  sync_warp();
  for (u32 mask = 16; mask > 0; mask /= 2) number += shuffle_xor(number, mask);
  late = any(late);
  if (lane() == 0) {
    store_global(a.counter, step);
    if (!late) store_global(a.sum, number);
  }
}
}
"""
LAYOUT = "4Q"  # x, sum, counter, timeout_ns
COUNTER = 4096  # offset of the step counter in a workspace
SIZE = 8192
SECOND = 1_000_000_000


class Adder:
    """The kernel with all that it needs, on one rank."""

    def __init__(self, rank: Rank, name: str, *, pdl: bool, fills: tuple[Fill, ...] = ()) -> None:
        assert dist.group.WORLD is not None
        self.device, self.board = torch.cuda.current_device(), Board(dist.group.WORLD, f"test-machinery/{name}")
        assert availability(self.board, self.device, 30.0) is None
        self.space = Workspace(self.board, self.device, SIZE, 30.0, fills=fills)
        assert self.space.bases[rank.rank] == self.space.base
        assert len(set(self.space.bases)) == rank.world
        bases = self.space.bases + (0,) * (8 - rank.world)
        fixed = struct.pack("9Q2I", *bases, self.space.error_pointer, rank.rank, rank.world)
        self.start = Launcher(adder(self.device), LAYOUT, fixed=fixed, block=32, pdl=pdl)
        self.x = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.sum = torch.zeros(1, dtype=torch.int32, device="cuda")

    def __call__(self, timeout_ns: int = 20 * SECOND) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        counter = self.space.base + COUNTER
        self.start(1, stream, self.x.data_ptr(), self.sum.data_ptr(), counter, timeout_ns)


def adder(device: int) -> Function:
    return load(compile_kernel(SOURCE, "tpfuse::add_numbers", arch=arch_of(device)), device)


def words(device: int, pointer: int, count: int) -> list[int]:
    """32-bit words of device memory."""
    found = (ctypes.c_uint32 * count)()
    with on_device(device) as cuda:
        check("cuMemcpyDtoH", cuda.cuMemcpyDtoH(ctypes.addressof(found), pointer, ctypes.sizeof(found)))
    return list(found)


def free_bytes() -> int:
    return int(check("cuMemGetInfo", driver().cuMemGetInfo())[0])


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.gpu(2)), pytest.param(4, marks=pytest.mark.gpu(4))])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param, "cuda") as started:
        yield started


def add_eagerly(rank: Rank, pdl: bool) -> list[int]:
    add = Adder(rank, f"eager-{pdl}", pdl=pdl)
    sums = []
    for i in range(100):
        add.x.fill_(1000 * rank.rank + i)  # the kernel must see this: it reads x after its dependency
        add()
        sums.append(add.sum.clone())
    torch.cuda.synchronize()
    assert add.space.read_error() is None
    assert words(add.device, add.space.base + COUNTER, 1) == [100]
    add.space.close()
    return [int(total) for total in sums]


@pytest.mark.parametrize("pdl", [False, True])
def test_peers_exchange_through_the_workspace(ranks: Ranks, pdl: bool) -> None:
    expected = [sum(1000 * rank + i for rank in range(ranks.world)) for i in range(100)]
    assert ranks.run(add_eagerly, pdl) == [expected] * ranks.world


def add_in_a_graph(rank: Rank, pdl: bool) -> list[list[int]]:
    add = Adder(rank, f"graph-{pdl}", pdl=pdl)
    sums = torch.zeros(5, dtype=torch.int32, device="cuda")
    add.x.fill_(rank.rank)
    add()  # an eager call before, between and after replays: the counter goes on
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(5):
            add.x.add_(1)
            add()
            sums[i].copy_(add.sum[0])
    found = []
    for _ in range(20):
        graph.replay()
        found.append(sums.tolist())
        add()
    torch.cuda.synchronize()
    assert add.space.read_error() is None
    assert words(add.device, add.space.base + COUNTER, 1) == [1 + 20 * 6]
    del graph
    add.space.close()
    return found


@pytest.mark.parametrize("pdl", [False, True])
def test_a_captured_launch_replays(ranks: Ranks, pdl: bool) -> None:
    own = ranks.world * (ranks.world - 1) // 2
    expected = [[own + ranks.world * (5 * replay + i + 1) for i in range(5)] for replay in range(20)]
    assert ranks.run(add_in_a_graph, pdl) == [expected] * ranks.world


def wait_for_a_missing_rank(rank: Rank) -> ErrorRecord | None:
    add = Adder(rank, "missing", pdl=True)
    if rank.rank != 1:
        add(timeout_ns=SECOND // 20)
    torch.cuda.synchronize()
    record = add.space.read_error()
    add.space.close()
    assert add.space.read_error() is None
    return record


def test_a_rank_that_does_not_come_is_in_the_error_record(ranks: Ranks) -> None:
    records = ranks.run(wait_for_a_missing_rank)
    assert records[1] is None
    for rank, record in enumerate(records):
        if rank != 1:
            assert record[:5] == (42, rank, 1, 0, 1)  # op, rank, peer, block, step
            assert SECOND // 20 <= record.waited_ns < 10 * SECOND


def look_at_new_memory(rank: Rank) -> list[int]:
    add = Adder(rank, "fills", pdl=False, fills=(Fill(16, 8, 0x80008000), Fill(SIZE - 4, 4, 7)))
    found = words(add.device, add.space.base, SIZE // 4)
    seen = [words(add.device, base, SIZE // 4) for base in add.space.bases]
    assert seen == [found] * rank.world
    add.space.close()
    return found


def test_new_memory_is_zero_but_for_its_fills(ranks: Ranks) -> None:
    expected = [0] * (SIZE // 4)
    expected[4:6] = [0x80008000] * 2
    expected[-1] = 7
    assert ranks.run(look_at_new_memory) == [expected] * ranks.world


def ask_for_too_much(rank: Rank) -> str:
    assert dist.group.WORLD is not None
    board = Board(dist.group.WORLD, "test-machinery/too-much")
    with pytest.raises(Unsupported) as caught:
        Workspace(board, torch.cuda.current_device(), 1 << 46 if rank.rank == 1 else 1 << 20, 30.0)
    return str(caught.value)


def test_one_rank_without_memory_is_everyones_reason(ranks: Ranks) -> None:
    reasons = ranks.run(ask_for_too_much)
    assert len(set(reasons)) == 1
    assert reasons[0].startswith("rank 1: cuMemAlloc of 70368744177664 bytes failed: CUDA_ERROR_")


def come_and_go(rank: Rank) -> int:
    """Bytes that are gone after some workspaces of 1 GiB."""
    assert dist.group.WORLD is not None
    device = torch.cuda.current_device()
    torch.zeros(1, device="cuda")
    left = []
    with on_device(device):
        for i in range(4):
            Workspace(Board(dist.group.WORLD, f"test-machinery/cycle-{i}"), device, 1 << 30, 30.0).close()
            left.append(free_bytes())
    return left[0] - left[-1]


def test_closing_gives_the_memory_back(ranks: Ranks) -> None:
    """A peer's share is back a moment later, hence the margin."""
    assert max(ranks.run(come_and_go)) < 1 << 30


@pytest.mark.gpu
def test_what_the_driver_knows_of_a_kernel() -> None:
    function = adder(0)
    assert function.argument_bytes == 8 * 8 + 8 + 8 + struct.calcsize(LAYOUT)
    assert adder(0) is function
    with pytest.raises(InvalidArgument, match="takes a struct of 112 bytes"):
        Launcher(function, LAYOUT, fixed=bytes(72), block=32)


@pytest.mark.gpu
def test_a_launch_that_cuda_refuses() -> None:
    start = Launcher(adder(0), "14Q", block=32)
    with on_device(0), pytest.raises(TpfuseError, match=r"add_numbers failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        start(0, 0, *[0] * 14)
