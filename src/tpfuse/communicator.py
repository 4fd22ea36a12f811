"""The Communicator: one for each tensor-parallel group and device. It owns the plan and the backend, checks what it is
given, and counts what ran.

Reading order for one call: the public method checks its tensors, `_serve` picks the route, `_begin` counts and
announces, the backend computes. Checks and route are remembered under the call's signature: the method's first lines
put everything that they depend on into a key. Under torch.compile the method becomes one operator of `ops.py`, which
calls the same method again when it runs.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from dataclasses import replace
from numbers import Real
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import __version__, checks
from tpfuse.agreement import Board, agree, diagnose
from tpfuse.backends import collective
from tpfuse.backends.collective import Call, Collective, Served
from tpfuse.backends.cuda import backend as cuda_backend
from tpfuse.backends.cuda import tuning
from tpfuse.backends.cuda.all_reduce import why_not as why_not_reduce
from tpfuse.backends.cuda.backend import CudaBackend
from tpfuse.backends.cuda.sharded_norm import why_not
from tpfuse.backends.cuda.workspace import availability, place
from tpfuse.errors import CommunicatorClosed, InvalidArgument, TpfuseError, Unsupported, first_line
from tpfuse.plan import MODES, Counter, Facts, Plan, Report, Route, combined_mode
from tpfuse.quant import Format
from tpfuse.reference import NormOutput
from tpfuse.rope import Rope

MAX_TIMEOUT = 1e6  # seconds; an endless wait is what the timeout is there to prevent
BACKENDS = ("auto", "cuda", "collective")
MOST_REMEMBERED = 1024  # signatures, of a communicator

_made: dict[str, int] = {}  # communicators made so far on each group, so that every one has its own name
_by_name: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()


def by_name(name: str) -> Communicator:
    """The living communicator of that name in this process: how operators in compiled code find theirs."""
    found = _by_name.get(name)
    if found is None:
        raise CommunicatorClosed(
            f"no communicator named {name!r} in this process; living: {sorted(_by_name)}. "
            "Keep the Communicator alive as long as code compiled with it runs."
        )
    return found


class Communicator:
    """Tensor-parallel ops of one process group on one device.

    Making one is collective: every rank of the group must, in the same order, and ranks whose version, settings or plan
    differ get a RankMismatch. Use it as a context manager, or call `close()`.

    group: a torch.distributed process group; None: the default one.
    device: where the tensors live; None: the current GPU if the group serves GPUs, else the CPU.
    mode: "fused", "control" (separate all-reduce and norm) or "off" (as model authors write it: whole rows gathered).
    backend: "cuda" (own kernels, up to 8 GPUs of one host that reach each other), "collective" (torch.distributed), or
    "auto": cuda for what it serves, collective for the rest; `plan` says why.
    max_hidden: widest row, in elements of one rank's tensor.
    timeout: seconds after which a rank that does not come is an error.

    Raises InvalidArgument, Unsupported, RankMismatch, PeerTimeout.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        mode: str = "fused",
        backend: str = "auto",
        max_hidden: int = 16384,
        timeout: float = 30.0,
    ) -> None:
        self.group = _resolve_group(group)
        serial = _made.get(self.group.group_name, 0)
        _made[self.group.group_name] = serial + 1
        self.name = f"{self.group.group_name}/{serial}"
        self.rank, self.world = self.group.rank(), self.group.size()
        self._board = Board(self.group, self.name)
        self._closed = False
        self._prepared = False
        self._failure: TpfuseError | None = None
        self._number = 0
        self._served: dict[Any, Served] = {}  # by signature; holds no tensors
        self._fallbacks: dict[tuple[str, str], Route] = {}
        self._counters: dict[int, Counter] = {}  # by the identity of the plan's route
        try:
            _check_settings(mode, backend, max_hidden, timeout)
            self.device, self.transport = _resolve_device(self.group, device)
        except TpfuseError as error:
            self._board.pin("facts", {"error": str(error)})
            raise
        self._gpu = self.device.type == "cuda"
        self.max_hidden, self.timeout = max_hidden, float(timeout)
        facts = Facts(self.world, self.device.type, self.transport, mode, backend, max_hidden)
        agree(self._board, self._settings(facts), self.timeout)
        self._cuda, reason = self._start_cuda(facts)
        try:
            routes = (
                fallback_routes(facts, reason) if self._cuda is None else cuda_backend.routes(self._cuda.thresholds)
            )
            self.plan = Plan(mode, backend, self.world, routes)
            agree(self._board, {"plan": self.plan.fingerprint}, self.timeout, "plan")
            agree(self._board, {}, self.timeout, "plan, all there")  # see prepare(): the others may have given up
            self._collective = Collective(self.group, self.device, self.transport, self.timeout, mode, self._fail)
        except BaseException:
            if self._cuda is not None:
                self._cuda.close()
            raise
        _by_name[self.name] = self
        import tpfuse.ops  # noqa: F401  registers torch.ops.tpfuse; here, because it needs `by_name` above

    def _settings(self, facts: Facts) -> dict[str, object]:
        """What must be the same on every rank."""
        return {
            "tpfuse": __version__,
            "torch": torch.__version__,
            "device": facts.device_type,
            "transport": facts.transport,
            "mode": facts.mode,
            "backend": facts.backend,
            "max_hidden": facts.max_hidden,
            "timeout": self.timeout,
        }

    def _start_cuda(self, facts: Facts) -> tuple[CudaBackend | None, str]:
        """The cuda backend, or why there is none; the same on every rank. Collective.

        Raises Unsupported where it was asked for and can't work.
        """
        reason: str | None = why_not_cuda(facts)
        if reason is None:
            assert self.device.index is not None
            reason = availability(self._board, self.device.index, self.timeout)
        if reason is None:
            thresholds = tuning.load(place(self.device.index).model, self.world)
            thresholds = tuning.agreed(self._board, thresholds, self.timeout)
            try:
                return CudaBackend(self._board, self.device, self.timeout, self._fail, thresholds), ""
            except Unsupported as error:
                reason = str(error)
        if facts.backend == "cuda":
            raise Unsupported(f"Communicator: backend='cuda' can't work here: {reason}. Use backend='auto'.")
        return None, reason

    def prepare(self) -> None:
        """Make everything ready that later calls need. Collective; call it before capturing a CUDA graph."""
        self.check()
        if self._prepared:
            return
        # Before torch.distributed connects the ranks: its own wait for one that does not come takes minutes. Twice,
        # because a rank that comes too late finds that all others have come, but not that they have waited for it.
        action = "call prepare(), or make a call that torch.distributed serves,"
        try:
            agree(self._board, {}, self.timeout, "prepare", action)
            agree(self._board, {}, self.timeout, "prepare, all there", action)
            self._collective.prepare()
        except TpfuseError as error:  # ranks that it did not reach may have gone on, so there is no second try
            self._failure = error
            raise
        except Exception as error:
            self._failure = TpfuseError(
                f"prepare: torch.distributed could not connect the ranks: {first_line(error)}. This "
                "communicator can't be used any more."
            )
            raise self._failure from error
        self._prepared = True

    def close(self) -> None:
        """Give back what the communicator holds. Calls after it raise CommunicatorClosed; closing twice is fine."""
        if not self._closed:
            self._closed = True
            _by_name.pop(self.name, None)
            self._collective.close()
            if self._cuda is not None:
                self._cuda.close()
            del self.group  # see Collective.close

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.plan.effective_mode
        return f"<tpfuse.Communicator {self.name}: rank {self.rank} of {self.world} on {self.device}, {state}>"

    def report(self) -> Report:
        """What really ran, as data (`as_dict()`) and as a rich table (`rich.print`)."""
        counters = tuple(counter for counter in self._counters.values() if counter.calls)
        ran = combined_mode(c.route.mode for c in counters) if counters else self.plan.effective_mode
        return Report(
            self.plan.requested_mode, ran, self.rank, self.world, str(self.device), self.transport, self.plan, counters
        )

    def rms_norm(
        self, x: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_bias: float = 0.0, out: Tensor | None = None
    ) -> Tensor:
        """RMSNorm over a width that is split over the ranks.

        x: `[..., n]`, this rank's part of rows of `n * W`; rows may be strided. weight: `[n]`, its part of gamma.
        Returns `x / sqrt(sum over all ranks of x^2 / (n W) + eps) * (weight + weight_bias)` like x, in `out` if given
        (which may be x itself).
        """
        if torch.compiler.is_compiling():
            checks.no_gradient("rms_norm", x=x)
            y = torch.ops.tpfuse.rms_norm(x, weight, self.name, eps, weight_bias)
            return y if out is None else checks.like("rms_norm", out, y).copy_(y)
        into = out is not None and (traits(out), 0 if out is x else between(x, out))
        key = ("rms_norm", traits(x), traits(weight), eps, weight_bias, into)
        served = self._remembered(key)
        if served is None:
            checks.activation("rms_norm", "x", x, self.device, self.max_hidden)
            checks.weight("rms_norm", "weight", weight, x)
            if out is not None:
                checks.output("rms_norm", out, x)
                checks.itself_or_apart("rms_norm", out, x)
            call = Call("rms_norm", count_rows(x), x.shape[-1], 0, x.dtype, None, eps, eps, weight_bias)
            served = self._serve(call, why_not((call.width,)), key)
        backend = self._begin(served)
        if backend is None:
            return empty(x) if out is None else out
        if isinstance(backend, Collective):
            return given(backend.rms_norm(rows(x), weight, eps, weight_bias), x, out)
        y = empty(x) if out is None else out
        backend.rms_norm(served, spaced(x), weight, eps, weight_bias, spaced(y))
        return y

    def qk_rms_norm(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        *,
        eps: float | tuple[float, float] = 1e-6,
        weight_bias: float = 0.0,
        rope: Rope | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rms_norm` of q `[..., n]` and of k `[..., m]`, each over its own width, in ONE exchange of two floats a row.

        q and k may be views of one fused qkv tensor. eps: one number, or a pair for q and k. `out=(q, k)`: in place.
        rope: rotate the rows before they are rounded, see tpfuse.Rope.
        """
        q_eps, k_eps = pair(eps)
        if out is not None and (type(out) is not tuple or len(out) != 2):
            checks.pair_of_outputs("qk_rms_norm", out)
        if torch.compiler.is_compiling():
            checks.no_gradient("qk_rms_norm", q=q, k=k)
            norms = (q, k, q_weight, k_weight, self.name, q_eps, k_eps, weight_bias)
            if rope is None:
                y = torch.ops.tpfuse.qk_rms_norm(*norms)
            else:
                tables = (rope.cos, rope.sin, rope.positions, rope.head_dim, rope.rotary_dim, rope.interleaved)
                y = torch.ops.tpfuse.qk_rms_norm_rope(*norms, *tables)
            if out is None:
                return y[0], y[1]
            q_into, k_into = checks.like("qk_rms_norm", out[0], y[0]), checks.like("qk_rms_norm", out[1], y[1])
            return q_into.copy_(y[0]), k_into.copy_(y[1])
        key = (
            "qk_rms_norm", traits(q), traits(k), traits(q_weight), traits(k_weight), q_eps, k_eps, weight_bias,
            rope is not None and rotation_traits(rope),
            out is not None and (traits(out[0]), traits(out[1]), beside(q, k, *out)),
        )  # fmt: skip
        served = self._remembered(key)
        if served is None:
            checks.activation("qk_rms_norm", "q", q, self.device, self.max_hidden)
            checks.activation("qk_rms_norm", "k", k, self.device, self.max_hidden)
            checks.same_rows("qk_rms_norm", q, k)
            checks.weight("qk_rms_norm", "q_weight", q_weight, q)
            checks.weight("qk_rms_norm", "k_weight", k_weight, k)
            if out is not None:
                checks.output("qk_rms_norm", out[0], q)
                checks.output("qk_rms_norm", out[1], k)
                checks.itself_or_apart("qk_rms_norm", out[0], q, k)
                checks.itself_or_apart("qk_rms_norm", out[1], k, q)
                checks.apart("qk_rms_norm", *out)
            if rope is not None:
                rope.check("qk_rms_norm", q, k)
            widths = q.shape[-1], k.shape[-1]
            call = Call("qk_rms_norm", count_rows(q), *widths, q.dtype, None, q_eps, k_eps, weight_bias)
            served = self._serve(call, why_not(widths, rope), key)
        backend = self._begin(served)
        if backend is None:
            return (empty(q), empty(k)) if out is None else out
        if isinstance(backend, Collective):
            normed = backend.qk_rms_norm(rows(q), rows(k), q_weight, k_weight, q_eps, k_eps, weight_bias, rope)
            q_out, k_out = (None, None) if out is None else out
            return given(normed[0], q, q_out), given(normed[1], k, k_out)
        y = (empty(q), empty(k)) if out is None else out
        into = (spaced(y[0]), spaced(y[1]))
        backend.qk_rms_norm(served, spaced(q), spaced(k), q_weight, k_weight, q_eps, k_eps, weight_bias, rope, into)
        return y

    def all_reduce(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The sum of every rank's x `[..., H]`, in fp32 and rounded once; in `out` if given (may be x)."""
        if torch.compiler.is_compiling():
            checks.no_gradient("all_reduce", x=x)
            y = torch.ops.tpfuse.all_reduce(x, self.name)
            return y if out is None else checks.like("all_reduce", out, y).copy_(y)
        into = out is not None and (traits(out), 0 if out is x else between(x, out))
        key = ("all_reduce", traits(x), into)
        served = self._remembered(key)
        if served is None:
            checks.activation("all_reduce", "x", x, self.device, self.max_hidden)
            if out is not None:
                checks.output("all_reduce", out, x)
                checks.itself_or_apart("all_reduce", out, x)
            call = Call("all_reduce", count_rows(x), x.shape[-1], 0, x.dtype, None, 0.0, 0.0, 0.0)
            served = self._serve(call, why_not_reduce(call.width), key)
        backend = self._begin(served)
        if backend is None:
            return empty(x) if out is None else out
        if isinstance(backend, Collective):
            return given(backend.all_reduce(rows(x)), x, out)
        y = empty(x) if out is None else out
        backend.all_reduce(served, spaced(x), spaced(y))
        return y

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        residual: Tensor | None = None,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
        quant: Format | None = None,
        keep_norm: bool = False,
        residual_layout: str = "replicated",
        top_k: int | None = None,
    ) -> NormOutput:
        """All-reduce, residual add and RMSNorm, the boundary of every decoder layer.

        x: `[..., H]`, this rank's partial sum; weight: `[H]`, the whole gamma; residual: like x, of any float dtype.
        Returns `NormOutput(norm, residual, quant, scale)`: the norm of `sum + residual` in the dtype of x, and the new
        residual `sum + residual` in the residual's dtype (None without one). weight_bias=1.0 is Gemma's norm.
        quant: a format of tpfuse.quant; the norm is then returned as `quant` and `scale`, and as it is, too, with
        keep_norm. residual_layout="row_sharded": residual is this rank's rows `[own, H]` (see `shard_rows`), and so is
        the one that is returned; all else has all rows.
        top_k: x is `[..., top_k, H]`, the weighted outputs of each token's experts, whose sum is this rank's partial
        sum: in fp32, one after the other, rounded to the dtype of x. What is returned is as of x `[..., H]`.
        """
        op, row_sharded = "all_reduce_rms_norm", residual_layout != "replicated"
        if row_sharded:
            checks.layout(op, residual_layout, residual)
        if torch.compiler.is_compiling():
            checks.no_gradient(op, x=x, residual=residual)
            if top_k is not None:
                checks.experts(op, top_k, x)
            return self._compiled_boundary(x, weight, residual, eps, weight_bias, quant, keep_norm, row_sharded, top_k)
        key = (
            op, traits(x), traits(weight), residual is not None and traits(residual), eps, weight_bias,
            quant is not None and format_traits(quant), keep_norm, row_sharded, top_k,
            type(top_k),
        )  # fmt: skip
        served = self._remembered(key)
        if served is None:
            checks.activation(op, "x", x, self.device, self.max_hidden)
            if top_k is not None:
                checks.experts(op, top_k, x)
            partial = whole(x, top_k)
            checks.weight(op, "weight", weight, x)
            count, width = count_rows(partial), x.shape[-1]
            if residual is not None:
                if row_sharded:
                    checks.row_shard(op, "residual", residual, x.device, count, width, self.rank, self.world)
                checks.same_shape(op, "residual", residual, residual if row_sharded else partial)
                checks.no_gradient(op, residual=residual)
            if not isinstance(keep_norm, bool):
                raise InvalidArgument(f"{op}: keep_norm={keep_norm!r}; needed: True or False.")
            if quant is not None:
                checks.quant_format(op, quant, x)
            call = Call(
                op, count, width, 0, x.dtype, None if residual is None else residual.dtype, eps, eps, weight_bias,
                "" if quant is None else quant.name, keep_norm, row_sharded, top_k or 0,
            )  # fmt: skip
            served = self._serve(call, why_not_reduce(width, top_k or 1), key)
        backend = self._begin(served)
        partial = whole(x, top_k)
        if not isinstance(backend, Collective):
            outputs = boundary_outputs(partial, residual, quant, keep_norm)
            if backend is not None:
                stream = None if residual is None else spaced(residual)
                given_x = spaced(x) if top_k is None else stacked(x)
                backend.all_reduce_rms_norm(served, given_x, weight, stream, eps, weight_bias, quant, outputs)
            return outputs
        stream = None if residual is None else rows(residual)
        summed = rows(x) if top_k is None else collective.sum_of_experts(stacked(x))
        norm, new = backend.all_reduce_rms_norm(summed, weight, stream, eps, weight_bias, row_sharded)
        norm = norm.view(partial.shape)
        if residual is not None and new is not None:
            new = new.view(residual.shape)
        if quant is None:
            return NormOutput(norm, new, None, None)
        return NormOutput(norm if keep_norm else None, new, *quant.encode(norm))

    def _compiled_boundary(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        weight_bias: float,
        quant: Format | None,
        keep_norm: bool,
        row_sharded: bool,
        top_k: int | None,
    ) -> NormOutput:
        """`all_reduce_rms_norm` as an operator of compiled code."""
        ops = torch.ops.tpfuse
        if quant is not None or row_sharded or top_k is not None:
            name, given = ("", None) if quant is None else (quant.name, quant.given)
            results = ops.layer_boundary(
                x, weight, residual, self.name, eps, weight_bias, name, given, keep_norm, row_sharded, top_k
            )
            return ordered(results, residual, quant, keep_norm)
        if residual is None:
            return NormOutput(ops.all_reduce_rms_norm(x, weight, self.name, eps, weight_bias), None, None, None)
        y, r = ops.all_reduce_add_rms_norm(x, weight, residual, self.name, eps, weight_bias)
        return NormOutput(y, r, None, None)

    def shard_rows(self, x: Tensor) -> Tensor:
        """This rank's rows of x `[..., H]`, as a new tensor `[own, H]`: row t belongs to rank t % W. Local.

        It is how a residual stream enters residual_layout="row_sharded"; `gather_rows` is how it leaves.
        """
        if x.dim() == 0 or x.shape[-1] == 0:
            raise InvalidArgument(f"shard_rows: x has shape {list(x.shape)}; needed: [..., width] with width > 0.")
        return rows(x)[self.rank :: self.world].clone(memory_format=torch.contiguous_format)

    def gather_rows(self, shard: Tensor, rows: int) -> Tensor:
        """All `rows` rows `[rows, H]` of which each rank brings its own, `[own, H]`: an exact copy. Collective."""
        if torch.compiler.is_compiling():
            checks.no_gradient("gather_rows", shard=shard)
            gathered: Tensor = torch.ops.tpfuse.gather_rows(shard, rows, self.name)
            return gathered
        checks.activation("gather_rows", "shard", shard, self.device, self.max_hidden)
        if not isinstance(rows, int) or rows < 0:
            raise InvalidArgument(f"gather_rows: rows={rows!r}; needed: how many rows all ranks have together.")
        width = shard.shape[-1]
        checks.row_shard("gather_rows", "shard", shard, self.device, rows, width, self.rank, self.world)
        call = Call("gather_rows", rows, width, 0, shard.dtype, None, 0.0, 0.0, 0.0)
        if self._begin(Served(call, self._counter(collective.GATHER_ROWS), own_kernels=False)) is None:
            return empty(shard)
        return self._collective.gather_rows(shard, rows)

    def _remembered(self, key: tuple[Any, ...]) -> Served | None:
        """How calls of this signature are served, if there was one before."""
        try:
            return self._served.get(key)
        except TypeError:  # the symbolic sizes of a trace have no hash
            return None

    def _serve(self, call: Call, unfit: str, key: tuple[Any, ...]) -> Served:
        """Decide who serves a call that has passed the checks, and remember it for all calls that are like it.

        unfit: why the cuda backend can't take this call although the plan gives it the op.
        """
        checks.numbers(call.op, eps=call.eps, eps_of_k=call.eps2, weight_bias=call.weight_bias)
        route = self.plan.route(call.op, call.size_in_bytes)
        if self._cuda is not None and route.backend == "cuda":
            route = self._fallback(call.op, unfit) if unfit else self._cuda.refine(route, call)
        own_kernels = route.backend == "cuda"
        sent = cuda_backend.link_bytes(call, route, self.world) if own_kernels else 0
        served = Served(call, self._counter(route), own_kernels, sent)
        with suppress(TypeError):  # as in _remembered
            if len(self._served) >= MOST_REMEMBERED:
                self._served.clear()
            self._served[key] = served
        return served

    def _begin(self, served: Served) -> Collective | CudaBackend | None:
        """Announce a call, count it, and return who serves it; None: there are no rows to work on."""
        self.check()
        call, counter = served.call, served.counter
        capturing = self._gpu and torch.cuda.is_current_stream_capturing()
        if self._gpu and not self._prepared and not served.own_kernels:  # the same on every rank, as routes are
            if capturing:
                raise Unsupported(
                    f"{call.op}: first call of {self!r} that torch.distributed serves, inside a CUDA graph capture. "
                    "Call prepare() on every rank before."
                )
            self.prepare()
        counter.calls += 1
        counter.rows += call.rows
        counter.bytes += served.sent
        counter.captured += capturing
        self._number += 1
        backend = self._cuda if served.own_kernels else self._collective
        assert backend is not None
        backend.begin(self._number, served)
        return backend if call.rows > 0 else None

    def _fallback(self, op: str, reason: str) -> Route:
        """The collective route of an op that the plan gives to the cuda backend, with the reason."""
        found = self._fallbacks.get((op, reason))
        if found is None:
            facts = Facts(self.world, self.device.type, self.transport, "control", "collective", self.max_hidden)
            route = next(route for route in collective.routes(facts) if route.op == op)
            found = self._fallbacks[op, reason] = replace(route, reason=reason)
        return found

    def _counter(self, route: Route) -> Counter:
        found = self._counters.get(id(route))
        if found is None:
            found = self._counters[id(route)] = Counter(route)
        return found

    def check(self) -> None:
        """Raise if a call has failed: for programs that replay CUDA graphs, as a replay raises nothing by itself.

        Reads host memory, so it costs next to nothing and tells of what the device has done so far. Every call asks it.
        Raises CommunicatorClosed, PeerTimeout, RankMismatch.
        """
        if self._closed:
            raise CommunicatorClosed(f"communicator {self.name} is closed; make a new one.")
        if self._failure is not None:
            raise self._failure
        if self._cuda is not None:
            self._cuda.check()

    def _fail(self, number: int, call: Call, cause: str) -> TpfuseError:
        """Find out who is missing in a call that failed, and stay failed: the group is not usable any more."""
        self._failure = diagnose(self._board, number, str(call), cause, self.timeout)
        return self._failure

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        """Itself: making one is collective, and copies of a model run over the same ranks."""
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise Unsupported(
            f"{self!r} can't be pickled: it is a process group and memory of this process. Save the state_dict() of "
            "modules that hold it, and make a Communicator in the process that loads it."
        )


def count_rows(x: Tensor) -> int:
    """Rows of `[..., n]`."""
    return x.numel() // x.shape[-1]


def rows(x: Tensor) -> Tensor:
    """`[..., n]` as `[T, n]`: a view where the strides allow it."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def spaced(x: Tensor) -> Tensor:
    """x, or a copy if its rows don't lie at one stride. A view costs as much as all of a call's checks, so the kernels'
    launches take contiguous tensors of any number of dimensions, and others as `[T, n]`."""
    return x if x.dim() == 2 or x.is_contiguous() else x.reshape(-1, x.shape[-1])


def whole(x: Tensor, top_k: int | None) -> Tensor:
    """x, or of outputs of experts a view of the first ones: the shape of their sum."""
    return x if top_k is None else x.select(-2, 0)


def stacked(x: Tensor) -> Tensor:
    """Outputs of experts `[..., top_k, H]` as `[T, top_k, H]`: a view where the strides allow it."""
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])


def traits(x: Tensor) -> tuple[Any, ...]:
    """All that checks and launches depend on, of a tensor: everything but its address."""
    try:
        return x.dtype, x.shape, x.stride(), x.device, x.requires_grad and torch.is_grad_enabled()
    except (AttributeError, TypeError):
        raise InvalidArgument(f"a {type(x).__name__} was given where a torch.Tensor is needed.") from None


def between(a: Tensor, b: Tensor) -> Any:
    """How far two tensors of one memory lie apart, in bytes; None where each has memory of its own."""
    try:
        distance = b.data_ptr() - a.data_ptr()
        near = -b.untyped_storage().nbytes() < distance < a.untyped_storage().nbytes()
    except RuntimeError:  # as in checks.share_memory
        return None
    return distance if near else None


def beside(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor) -> Any:
    """How two outputs lie beside their inputs and each other."""
    pairs = () if q_out is q and k_out is k else ((q, q_out), (k, k_out), (q, k_out), (k, q_out))
    return between(q_out, k_out), *(between(*two) for two in pairs)


def rotation_traits(rope: Rope) -> tuple[Any, ...]:
    """The same of a rotation, whose check looks at addresses as well."""
    cos, sin = rope.cos, rope.sin
    off = (cos.data_ptr() | sin.data_ptr()) % 16
    return rope.rotary_dim, rope.head_dim, rope.interleaved, traits(cos), traits(sin), traits(rope.positions), off


def format_traits(quant: Format) -> tuple[Any, ...]:
    """The same of a format, or of what is not one."""
    if not isinstance(quant, Format):
        return (type(quant),)
    given = quant.given
    return type(quant), quant.name, given is not None and (traits(given), given.requires_grad)


def empty(x: Tensor) -> Tensor:
    """A contiguous tensor like x, not filled: results are contiguous whatever the strides of the input are."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def boundary_outputs(x: Tensor, residual: Tensor | None, quant: Format | None, keep_norm: bool) -> NormOutput:
    """What `all_reduce_rms_norm` returns, not filled."""
    norm = empty(x) if quant is None or keep_norm else None
    stream = None if residual is None else empty(residual)
    return NormOutput(norm, stream, None, None) if quant is None else NormOutput(norm, stream, *quant.empty(x))


def present(y: NormOutput, given: Tensor | None) -> list[Tensor]:
    """The results that there are, without a scale that was given: what an operator returns."""
    return [result for result in y if result is not None and result is not given]


def ordered(results: list[Tensor], residual: Tensor | None, quant: Format | None, keep_norm: bool) -> NormOutput:
    """What `present` has made a list of, as a NormOutput again."""
    there = iter(results)
    norm = next(there) if quant is None or keep_norm else None
    stream = None if residual is None else next(there)
    if quant is None:
        return NormOutput(norm, stream, None, None)
    return NormOutput(norm, stream, next(there), next(there, quant.given))


def pair(eps: float | tuple[float, float]) -> tuple[float, float]:
    """eps of q and of k."""
    if isinstance(eps, Real):
        return eps, eps
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise InvalidArgument(f"qk_rms_norm: eps={eps!r}; needed: one number, or two, for q and for k.")
    return eps[0], eps[1]


def given(y: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """The rows y in the shape of x, in `out` if there is one."""
    return y.view(x.shape) if out is None else out.copy_(y.view(x.shape))


def why_not_cuda(facts: Facts) -> str | None:
    """Why the cuda backend is not even tried, from what is known without asking the other ranks."""
    if facts.mode != "fused":
        return f"mode {facts.mode} does without fused kernels"
    if facts.backend == "collective":
        return "backend collective was asked for, and has no fused kernels"
    if facts.device_type != "cuda":
        return f"backend cuda needs GPUs, the device is {facts.device_type}; backend collective has no fused kernels"
    return "one rank: there is no exchange" if facts.world == 1 else None


def fallback_routes(facts: Facts, reason: str) -> tuple[Route, ...]:
    """The routes of every op where `reason` speaks against the cuda backend."""
    return tuple(replace(route, reason=reason if facts.mode == "fused" else "") for route in collective.routes(facts))


def _resolve_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise InvalidArgument(
            f"Communicator: group is {group!r}; needed: a torch.distributed process group of this rank, or None."
        )
    if not dist.is_initialized():
        started = "RANK and WORLD_SIZE are set" if "RANK" in os.environ else "this process was not started by torchrun"
        raise InvalidArgument(
            f"Communicator: torch.distributed is not initialised ({started}). Call "
            "torch.distributed.init_process_group() on every rank first; one process alone is a group of one."
        )
    return group if group is not None else dist.group.WORLD  # type: ignore[return-value]


def _check_settings(mode: str, backend: str, max_hidden: int, timeout: float) -> None:
    if mode not in MODES:
        raise InvalidArgument(f"Communicator: mode={mode!r}; supported: {', '.join(MODES)}.")
    if backend not in BACKENDS:
        raise InvalidArgument(f"Communicator: backend={backend!r}; supported: {', '.join(BACKENDS)}.")
    if not isinstance(max_hidden, int) or max_hidden < 1:
        raise InvalidArgument(
            f"Communicator: max_hidden={max_hidden!r}; needed: a whole number of elements, at least 1."
        )
    if not isinstance(timeout, (int, float)) or not 0 < timeout < MAX_TIMEOUT:
        raise InvalidArgument(
            f"Communicator: timeout={timeout!r}; needed: seconds, more than 0, below {MAX_TIMEOUT:g}."
        )


def _resolve_device(group: dist.ProcessGroup, device: torch.device | str | None) -> tuple[torch.device, str]:
    """The device and the transport that the group has for it, e.g. (cuda:3, "nccl")."""
    transports = dict(part.split(":") for part in str(dist.get_backend_config(group)).split(","))
    if device is None:
        gpu = "cuda" in transports and torch.cuda.is_available() and transports["cuda"] != "gloo"
        device = "cuda" if gpu else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"Communicator: device={device!r}; supported: cpu, cuda, cuda:N.") from error
    if device.type == "cpu":
        device = torch.device("cpu")  # there is one, and tensors on it say so
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Unsupported(f"Communicator: device={device}, but torch sees no GPU here. Use device='cpu'.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type not in transports:
        raise Unsupported(
            f"Communicator: device={device}, but the group serves {', '.join(transports)} only. "
            "Make the group with a backend for that device (gloo for cpu, nccl for cuda)."
        )
    return device, transports[device.type]
