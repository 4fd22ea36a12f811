"""The shared workspace and the launcher, as far as they can be shown without a GPU.

How ranks judge their facts, how they agree when one of them fails, in which order memory is given back, what a launch
hands to the driver, and that structures are as CUDA has them.

For the order of things the driver is replaced by one that writes down what it is asked; the ranks are threads.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpfuse.agreement import Board
from tpfuse.backends import cuda
from tpfuse.backends.cuda import launch, workspace
from tpfuse.backends.cuda.compile import Function
from tpfuse.backends.cuda.launch import LaunchAttribute, LaunchConfig, Launcher
from tpfuse.backends.cuda.workspace import ErrorRecord, Fill, Place, Record, Workspace, availability, judge
from tpfuse.errors import InvalidArgument, PeerTimeout, RankMismatch, TpfuseError, Unsupported
from tpfuse.launch import Rank

H200 = "NVIDIA H200 with 132 multiprocessors"


def places(world: int) -> dict[int, Place]:
    """A healthy machine."""
    everyone = {f"GPU-{rank}": True for rank in range(world)}
    return {
        rank: Place("", "here", rank, f"GPU-{rank}", H200, {u: True for u in everyone if u != f"GPU-{rank}"})
        for rank in range(world)
    }


@pytest.mark.parametrize("world", [1, 2, 8])
def test_a_healthy_machine(world: int) -> None:
    assert judge(places(world)) is None


def test_no_peer_access_in_one_direction() -> None:
    found = places(4)
    found[2] = replace(found[2], reach={**found[2].reach, "GPU-0": False})
    assert judge(found) == "no peer access between rank 0 (GPU 0) and rank 2 (GPU 2)"


def test_a_hidden_gpu_counts_as_reachable() -> None:
    assert judge({rank: replace(where, gpu=0, reach={}) for rank, where in places(4).items()}) is None


def test_what_rules_peer_access_out() -> None:
    found = places(4)
    assert judge({**found, 3: replace(found[3], host="there")}) == (
        "rank 0 and rank 3 are on different hosts (here and there)"
    )
    assert judge({**found, 3: replace(found[3], uuid="GPU-1")}) == "rank 1 and rank 3 share one GPU (GPU-1)"
    assert judge({**found, 1: replace(found[1], model="NVIDIA H100 with 114 multiprocessors")}) == (
        f"rank 0 has {H200}, rank 1 has NVIDIA H100 with 114 multiprocessors; the kernels need equal GPUs"
    )
    assert judge({**found, 2: Place("no driver"), 3: Place("no package")}) == "rank 2: no driver"
    assert judge(places(9)) == "9 ranks; peer access serves up to 8"


def test_the_verdict_does_not_depend_on_the_order_of_arrival() -> None:
    found = places(4)
    found[1] = replace(found[1], reach={**found[1].reach, "GPU-3": False, "GPU-2": False})
    assert (
        judge(found)
        == judge(dict(reversed(found.items())))
        == ("no peer access between rank 1 (GPU 1) and rank 2 (GPU 2)")
    )


def test_nothing_is_needed_to_import_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    cuda.driver.cache_clear()
    assert "pip install tpfuse[cuda]" in (cuda.missing() or "")
    assert workspace.place(0) == Place(error=cuda.missing() or "")
    with pytest.raises(Unsupported, match="pip install"):
        cuda.driver()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver, as far as place() asks it."""
    answers = types.SimpleNamespace(cuDeviceGetCount=lambda: (0, 1), cuDeviceGetName=lambda *_: (0, b"H200\0"))
    for name, stand_in in {
        "missing": lambda: None,
        "driver": lambda: answers,
        "handle": lambda device: device,
        "gpu_uuid": lambda device: f"GPU-{device}",
        "attribute": lambda *_: 132,
        "arch_of": lambda _: "sm_90a",
    }.items():
        monkeypatch.setattr(workspace, name, stand_in)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)


@pytest.mark.usefixtures("gpu")
def test_peer_access_that_the_user_has_switched_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not workspace.place(0).error
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert workspace.place(0).error.startswith("NCCL_P2P_DISABLE=1 is set")


@pytest.mark.usefixtures("gpu")
def test_kernels_that_could_not_be_loaded_later_are_told_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o770)
    monkeypatch.setenv("TPFUSE_CACHE_DIR", str(folder))
    assert "can be written by others (mode 770): chmod go-w" in workspace.place(0).error
    monkeypatch.setenv("TPFUSE_CACHE_DIR", "/proc/nowhere/kernels")  # not kept then, which is a warning
    assert not workspace.place(0).error


def ask(rank: Rank, declining: int) -> str | None:
    import torch.distributed as dist

    assert dist.group.WORLD is not None
    board = Board(dist.group.WORLD, f"test-workspace/{declining}")
    if rank.rank == declining:
        workspace.decline(board, "has other plans")
        return None
    return availability(board, 0, 20.0)


@pytest.mark.parametrize("declining", [-1, 1])
def test_ranks_agree_through_the_store(on_ranks: Callable[..., list[Any]], declining: int) -> None:
    """Without GPUs no rank can; with GPUs these ranks share one. Both are reasons, the same on every rank."""
    verdicts = [verdict for rank, verdict in enumerate(on_ranks(2, ask, declining)) if rank != declining]
    assert len(set(verdicts)) == 1
    assert verdicts[0]
    if declining >= 0:
        assert verdicts[0] in ("rank 1: has other plans", f"rank 0: {cuda.missing()}")


class Postings:
    """The board's wall, for ranks that are threads."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.pinned: dict[tuple[str, int], str] = {}


class ThreadBoard(Board):
    def __init__(self, wall: Postings, rank: int, world: int) -> None:
        self.rank, self.world, self._wall = rank, world, wall

    def pin(self, topic: str, message: Mapping[str, object]) -> None:
        with self._wall.changed:
            self._wall.pinned[topic, self.rank] = json.dumps(message)
            self._wall.changed.notify_all()

    def read(self, topic: str, seconds: float) -> dict[int, dict[str, object]]:
        deadline = time.monotonic() + seconds
        wanted = [(topic, rank) for rank in range(self.world)]
        with self._wall.changed:
            self._wall.changed.wait_for(
                lambda: all(key in self._wall.pinned for key in wanted), deadline - time.monotonic()
            )
            return {key[1]: json.loads(self._wall.pinned[key]) for key in wanted if key in self._wall.pinned}


class Driver:
    """One driver for all ranks: a device's memory starts at (device + 1) << 40, and is mapped at that plus (1 << 50).
    `broken` names calls that fail, as (device, call)."""

    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP, CU_IPC_HANDLE_SIZE = 1, 2, 64
    CUipcMem_flags = types.SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=1)
    CUresult = types.SimpleNamespace(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED=704)

    def __init__(self) -> None:
        self.current = threading.local()
        self.calls: list[tuple[Any, ...]] = []
        self.broken: set[tuple[int, str]] = set()
        self.host: dict[int, Any] = {}

    class CUipcMemHandle:
        def __init__(self) -> None:
            self.bytes = (ctypes.c_char * 64)()

        def getPtr(self) -> int:
            return ctypes.addressof(self.bytes)

    def note(self, call: str, *values: object) -> int:
        device = self.current.device
        self.calls.append((device, call, *values))
        return 719 if (device, call) in self.broken else 0

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        buffer = (ctypes.c_char * size).from_buffer_copy(b"\xff" * size)
        self.host[ctypes.addressof(buffer)] = buffer
        return self.note("cuMemHostAlloc"), ctypes.addressof(buffer)

    def cuMemHostGetDevicePointer(self, pointer: int, flags: int) -> tuple[int, int]:
        return 0, pointer

    def cuMemFreeHost(self, pointer: int) -> tuple[int]:
        return (self.note("cuMemFreeHost"),)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        return self.note("cuMemAlloc", size), (self.current.device + 1) << 40

    def cuMemFree(self, pointer: int) -> tuple[int]:
        assert pointer == (self.current.device + 1) << 40
        return (self.note("cuMemFree"),)

    def cuMemsetD8(self, pointer: int, value: int, size: int) -> tuple[int]:
        return (self.note("cuMemsetD8", value, size),)

    def cuMemsetD32(self, pointer: int, value: int, count: int) -> tuple[int]:
        return (self.note("cuMemsetD32", pointer & 0xFFFFFF, value, count),)

    def cuCtxSynchronize(self) -> tuple[int]:
        return (self.note("cuCtxSynchronize"),)

    def cuIpcGetMemHandle(self, pointer: int) -> tuple[int, Any]:
        exported = self.CUipcMemHandle()
        ctypes.memmove(exported.bytes, struct.pack("Q", pointer), 8)
        return self.note("cuIpcGetMemHandle"), exported

    def cuIpcOpenMemHandle(self, exported: Any, flags: int) -> tuple[int, int]:
        (pointer,) = struct.unpack("Q", bytes(exported.bytes[:8]))
        return self.note("cuIpcOpenMemHandle", (pointer >> 40) - 1), pointer + (1 << 50)

    def cuIpcCloseMemHandle(self, pointer: int) -> tuple[int]:
        return (self.note("cuIpcCloseMemHandle", (pointer >> 40 & 0xFF) - 1),)

    def cuCtxEnablePeerAccess(self, peer: int, flags: int) -> tuple[int]:
        self.note("cuCtxEnablePeerAccess", peer)
        return (704,)

    def of(self, call: str) -> list[int]:
        """The devices that made a call, sorted."""
        return sorted(made[0] for made in self.calls if made[1] == call)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Each thread counts as a process of its own."""
    made = Driver()

    @contextmanager
    def on_device(device: int) -> Iterator[Driver]:
        made.current.device = device
        yield made

    monkeypatch.setattr(workspace, "on_device", on_device)
    monkeypatch.setattr(workspace, "process", lambda: str(threading.get_ident()))
    monkeypatch.setattr(workspace, "context", lambda device: device)
    monkeypatch.setattr(cuda, "describe", lambda status: f"CUDA_ERROR_{status}")
    return made


def on_threads(world: int, job: Callable[[ThreadBoard], Any]) -> list[Any]:
    """Run a job for every rank; what it raises is its result."""
    wall = Postings()
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = job(ThreadBoard(wall, rank, world))
        except TpfuseError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_reaches_every_other(fake: Driver) -> None:
    fills = (Fill(64, 128, 0x80008000),)

    def job(board: ThreadBoard) -> tuple[int, ...]:
        space = Workspace(board, board.rank, 1000, 5.0, fills=fills)
        assert space.read_error() is None
        bases = space.bases
        space.close()
        space.close()
        return bases

    for rank, bases in enumerate(on_threads(4, job)):
        own = [(peer + 1 << 40) + (0 if peer == rank else 1 << 50) for peer in range(4)]
        assert bases == tuple(own)
    assert (0, "cuMemAlloc", 2 << 20) in fake.calls
    assert (0, "cuMemsetD8", 0, 2 << 20) in fake.calls
    assert (3, "cuMemsetD32", 64, 0x80008000, 32) in fake.calls
    kinds = [call[1] for call in fake.calls]
    last_unmapped = max(i for i, kind in enumerate(kinds) if kind == "cuIpcCloseMemHandle")
    assert kinds.count("cuIpcCloseMemHandle") == 12
    assert kinds.index("cuMemFree") > last_unmapped
    assert fake.of("cuMemFree") == fake.of("cuMemFreeHost") == [0, 1, 2, 3]


def test_ranks_of_one_process_use_the_address_itself(fake: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "process", lambda: "one")

    def job(board: ThreadBoard) -> tuple[int, ...]:
        space = Workspace(board, board.rank, 1000, 5.0)
        space.close()
        return space.bases

    assert on_threads(2, job) == [(1 << 40, 2 << 40)] * 2
    assert fake.of("cuCtxEnablePeerAccess") == [0, 1]
    assert not fake.of("cuIpcOpenMemHandle")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("cuMemHostAlloc", "cuMemHostAlloc failed: CUDA_ERROR_719"),
        ("cuMemAlloc", "cuMemAlloc of 2097152 bytes failed: CUDA_ERROR_719"),
        ("cuIpcGetMemHandle", "cuIpcGetMemHandle failed: CUDA_ERROR_719"),
        ("cuIpcOpenMemHandle", "mapping the memory of rank 0 (GPU 0) failed: CUDA_ERROR_719"),
    ],
)
def test_one_rank_fails_and_all_say_the_same(fake: Driver, call: str, words: str) -> None:
    fake.broken = {(2, call), (3, call)}
    results = on_threads(4, lambda board: Workspace(board, board.rank, 1000, 5.0))
    assert [type(result) for result in results] == [Unsupported] * 4
    assert {str(result) for result in results} == {f"rank 2: {words}"}
    healthy = [0, 1] if call in ("cuMemHostAlloc", "cuMemAlloc") else [0, 1, 2, 3]
    assert fake.of("cuMemFree") == healthy
    opened = [made for made in fake.calls if made[1] == "cuIpcOpenMemHandle" and made[0] < 2]
    assert len(fake.of("cuIpcCloseMemHandle")) == len(opened)


def test_ranks_that_ask_for_different_sizes(fake: Driver) -> None:
    results = on_threads(2, lambda board: Workspace(board, board.rank, 1000 + board.rank, 5.0))
    assert [type(result) for result in results] == [RankMismatch] * 2
    assert {str(result) for result in results} == {
        "Workspace: rank 1 asks for 1001 bytes, rank 0 for 1000: it must be equal"
    }
    assert fake.of("cuMemFree") == [0, 1]


def test_fills_outside_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="not whole words inside"):
        Workspace(ThreadBoard(Postings(), 0, 1), 0, 100, 1.0, fills=[Fill(64, 40, 1)])


@pytest.mark.filterwarnings("ignore:tpfuse")
def test_a_rank_that_does_not_come_is_named(fake: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace.Workspace.close, "__defaults__", (0.1,))
    results = on_threads(3, lambda board: board.rank == 1 or Workspace(board, board.rank, 1000, 0.2))
    assert [type(results[rank]) for rank in (0, 2)] == [PeerTimeout] * 2
    assert "rank 1 of 3 did not come" in str(results[0])
    assert not fake.of("cuMemFree"), "rank 1 may still map this memory"


def test_memory_that_a_peer_may_still_use_is_kept(fake: Driver) -> None:
    def job(board: ThreadBoard) -> list[str]:
        space = Workspace(board, board.rank, 1000, 5.0)
        if board.rank == 1:
            return []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            space.close(0.2)
        assert space.read_error() is None
        return [str(warning.message) for warning in caught]

    (message,) = on_threads(2, job)[0]
    assert "1000 bytes on GPU 0 stay allocated" in message
    assert "rank 1 of 2 did not come" in message
    assert fake.of("cuIpcCloseMemHandle") == [0]
    assert not fake.of("cuMemFree")


@pytest.mark.filterwarnings("ignore:tpfuse")
def test_a_device_that_failed_keeps_everyones_memory(fake: Driver) -> None:
    def job(board: ThreadBoard) -> float:
        space = Workspace(board, board.rank, 1000, 5.0)
        if board.rank == 0:
            fake.broken = {(0, "cuCtxSynchronize")}
        since = time.monotonic()
        space.close(5.0)
        return time.monotonic() - since

    assert max(on_threads(2, job)) < 4
    assert not fake.of("cuMemFree")


def test_the_error_record(fake: Driver) -> None:
    space = Workspace(ThreadBoard(Postings(), 0, 1), 0, 64, 5.0)
    assert ctypes.sizeof(Record) == 32
    assert Record.waited_ns.offset == 24
    halves = struct.pack("4I", 1, 2, 3, 4), struct.pack("2IQ", 5, 6, 7_000_000_000)
    assert space.read_error() is None
    ctypes.memmove(space.error_pointer + 16, halves[1], 16)
    assert space.read_error() is None
    ctypes.memmove(space.error_pointer, halves[0], 16)
    assert space.read_error() == ErrorRecord(op=2, rank=3, peer=4, block=5, step=6, waited_ns=7_000_000_000)
    space.close()
    assert space.read_error() is None


def test_launch_structures_are_those_of_cuda() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install tpfuse[cuda]")
    assert ctypes.sizeof(LaunchConfig) == driver.sizeof(driver.CUlaunchConfig)
    assert ctypes.sizeof(LaunchAttribute) == driver.sizeof(driver.CUlaunchAttribute)
    which = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert int(which) == launch.PROGRAMMATIC_STREAM_SERIALIZATION
    given = driver.CUlaunchConfig()
    fields = ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes", "hStream")
    for number, name in enumerate(fields, 1):
        setattr(given, name, number)
    attribute = driver.CUlaunchAttribute()
    attribute.id = which
    attribute.value.programmaticStreamSerializationAllowed = 1
    given.attrs, given.numAttrs = [attribute], 1
    ours = LaunchConfig.from_address(given.getPtr())
    names = [name for name, _ in LaunchConfig._fields_]
    assert [getattr(ours, name) for name in names[:8]] == list(range(1, 9))
    assert ours.attribute_count == 1
    theirs = LaunchAttribute.from_address(ours.attributes)
    assert (theirs.id, theirs.value[0]) == (launch.PROGRAMMATIC_STREAM_SERIALIZATION, 1)
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = 6, 2, 1
    theirs = LaunchAttribute.from_address(attribute.getPtr())
    assert (theirs.id, tuple(theirs.value)) == (launch.CLUSTER_DIMENSION, (6, 2, 1))


class Launched:
    """In place of cuLaunchKernelEx: keeps what the driver would read."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self._thunk = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self._entry)
        address = ctypes.cast(self._thunk, ctypes.c_void_p).value or 0
        self.call = ctypes.CFUNCTYPE(ctypes.c_int)(address)  # without argtypes, as CDLL gives it

    def _entry(self, config: int, function: int, parameters: int, extra: int | None) -> int:
        seen = LaunchConfig.from_address(config)
        self.config = {name: getattr(seen, name) for name, _ in LaunchConfig._fields_}
        self.attribute = LaunchAttribute.from_address(seen.attributes).id
        self.function, self.extra = function, extra
        self.arguments = ctypes.string_at(ctypes.c_void_p.from_address(parameters).value or 0, 40)
        return self.status


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Function:
    monkeypatch.setattr(launch, "attribute", lambda device, name: 9)
    monkeypatch.setattr(launch, "describe", lambda status: f"CUDA_ERROR_{status}")
    return Function(0x7FFF_0000_1234, "kernel", 0, 40)


def test_a_launch_gives_the_driver_what_it_reads(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Launched()
    monkeypatch.setattr(launch, "launch_call", lambda: driver.call)
    start = Launcher(function, "Qiff", fixed=struct.pack("2Q", 1 << 47, 2), block=256, pdl=True)
    for grid, stream in ((7, 0x7FFF_1111_0000), (9, 0)):
        start(grid, stream, 1 << 46, -5, 0.5, 1.5)
        assert driver.function == function.handle
        assert driver.extra is None
        config = driver.config
        assert [config[f"grid_{axis}"] for axis in "xyz"] == [grid, 1, 1]
        assert [config[f"block_{axis}"] for axis in "xyz"] == [256, 1, 1]
        assert (config["stream"] or 0, config["shared_bytes"]) == (stream, 0)
        assert (config["attribute_count"], driver.attribute) == (1, launch.PROGRAMMATIC_STREAM_SERIALIZATION)
        assert driver.arguments[:36] == struct.pack("3Qiff", 1 << 47, 2, 1 << 46, -5, 0.5, 1.5)


def test_pdl_needs_hopper(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Launched()
    monkeypatch.setattr(launch, "launch_call", lambda: driver.call)
    monkeypatch.setattr(launch, "attribute", lambda device, name: 8)
    Launcher(function, "5Q", block=32, pdl=True)(1, 0, *range(5))
    assert driver.config["attribute_count"] == 0


def test_a_failed_launch_has_the_words_of_cuda(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Launched(status=701)
    monkeypatch.setattr(launch, "launch_call", lambda: driver.call)
    with pytest.raises(TpfuseError, match=r"launch of kernel failed: CUDA_ERROR_701 \(grid 3, block 32\)"):
        Launcher(function, "5Q", block=32)(3, 0, *range(5))


@pytest.mark.parametrize(("layout", "fixed"), [("4Q", 0), ("6Q", 0), ("4Q", 16), ("4Qii", 0), ("8QQ", 4)])
def test_a_layout_that_is_not_the_kernels(function: Function, layout: str, fixed: int) -> None:
    if layout == "4Qii":
        launch.check_layout(function, layout, fixed)
        launch.check_layout(function, "4Qi", fixed)  # the struct's last 4 bytes are padding
        return
    with pytest.raises(InvalidArgument, match="takes a struct of 40 bytes"):
        launch.check_layout(function, layout, fixed)
