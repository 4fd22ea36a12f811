"""Starts ranks on this machine: one process each, joined in a process group, for the command line, examples and tests.

Under torchrun (RANK and WORLD_SIZE set) nothing is started: this process is one of the ranks.

A job is a module-level function `job(rank: Rank, *args)`. What it returns comes back to the caller, one value a rank;
what it raises is raised there, as the rank's TpfuseError or as RankFailed with the traceback. A rank that dies without
a word is an error too, and no rank outlives the caller, however that ends.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from types import TracebackType
from typing import Any

from tpfuse.errors import InvalidArgument, PeerTimeout, TpfuseError, Unsupported, first_line

Progress = Callable[[int, int, str], None]  # done, total, what
LOOPBACK = "127.0.0.1"
GRACE = 10.0  # seconds in which ranks may end by themselves


class RankFailed(TpfuseError):
    """A rank's job raised something that is not a TpfuseError, or its process died."""


@dataclass
class Rank:
    """What a job knows of itself."""

    rank: int
    world: int
    device_type: str
    progress: Progress


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks() -> bool:
    """Whether this process prints: under torchrun only rank 0."""
    return not under_torchrun() or _torchruns("RANK", 0) == 0


def resolve_world(world: int | None, device_type: str) -> int:
    """The number of ranks to start: as asked, else one a GPU, else 2 on a CPU. Raises Unsupported, InvalidArgument."""
    import torch

    if world is not None and world < 1:
        raise InvalidArgument(f"--world {world}: at least 1 rank is needed.")
    if under_torchrun():
        given = _torchruns("WORLD_SIZE", 1)
        if world not in (None, given):
            raise InvalidArgument(f"--world {world}, but torchrun started {given} ranks. Leave --world out.")
        return given
    if device_type == "cuda":
        gpus = torch.cuda.device_count()
        if not gpus:
            raise Unsupported("--device cuda: torch sees no GPU on this machine. Use --device cpu.")
        if world is not None and world > gpus:
            raise Unsupported(f"--world {world}: this machine has {gpus} GPUs, and each rank needs its own.")
        return world or gpus
    return world or 2


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class Ranks:
    """W running ranks. `run(job, *args)` runs a job on all of them and returns their results in rank order."""

    def __init__(self, world: int, device_type: str = "cpu", *, timeout: float = 120.0) -> None:
        self.world = world
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._store: Any = None
        try:
            with _interrupts_wait():  # which threads that are started in here inherit, too
                # Ranks meet here, at a port of the system's choice: one that rank 0 opens later may be taken by then.
                self._store = _meeting_place(timeout)
                for rank in range(world):
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=_serve, args=(theirs, rank, world, device_type, self._store.port, timeout), daemon=True
                    )
                    process.start()
                    theirs.close()
                    self._pipes.append(ours)
                    self._processes.append(process)
        except BaseException:
            self.close(0.0)
            raise

    def run(self, job: Callable[..., Any], *args: Any, progress: Progress | None = None) -> list[Any]:
        """Raises the first failure: a rank's own TpfuseError, or RankFailed."""
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((job, args))
            except OSError as error:
                self.close()
                raise RankFailed(
                    f"rank {rank}: its process is not there any more ({error}). Start new ranks."
                ) from error
        results: dict[int, Any] = {}
        failures: dict[int, TpfuseError] = {}
        waiting = set(range(self.world))
        deadline: float | None = None  # after a failure the other ranks get a moment to end or fail in their own words
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait([self._pipes[rank] for rank in waiting], timeout=left)
            if not ready or left == 0.0:
                break
            for rank in [rank for rank in waiting if self._pipes[rank] in ready]:
                kind, value = self._receive(rank)
                if kind == "progress":
                    if progress is not None and rank == 0:
                        progress(*value)
                    continue
                waiting.remove(rank)
                if kind == "result":
                    results[rank] = value
                else:
                    failures[rank] = self._failure(rank, kind, value)
                    deadline = deadline or time.monotonic() + GRACE
        if failures:
            self.close()
            raise failures[min(failures)]
        return [results[rank] for rank in range(self.world)]

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            kind, value = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            return "died", None
        return kind, value

    def _failure(self, rank: int, kind: str, value: Any) -> TpfuseError:
        if kind == "error":
            return value if isinstance(value, TpfuseError) else RankFailed(f"rank {rank}: {value}")
        self._processes[rank].join(5)
        code = self._processes[rank].exitcode
        return RankFailed(f"rank {rank}: the process died with exit code {code}; its own output says more.")

    def kill(self, rank: int) -> None:
        """End one rank's process at once, as a crash would."""
        self._processes[rank].kill()
        self._processes[rank].join()

    def close(self, grace: float = GRACE) -> None:
        """End the ranks: by themselves within `grace` seconds, or by force."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + grace
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._store = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.close(0.0 if interrupted else GRACE)


def run_ranks(
    job: Callable[..., Any], *args: Any, world: int, device_type: str, progress: Progress | None = None
) -> list[Any]:
    """Run a job once. Under torchrun it runs in this process, and the list holds this rank's result only."""
    if under_torchrun():
        rank, local = _torchruns("RANK", 0), _torchruns("LOCAL_RANK", 0)
        join_group(rank, world, device_type, None, 120.0, local)
        try:
            return [job(Rank(rank, world, device_type, progress if progress and rank == 0 else _ignore), *args)]
        finally:
            leave_group()
    with Ranks(world, device_type) as ranks:
        return ranks.run(job, *args, progress=progress)


def _meeting_place(timeout: float) -> Any:
    """The store of ranks on this machine. Raises Unsupported where there is no loopback interface."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    limit = timedelta(seconds=timeout)
    try:
        return TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        raise Unsupported(
            f"ranks can't meet at {LOOPBACK}: {first_line(error)}. They need the loopback interface."
        ) from error


def join_group(rank: int, world: int, device_type: str, port: int | None, timeout: float, local: int) -> None:
    """Initialise torch.distributed for this process. port: of the store where ranks meet, on this machine; None: as
    torchrun has it. Raises PeerTimeout if not all ranks come."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    backend = "gloo"
    if device_type == "cuda":
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise Unsupported(f"rank {rank} needs GPU {local}; torch sees {gpus}. Use --device cpu, or fewer ranks.")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        limit = timedelta(seconds=timeout)
        store = None if port is None else TCPStore(LOOPBACK, port, is_master=False, timeout=limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (RuntimeError, TimeoutError) as error:
        raise PeerTimeout(
            f"rank {rank} of {world}: not all ranks came within {timeout:g} s: {first_line(error)}"
        ) from error


def leave_group() -> None:
    import torch.distributed as dist

    gc.collect()  # an unclosed communicator holds its group in a cycle; Gloo aborts if that outlives the interpreter
    if dist.is_initialized():
        dist.destroy_process_group()


def _ignore(done: int, total: int, what: str) -> None:
    """No progress wanted."""


def _torchruns(name: str, least: int) -> int:
    """A number that torchrun has put into the environment; LOCAL_RANK may be left out."""
    text = os.environ.get(name, "0")
    if not text.isdecimal() or int(text) < least:
        raise InvalidArgument(
            f"{name}={text!r} in the environment; needed: a whole number of at least {least}, as torchrun sets it. "
            "Unset RANK and WORLD_SIZE to start ranks without torchrun."
        )
    return int(text)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold SIGINT back while ranks start. They inherit that, so that Ctrl-C reaches none before it ignores SIGINT."""
    resource_tracker.ensure_running()  # starting it later, with the first rank, would let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _belong_to_parent() -> None:
    """A rank ends when its parent does, whatever it is busy with, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = mp.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=follow, name="tpfuse-follow-parent", daemon=True).start()


def _serve(pipe: Connection, rank: int, world: int, device_type: str, port: int, timeout: float) -> None:
    """A rank's process: join the group, then run jobs until the pipe closes."""
    _belong_to_parent()
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    try:
        join_group(rank, world, device_type, port, timeout, rank)
    except TpfuseError as error:
        with suppress(OSError):  # the parent is gone
            pipe.send(("error", error))
        return
    me = Rank(rank, world, device_type, lambda *state: pipe.send(("progress", state)))
    while True:
        try:
            job, args = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            answer = ("result", job(me, *args))
        except TpfuseError as error:
            answer = ("error", error)
        except BaseException:
            answer = ("error", traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:  # nobody waits for it any more
            break
    leave_group()
