"""Replays that start before torch has checked that its compiled code may be called.

Between the call of a compiled model and its first graph Dynamo evaluates guards, hundreds for each layer, and gathers
parameters, while the device has nothing to do. `Ahead` replays the graphs of the last call first, on the new arguments,
and makes the call then, while the device computes. That call checks and gathers as ever. Where it comes to the runner
with exactly the inputs that were replayed, it takes the results. Where it does not (a recompiled graph, a new weight),
it runs as if nothing had happened, and what was replayed is thrown away.

Design record
- Nothing is skipped: no guard, no comparison of addresses, which comes before the replay. Leaving guards out
  (guard_filter_fn, skip_guard_eval_unsafe) saves as much, and serves a changed model by old code without an error.
- Between the call and the runner there must be nothing but torch's checks: inputs are compared by identity, and what
  Python or another graph writes to them there would be missed. So only for functions of tensors that are one graph
  (fullgraph=True), and not offered to users, whose functions may be anything.
- What was thrown away has run, so what the split operators do must be the same when it is done twice. That is why this
  is not in every runner. Graphs that write to their inputs are left alone.
- Only what two calls in a row had in common is taken for the next one's: a tensor that is new each time is not guessed.
- Weights are known as they are, so those that were replaced stay until the next call, or `forget`. Weak references to
  hundreds of them cost a third of what there is to gain.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpfuse.graphs.specs import Count

if TYPE_CHECKING:
    from tpfuse.graphs.runner import Runner

SERVING: ContextVar[Ahead | None] = ContextVar("serving", default=None)  # whose call runs


class Call:
    """A call that a runner served: which of the graph's inputs were arguments, and what the others were."""

    def __init__(self, runner: Runner, inputs: Sequence[Any], given: Sequence[Tensor]) -> None:
        self.arguments = len(given)
        places = {id(tensor): place for place, tensor in enumerate(given)}
        self.runner = weakref.ref(runner)
        self.inference = torch.is_inference_mode_enabled()  # tensors of that mode are not written to outside of it
        self.given = {slot: places[id(value)] for slot, value in enumerate(inputs) if id(value) in places}
        specs = runner.parts.specs[: len(inputs)]
        self.counts = {slot: spec for slot, spec in enumerate(specs) if isinstance(spec, Count)}
        changing = self.given.keys() | self.counts.keys()
        self.kept = [None if slot in changing else value for slot, value in enumerate(inputs)]

    def like(self, other: Call) -> bool:
        """Whether calls with the arguments of one would have the inputs of the other."""
        same = self.runner() is other.runner() and self.given == other.given
        return same and all(map(_same, self.kept, other.kept))

    def inputs(self, runner: Runner, given: Sequence[Tensor]) -> list[Any]:
        """The inputs of a call with these arguments."""
        inputs = list(self.kept)
        for slot, place in self.given.items():
            inputs[slot] = given[place]
        tokens = runner.parts.tokens(inputs)
        for slot, count in self.counts.items():
            inputs[slot] = count.at(tokens)
        return inputs


class Ahead:
    """A function of tensors that was compiled with `Piecewise` and fullgraph=True, for calls without gradients. Called
    as it is, one call at a time.

    What its split operators do must be the same when it is done twice.
    """

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self._compiled = compiled
        self._started: tuple[Runner, list[Any], tuple[Any, ...]] | None = None
        self._served: list[tuple[Runner, Sequence[Any]]] = []  # by runners, in the call that runs
        self.forget()

    def forget(self) -> None:
        """Begin anew: the next two calls are made as ever."""
        self._last: Call | None = None
        self._known = False  # the call before the last was like it

    def __call__(self, *given: Tensor) -> Any:
        try:
            self._started = self._start(given)
            token = SERVING.set(self)
            try:
                result = self._compiled(*given)
            finally:
                SERVING.reset(token)
            self._learn(given)
        except BaseException:
            self.forget()
            raise
        finally:
            self._started = None
            self._served.clear()
        return result

    def serve(self, runner: Runner, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What a runner returns to compiled code: what was replayed, if that was of these inputs, or what it runs."""
        self._served.append((runner, inputs))
        started, self._started = self._started, None
        if started is not None and started[0] is runner and all(map(_same, inputs, started[1])):
            return started[2]
        self._known = False
        token = SERVING.set(None)
        try:
            return runner.serve(inputs)
        finally:
            SERVING.reset(token)

    def _start(self, given: Sequence[Tensor]) -> tuple[Runner, list[Any], tuple[Any, ...]] | None:
        runner = self._last.runner() if self._last is not None and self._known else None
        if self._last is None or runner is None:
            return None
        if len(given) != self._last.arguments or torch.is_inference_mode_enabled() != self._last.inference:
            return None
        inputs = self._last.inputs(runner, given)
        return (runner, inputs, runner.serve(inputs)) if runner.replays(inputs) else None

    def _learn(self, given: Sequence[Tensor]) -> None:
        if len(self._served) != 1:
            self.forget()
        elif not self._known:
            before, self._last = self._last, Call(*self._served[0], given)
            tokens = set(self._served[0][0].parts.counted) <= self._last.given.keys()
            self._known = tokens and before is not None and self._last.like(before)


def _same(a: Any, b: Any) -> bool:
    """The very tensor, or a number like it."""
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))
