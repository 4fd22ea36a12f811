"""How a figure is taken.

On CUDA: one CUDA graph of CALLS calls, so that no launch cost of the host is in it. Before each replay, on the stream:
inputs are restored, the L2 is flushed if the cache state is cold, the device sleeps until the host has enqueued all
that follows, and a tiny all-reduce aligns the ranks. Events around the graph give the time; REPLAYS of them, the
median.

On a CPU: the same calls in a loop after a barrier, by the clock. Cores are shared and the clock changes, so only ratios
within one run mean anything.

Both: the replays of all implementations of a case take turns, so that a machine that slows down slows all of them. Each
implementation is checked against the reference before it is timed and again after; on CUDA the second check looks at
what the graph itself wrote, over NaNs. The MAXIMUM over ranks of their medians is the figure.

Cache states. `hot`: every call uses one input set, which fits in the L2 with its results, as after a GEMM; where it
does not fit there is no such state and no row. `cold`: no call finds its inputs in the L2: the calls rotate over sets,
and the flush reads 4 x L2 of other memory before each replay, because at few tokens not even a set for each call would
fill the cache. Results rotate with the sets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from tpfuse.bench.cases import Case, InputSet, Outputs, difference, expected
from tpfuse.bench.ceilings import memory_bytes
from tpfuse.bench.implementations import Implementation
from tpfuse.errors import CommunicatorClosed, PeerTimeout, RankMismatch, Unsupported, first_line

Value = TypeVar("Value")

CALLS = 30  # in one graph; W^30 is finite in bf16 for W <= 16: a reduction in place multiplies by W each time
REPLAYS = 20
WARM_REPLAYS = 3
L2_FACTOR = 4  # cold sets, and the flush, are this many times the L2
SLEEP_CYCLES = 1_000_000  # about 0.5 ms: longer than the host needs to enqueue a replay

CPU_REPEATS = (15, 5)  # at best, at worst
CPU_REPEAT_US = 4e3  # calls in one repeat take about this long
CPU_BUDGET_US = 0.25e6  # for all repeats of one figure

FATAL = (PeerTimeout, RankMismatch, CommunicatorClosed)  # the ranks have lost each other: no row can be trusted


class State(NamedTuple):
    """A cache state and the number of input sets that make it."""

    cache: str
    sets: int


class Figure(NamedTuple):
    """The result for one implementation. us is None where it failed, and error says why."""

    us: float | None
    us_ranks: tuple[float, ...]
    error: str


class Replay(Protocol):
    """Calls that are ready to be timed."""

    @property
    def repeats(self) -> int:
        """How many samples make a figure."""

    def sample(self) -> float:
        """µs of one call, from one replay."""

    def rerun(self) -> dict[int, Outputs]:
        """Run once more, untimed, on restored inputs: the results of each set."""

    def close(self) -> None: ...


class Method(Protocol):
    """How one kind of device is timed."""

    def states(self, case: Case) -> list[State]: ...
    def replay(self, call: Callable[[int], Outputs], sets: Sequence[InputSet], state: State) -> Replay: ...


def measure(
    case: Case,
    state: State,
    implementations: Sequence[Implementation],
    method: Method,
    rank: int,
    device: torch.device,
) -> list[Figure]:
    """One figure for each implementation. Collective: a failure on one rank is a failure on all."""
    sets = [InputSet(case, rank, number, device) for number in range(state.sets)]
    looked_at = sorted({0, state.sets - 1})
    want = {number: expected(case, rank, number, device) for number in looked_at}
    trials = [Trial(case, sets, want, implementation) for implementation in implementations]
    for trial in trials:
        trial.attempt(trial.check_eager)
        trial.attempt(lambda t=trial: t.prepare(method, state))  # type: ignore[misc]
    for _ in range(max((t.repeats for t in trials), default=0)):
        for trial in trials:
            if not trial.error and len(trial.samples) < trial.repeats:
                trial.sample()
    for trial in trials:
        trial.attempt(trial.check_again)
    return [trial.figure() for trial in trials]


class Trial:
    """One implementation in one case and cache state, on its way to a figure."""

    def __init__(
        self, case: Case, sets: Sequence[InputSet], want: Mapping[int, Outputs], implementation: Implementation
    ) -> None:
        self.case, self.sets, self.want, self.implementation = case, sets, want, implementation
        self.error = ""
        self.samples: list[float] = []
        self._replay: Replay | None = None

    @property
    def repeats(self) -> int:
        return 0 if self.error or self._replay is None else self._replay.repeats

    def attempt(self, step: Callable[[], str]) -> None:
        """Run a step, which returns what is wrong or raises it. The ranks then agree, so that all go on or none."""
        if self.error:
            return
        try:
            error = step()
        except FATAL:
            raise
        except Exception as raised:
            error = first_line(raised)
        self.error = first_error(error)

    def call(self, number: int) -> Outputs:
        return self.implementation.step(self.case, self.sets[number].tensors)

    def check_eager(self) -> str:
        """Eager calls on restored inputs give the right results."""
        results = {}
        for number in self.want:
            self.sets[number].restore()
            results[number] = self.call(number)
        return self._compare(results)

    def prepare(self, method: Method, state: State) -> str:
        self._replay = method.replay(self.call, self.sets, state)
        return ""

    def sample(self) -> None:
        assert self._replay is not None
        self.samples.append(self._replay.sample())

    def check_again(self) -> str:
        """What the replay wrote is right. Reductions in place spoil their inputs there: check eager calls instead."""
        assert self._replay is not None
        return self.check_eager() if self.implementation.in_place else self._compare(self._replay.rerun())

    def figure(self) -> Figure:
        if self._replay is not None:
            self._replay.close()
            self._replay = None  # it refers to this trial: a cycle would keep the communicator alive at exit
        if self.error:
            return Figure(None, (), self.error)
        medians = tuple(round(us, 3) for us in gathered(statistics.median(self.samples)))
        return Figure(max(medians), medians, "")

    def _compare(self, results: Mapping[int, Outputs]) -> str:
        errors = (difference(self.case, results[number], want) for number, want in self.want.items())
        return next((error for error in errors if error), "")


def first_error(error: str) -> str:
    """What all ranks say, or the first rank that says something; empty where none does. Collective."""
    found = gathered(error)
    if len(set(found)) == 1:
        return error
    return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), "")


def gathered(value: Value) -> list[Value]:
    """Every rank's value, by way of the CPU's group, which works while a GPU does not. Collective."""
    values: list[Value | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise PeerTimeout(
            f"bench: rank {dist.get_rank()} lost the other ranks: {first_line(error)}. Look at their output."
        ) from error
    return [v for v in values if v is not None]


class CudaMethod:
    """CUDA graphs and events. One for a process: it works on a stream of its own from here on, as capture needs it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        torch.cuda.set_stream(self.stream)
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size or 64 << 20
        self._flushed = torch.ones(L2_FACTOR * self.l2 // 4, device=device)
        self._sink = torch.empty((), device=device)
        self._signal = torch.ones(1, device=device)

    def states(self, case: Case) -> list[State]:
        moved = memory_bytes(case)
        inputs = max(1, moved // 2)
        cold = State("cold", min(CALLS, max(2, -(-L2_FACTOR * self.l2 // inputs))))
        return [cold, State("hot", 1)] if moved <= self.l2 else [cold]

    def replay(self, call: Callable[[int], Outputs], sets: Sequence[InputSet], state: State) -> Replay:
        return CudaReplay(self, call, sets, state)

    def flush(self) -> None:
        """Fill the L2 with something else. By reading: dirty lines would have to be written back during the replay."""
        torch.sum(self._flushed, 0, out=self._sink)

    def align(self) -> None:
        """Let the host run ahead, then let all ranks' streams go on together."""
        torch.cuda._sleep(SLEEP_CYCLES)
        dist.all_reduce(self._signal.fill_(1))


class CudaReplay:
    """A graph of CALLS calls. It keeps the results of each set, so that they rotate through the cache as well."""

    repeats = REPLAYS

    def __init__(
        self, method: CudaMethod, call: Callable[[int], Outputs], sets: Sequence[InputSet], state: State
    ) -> None:
        self._method, self._sets, self._state = method, sets, state
        self._results: dict[int, Outputs] = {}
        self._graph = torch.cuda.CUDAGraph()
        self._capture(call)
        for _ in range(WARM_REPLAYS):
            self.sample()

    def _capture(self, call: Callable[[int], Outputs]) -> None:
        try:
            # thread_local: watchdogs of NCCL and of tpfuse ask for events from other threads meanwhile.
            with torch.cuda.graph(self._graph, stream=self._method.stream, capture_error_mode="thread_local"):
                for number in range(CALLS):
                    self._results[number % self._state.sets] = call(number % self._state.sets)
        except Exception as error:  # ending a broken capture raises once more: the first error is the reason
            cause = error.__context__ if isinstance(error.__context__, Exception) else error
            raise Unsupported(f"can't be captured into a CUDA graph: {first_line(cause)}") from error

    def sample(self) -> float:
        self._restore()
        if self._state.cache == "cold":
            self._method.flush()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._method.align()
        first.record()
        self._graph.replay()
        last.record()
        last.synchronize()
        elapsed: float = first.elapsed_time(last)
        return elapsed * 1e3 / CALLS

    def rerun(self) -> dict[int, Outputs]:
        for results in self._results.values():
            for result in results:
                result.fill_(torch.nan)
        self._restore()
        self._graph.replay()
        torch.cuda.synchronize()
        return self._results

    def close(self) -> None:
        torch.cuda.synchronize()
        self._results = {}
        self._graph.reset()

    def _restore(self) -> None:
        for inputs in self._sets:
            inputs.restore()


class CpuMethod:
    """The clock, and as many calls as are affordable. One set: there is no way to tell what a CPU's caches hold."""

    def states(self, case: Case) -> list[State]:
        return [State("hot", 1)]

    def replay(self, call: Callable[[int], Outputs], sets: Sequence[InputSet], state: State) -> Replay:
        return CpuReplay(call, sets)


class CpuReplay:
    """A loop of calls, its length calibrated once and the same on every rank."""

    def __init__(self, call: Callable[[int], Outputs], sets: Sequence[InputSet]) -> None:
        self._call, self._sets = call, sets
        self._calls = 2
        us = max(gathered(self.sample()))
        self._calls = max(1, min(CALLS, round(CPU_REPEAT_US / us)))
        most, least = CPU_REPEATS
        self.repeats = max(least, min(most, round(CPU_BUDGET_US / (self._calls * us))))

    def sample(self) -> float:
        for inputs in self._sets:
            inputs.restore()
        dist.barrier()
        start = time.perf_counter()
        for number in range(self._calls):
            self._call(number % len(self._sets))
        return (time.perf_counter() - start) * 1e6 / self._calls

    def rerun(self) -> dict[int, Outputs]:
        for inputs in self._sets:
            inputs.restore()
        return {number: self._call(number) for number in range(len(self._sets))}

    def close(self) -> None:
        """Nothing is held."""


METHODS: Mapping[str, Callable[[torch.device], Method]] = {"cuda": CudaMethod, "cpu": lambda device: CpuMethod()}
