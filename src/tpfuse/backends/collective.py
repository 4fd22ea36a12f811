"""The `collective` backend: torch.distributed plus torch ops. It works wherever torch.distributed works.

Design record
- The norms over a sharded width exchange ONE all-reduce of fp32 sums: [T, 1] for `rms_norm`, [T, 2] for `qk_rms_norm`.
- 16-bit partial sums of more than two ranks are never added in their own dtype. Libraries that do round after every
  hop, up to W - 1 times, which breaks the contract's single rounding; with two ranks there is one addition and the
  native dtype is exact. docs/contract.md gives the bounds.
  Small ones travel as fp32 through the library's all-reduce: one exchange, twice the bytes.
  Large ones (LARGE) travel as they are, in two exchanges: all-to-all, so that each rank holds its part of the elements
  of every rank; fp32 sum in rank order, rounded once; all-gather. The bytes of a ring all-reduce, and the bits of the
  reference. In the plan both are the algorithm "all-reduce".
- Few torch kernels a call, because at few rows they are the time: 28 in `qk_rms_norm` took 51 µs with NCCL on 4x H200
  where a plain implementation takes 38. Hence operands of mixed dtypes, which torch widens inside the kernel; `out=`
  of the final dtype, which rounds there; and q's and k's statistics as two columns of one tensor, with constants that
  are made once. Now 10, the exchange included (not measured yet).
- A row-sharded residual saves nothing here: the whole sum is reduced, each rank norms its own rows and gathers the
  others'. So the result has the bits of the replicated path. A reduce-scatter would move half of the sum's bytes, but
  adds in an order of its own, or needs the two exchanges of large sums.
- Mode `off` keeps the path that MiniMax-M2 started from: gather whole rows, norm them, keep the own slice.
- Gloo aborts the whole process when ranks bring different sizes. So on Gloo a fixed-size signature of the call is
  exchanged first; a difference is then an error on every rank, at once. It costs one small all-gather a call, on a
  transport that is not fast anyway, and counts as signature, not as exchange. It runs for T = 0 too.
- Other transports (NCCL) are asynchronous: a watchdog thread looks after the calls that are in flight. A call that
  could have begun (all earlier work of its stream is done) and is not finished after `timeout` fails the communicator:
  the group is aborted, which frees the device, and the next call raises. Calls captured into CUDA graphs are not
  watched; a graph replays without the host.
"""

from __future__ import annotations

import struct
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions  # type: ignore[attr-defined]

from tpfuse.agreement import ANSWER, GRACE
from tpfuse.errors import CommunicatorClosed, RankMismatch, TpfuseError, first_line
from tpfuse.plan import ANY, OPS, Counter, Facts, Route, slot_bytes
from tpfuse.quant import FORMATS
from tpfuse.rope import Rope, rotate

# torch 2.13 renamed it and warns about the old name.
_all_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
LARGE = 2 << 20  # bytes of a 16-bit tensor; the crossing point is estimated, not yet measured
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SIGNATURE = struct.Struct("10q3d")
NAMES = (*OPS, "gather_rows")  # what is announced
GATHER_ROWS = Route("gather_rows", None, "collective", "all-gather", ANY, "")  # not in plans: there is no other way
_QUANT = ("", *FORMATS)


Launches = dict[bool, Any]  # what the cuda backend has prepared, by whether all addresses are aligned


class Call(NamedTuple):
    """The signature of a call: what every rank must bring alike."""

    op: str
    rows: int
    width: int
    width2: int  # k of qk_rms_norm, else 0
    dtype: torch.dtype
    residual: torch.dtype | None
    eps: float
    eps2: float
    weight_bias: float
    quant: str = ""  # the name of the format
    keep_norm: bool = False
    row_sharded: bool = False
    top_k: int = 0  # of x [..., top_k, width]; 0: it is [..., width]

    @property
    def size_in_bytes(self) -> int:
        """What this rank's rows of x (or of q) take as they cross the links: what a plan's bounds are compared with."""
        return self.rows * slot_bytes(self.width, self.dtype.itemsize)

    def pack(self) -> bytes:
        residual = -1 if self.residual is None else DTYPE_CODES[self.residual]
        codes = (NAMES.index(self.op), self.rows, self.width, self.width2, DTYPE_CODES[self.dtype], residual)
        outputs = (_QUANT.index(self.quant), self.keep_norm, self.row_sharded, self.top_k)
        return _SIGNATURE.pack(*codes, *outputs, self.eps, self.eps2, self.weight_bias)

    @staticmethod
    def unpack(data: bytes) -> Call:
        op, rows, width, width2, dtype, residual, *outputs, eps, eps2, bias = _SIGNATURE.unpack(data)
        dtypes = [*DTYPE_CODES, None]  # -1: no residual
        x_dtype = dtypes[dtype]
        assert x_dtype is not None
        shape = (NAMES[op], rows, width, width2, x_dtype, dtypes[residual])
        quant, keep, sharded, top_k = outputs
        return Call(*shape, eps, eps2, bias, _QUANT[quant], bool(keep), bool(sharded), top_k)

    def __str__(self) -> str:
        width = f"{self.width}+{self.width2}" if self.width2 else f"{self.width}"
        residual = "" if self.residual is None else f", residual {short(self.residual)}"
        residual += " row-sharded" if self.row_sharded else ""
        quant = f", {self.quant}" if self.quant else ""
        width += f" of {self.top_k} experts" if self.top_k else ""
        return f"{self.op}({self.rows} rows x {width}, {short(self.dtype)}{residual}{quant})"


@dataclass(eq=False, slots=True)
class Served:
    """How calls that are alike are served: the first one has passed the checks and found it out. Holds no tensor."""

    call: Call
    counter: Counter  # of the route
    own_kernels: bool  # or torch.distributed
    sent: int = 0  # bytes of a call, where they are known before
    launches: Launches = field(default_factory=dict)


def short(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def routes(facts: Facts) -> tuple[Route, ...]:
    """How this backend serves every op under the requested mode."""
    reason = ""
    if facts.mode == "fused":
        reason = "one rank: there is no exchange" if facts.world == 1 else "backend collective has no fused kernels"
    mode = "control" if facts.mode == "fused" else facts.mode
    norm = "all-gather, norm" if mode == "off" else "all-reduce of sums"
    algorithms = {
        "rms_norm": norm,
        "qk_rms_norm": norm,
        "all_reduce": "all-reduce",
        "all_reduce_rms_norm": "all-reduce, norm",
    }
    return tuple(
        Route(op, None, "collective", "local" if facts.world == 1 else name, mode, reason)
        for op, name in algorithms.items()
    )


class Collective:
    """Serves the ops for one communicator. Tensors come checked, as `[T, n]`; results are new contiguous tensors.

    `fail` turns what went wrong in the current call into the error to raise: it asks the peers where they are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        transport: str,
        timeout: float,
        mode: str,
        fail: Callable[[int, Call, str], TpfuseError],
    ) -> None:
        self.group, self.device, self.transport, self.mode = group, device, transport, mode
        self.world = group.size()
        self._timeout = timedelta(seconds=timeout)
        self._fail = fail
        self._constants: dict[tuple[float, ...], Tensor] = {}
        self._current: tuple[int, Served] | None = None
        self._watchdog: Watchdog | None = None
        if self.world > 1 and transport != "gloo":
            self._watchdog = Watchdog(group, timeout, fail)

    def prepare(self) -> None:
        """Make the transport ready, so that later calls may be captured. Collective."""
        if self.world > 1 and self.transport != "gloo":
            zeros = torch.zeros(self.world, device=self.device)
            dist.all_reduce(zeros, group=self.group)
            dist.all_to_all_single(torch.empty_like(zeros), zeros, group=self.group)
            _all_gather(torch.empty_like(zeros), zeros[:1], group=self.group)
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        # Gloo aborts a process that still holds a group while the interpreter shuts down, as a communicator that is a
        # global does. `fail` leads back to the communicator, and is a cycle.
        self._fail = _fail_closed
        self._watchdog = None
        del self.group

    def begin(self, number: int, served: Served) -> None:
        """Announce a call, whose bytes go to its counter. On Gloo, compare its signature over the ranks first."""
        self._current = (number, served)
        if self.world > 1 and self.transport == "gloo":
            self._compare(number, served.call)

    @torch.no_grad()
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_bias: float) -> Tensor:
        if self.mode == "off" and self.world > 1:
            return self._gathered_norm(x, self._gathered(x), weight, eps, weight_bias)
        inverse = self._inverse_rms((x,), (eps,))
        return self._scale(x, inverse, weight, weight_bias)

    @torch.no_grad()
    def qk_rms_norm(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        q_eps: float,
        k_eps: float,
        weight_bias: float,
        rope: Rope | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.mode == "off" and self.world > 1:
            # Both before any arithmetic: what raises there must not leave this rank one exchange behind the others.
            whole_q, whole_k = self._gathered(q), self._gathered(k)
            return (
                self._gathered_norm(q, whole_q, q_weight, q_eps, weight_bias, rope),
                self._gathered_norm(k, whole_k, k_weight, k_eps, weight_bias, rope),
            )
        inverse = self._inverse_rms((q, k), (q_eps, k_eps))
        return (
            self._scale(q, inverse[:, :1], q_weight, weight_bias, rope),
            self._scale(k, inverse[:, 1:], k_weight, weight_bias, rope),
        )

    @torch.no_grad()
    def all_reduce(self, x: Tensor) -> Tensor:
        wide = self.world > 2 and x.dtype != torch.float32
        if wide and x.numel() * x.element_size() >= LARGE:
            return self._all_reduce_large(x)
        total = x.to(torch.float32 if wide else x.dtype, copy=True, memory_format=torch.contiguous_format)
        self._all_reduce(total)
        return total.to(x.dtype)

    @torch.no_grad()
    def gather_rows(self, shard: Tensor, count: int) -> Tensor:
        """All `count` rows, of which this rank has `shard`: row t belongs to rank t % W."""
        most = -(-count // self.world)
        sent = torch.nn.functional.pad(shard, (0, 0, 0, most - shard.shape[0])).contiguous()
        every = torch.empty(self.world * most, shard.shape[1], dtype=shard.dtype, device=shard.device)
        if self.world == 1:
            return every.copy_(sent)
        self._run(sent, lambda: _all_gather(every, sent, group=self.group, async_op=True))
        return every.view(self.world, most, -1).transpose(0, 1).flatten(0, 1)[:count]

    @torch.no_grad()
    def all_reduce_rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        weight_bias: float,
        row_sharded: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The norm of all rows, and the new residual: of all rows, or of this rank's where it is row-sharded."""
        total = self.all_reduce(x)
        if not row_sharded:
            return self._add_norm(total, weight, residual, eps, weight_bias)
        own = total[self.group.rank() :: self.world]
        norm, new = self._add_norm(own, weight, residual, eps, weight_bias)
        return self.gather_rows(norm, x.shape[0]), new

    def _add_norm(
        self, total: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_bias: float
    ) -> tuple[Tensor, Tensor | None]:
        """Norm and new residual of rounded sums."""
        r = total
        if residual is None or residual.dtype != torch.float32:
            r = r.float()
        if residual is not None:
            r = torch.add(r, residual)
        norm = torch.nn.functional.rms_norm(r, (r.shape[-1],), self._gamma(weight, weight_bias).float(), eps)
        return norm.to(total.dtype), None if residual is None else r.to(residual.dtype)

    def _inverse_rms(self, xs: Sequence[Tensor], eps: tuple[float, ...]) -> Tensor:
        """fp32 `[T, len(xs)]`: of each x the inverse root mean squares of its whole rows, as a column."""
        total = sums_of_squares(xs)
        self._all_reduce(total.squeeze(-1))
        reciprocals = self._constant(*(1.0 / (self.world * x.shape[-1]) for x in xs))
        return torch.addcmul(self._constant(*eps), total, reciprocals, out=total).rsqrt_()

    def _scale(
        self, x: Tensor, inverse: Tensor, weight: Tensor, weight_bias: float, rope: Rope | None = None
    ) -> Tensor:
        """`round((x * inverse) * (weight + weight_bias))`, or `round(rotate(x * (weight + weight_bias)) * inverse)`.
        inverse is fp32 and so are all products."""
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if rope is not None:
            return torch.mul(rotate(x.float() * self._gamma(weight, weight_bias), rope), inverse, out=y)
        return torch.mul(torch.mul(x, inverse), self._gamma(weight, weight_bias), out=y)

    def _gamma(self, weight: Tensor, weight_bias: float) -> Tensor:
        """The weight as it is, or its sum with the bias in fp32."""
        return torch.add(weight, self._constant(weight_bias)) if weight_bias else weight

    def _constant(self, *values: float) -> Tensor:
        """Numbers as fp32 on the device, made once. Not kept while a CUDA graph is captured: only a replay would fill
        the tensor, and a copy from the host can't be captured."""
        if values not in self._constants:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                numbers = [torch.full((1,), v, dtype=torch.float32, device=self.device) for v in values]
                return torch.cat(numbers)
            made = torch.tensor(values, dtype=torch.float32, device=self.device)
            if type(made) is not Tensor:  # a trace's, which holds no numbers
                return made
            self._constants[values] = made
        return self._constants[values]

    def _gathered(self, x: Tensor) -> Tensor:
        """The whole rows, in fp32: W times the bytes of x instead of one float a row."""
        rows = x.contiguous()
        parts = torch.empty(self.world * rows.shape[0], x.shape[-1], dtype=x.dtype, device=x.device)
        self._run(rows, lambda: _all_gather(parts, rows, group=self.group, async_op=True))
        whole: Tensor = parts.unflatten(0, (self.world, -1)).transpose(0, 1).flatten(1).float()
        return whole

    def _gathered_norm(
        self, x: Tensor, whole: Tensor, weight: Tensor, eps: float, weight_bias: float, rope: Rope | None = None
    ) -> Tensor:
        """The own slice of the norm of whole rows."""
        n = x.shape[-1]
        if rope is not None:
            inverse = whole.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            return self._scale(x, inverse, weight, weight_bias, rope)
        normed = torch.nn.functional.rms_norm(whole, (self.world * n,), None, eps)
        own = normed[:, self.group.rank() * n : (self.group.rank() + 1) * n]
        return (own * self._gamma(weight, weight_bias)).to(x.dtype)

    def _all_reduce(self, buffer: Tensor) -> None:
        """Sum a contiguous buffer over the ranks, in place."""
        if self.world == 1:
            return
        self._run(buffer, lambda: dist.all_reduce(buffer, group=self.group, async_op=True))

    def _all_reduce_large(self, x: Tensor) -> Tensor:
        """Each rank sums its part of the elements, in fp32 and rank order, and hands out the rounded result."""
        part = -(-x.numel() // self.world)
        sent, missing = x.reshape(-1), part * self.world - x.numel()
        if missing:
            sent = torch.nn.functional.pad(sent, (0, missing))
        every = torch.empty_like(sent)
        self._run(sent, lambda: dist.all_to_all_single(every, sent, group=self.group, async_op=True))
        first, *others, last = every.view(self.world, part).unbind()
        total = first.float()
        for other in others:
            total += other
        own = torch.add(total, last, out=torch.empty_like(last))
        self._run(own, lambda: _all_gather(every, own, group=self.group, async_op=True))
        return every[: x.numel()].view(x.shape)

    def _run(self, buffer: Tensor, start: Callable[[], dist.Work]) -> None:
        """Start an exchange of `buffer` and wait for it: the host on Gloo, the current stream elsewhere."""
        assert self._current is not None
        number, served = self._current
        call = served.call
        served.counter.bytes += buffer.numel() * buffer.element_size()
        try:
            if self._watchdog is None:
                start().wait(self._timeout)
            else:
                self._watchdog.follow(number, call, start)
        except RuntimeError as error:
            raise self._fail(number, call, first_line(error)) from error

    def _compare(self, number: int, call: Call) -> None:
        own = torch.frombuffer(bytearray(call.pack()), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.world)]
        options = AllgatherOptions()
        options.timeout = self._timeout
        try:
            self.group.allgather([every], [own], options).wait()
        except RuntimeError as error:
            raise self._fail(number, call, first_line(error)) from error
        packed = [bytes(t.tolist()) for t in every]
        if any(p != packed[0] for p in packed):
            raise RankMismatch(difference(number, [Call.unpack(p) for p in packed]))


@torch.no_grad()
def sum_of_experts(x: Tensor) -> Tensor:
    """`[T, H]`, rounded, of `[T, top_k, H]`. One by one: the order of torch.sum depends on the number of rows."""
    first, *others = x.unbind(1)
    total = first.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for other in others:
        total += other
    return total.to(x.dtype)


def sums_of_squares(xs: Sequence[Tensor]) -> Tensor:
    """fp32 `[T, len(xs)]`: of each x `[T, n]` the sums over its rows, as a column.

    On a GPU a norm is one kernel that reads x as it is; root and square cost 1.5 ulp. torch's norm on a CPU adds one
    element after the other: 79 ulp at 16384 in bf16, measured.
    """
    sums = torch.empty(xs[0].shape[0], len(xs), dtype=torch.float32, device=xs[0].device)
    for x, column in zip(xs, sums.unbind(-1), strict=True):
        if x.is_cuda:
            torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32, out=column)
        else:
            torch.sum(x.float().square(), -1, out=column)
    return sums.square_() if sums.is_cuda else sums


def _fail_closed(number: int, call: Call, cause: str) -> TpfuseError:
    return CommunicatorClosed(f"call #{number}, {call}: the communicator was closed meanwhile ({cause}).")


def difference(number: int, calls: list[Call]) -> str:
    """Name the ranks and the fields in which the calls differ from rank 0's."""
    found = [
        f"rank {rank} has {field}={getattr(call, field)}, rank 0 has {getattr(calls[0], field)}"
        for rank, call in enumerate(calls)
        for field in Call._fields
        if getattr(call, field) != getattr(calls[0], field)
    ]
    return (
        f"call #{number}, {calls[0]} on rank 0: the ranks differ: {'; '.join(found)}. "
        "Every rank must make the same calls with the same shapes and settings."
    )


@dataclass
class InFlight:
    """A call that the device has not finished. `ready` fires when all earlier work of the stream is done."""

    number: int
    call: Call
    ready: torch.cuda.Event
    work: dist.Work
    since: float | None = None  # when `ready` was first seen fired


STOP = GRACE + 3 * ANSWER  # seconds: a diagnosis, and after it an abort


class Watchdog:
    """Follows asynchronous calls and fails the communicator when one does not end in time."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout: float,
        fail: Callable[[int, Call, str], TpfuseError],
    ) -> None:
        self._group, self._timeout, self._fail = group, timeout, fail
        self._calls: deque[InFlight] = deque()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tpfuse-watchdog", daemon=True)
        self._thread.start()

    def follow(self, number: int, call: Call, start: Callable[[], dist.Work]) -> None:
        if torch.cuda.is_current_stream_capturing():
            start().wait()
            return
        ready = torch.cuda.Event()
        ready.record()
        work = start()
        work.wait()
        self._calls.append(InFlight(number, call, ready, work))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(STOP)
        if self._thread.is_alive():  # in torch's abort, which has no limit
            warnings.warn(f"tpfuse: aborting the process group takes more than {STOP:g} s; left alone.", stacklevel=3)

    def _watch(self) -> None:
        pause = min(0.2, self._timeout / 10)
        while not self._stopped.wait(pause):
            try:
                late = self._late()
            except RuntimeError as error:
                if "captur" in str(error):  # a graph of another thread's: asked again when it is done
                    continue
                # This rank's device has failed, and torch says so in its next call. Peers' watchdogs name this rank.
                warnings.warn(f"tpfuse: calls are not watched any more: {first_line(error)}", stacklevel=1)
                return
            if late is not None:
                self._fail(late.number, late.call, "the exchange did not end on the device")
                self._group.abort()
                return

    def _late(self) -> InFlight | None:
        """The oldest call in flight, if its time is over."""
        while self._calls and self._calls[0].work.is_completed():
            self._calls.popleft()
        if not self._calls:
            return None
        oldest, now = self._calls[0], time.monotonic()
        if oldest.since is None:
            oldest.since = now if oldest.ready.query() else None
            return None
        return oldest if now - oldest.since > self._timeout else None
