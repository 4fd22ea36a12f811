"""Running ranks for every test, and what the `gpu` marker means.

Ranks are processes that take seconds to start, so the session keeps one pool of each size and hands it to whoever asks.
What tests run there are module-level functions of `jobs.py` and `failing.py`, which the ranks import by name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import ALONE

from tpfuse import Communicator, cli
from tpfuse.launch import Ranks

pytest_plugins = ("pytester",)

OnRanks = Callable[..., list[Any]]
Refused = Callable[..., str]


class Pools:
    """`pools(world, job, *args)` runs a job on `world` ranks and returns their results in rank order."""

    def __init__(self) -> None:
        self._running: dict[int, Ranks] = {}

    def __call__(self, world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        if world not in self._running:
            self._running[world] = Ranks(world)
        try:
            return self._running[world].run(job, *args)
        except BaseException:  # whatever it was, these ranks may be anywhere now: the next test gets fresh ones
            self._running.pop(world).close()
            raise

    def close(self) -> None:
        with ThreadPoolExecutor() as threads:  # ending takes ranks a while, too
            list(threads.map(Ranks.close, self._running.values()))


@pytest.fixture(scope="session")
def on_ranks() -> Iterator[OnRanks]:
    """Run `job(rank, *args)` on W ranks of the CPU: `results = on_ranks(W, jobs.some_job, ...)`."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Communicator]:
    """A communicator of a group of one, in this process: enough for what needs no peer. 64 elements wide at most."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Communicator(max_hidden=64, timeout=5.0) as comm:
            yield comm
    finally:
        dist.destroy_process_group()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What the command line says to arguments that it refuses: one line and exit code 2. In this process, which saves
    the seconds that a new one needs for its imports; test_cli.py has new ones."""

    def said(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tpfuse", *map(str, arguments)])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for ranks that it starts
        for name in ALONE:
            monkeypatch.delenv(name, raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        assert re.fullmatch(r"tpfuse: error: [^\n]+\n", err), err
        return err

    return said


def pytest_configure(config: pytest.Config) -> None:
    """Without GPUs and without a `-m` of the user's, leave the gpu tests out: as deselected, which pytest counts."""
    if not config.option.markexpr and torch.cuda.device_count() == 0:
        config.option.markexpr = "not gpu"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.gpu` needs one GPU, `@pytest.mark.gpu(4)` four. Fewer is a failure: nothing was tested."""
    marker = item.get_closest_marker("gpu")
    if marker is not None:
        needed, found = marker.args[0] if marker.args else 1, torch.cuda.device_count()
        if found < needed:
            pytest.fail(
                f"this test needs {needed} GPU(s), torch sees {found}; leave it out with -m 'not gpu'", pytrace=False
            )
