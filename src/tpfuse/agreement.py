"""What ranks tell each other beside the data, through torch.distributed's key-value store.

Two uses. When a communicator is constructed or prepared, every rank publishes its facts and reads everyone's: a
difference, or a rank that does not come, is one clear error on every rank. And when a call fails, every rank publishes
the call that it is in, so that the error can say who is where. The store is a side channel that works while the data
path hangs, and each wait is bounded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from threading import Thread
from typing import TypeVar

from torch.distributed import DistError, DistNetworkError, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_process_group_store

from tpfuse.errors import PeerTimeout, RankMismatch, TpfuseError

GRACE = 5.0  # seconds that a failing rank waits for its peers to say where they are
ANSWER = 10.0  # seconds in which the store answers what it does not have to wait for
LOOK = 0.2  # seconds for one rank's key when time is over: a busy store needs a while to say that a key is there

Answer = TypeVar("Answer")


class Board:
    """A place in the group's store where each rank can pin a message and read the others'.

    Raises PeerTimeout where the store is gone or does not answer.
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self.rank, self.world = group.rank(), group.size()
        self._store: Store = _answer(lambda: _connection(_get_process_group_store(group)), ANSWER)
        self._prefix = f"tpfuse/{name}"

    def pin(self, topic: str, message: Mapping[str, object]) -> None:
        _answer(lambda: self._store.set(f"{self._prefix}/{topic}/{self.rank}", json.dumps(message)), ANSWER)

    def read(self, topic: str, seconds: float) -> dict[int, dict[str, object]]:
        """The messages of all ranks that pinned one within `seconds`; the others are missing."""
        return _answer(lambda: self._read(topic, seconds), seconds + LOOK * self.world + ANSWER)

    def _read(self, topic: str, seconds: float) -> dict[int, dict[str, object]]:
        deadline = time.monotonic() + seconds
        found: dict[int, dict[str, object]] = {}
        for rank in range(self.world):
            key = f"{self._prefix}/{topic}/{rank}"
            left = max(LOOK, deadline - time.monotonic())
            try:
                self._store.wait([key], timedelta(seconds=left))
                found[rank] = json.loads(self._store.get(key))
            except DistNetworkError:  # the store is gone, which says nothing of this rank
                raise
            except RuntimeError:  # not there in time
                continue
        return found


def _connection(store: Store) -> Store:
    """The store through a connection of its own: a TCPStore's is locked while anybody waits through it."""
    try:
        own: Store = store.clone()  # type: ignore[attr-defined]
    except RuntimeError:  # of a class of somebody's that has none, or the store is lost, which is told when it is asked
        return store
    return own


def _answer(question: Callable[[], Answer], seconds: float) -> Answer:
    """What the store says, asked on a thread: torch waits without a limit for a store whose process is stopped."""
    answer: Future[Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:
            answer.set_exception(error)

    store = "the store that the ranks of the group meet in (in one rank's process, mostly rank 0's: look at its log)"
    Thread(target=ask, daemon=True).start()
    try:
        return answer.result(seconds)
    except FutureTimeout:
        raise PeerTimeout(f"Communicator: {store} did not answer within {seconds:g} s.") from None
    except DistError as error:
        raise PeerTimeout(f"Communicator: {store} is gone: {error}") from error


def agree(
    board: Board,
    facts: Mapping[str, object],
    timeout: float,
    topic: str = "facts",
    action: str = "construct a Communicator on this group",
) -> None:
    """Compare `facts` over all ranks. Raises PeerTimeout or RankMismatch, or TpfuseError where a rank could not start:
    after `timeout` seconds at most, and what a store that does not answer is given. A rank that comes too late may see
    no error where the others do. A rank that failed before pins {"error": text} instead. action: what a missing rank
    should have done."""
    board.pin(topic, facts)
    found = board.read(topic, timeout)
    for rank, other in sorted(found.items()):
        if "error" in other:
            raise TpfuseError(f"Communicator: rank {rank} could not start: {other['error']}")
    missing = [rank for rank in range(board.world) if rank not in found]
    if missing:
        raise PeerTimeout(
            f"Communicator: {ranks(missing)} of {board.world} did not {action} within {timeout:g} s. Every rank of the "
            "group must, in the same order; look at that rank's own log."
        )
    differences = [
        f"rank {rank} has {field}={other.get(field)!r}, rank 0 has {value!r}"
        for rank, other in sorted(found.items())
        for field, value in found[0].items()
        if other.get(field) != value
    ]
    if differences:
        raise RankMismatch(
            "Communicator: the ranks differ: " + "; ".join(differences) + ". They must be the same on every rank."
        )


def diagnose(board: Board, number: int, call: str, cause: str, timeout: float) -> TpfuseError:
    """Say which rank is where when call `number` failed on this one. Never raises, returns the error to raise."""
    others: dict[int, dict[str, object]] = {}
    try:
        board.pin(f"failed/{number}", {"call": call})
        others = board.read(f"failed/{number}", min(GRACE, timeout))
    except PeerTimeout:
        pass
    here = f"call #{number}, {call} on rank {board.rank}"
    if board.rank not in others:
        return PeerTimeout(
            f"{here}: the exchange failed ({cause}), and so did the store that could say which rank is missing. It "
            "lives in one rank's process, mostly rank 0's: look at its log. This communicator can't be used any more."
        )
    different = [f"rank {r} is in {o['call']}" for r, o in sorted(others.items()) if o["call"] != call]
    if different:
        return RankMismatch(
            f"{here}: {'; '.join(different)}. Every rank must make the same calls with the same shapes."
        )
    missing = [rank for rank in range(board.world) if rank not in others]
    if missing:
        return PeerTimeout(
            f"{here}: {ranks(missing)} did not arrive within {timeout:g} s ({cause}). "
            "Look at that rank's own log; this communicator can't be used any more."
        )
    return PeerTimeout(f"{here}: all ranks are in the same call, but the exchange failed: {cause}")


def ranks(numbers: list[int]) -> str:
    """`rank 2` or `ranks 1, 3`."""
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
