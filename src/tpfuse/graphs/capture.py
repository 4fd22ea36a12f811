"""What a CUDA graph is to the rest of the package: something that records a call once and replays it.

`Mechanism` is the interface. `CudaGraphs` is the one that users get; the tests have a stand-in that records calls and
replays them on a CPU, with the same promises: fixed buffers, results that a replay overwrites, nothing computed while
recording.

Design record
- Captures run on a stream of their own for each lane (a lane is a stream that calls come on): blocks of a pool belong
  to the stream that they were allocated on, so lanes share a pool and never each other's memory.
- Warm-ups run on that stream, too: cuBLAS keeps a workspace for each stream, which a capture would take from the pool
  and never give back.
- `capture_begin` and `capture_end` are called directly. `torch.cuda.graph` collects garbage and empties the cache at
  every entry, which for sixty pieces of twenty sizes is minutes.
- Results are handed out as views that don't own their memory (`unowned`): a piece's result may be overwritten by
  graphs captured after its last reader, in the order in which they replay. Without that, memory grows with the number
  of layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from tpfuse.errors import Unsupported

CIRCLE = 32  # streams that torch has for a device and priority
CAPTURE_INVALID = 2  # CU_STREAM_CAPTURE_STATUS_INVALIDATED
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class Graph(Protocol):
    """A recorded call."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Mechanism(Protocol):
    """How calls are recorded. Pools are opaque handles."""

    name: str

    def why_not(self, device: torch.device) -> str:
        """Why tensors of this device can't be captured, now; empty where they can."""
        ...

    def lane(self) -> Hashable:
        """What calls come on: graphs of one lane never run at the same time."""
        ...

    def aside(self, lane: Hashable) -> contextlib.AbstractContextManager[None]:
        """Where captures of a lane happen; warm-ups too, so that what libraries keep for it is not in the pool."""
        ...

    def new_pool(self) -> Any:
        """A handle of a pool that has no memory yet."""
        ...

    def capture(self, run: Callable[..., Any], inputs: Sequence[Any], pool: Any, lane: Hashable) -> tuple[Graph, Any]:
        """Record `run(*inputs)`. Returns the graph, and the results, which have no values before the first replay.

        Whatever `run` raises passes through; the stream and the pool can be used afterwards.
        """
        ...

    def unowned(self, tensor: Tensor) -> Tensor:
        """The same memory, without keeping it."""
        ...

    def held(self, pool: Any) -> int:
        """Bytes that a pool holds."""
        ...

    def wait(self) -> None:
        """Until nothing that was replayed is running."""
        ...

    def give_back(self) -> None:
        """Return memory that nobody uses any more to the device."""
        ...


class CudaGraphs:
    """CUDA graphs of the current device, in memory pools of torch's allocator."""

    name = "CUDA graphs"

    # The last capture of a pool, if it failed. A pool that no graph has any more, but whose memory is still in use (the
    # exception holds what was computed), can't be captured into again, so its graph stays until the next one is there.
    _failed: ClassVar[dict[Any, torch.cuda.CUDAGraph]] = {}

    def __init__(self) -> None:
        self._streams: dict[Hashable, torch.cuda.Stream] = {}

    def why_not(self, device: torch.device) -> str:
        if device.type != "cuda":
            return f"tensors are on {device.type}; CUDA graphs need GPUs"
        if device.index != torch.cuda.current_device():
            return f"tensors are on {device}, the current device is {torch.cuda.current_device()}"
        if torch.cuda.is_current_stream_capturing():
            return "inside a capture of the caller's: recorded into that"
        return ""

    def lane(self) -> Hashable:
        stream = torch.cuda.current_stream()
        return stream.device_index, stream.cuda_stream

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    @contextlib.contextmanager
    def aside(self, lane: Hashable) -> Iterator[None]:
        if lane not in self._streams:
            self._streams[lane] = self._stream_of_its_own(lane)
        stream, current = self._streams[lane], torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            current.wait_stream(stream)

    def _stream_of_its_own(self, lane: Any) -> torch.cuda.Stream:
        """torch hands streams out in a circle of 32, so a new one may be another lane's, or one that calls come on."""
        taken = {stream.cuda_stream for stream in self._streams.values()}
        taken |= {handle for _, handle in (lane, *cast("list[tuple[int, int]]", list(self._streams)))}
        for _ in range(CIRCLE):
            stream = torch.cuda.Stream()
            if stream.cuda_stream not in taken:
                return stream
        raise Unsupported(f"Piecewise: calls came on {len(self._streams) + 1} streams, and each needs another one.")

    def capture(self, run: Callable[..., Any], inputs: Sequence[Any], pool: Any, lane: Hashable) -> tuple[Graph, Any]:
        graph = torch.cuda.CUDAGraph()
        with self.aside(lane):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                results = run(*inputs)
                graph.capture_end()
            except BaseException:
                _end(graph)
                self._forget_failures(pool)
                self._failed[pool] = graph
                raise
        self._forget_failures(pool)
        return graph, results

    def _forget_failures(self, *pools: Any) -> None:
        for pool in pools:
            if pool in self._failed:
                self._failed.pop(pool).reset()

    def unowned(self, tensor: Tensor) -> Tensor:
        whole = tensor.untyped_storage()
        storage = torch._C._construct_storage_from_data_pointer(whole.data_ptr(), tensor.device, whole.nbytes())
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    def held(self, pool: Any) -> int:
        if pool is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def give_back(self) -> None:
        self._forget_failures(*self._failed)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _end(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that failed, on the current stream. The error that counts is the caller's.

    `capture_end` of a capture that a forbidden call made invalid raises before torch's allocators have left the pool,
    which then can't be captured into any more (seen with torch 2.11: that of pinned memory has no other way out). So
    the driver ends that capture, and torch an empty one in its place.
    """
    driver, stream = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status, dropped = ctypes.c_int(), ctypes.c_void_p()
    driver.cuStreamIsCapturing(stream, ctypes.byref(status))
    if status.value == CAPTURE_INVALID:
        driver.cuStreamEndCapture(stream, ctypes.byref(dropped))
        driver.cuStreamBeginCapture_v2(stream, THREAD_LOCAL)
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty graph
        graph.capture_end()
