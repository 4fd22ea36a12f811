"""The backend for torch.compile, and the life cycle of everything that it has captured.

The backend knows its runners weakly: compiled code holds them, and a model that is gone takes its graphs along. What
outlives a `clear` is the sizes, the counters and the compiled code; what does not is graphs, the addresses that they
hold, buffers, results, and the pool's handle.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import rich
import torch
from rich.progress import Progress
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental import _config as shape_settings

from tpfuse.errors import InvalidArgument, TpfuseError, Unsupported
from tpfuse.graphs.capture import CudaGraphs, Mechanism
from tpfuse.graphs.nodes import value_of
from tpfuse.graphs.partition import Compiler, SplitOp, calls, partition, split_targets, splits, token_symbols
from tpfuse.graphs.report import Counts, GraphReport, SizeCounter
from tpfuse.graphs.runner import Runner, Settings


@dataclass(frozen=True)
class Cleared:
    """What `Piecewise.clear` did."""

    runners: int
    graphs: int
    failures: tuple[str, ...]  # what could not be reset


@dataclass
class Estimate:
    """What graphs needed in the first phase; filled in at the end of the `with` block."""

    report: GraphReport | None = None

    @property
    def bytes(self) -> int:
        """Memory that graphs and their buffers held."""
        return 0 if self.report is None else self.report.bytes


class Piecewise:
    """A torch.compile backend: pieces between operators as CUDA graphs, the operators eagerly between them.

        backend = tpfuse.graphs.Piecewise(split_ops=["tpfuse::attention"], sizes=[64, 128, 256, 512])
        model = torch.compile(model, backend=backend)
        torch._dynamo.mark_dynamic(tokens, 0)  # before the first call, on each input that has tokens

    split_ops: operators that are not captured: "namespace::name", torch.ops.namespace.name (or one overload of it), or
    a function as the model calls it.
    sizes: numbers of tokens to capture. A call with fewer is padded to the next; one with more than all runs eagerly.
    pool: handle of a memory pool to begin with (torch.cuda.graph_pool_handle()); None: a new one.
    warmup: eager runs of each piece before its capture, on its very inputs.
    compiler: makes a callable from each piece (a torch.fx.GraphModule) and its example inputs (fake tensors and
    SymInts); None: pieces run as they were traced.
    check_addresses: compare the addresses that graphs hold before each replay, and raise StaleGraph if one moved.
    mechanism: what records and replays; None: CUDA graphs.

    The first call of a traced graph raises InvalidArgument where it has dynamic dimensions besides tokens, or a piece
    that computes with all of its rows or writes to a cache, and Unsupported where gradients are needed. Any call may
    raise CaptureFailed, StaleGraph, and Unsupported if it comes inside of another one.
    """

    def __init__(
        self,
        split_ops: Collection[SplitOp],
        sizes: Collection[int],
        *,
        pool: Any = None,
        warmup: int = 1,
        compiler: Compiler | None = None,
        check_addresses: bool = True,
        mechanism: Mechanism | None = None,
    ) -> None:
        if not isinstance(sizes, Collection) or not sizes or not all(type(n) is int and n > 0 for n in sizes):
            raise InvalidArgument(f"Piecewise: sizes={sizes!r}; needed: one or more numbers of tokens, from 1 up.")
        if type(warmup) is not int or warmup < 0:
            raise InvalidArgument(f"Piecewise: warmup={warmup!r}; needed: a whole number of eager runs, from 0 up.")
        if isinstance(split_ops, str) or not isinstance(split_ops, Collection):
            raise InvalidArgument(f"Piecewise: split_ops={split_ops!r}; needed: a list of operators.")
        rising = tuple(sorted(set(sizes)))
        mechanism = CudaGraphs() if mechanism is None else mechanism
        counts = Counts({size: SizeCounter(size) for size in rising})
        pool = mechanism.new_pool() if pool is None else pool
        self._settings = Settings(rising, warmup, check_addresses, mechanism, pool, counts)
        self._targets, self._compiler = split_targets(split_ops), compiler
        self._unseen = set(self._targets)  # in no graph so far
        self._runners: weakref.WeakSet[Runner] = weakref.WeakSet()

    @property
    def sizes(self) -> tuple[int, ...]:
        """What is captured, in the order in which `capture` does it: largest first."""
        return self._settings.sizes[::-1]

    @property
    def pool(self) -> Any:
        """The handle of the pool that the next capture takes its memory from. `clear` makes a new one."""
        return self._settings.pool

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """What torch.compile calls with each graph that it has traced."""
        try:
            return self._compiled(graph, inputs)
        except TpfuseError as error:  # torch would wrap it in one of its own; the call that follows raises it
            kind, message = type(error), str(error)

        def refuse(*args: Any) -> Any:
            raise kind(message)  # a new one each time: a traceback keeps the inputs of a call

        return refuse

    def _compiled(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in inputs):
            raise Unsupported(
                "Piecewise: gradients are enabled and needed; graphs are for inference. Call the model inside "
                "torch.no_grad() or torch.inference_mode()."
            )
        self._unseen -= {op for op in self._unseen if any(calls(node, op) for node in graph.graph.nodes)}
        if not token_symbols(graph):
            return self._static(graph)
        runner = Runner(partition(graph, self._targets, self._compiler), self._settings)
        self._runners.add(runner)
        return runner

    def __deepcopy__(self, memo: Any) -> Piecewise:
        """Copies of a compiled model are served by the same backend."""
        return self

    def _static(self, graph: GraphModule) -> Callable[..., Any]:
        """A graph whose shapes are all constants runs eagerly, if there is a reason: nothing to split, or torch made
        a graph of its own for 0 or 1 tokens."""
        split = [node for node in graph.graph.nodes if splits(node, self._targets)]
        sizes = {size for node in graph.graph.find_nodes(op="placeholder") for size in _sizes(value_of(node))}
        if split and not sizes & {0, 1}:
            raise InvalidArgument(
                f"Piecewise: the graph calls {split[0].target}, and has no dynamic dimension that could be tokens. "
                "Mark it on the inputs before the first call: torch._dynamo.mark_dynamic(tensor, dim)."
            )
        reason = "compiled for constant shapes: " + (
            "0 or 1 tokens, or none marked" if split else "nothing to split at, no tokens"
        )
        counts = self._settings.counts

        def run(*args: Any) -> Any:
            counts.eager[reason] += 1
            return graph(*args)

        return run

    def capture(
        self, step: Callable[[int], Any], *, sizes: Collection[int] | None = None, progress: bool = True
    ) -> None:
        """Call `step(tokens)` for each size, largest first: it runs the model with so many tokens.

        Smaller sizes then find the memory of larger ones free, and what the first call compiles serves 0 and 1 tokens,
        too. On every rank, in the same order. progress: show a bar, where there is a terminal.
        """
        chosen = self.sizes if sizes is None else tuple(sorted(set(sizes), reverse=True))
        unknown = sorted(set(chosen) - set(self.sizes))
        if unknown:
            raise InvalidArgument(f"Piecewise: capture(sizes={unknown}); needed: some of {list(self.sizes)}.")
        shown = progress and rich.get_console().is_terminal
        with Progress(transient=True, disable=not shown) as bar, any_size():
            task = bar.add_task("capturing", total=len(chosen))
            for size in chosen:
                bar.update(task, description=f"capturing {size} tokens")
                before = self._served(size)
                step(size)
                if self._served(size) == before:
                    raise InvalidArgument(f"Piecewise: capture: step({size}) ran no graph of {size} tokens.")
                bar.advance(task)
        self._settings.mechanism.give_back()  # what warm-ups took for themselves

    def _served(self, size: int) -> int:
        """How many calls went to this size, or nowhere since nothing is captured here."""
        return self._settings.counts.sizes[size].calls + sum(self._settings.counts.eager.values())

    def clear(self) -> Cleared:
        """Give everything captured back, and the memory with it; the next calls capture again, in a new pool.

        Waits for the device. What fails, such as a runner that can't be reset, is reported, here, as a warning and in
        `report()`; the others are cleared all the same. Raises Unsupported while a call runs.
        """
        with self._settings.idle():
            cleared = self._clear()
        for failure in cleared.failures:
            warnings.warn(f"Piecewise.clear: {failure}", RuntimeWarning, stacklevel=2)
        return cleared

    def _clear(self) -> Cleared:
        settings, runners = self._settings, list(self._runners)
        graphs = sum(counter.graphs for counter in self.report().sizes)
        failures: list[str] = []

        def attempt(step: Callable[[], list[str] | None]) -> None:
            try:
                failures.extend(step() or [])
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")

        attempt(settings.mechanism.wait)
        for runner in runners:
            attempt(runner.clear)
        if failures:
            settings.unfreed.append(settings.pool)
        settings.pool = settings.mechanism.new_pool()
        attempt(settings.mechanism.give_back)
        settings.counts.failures += failures
        return Cleared(len(runners), graphs, tuple(failures))

    @contextlib.contextmanager
    def estimate(self) -> Iterator[Estimate]:
        """The first phase of two: capture with a temporary KV cache, to learn how much memory graphs need.

            with backend.estimate() as estimate:
                model.bind(temporary_cache)
                backend.capture(step)
            model.bind(KVCache(free_memory() - estimate.bytes))
            backend.capture(step)

        At the end of the block, also by an exception, everything captured is given back (`clear`).
        """
        estimate = Estimate()
        try:
            yield estimate
            estimate.report = self.report()
        finally:
            self.clear()

    def report(self) -> GraphReport:
        """What was captured, what it holds, what ran: as data (`as_dict()`) and as a rich table (`rich.print`)."""
        settings, counts = self._settings, self._settings.counts
        runners = list(self._runners)
        lanes = [lane for runner in runners for lane in list(runner.lanes.values())]
        recordings = [recording for lane in lanes for recording in list(lane.recordings.values())]
        for size, counter in counts.sizes.items():
            alive = [recording for recording in recordings if recording.size == size]
            counter.graphs = sum(len(recording.graphs) for recording in alive)
            if alive:
                counter.seconds = sum(recording.seconds for recording in alive)
                counter.bytes = sum(recording.bytes for recording in alive)
        steps = [step for runner in runners for step in runner.parts.steps]
        pieces = sum(step.piece for step in steps)
        return GraphReport(
            mechanism=settings.mechanism.name,
            runners=len(runners),
            pieces=pieces,
            split_calls=len(steps) - pieces,
            sizes=tuple(SizeCounter(**vars(counts.sizes[size])) for size in self.sizes),
            misses=dict(counts.misses),
            eager=dict(counts.eager),
            failures=tuple(counts.failures),
            unseen=tuple(sorted(map(str, self._unseen))),
            pool_bytes=sum(settings.mechanism.held(pool) for pool in (settings.pool, *settings.unfreed)),
            buffer_bytes=sum(runner.buffer_bytes for runner in runners),
        )


def any_size() -> contextlib.AbstractContextManager[None]:
    """While in it, torch.compile makes one graph for all numbers of tokens, and none of their own for 0 and 1."""
    return shape_settings.patch(backed_size_oblivious=True)  # type: ignore[attr-defined,no-any-return]


def _sizes(value: Any) -> tuple[int, ...]:
    plain = isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)
    return tuple(size for size in value.shape if isinstance(size, int)) if plain else ()
