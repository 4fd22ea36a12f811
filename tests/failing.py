"""What tests of failures run on ranks. Each job has a process group of its own, so that what it breaks stays there, and
returns what happened as data, so that its ranks can be used again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import torch
import torch.distributed as dist
from jobs import Case

from tpfuse import Communicator, communicator
from tpfuse.launch import Rank

Settings = dict[str, Any]
QUICK = 2.0  # the timeout where it has to pass; ranks that are there must come within it, on a busy machine, too
LATE = 8.0  # seconds that a busy machine may add; less than the timeouts that must not be waited for


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: the class and text of the error, empty where there was none, and how long it took."""

    error: str
    message: str
    seconds: float
    value: Any = None


def attempt(action: Callable[[], Any]) -> Outcome:
    began = time.monotonic()
    try:
        value = action()
    except Exception as error:
        return Outcome(type(error).__name__, str(error), time.monotonic() - began)
    return Outcome("", "", time.monotonic() - began, value)


def outcome_of(rank: Rank, job: Callable[..., Any], *args: Any) -> Outcome:
    """Run another job, and return what it raises."""
    return attempt(lambda: job(rank, *args))


def fresh_group() -> dist.ProcessGroup:
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def prepares(rank: Rank, odd: int, late: float | None, timeout: float) -> tuple[Outcome, Outcome]:
    """Each rank prepares its communicator, twice; the odd one so many seconds late, or never."""
    comm = Communicator(fresh_group(), timeout=timeout)
    if rank.rank == odd:
        if late is None:
            return Outcome("", "", 0.0), Outcome("", "", 0.0)
        time.sleep(late)
    return attempt(comm.prepare), attempt(comm.prepare)


def construct(rank: Rank, settings: Sequence[Settings | None]) -> Outcome:
    """Each rank makes a communicator with its own settings; None: that rank never does."""
    group, mine = fresh_group(), settings[rank.rank]
    return Outcome("", "", 0.0) if mine is None else attempt(lambda: repr(Communicator(group, **mine)))


def construct_late(rank: Rank, late: int, delay: float, timeout: float) -> Outcome:
    """One rank makes its communicator `delay` seconds after the others."""
    group = fresh_group()
    time.sleep(delay if rank.rank == late else 0.0)
    return attempt(lambda: repr(Communicator(group, timeout=timeout)))


def construct_as_version(rank: Rank, versions: Sequence[str]) -> Outcome:
    group, before = fresh_group(), communicator.__version__
    communicator.__version__ = versions[rank.rank]
    try:
        return attempt(lambda: repr(Communicator(group, timeout=10.0)))
    finally:
        communicator.__version__ = before


def construct_twice(rank: Rank, settings: Sequence[Settings]) -> tuple[Outcome, Outcome]:
    """First each rank with its own settings, then all alike, on one group."""
    group = fresh_group()
    first = attempt(lambda: repr(Communicator(group, timeout=10.0, **settings[rank.rank])))
    return first, attempt(lambda: Communicator(group, timeout=10.0).all_reduce(torch.ones(2, 4)))


def construct_in_group_of_rank_0(rank: Rank) -> Outcome:
    group = dist.new_group([0])
    return attempt(lambda: repr(Communicator(group, timeout=QUICK)))


def each_calls(rank: Rank, cases: Sequence[Case | None], timeout: float, delay: Sequence[float] = ()) -> Outcome:
    """Each rank makes its own call on one communicator; None: that rank makes none."""
    comm, case = Communicator(fresh_group(), timeout=timeout), cases[rank.rank]
    if delay:
        time.sleep(delay[rank.rank])
    if case is None:
        return Outcome("", "", 0.0)
    given = jobs.inputs(case, comm.rank, comm.world)
    return attempt(lambda: jobs.call(comm, case, given))


def calls_again(rank: Rank, first: Sequence[Case | None], then: Case, timeout: float) -> tuple[Outcome, Outcome]:
    """A call each, and then one that is alike, on the same communicator."""
    comm = Communicator(fresh_group(), timeout=timeout)

    def one(case: Case | None) -> Outcome:
        if case is None:
            return Outcome("", "", 0.0)
        return attempt(lambda: jobs.call(comm, case, jobs.inputs(case, comm.rank, comm.world)))

    before = one(first[rank.rank])
    return before, one(None if first[rank.rank] is None else then)


def dies_in_the_middle(rank: Rank, dying: int, timeout: float, folder: Path) -> None:
    """After a first call that works, one rank is killed and the others make a second; what they see goes to files,
    because with a dead rank there are no results."""
    comm = Communicator(timeout=timeout)
    x = torch.ones(3, 8)
    comm.all_reduce(x)
    if rank.rank == dying:
        os.kill(os.getpid(), signal.SIGKILL)
    seen = attempt(lambda: comm.all_reduce(x))
    (folder / str(rank.rank)).write_text(f"{seen.error}: {seen.message}")


def raises(rank: Rank, failing: int) -> str:
    if rank.rank == failing:
        raise KeyError("no such weight")
    return "fine"


def raises_while_rank_0_goes_on(rank: Rank, seconds: float) -> None:
    raises(rank, 1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rank.progress(0, 1, "still here")
        time.sleep(0.1)


def exits(rank: Rank, failing: int, code: int) -> None:
    if rank.rank == failing:
        os._exit(code)


def identity(rank: Rank, *args: Any) -> tuple[Any, ...]:
    return (rank.rank, rank.world, rank.device_type, os.getpid(), *args)


def counts_progress(rank: Rank, steps: int) -> int:
    for i in range(steps):
        rank.progress(i + 1, steps, f"step {i + 1}")
    return steps


def tensors(rank: Rank) -> torch.Tensor:
    return torch.full((2, 3), float(rank.rank))


def sleeps(rank: Rank, seconds: float) -> None:
    time.sleep(seconds)
