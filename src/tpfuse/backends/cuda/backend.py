"""The cuda backend of one communicator: its workspace, its kernels, and the check that follows every call.

A call costs the host one launch. What keeps it so cheap: nothing is allocated but the result, the launch is prebuilt
(launch.py), and a kernel that gave up is noticed by one load of pinned memory at the next call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpfuse.agreement import Board
from tpfuse.backends.collective import Call
from tpfuse.backends.cuda import sharded_norm
from tpfuse.backends.cuda.sharded_norm import ShardedNorm
from tpfuse.backends.cuda.workspace import Workspace
from tpfuse.errors import TpfuseError
from tpfuse.plan import Counter, Route
from tpfuse.rope import Rope

SERVED = ("rms_norm", "qk_rms_norm")
LINK_BYTES = {"rms_norm": 16, "qk_rms_norm": 16}  # of a row's packet to one peer


def routes() -> dict[str, Route]:
    """How this backend serves the ops that it has kernels for."""
    return {op: Route(op, None, "cuda", "push of sums", "fused", "") for op in SERVED}


class CudaBackend:
    """Serves the ops of SERVED. Tensors come checked, as `[T, n]` with T > 0. Raises what `fail` makes of an error."""

    def __init__(
        self,
        board: Board,
        device: torch.device,
        timeout: float,
        fail: Callable[[int, Call, str], TpfuseError],
    ) -> None:
        assert device.index is not None
        self._index, self._world, self._fail = device.index, board.world, fail
        self._space = Workspace(board, device.index, sharded_norm.workspace_bytes(), timeout)
        try:
            self._norm = ShardedNorm(device, board.rank, board.world, self._space, timeout)
        except TpfuseError:
            self._space.close()
            raise
        self._stream: int | None = None  # of the last call that was not captured
        self._current: tuple[int, Call] | None = None

    @property
    def workspace_bytes(self) -> int:
        return self._space.size

    def close(self) -> None:
        self._space.close()

    def begin(self, number: int, call: Call, counter: Counter) -> None:
        """Announce a call."""
        self._current = (number, call)
        counter.bytes += call.rows * (self._world - 1) * LINK_BYTES[call.op]

    def check(self) -> None:
        """Raise if a kernel gave up waiting for a peer."""
        record = self._space.read_error()
        if record is not None and self._current is not None:
            cause = (
                f"a kernel gave up after {record.waited_ns / 1e9:.3g} s: rank {record.peer} did not send step "
                f"{record.step} of block {record.block}"
            )
            raise self._fail(*self._current, cause)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_bias: float, out: Tensor) -> None:
        self._norm((x,), (weight,), (out,), (eps,), weight_bias, self._current_stream())

    def qk_rms_norm(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        q_eps: float,
        k_eps: float,
        weight_bias: float,
        rope: Rope | None,
        out: tuple[Tensor, Tensor],
    ) -> None:
        weights, eps = (q_weight, k_weight), (q_eps, k_eps)
        self._norm((q, k), weights, out, eps, weight_bias, self._current_stream(), rope)

    def _current_stream(self) -> int:
        """The handle of the current stream. All calls share one workspace, so a new stream waits for the last one;
        replays of a graph are the caller's to order."""
        handle: int = torch._C._cuda_getCurrentRawStream(self._index)
        if handle != self._stream and not torch.cuda.is_current_stream_capturing():
            if self._stream is not None:
                last = torch.cuda.ExternalStream(self._stream, device=self._index)
                torch.cuda.current_stream(self._index).wait_stream(last)
            self._stream = handle
        return handle
