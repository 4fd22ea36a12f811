"""Memory that all ranks of a group reach directly, for one group and device, and the record of what went wrong in it.

    reason = availability(board, device, timeout)        # None, or why peer access can't work; the same on every rank
    space = Workspace(board, device, size, timeout)      # collective; Unsupported, with the same words on every rank
    space.bases                                          # W addresses, valid in kernels of this device
    space.read_error()                                   # None, or what a kernel wrote when it gave up waiting

How ranks come to agree: each step is a message that every rank pins to the board and reads from all others, and what
follows is a function of these messages alone. So where one rank can't allocate, or can't map one peer, all ranks
raise the same Unsupported, and all fall back together. A rank that says nothing in time is PeerTimeout.

Design record
- cuMemAlloc and CUDA IPC. Memory of torch's allocator can't be exported under expandable segments and moves in sleep
  mode. NVLink multicast objects are never made: they are scarce, and need a fabric manager.
- Sizes are rounded up to 2 MiB: a smaller allocation may share its block with others, and IPC exports whole blocks.
- A peer's GPU that CUDA_VISIBLE_DEVICES hides from this rank can't be asked about by cuDeviceCanAccessPeer, but IPC
  maps its memory all the same. So what is unknown counts as possible, and mapping it decides.
- GPUs of different models are refused: grids are functions of rank-invariant facts, such as the number of
  multiprocessors.
- Closing. To free memory that a peer still maps is undefined, and a peer's kernel may still write to it. So a rank
  waits for its own device, after which no kernel of its own touches any peer; unmaps the peers' memory; says so; and
  frees its own once ALL ranks have said so. If one does not within the bound, or its device failed, the memory stays
  allocated until the process ends, with a warning: a leak is the only safe answer to a peer that may still write.
  Rank 0, whose process often hosts the store, then waits until the others have read the last message.
- The error record is 32 bytes of pinned host memory, so a poll is one load (0.02 µs, measured on a CPU). Kernels have
  no fence and no compare-and-swap, therefore they write the second half first, then the half with `set`, each as one
  16-byte store, and the reader waits a moment for a half that is still on its way. Of blocks that give up at once the
  last one is seen, or one half each of two: rank and peer belong together, block and step do.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from ctypes import c_uint32, c_uint64
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from tpfuse.agreement import GRACE, Board, ranks
from tpfuse.backends.cuda import attribute, check, context, driver, handle, missing, on_device
from tpfuse.backends.cuda.compile import arch_of, check_folder
from tpfuse.errors import InvalidArgument, PeerTimeout, RankMismatch, TpfuseError, Unsupported

MAX_WORLD = 8
GRANULE = 2 << 20

_PROCESS = uuid.uuid4().hex


@dataclass(frozen=True)
class Place:
    """Where a rank runs and whom it reaches, as it knows by itself."""

    error: str = ""  # why it can't take part at all
    host: str = ""
    gpu: int = 0  # index in the rank's own process
    uuid: str = ""
    model: str = ""
    reach: Mapping[str, bool] = field(default_factory=dict)  # of each GPU that it sees, by UUID: peer access?


class Fill(NamedTuple):
    """Part of a new workspace that holds 32-bit words other than zero."""

    offset: int
    size: int
    word: int


class Record(ctypes.Structure):
    """The error record, as kernels write it."""

    _fields_ = (
        ("set", c_uint32), ("op", c_uint32), ("rank", c_uint32), ("peer", c_uint32),
        ("block", c_uint32), ("step", c_uint32), ("waited_ns", c_uint64),
    )  # fmt: skip


class ErrorRecord(NamedTuple):
    """A block of `rank`'s kernel waited `waited_ns` for `step` of `peer` and gave up."""

    op: int
    rank: int
    peer: int
    block: int
    step: int
    waited_ns: int


def availability(board: Board, device: int, timeout: float) -> str | None:
    """Why the ranks can't work on each other's memory, the same on every rank, or None. Collective.

    device: this rank's GPU, by its index here. Raises PeerTimeout where a rank does not come.
    """
    told = exchange(board, "cuda/place", asdict(place(device)), timeout)
    return judge({rank: Place(**message) for rank, message in told.items()})


def decline(board: Board, reason: str) -> None:
    """Take part in the others' `availability` with nothing but the reason why this rank can't."""
    board.pin("cuda/place", {"error": reason})


def place(device: int) -> Place:
    """This rank's facts. Asks the driver and NVRTC only; makes no context."""
    reason = missing()
    if reason is None and os.environ.get("NCCL_P2P_DISABLE") == "1":
        reason = "NCCL_P2P_DISABLE=1 is set, which says that peer access does not work here"
    if reason is not None:
        return Place(error=reason)
    try:
        module = driver()
        visible = range(check("cuDeviceGetCount", module.cuDeviceGetCount()))
        reach = {
            gpu_uuid(other): bool(
                check("cuDeviceCanAccessPeer", module.cuDeviceCanAccessPeer(handle(device), handle(other)))
            )
            for other in visible
            if other != device
        }
        name = check("cuDeviceGetName", module.cuDeviceGetName(128, handle(device))).split(b"\0")[0].decode()
        model = f"{name} with {attribute(device, 'MULTIPROCESSOR_COUNT')} multiprocessors"
        # What one rank's environment may lack: here all ranks hear of it, and before they rely on each other.
        arch_of(device)  # needs NVRTC
        check_folder()
        return Place("", host(), device, gpu_uuid(device), model, reach)
    except TpfuseError as error:
        return Place(error=str(error))


def judge(places: Mapping[int, Place]) -> str | None:
    """Why ranks at these places can't work on each other's memory, or None."""
    if reason := first_error({rank: asdict(where) for rank, where in places.items()}):
        return reason
    if len(places) > MAX_WORLD:
        return f"{len(places)} ranks; peer access serves up to {MAX_WORLD}"
    for (a, one), (b, other) in combinations(sorted(places.items()), 2):
        if one.host != other.host:
            return f"rank {a} and rank {b} are on different hosts ({one.host} and {other.host})"
        if one.uuid == other.uuid:
            return f"rank {a} and rank {b} share one GPU ({one.uuid})"
        if one.model != other.model:
            return f"rank {a} has {one.model}, rank {b} has {other.model}; the kernels need equal GPUs"
        if not (one.reach.get(other.uuid, True) and other.reach.get(one.uuid, True)):
            return f"no peer access between rank {a} (GPU {one.gpu}) and rank {b} (GPU {other.gpu})"
    return None


def agree_on(board: Board, topic: str, error: str | None, timeout: float) -> str | None:
    """Tell everyone how a step went here (None: well). Returns the first rank's error, the same on every rank."""
    return first_error(exchange(board, topic, {"error": error or ""}, timeout))


def exchange(board: Board, topic: str, message: Mapping[str, object], timeout: float) -> dict[int, dict[str, Any]]:
    """Every rank's message. Raises PeerTimeout, naming the ranks that did not send one."""
    board.pin(topic, message)
    told = board.read(topic, timeout)
    absent = [rank for rank in range(board.world) if rank not in told]
    if absent:
        raise PeerTimeout(
            f"Communicator: {ranks(absent)} of {board.world} did not come to {topic!r} within {timeout:g} s. "
            "Every rank must construct and prepare in the same order; look at that rank's own log."
        )
    return told


def first_error(told: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The error of the lowest rank that has one, with its rank."""
    return next((f"rank {rank}: {told[rank]['error']}" for rank in sorted(told) if told[rank].get("error")), None)


def host() -> str:
    """Names this machine's current boot. Containers that share it differ in their host names, and share no IPC."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else uuid.getnode()}"


def process() -> str:
    """Names this process, whatever PID namespace it is in."""
    return f"{_PROCESS}/{os.getpid()}"


def gpu_uuid(device: int) -> str:
    found = check("cuDeviceGetUuid", driver().cuDeviceGetUuid(handle(device)))
    return f"GPU-{uuid.UUID(bytes=bytes(found.bytes))}"


class Workspace:
    """`size` bytes on every rank, at `bases[rank]`, zero but for `fills` before any peer can write to them.

    Making one is collective, and so is closing it. Captured graphs hold its addresses: it must outlive them.
    Raises Unsupported (the same words on every rank), RankMismatch, PeerTimeout.
    """

    def __init__(
        self,
        board: Board,
        device: int,
        size: int,
        timeout: float,
        *,
        fills: Sequence[Fill] = (),
        topic: str = "cuda/workspace",
    ) -> None:
        if size < 1 or any(f.offset % 4 or f.size % 4 or f.offset < 0 or f.offset + f.size > size for f in fills):
            raise InvalidArgument(f"Workspace: size {size}, fills {list(fills)}: not whole words inside it")
        self.device, self.size, self.rank, self.world = device, size, board.rank, board.world
        self._board, self._topic = board, topic
        self._opened: list[int] = []
        self._record = Record()  # until the one in pinned memory is there, and after it is gone
        self.flag = c_uint32.from_buffer(self._record)  # not 0: a kernel gave up, see read_error
        self._host = 0
        self._closed = False
        self.base, self.error_pointer = 0, 0
        self.bases: tuple[int, ...] = ()
        try:
            told = exchange(board, f"{topic}/handles", self._allocate(fills), timeout)
            reason = first_error(told)
            if reason is None:
                _check_sizes({rank: message["size"] for rank, message in told.items()})
                reason = agree_on(board, f"{topic}/mapped", self._map(told), timeout)
            if reason is not None:
                raise Unsupported(reason)
        except BaseException:
            self.close()
            raise

    def read_error(self) -> ErrorRecord | None:
        """What a kernel wrote when it gave up, or None. Cheap enough for every call."""
        if not self.flag.value:
            return None
        deadline = time.monotonic() + 0.01
        while not self._record.waited_ns and time.monotonic() < deadline:
            pass
        r = self._record
        return ErrorRecord(r.op, r.rank, r.peer, r.block, r.step, r.waited_ns)

    def close(self, timeout: float = GRACE) -> None:
        """Unmap, and free once no peer maps this rank's memory. Waits for the device and up to `timeout` for peers.
        Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        trouble = self._await_peers(self._unmap(), timeout)
        self.flag, self._record = c_uint32(0), Record()
        if trouble is None:
            trouble = self._free()
        if trouble is not None and self.base:
            warnings.warn(
                f"tpfuse: {self.size} bytes on GPU {self.device} stay allocated until this process ends: {trouble}",
                stacklevel=2,
            )

    def _allocate(self, fills: Sequence[Fill]) -> dict[str, object]:
        """Make this rank's memory. Returns what peers need to map it, or the error."""
        try:
            with on_device(self.device) as cuda:
                flags = cuda.CU_MEMHOSTALLOC_PORTABLE | cuda.CU_MEMHOSTALLOC_DEVICEMAP
                size = ctypes.sizeof(Record)
                self._host = int(check("cuMemHostAlloc", cuda.cuMemHostAlloc(size, flags)))
                ctypes.memset(self._host, 0, size)
                self._record = Record.from_address(self._host)
                self.flag = c_uint32.from_address(self._host)
                pointer = check("cuMemHostGetDevicePointer", cuda.cuMemHostGetDevicePointer(self._host, 0))
                self.error_pointer = int(pointer)
                rounded = -(-self.size // GRANULE) * GRANULE
                self.base = int(check(f"cuMemAlloc of {rounded} bytes", cuda.cuMemAlloc(rounded)))
                check("cuMemsetD8", cuda.cuMemsetD8(self.base, 0, rounded))
                for fill in fills:
                    check("cuMemsetD32", cuda.cuMemsetD32(self.base + fill.offset, fill.word, fill.size // 4))
                check("cuCtxSynchronize", cuda.cuCtxSynchronize())
                exported = check("cuIpcGetMemHandle", cuda.cuIpcGetMemHandle(self.base))
                raw = ctypes.string_at(exported.getPtr(), cuda.CU_IPC_HANDLE_SIZE)
        except TpfuseError as error:
            return {"error": str(error)}
        return {
            "handle": raw.hex(), "size": self.size, "process": process(), "pointer": self.base, "gpu": self.device,
        }  # fmt: skip

    def _map(self, told: Mapping[int, Mapping[str, Any]]) -> str | None:
        """Map every peer's memory. Returns the error."""
        bases = []
        try:
            with on_device(self.device) as cuda:
                for rank, peer in sorted(told.items()):
                    what = f"mapping the memory of rank {rank} (GPU {peer['gpu']})"
                    if peer["process"] == process():
                        if peer["gpu"] != self.device:
                            status, *_ = cuda.cuCtxEnablePeerAccess(context(peer["gpu"]), 0)
                            if status != cuda.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
                                check(what, (status,))
                        bases.append(peer["pointer"])
                    else:
                        exported = cuda.CUipcMemHandle()
                        ctypes.memmove(exported.getPtr(), bytes.fromhex(peer["handle"]), cuda.CU_IPC_HANDLE_SIZE)
                        lazy = int(cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
                        self._opened.append(int(check(what, cuda.cuIpcOpenMemHandle(exported, lazy))))
                        bases.append(self._opened[-1])
        except TpfuseError as error:
            return str(error)
        self.bases = tuple(bases)
        return None

    def _unmap(self) -> str | None:
        """Wait for the device, then unmap the peers' memory. Returns the error."""
        if not self._host:  # nothing was made here
            return None
        try:
            with on_device(self.device) as cuda:
                check("cuCtxSynchronize", cuda.cuCtxSynchronize())
                while self._opened:
                    check("cuIpcCloseMemHandle", cuda.cuIpcCloseMemHandle(self._opened.pop()))
        except TpfuseError as error:
            return str(error)
        return None

    def _await_peers(self, error: str | None, timeout: float) -> str | None:
        """Say that this rank has unmapped everything, or its error, and wait until all have. Returns the error."""
        try:
            told = exchange(self._board, f"{self._topic}/closed", {"error": error or ""}, timeout)
            self._board.pin(f"{self._topic}/read", {})
            if self.rank == 0:
                self._board.read(f"{self._topic}/read", timeout)
        except RuntimeError as lost:  # a rank is missing, or the store's host is gone
            return error or str(lost)
        return first_error(told)

    def _free(self) -> str | None:
        """Returns the error."""
        try:
            if self._host:
                with on_device(self.device) as cuda:
                    check("cuMemFreeHost", cuda.cuMemFreeHost(self._host))
                    if self.base:
                        check("cuMemFree", cuda.cuMemFree(self.base))
        except TpfuseError as error:
            return str(error)
        return None


def _check_sizes(sizes: Mapping[int, int]) -> None:
    """Raise RankMismatch, the same on every rank, unless all are equal."""
    for rank, size in sorted(sizes.items()):
        if size != sizes[0]:
            raise RankMismatch(f"Workspace: rank {rank} asks for {size} bytes, rank 0 for {sizes[0]}: it must be equal")
