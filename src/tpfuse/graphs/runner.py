"""One traced graph at run time: which size serves a call, recording it, replaying it.

A call with T tokens is served by the smallest size S that has room. What pieces read from outside of pieces lies in
padded buffers: the first T rows are copied in, the rest is zero. Pieces compute S rows; operators that were split off
get the first T, as views, so what they write in place lies where the next piece looks for it. Results are the caller's
own: copies of the first T rows.

States of a size, per lane (a stream that calls come on): nothing -> recorded (`Recording`), by the first call that
needs it -> nothing, by `clear`. A recording that fails leaves nothing.

Design record
- A recording run is a real one: each piece is warmed up on copies of its inputs, captured, and replayed, then the
  operator behind it runs on what it computed. So no made-up inputs are needed, and captured is what runs.
- Pieces must not write to memory that is not per token: warm-ups would do it again, padding would do it for tokens
  that don't exist. Tensors count their writes (`_version`), so this is an error and not a hope.
- Addresses that graphs hold are compared on every replay: 0.08 µs a tensor, measured on a CPU. What operators inside a
  piece find for themselves (by name, in a closure) can't be seen: `Piecewise.clear` is for that.
- Numbers that pieces compute with are in the graphs as they were. A call that brings another one runs eagerly, and is
  counted: numbers change by design, addresses by mistake.
- A lane serves one call at a time: a second one would overwrite its buffers. That is an error, not a wait.
- Padded buffers are shared by all sizes of a lane: views of one allocation for the largest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpfuse.checks import share_memory
from tpfuse.errors import InvalidArgument, TpfuseError, Unsupported
from tpfuse.graphs.ahead import SERVING
from tpfuse.graphs.capture import Graph, Mechanism
from tpfuse.graphs.partition import Partition, Step, refuse_writes
from tpfuse.graphs.report import Counts
from tpfuse.graphs.specs import Count, Rows


class StaleGraph(TpfuseError):
    """A tensor that a captured graph reads has another address now."""


class CaptureFailed(TpfuseError):
    """A piece could not be captured; nothing of that size was kept, and the next call tries again."""


@dataclass
class Settings:
    """What the runners of one backend share."""

    sizes: tuple[int, ...]  # rising
    warmup: int
    check_addresses: bool
    mechanism: Mechanism
    pool: Any
    counts: Counts
    unfreed: list[Any] = field(default_factory=list)  # pools of graphs that could not be reset
    locks: dict[Hashable, threading.Lock] = field(default_factory=dict)  # by lane: one call at a time
    guard: threading.Lock = field(default_factory=threading.Lock)  # of new locks

    def lock(self, lane: Hashable) -> threading.Lock:
        found = self.locks.get(lane)
        if found is None:
            with self.guard:
                found = self.locks.setdefault(lane, threading.Lock())
        return found

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """In it no call runs and none begins. Raises Unsupported where one does."""
        with self.guard, contextlib.ExitStack() as held:
            for lock in self.locks.values():
                if not lock.acquire(blocking=False):
                    raise Unsupported(
                        "Piecewise: clear() while a call runs, whose graphs it would free. Call it between calls."
                    )
                held.callback(lock.release)
            yield

    def size_for(self, tokens: int) -> int | None:
        """The smallest size with room; None: a miss."""
        return next((size for size in self.sizes if size >= tokens), None)


@dataclass
class Lane:
    """What one lane of a runner holds: padded buffers, and the recordings that read them."""

    buffers: dict[int, Tensor] = field(default_factory=dict)  # by slot, flat, for the largest size
    recordings: dict[int, Recording] = field(default_factory=dict)  # by size

    def buffer(self, slot: int, spec: Rows, size: int, largest: int) -> Tensor:
        """The padded buffer of a slot for `size` tokens, contiguous."""
        if slot not in self.buffers:
            with torch.inference_mode(False):  # so that writes are counted
                self.buffers[slot] = torch.zeros(spec.numel(largest), dtype=spec.dtype, device=spec.device)
        return self.buffers[slot][: spec.numel(size)].view(spec.shape_of(size))


@dataclass
class Recording:
    """A captured size. `padded` has the whole rows of what lies at fixed addresses, by slot."""

    size: int
    graphs: dict[str, Graph] = field(default_factory=dict)  # by step
    padded: dict[int, Any] = field(default_factory=dict)
    addresses: dict[int, int] = field(default_factory=dict)  # of fixed tensors that pieces read, by slot
    numbers: dict[int, Any] = field(default_factory=dict)  # fixed numbers that pieces read, by slot
    memory: frozenset[int] = frozenset()  # storages that replays write to
    written: set[int] = field(default_factory=set)  # graph inputs that a step writes to
    seconds: float = 0.0  # of its capture, warm-ups included
    bytes: int = 0  # by which the pool grew

    def reset(self) -> list[str]:
        """Free the graphs; what fails is reported, and the rest goes on."""
        failures = []
        for name, graph in self.graphs.items():
            try:
                graph.reset()
            except Exception as error:
                failures.append(f"{name} at {self.size} tokens: {error}")
        self.graphs.clear()
        self.padded.clear()
        return failures


class Runner:
    """Runs one partitioned graph. Made by the backend, held by the compiled code."""

    def __init__(self, parts: Partition, settings: Settings) -> None:
        self.parts, self.settings = parts, settings
        self.lanes: dict[Hashable, Lane] = {}
        read = parts.slots_of(piece=True)
        inputs = range(parts.inputs)
        self._buffered = tuple(n for n in inputs if n in read and isinstance(parts.specs[n], Rows))
        outside = [slot for step in parts.steps if not step.piece for slot in step.outputs]
        self._copied = frozenset(n for n in outside if n in read and isinstance(parts.specs[n], Rows))
        self._fixed = tuple(n for n in inputs if n in read and not isinstance(parts.specs[n], (Rows, Count)))
        self._laid_out = self._copied.union(self._buffered)
        self._dropped = parts.dropped_after()
        self._first_call = True

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """What compiled code calls."""
        ahead = SERVING.get()
        return self.serve(args) if ahead is None else ahead.serve(self, args)

    def replays(self, args: Sequence[Any]) -> bool:
        """Whether `serve` would only replay, and write to no input."""
        parts, mechanism = self.parts, self.settings.mechanism
        if mechanism.why_not(self._device(args)):
            return False
        tokens = parts.tokens(args)
        for slot in parts.counted:
            spec, given = parts.specs[slot], args[slot]
            assert isinstance(spec, Rows)
            if (tuple(given.shape), given.dtype, given.device) != (spec.shape_of(tokens), spec.dtype, spec.device):
                return False
        lane, size = self.lanes.get(mechanism.lane()), self.settings.size_for(tokens)
        recording = None if lane is None or size is None else lane.recordings.get(size)
        if recording is None or recording.written:
            return False
        return all(_same(_number(args[n]), was) for n, was in recording.numbers.items())

    def serve(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Serve one call of the graph, with the inputs and results of the graph."""
        settings, counts = self.settings, self.settings.counts
        tokens = self.parts.tokens(args)
        reason = settings.mechanism.why_not(self._device(args))
        if reason:
            counts.eager[reason] += 1
            return self._eagerly(args, tokens)
        size = settings.size_for(tokens)
        if size is None:
            counts.misses[tokens] += 1
            return self._eagerly(args, tokens)
        lane_key = settings.mechanism.lane()
        lock = settings.lock(lane_key)
        if not lock.acquire(blocking=False):
            raise Unsupported(
                "Piecewise: a call while another one, or clear(), runs on this stream, whose graphs share memory. "
                "Threads need a stream each, and a split operator must not call a model of the same backend."
            )
        try:
            return self._graphs(args, tokens, size, lane_key)
        finally:
            lock.release()

    def _graphs(self, args: Sequence[Any], tokens: int, size: int, lane_key: Hashable) -> tuple[Any, ...]:
        """Serve a call by the graphs of a size."""
        lane = self.lanes.get(lane_key)
        if lane is None:
            lane = self.lanes[lane_key] = Lane()
        counts, recording = self.settings.counts, lane.recordings.get(size)
        if recording is None:
            results = self._record(args, tokens, size, lane, lane_key)
        else:
            other = [self.parts.names[n] for n, was in recording.numbers.items() if not _same(_number(args[n]), was)]
            if other:
                counts.eager[f"another number than at the capture: {', '.join(other)}"] += 1
                return self._eagerly(args, tokens)
            results = self._replay(recording, args, tokens)
        counter = counts.sizes[size]
        counter.calls += 1
        counter.replays += recording is not None
        counter.tokens += tokens
        counter.padding += size - tokens
        return results

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.nbytes for lane in list(self.lanes.values()) for buffer in list(lane.buffers.values()))

    def clear(self) -> list[str]:
        """Drop everything captured: graphs, addresses, results, buffers. Returns what failed to reset, and goes on."""
        lanes, self.lanes = self.lanes, {}
        return [failure for lane in lanes.values() for r in lane.recordings.values() for failure in r.reset()]

    def _device(self, args: Sequence[Any]) -> torch.device:
        devices = (arg.device for arg in args if isinstance(arg, Tensor))
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    def _eagerly(self, args: Sequence[Any], tokens: int) -> tuple[Any, ...]:
        values = dict(enumerate(args))
        for step, dropped in zip(self.parts.steps, self._dropped, strict=True):
            given = [self._count(slot, tokens, values) for slot in step.inputs]
            run = step.run if self._contiguous(step, given) else step.traced
            values.update(zip(step.outputs, step.values(run(*given)), strict=True))
            for slot in dropped:
                values.pop(slot, None)
        return self._marked([self._count(slot, tokens, values) for slot in self.parts.results])

    def _contiguous(self, step: Step, given: Sequence[Any]) -> bool:
        """Whether a piece gets what graphs read from padded buffers laid out like these, for which it was compiled."""
        slots = zip(step.inputs, given, strict=True)
        return step.run is step.traced or all(v.is_contiguous() for slot, v in slots if slot in self._laid_out)

    def _marked(self, results: Sequence[Any]) -> tuple[Any, ...]:
        """Results. Behind a graph break, the next graph of a model is traced with those of the first call, and finds on
        them where its tokens are."""
        if self._first_call:
            self._first_call = False
            for slot, value in zip(self.parts.results, results, strict=True):
                spec = None if slot is None or slot < self.parts.inputs else self.parts.specs[slot]
                if isinstance(spec, Rows):
                    torch._dynamo.maybe_mark_dynamic(value, spec.dim)
        return tuple(results)

    def _count(self, slot: int | None, tokens: int, values: dict[int, Any]) -> Any:
        if slot is None:
            return None
        spec = self.parts.specs[slot]
        return spec.at(tokens) if isinstance(spec, Count) else values[slot]

    def _fill(self, padded: Tensor, spec: Rows, given: Tensor, tokens: int, size: int) -> None:
        spec.first(padded, tokens).copy_(given)
        if tokens < size:
            spec.after(padded, tokens).zero_()

    def _load(self, padded: dict[int, Any], args: Sequence[Any], tokens: int, size: int) -> None:
        for slot in self._buffered:
            spec = self.parts.specs[slot]
            assert isinstance(spec, Rows)
            self._fill(padded[slot], spec, args[slot], tokens, size)

    def _split(self, step: Step, padded: dict[int, Any], outside: dict[int, Any], tokens: int, size: int) -> None:
        """Run an operator that was split off, on the real tokens, and put what it returns where pieces read it."""
        given = [self._real(slot, padded, outside, tokens, size) for slot in step.inputs]
        for slot, value in zip(step.outputs, step.values(step.run(*given)), strict=True):
            outside[slot] = value
            if slot in self._copied:
                spec = self.parts.specs[slot]
                assert isinstance(spec, Rows)
                if tuple(value.shape) != spec.shape_of(tokens):
                    raise InvalidArgument(
                        f"Piecewise: {step.name} returned {list(value.shape)} as {self.parts.names[slot]} for {tokens} "
                        f"tokens; its fake implementation says {list(spec.shape_of(tokens))}."
                    )
                self._fill(padded[slot], spec, value, tokens, size)

    def _real(self, slot: int, padded: dict[int, Any], outside: dict[int, Any], tokens: int, size: int) -> Any:
        """A value without padding. `outside` has what lies in no padded memory: inputs, results of split operators."""
        spec = self.parts.specs[slot]
        if isinstance(spec, Count):
            return spec.at(tokens)
        if slot not in padded:
            return outside[slot]
        value = padded[slot]
        return spec.first(value, tokens) if isinstance(spec, Rows) and tokens < size else value

    def _results(
        self, recording: Recording, padded: dict[int, Any], outside: dict[int, Any], args: Sequence[Any], tokens: int
    ) -> tuple[Any, ...]:
        size = recording.size
        for slot in recording.written:
            args[slot].copy_(self._real(slot, padded, outside, tokens, size))
        own = [None if s is None else self._own(s, recording, padded, outside, tokens) for s in self.parts.results]
        return self._marked(own)

    def _refuse_shared(self, written: set[int], slots: Sequence[int], args: Sequence[Any]) -> None:
        """What is written to the buffer of one input is not seen in another that has the same memory."""
        for ours in written:
            for other in slots:
                if other != ours and isinstance(args[other], Tensor) and share_memory(args[ours], args[other]):
                    raise InvalidArgument(
                        f"Piecewise: {self.parts.names[ours]}, which the model writes to, shares memory with "
                        f"{self.parts.names[other]}; here the former has a buffer of its own. Give the model tensors "
                        "of their own."
                    )

    def _own(
        self, slot: int, recording: Recording, padded: dict[int, Any], outside: dict[int, Any], tokens: int
    ) -> Any:
        """A result for the caller, which the next replay does not touch."""
        if slot < self.parts.inputs and not isinstance(self.parts.specs[slot], Count):
            return outside[slot]
        value = self._real(slot, padded, outside, tokens, recording.size)
        if not isinstance(value, Tensor):
            return value
        ours = slot in padded or value.untyped_storage().data_ptr() in recording.memory
        return value.clone() if ours else value

    def _replay(self, recording: Recording, args: Sequence[Any], tokens: int) -> tuple[Any, ...]:
        size, padded = recording.size, recording.padded
        if self.settings.check_addresses:
            moved = [n for n, address in recording.addresses.items() if args[n].data_ptr() != address]
            if moved:
                raise StaleGraph(self._moved(recording, moved))
        if recording.written:
            self._refuse_shared(recording.written, self.parts.counted, args)
        outside = dict(enumerate(args))
        self._load(padded, args, tokens, size)
        for step in self.parts.steps:
            if step.piece:
                recording.graphs[step.name].replay()
            else:
                self._split(step, padded, outside, tokens, size)
        return self._results(recording, padded, outside, args, tokens)

    def _moved(self, recording: Recording, slots: Sequence[int]) -> str:
        return (
            f"Piecewise: {', '.join(self.parts.names[slot] for slot in slots[:5])} moved since {recording.size} tokens "
            "were captured, so a replay would read memory that may be freed, or old numbers. Call backend.clear() when "
            "weights or caches move; the next calls capture again."
        )

    def _record(self, args: Sequence[Any], tokens: int, size: int, lane: Lane, lane_key: Hashable) -> tuple[Any, ...]:
        """Serve a call and capture its size on the way."""
        settings = self.settings
        began, held = time.perf_counter(), settings.mechanism.held(settings.pool)
        recording = Recording(size)
        try:
            results = self._record_steps(recording, args, tokens, lane, lane_key)
        except BaseException:
            settings.counts.failures += recording.reset()
            raise
        lane.recordings[size] = recording
        settings.counts.sizes[size].captures += 1
        recording.seconds = time.perf_counter() - began
        recording.bytes = settings.mechanism.held(settings.pool) - held
        return results

    def _record_steps(
        self, recording: Recording, args: Sequence[Any], tokens: int, lane: Lane, lane_key: Hashable
    ) -> tuple[Any, ...]:
        size, specs = recording.size, self.parts.specs
        outside = dict(enumerate(args))
        owned: dict[int, Any] = {}  # what recording.padded has, until its last reader is captured
        for slot in (*self._buffered, *self._copied):
            spec = specs[slot]
            assert isinstance(spec, Rows)
            recording.padded[slot] = owned[slot] = lane.buffer(slot, spec, size, self.settings.sizes[-1])
        self._load(owned, args, tokens, size)
        for step, dropped in zip(self.parts.steps, self._dropped, strict=True):
            inputs = {slot: recording.padded[slot] for slot in self._buffered}
            if step.piece:
                self._capture(step, recording, owned, outside, lane_key)
            else:
                before = _writes(inputs)
                self._split(step, owned, outside, tokens, size)
                recording.written |= {slot for slot in inputs if slot in step.writes} | _changed(inputs, before)
            for slot in dropped:
                owned.pop(slot, None)
        self._refuse_shared(recording.written, range(self.parts.inputs), args)
        for slot in self._fixed:
            if _is_number(args[slot]):
                recording.numbers[slot] = _number(args[slot])
            elif isinstance(args[slot], Tensor):
                recording.addresses[slot] = args[slot].data_ptr()
        whole = (value for value in recording.padded.values() if isinstance(value, Tensor))
        recording.memory = frozenset(value.untyped_storage().data_ptr() for value in whole)
        return self._results(recording, recording.padded, outside, args, tokens)

    def _capture(
        self, step: Step, recording: Recording, owned: dict[int, Any], outside: dict[int, Any], lane_key: Hashable
    ) -> None:
        """Warm a piece up, capture it, and run it by its first replay."""
        settings, size = self.settings, recording.size
        inputs = {slot: _counted(self._whole(slot, owned, outside, size)) for slot in step.inputs}
        try:
            self._warm_up(step, inputs, lane_key)
            watched = inputs | {slot: recording.padded[slot] for slot in self._buffered}
            before = _writes(watched)
            graph, returned = settings.mechanism.capture(step.run, list(inputs.values()), settings.pool, lane_key)
        except Exception as error:
            raise CaptureFailed(
                f"Piecewise: {step.name} can't be captured at {size} tokens: {type(error).__name__}: {error}. Nothing "
                "of this size was kept. If an operator in it can't be captured (host decisions, allocation outside "
                "torch, synchronisation), name it in split_ops."
            ) from error
        recording.graphs[step.name] = graph
        written = step.writes | _changed(watched, before)
        refuse_writes(step.name, written, self.parts.specs, self.parts.names)
        recording.written |= written & set(self._buffered)
        for slot, value in zip(step.outputs, step.values(returned), strict=True):
            owned[slot] = value
            recording.padded[slot] = settings.mechanism.unowned(value) if isinstance(value, Tensor) else value
        graph.replay()

    def _warm_up(self, step: Step, inputs: dict[int, Any], lane_key: Hashable) -> None:
        """Run a piece on its very inputs (kernels are chosen by strides and alignment), then undo what it wrote."""
        rows = {slot: inputs[slot] for slot in inputs if isinstance(self.parts.specs[slot], Rows)}
        kept = {slot: tensor.clone() for slot, tensor in rows.items()} if self.settings.warmup else {}
        before = _writes(rows)
        with self.settings.mechanism.aside(lane_key):
            for _ in range(self.settings.warmup):
                step.run(*inputs.values())
        uncounted = {slot for slot in rows if slot not in before and not _overlaps(rows[slot])}
        for slot in (step.writes | _changed(rows, before) | uncounted) & kept.keys():
            rows[slot].copy_(kept[slot])

    def _whole(self, slot: int, owned: dict[int, Any], outside: dict[int, Any], size: int) -> Any:
        """A value as pieces see it: with padding."""
        spec = self.parts.specs[slot]
        if isinstance(spec, Count):
            return spec.at(size)
        return owned[slot] if slot in owned else outside[slot]


def _writes(tensors: dict[int, Any]) -> dict[int, int]:
    """How often tensors were written to. Tensors of inference mode don't count it, and are left out."""
    return {n: t._version for n, t in tensors.items() if isinstance(t, Tensor) and not t.is_inference()}


def _changed(tensors: dict[int, Any], before: dict[int, int]) -> set[int]:
    """Which of them were written to since."""
    return {slot for slot, writes in _writes(tensors).items() if writes != before[slot]}


def _counted(value: Any) -> Any:
    """The same memory as a tensor that counts writes, which those of inference mode don't."""
    if not isinstance(value, Tensor) or not value.is_inference() or type(value) not in (Tensor, torch.nn.Parameter):
        return value
    if value.is_conj() or value.is_neg():  # views of another kind than memory can tell
        return value
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=value.dtype, device=value.device)
        return alias.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())


def _is_number(value: Any) -> bool:
    """torch wraps numbers as tensors of a CPU."""
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0 and not value.is_cuda)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or (a != a and b != b)


def _overlaps(tensor: Tensor) -> bool:
    """Whether entries share memory, as in an expanded tensor: nobody can have written to it in place."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
