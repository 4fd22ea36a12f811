"""Kernels that gave up waiting, in a worker that replays graphs.

A replay runs no Python, so none of our operators looks whether a kernel of theirs has failed, and vLLM replays graphs
for nearly all of its steps. Later results are wrong then: rows that came too late are taken for those of later calls.
So each step of a worker asks before it begins and after its results are on the host. Asking reads host memory.

A rank whose results nobody reads only logs its error and takes no part in later steps; the one whose results are read
then waits for it in a kernel, and fails as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpfuse.errors import TpfuseError
from tpfuse.integrations.serving import state
from tpfuse.integrations.vllm.plugin import replace

STEPS = ("execute_model", "sample_tokens", "execute_dummy_batch")


def install() -> None:
    """Have the steps of workers ask. Raises LookupError where they are not there."""
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.worker.gpu_worker import Worker

    for owner, name in (*((Worker, name) for name in STEPS), (WorkerProc, "enqueue_output")):
        if not callable(getattr(owner, name, None)):
            raise LookupError(f"{owner.__name__}.{name} is not there")
    for name in STEPS:
        replace(Worker, name, step)
    replace(WorkerProc, "enqueue_output", enqueue)


def step(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A step of a worker. Its result is None, on the host, or something to wait for."""
    state.check()
    result = stock(*args, **kwargs)
    wait = getattr(result, "get_output", None)
    if wait is not None:
        result.get_output = lambda: checked(wait())
    elif result is not None:
        checked(result)
    return result


def checked(output: Any) -> Any:
    """A result that has come to the host, so that all kernels before it are done."""
    state.check()
    return output


def enqueue(stock: Callable[..., Any], worker: Any, output: Any) -> Any:
    """What hands a worker's results on, in a thread that an error would end without a word: 0.24 takes errors that it
    is handed, not those of waiting for a result."""
    try:
        return stock(worker, output)
    except TpfuseError as error:
        return stock(worker, error)
