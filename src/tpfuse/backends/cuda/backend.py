"""The cuda backend of one communicator: its workspace, its kernels, and the check that follows every call.

A call costs the host one launch. What keeps it so cheap: nothing is allocated but the result, the launch is prebuilt
(launch.py), arguments that calls have in common are packed once, and a kernel that gave up is noticed by one load of
pinned memory at the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tpfuse.agreement import Board
from tpfuse.backends.collective import Call, Served
from tpfuse.backends.cuda import all_reduce, sharded_norm
from tpfuse.backends.cuda.all_reduce import AllReduce, Thresholds
from tpfuse.backends.cuda.sharded_norm import ShardedNorm
from tpfuse.backends.cuda.workspace import Workspace
from tpfuse.errors import TpfuseError
from tpfuse.plan import Route
from tpfuse.quant import FORMATS, Format, FP8Static
from tpfuse.reference import NormOutput
from tpfuse.rope import Rope

WORKSPACE_BYTES = sharded_norm.workspace_bytes() + all_reduce.WORKSPACE_BYTES  # on each GPU, for a group
PACKET = 16  # bytes of a row's sums of squares, to one peer
# The owner of a row norms it, and what is gathered is the norm: other rows of the plan don't say so.
EARLY = Route("all_reduce_rms_norm", None, "cuda", "two-shot push, norm before gather", "fused", "")


def routes(thresholds: Thresholds) -> tuple[Route, ...]:
    """How this backend serves the ops."""
    one, two = "one-shot push", "two-shot push"
    norms = (Route(op, None, "cuda", "push of sums", "fused", "") for op in sharded_norm.OPS)
    reductions = (
        Route(op, kib, "cuda", algorithm, "fused", "")
        for op in all_reduce.OPS
        for kib, algorithm in ((thresholds.one_shot_kib, one), (None, two))
    )
    return (*norms, *reductions)


class CudaBackend:
    """Serves all ops. Tensors come checked, as `[T, n]` or contiguous `[..., n]`, with T > 0. Raises what `fail` makes
    of an error."""

    def __init__(
        self,
        board: Board,
        device: torch.device,
        timeout: float,
        fail: Callable[[int, Call, str], TpfuseError],
        thresholds: Thresholds,
    ) -> None:
        assert device.index is not None
        self._index, self._fail = device.index, fail
        self.thresholds = thresholds
        self._spaces: list[Workspace] = []
        try:
            norms = Workspace(board, device.index, sharded_norm.workspace_bytes(), timeout)
            self._spaces.append(norms)
            sums = Workspace(
                board, device.index, all_reduce.WORKSPACE_BYTES, timeout,
                fills=all_reduce.fills(), topic="cuda/all_reduce",
            )  # fmt: skip
            self._spaces.append(sums)
            self._norms, self._sums = norms, sums
            self._norm = ShardedNorm(device, board.rank, board.world, norms, timeout)
            self._reduce = AllReduce(device, board.rank, board.world, sums, timeout, thresholds)
        except BaseException:
            self.close()
            raise
        self._stream: int | None = None  # of the last call that was not captured
        self._current: tuple[int, Served] | None = None

    def close(self) -> None:
        for space in self._spaces:
            space.close()

    def refine(self, route: Route, call: Call) -> Route:
        """The plan's route of a call, or the one that its arguments ask for."""
        return EARLY if call.op == EARLY.op and self._early(call) else route

    def _early(self, call: Call) -> bool:
        residual, quant = call.residual is not None, bool(call.quant)
        return all_reduce.goes_early(
            call.size_in_bytes, self.thresholds, call.row_sharded, residual, quant, call.keep_norm
        )

    def begin(self, number: int, served: Served) -> None:
        """Announce a call."""
        self._current = (number, served)

    def check(self) -> None:
        """Raise if a kernel gave up waiting for a peer."""
        if self._norms.flag.value or self._sums.flag.value:
            self._raise()

    def _raise(self) -> None:
        for space, unit in zip(self._spaces, ("step", "row"), strict=True):
            record = space.read_error()
            if record is not None and self._current is not None:
                cause = (
                    f"a kernel gave up after {record.waited_ns / 1e9:.3g} s: rank {record.peer} did not send {unit} "
                    f"{record.step} of block {record.block}"
                )
                number, served = self._current
                raise self._fail(number, served.call, cause)

    def rms_norm(self, served: Served, x: Tensor, weight: Tensor, eps: float, weight_bias: float, out: Tensor) -> None:
        self._norm(served.launches, (x,), (weight,), (out,), (eps,), weight_bias, self._current_stream())

    def qk_rms_norm(
        self,
        served: Served,
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
        self._norm(served.launches, (q, k), weights, out, eps, weight_bias, self._current_stream(), rope)

    def all_reduce(self, served: Served, x: Tensor, out: Tensor) -> None:
        self._reduce.all_reduce(served.launches, x, out, self._current_stream())

    def all_reduce_rms_norm(
        self,
        served: Served,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        weight_bias: float,
        quant: Format | None,
        out: NormOutput,
    ) -> None:
        """Fills `out`."""
        norm, new, bytes_, scale = out
        self._reduce.all_reduce_rms_norm(
            served.launches, x, served.call.top_k, weight, residual, new, norm, quant, bytes_, scale, eps, weight_bias,
            served.counter.route is EARLY, self._current_stream(),
        )  # fmt: skip

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


def link_bytes(call: Call, route: Route, world: int) -> int:
    """What a rank sends to its peers in a call, of rows that are spread evenly over their owners."""
    if call.op in sharded_norm.OPS:
        return call.rows * (world - 1) * PACKET
    row = call.width * call.dtype.itemsize
    if route.algorithm == "one-shot push":
        return call.rows * (world - 1) * row
    back = row
    if route is EARLY and call.quant and not call.keep_norm:
        back = quantised_bytes(call.quant, call.width)
    return call.rows * (world - 1) * (row + back) // world


@cache
def quantised_bytes(name: str, width: int) -> int:
    """What a row takes that its owner has quantised: its elements, and of each scale that it computed a word."""
    quant = FORMATS[name](torch.ones(1))
    return width // quant.packed + (0 if isinstance(quant, FP8Static) else 4 * quant.groups(width))
