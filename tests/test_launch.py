"""Starting ranks: results, failures and ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import failing
import pytest
import torch
from torch.distributed import TCPStore

from tpfuse import launch
from tpfuse.errors import InvalidArgument, PeerTimeout, TpfuseError, Unsupported
from tpfuse.launch import RankFailed, Ranks, join_group, resolve_world, run_ranks, speaks

SLEEPING = """
import os, time
from tpfuse.launch import Ranks

def sleeps(rank):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(100)

if __name__ == "__main__":
    Ranks(2).run(sleeps)
"""


def gone(pid):
    """No process of that number, or one that only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


# Results


def test_results_come_in_rank_order(on_ranks):
    results = on_ranks(4, failing.identity, "argument", 7)
    assert [r[0] for r in results] == [0, 1, 2, 3]
    assert {r[1:3] for r in results} == {(4, "cpu")}
    assert len({r[3] for r in results}) == 4  # processes
    assert all(r[4:] == ("argument", 7) for r in results)


def test_ranks_stay_for_the_next_job(on_ranks):
    assert on_ranks(2, failing.identity) == on_ranks(2, failing.identity)


def test_progress_of_rank_0_is_told_once():
    seen = []
    with Ranks(1) as ranks:
        assert ranks.run(failing.counts_progress, 3, progress=lambda *state: seen.append(state)) == [3]
    assert seen == [(1, 3, "step 1"), (2, 3, "step 2"), (3, 3, "step 3")]


# Failures, and what is left after them


def test_others_that_go_on_after_a_failure_are_waited_for_once(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    with Ranks(2) as ranks:
        ranks.run(failing.identity)
        began = time.monotonic()
        with pytest.raises(RankFailed, match="no such weight"):
            ranks.run(failing.raises_while_rank_0_goes_on, 20.0)
    assert time.monotonic() - began < 10


def test_an_exception_comes_back_with_its_rank_and_traceback():
    with Ranks(2) as ranks, pytest.raises(RankFailed) as caught:
        ranks.run(failing.raises, 1)
    assert str(caught.value).startswith("rank 1: Traceback")
    assert "in raises" in str(caught.value)
    assert "KeyError: 'no such weight'" in str(caught.value)
    assert isinstance(caught.value, TpfuseError)


def test_a_rank_that_dies_is_reported_with_its_exit_code_and_nothing_stays():
    ranks = Ranks(2)
    pids = [pid for _, _, _, pid in ranks.run(failing.identity)]
    with pytest.raises(RankFailed, match="rank 1: the process died with exit code 3"):
        ranks.run(failing.exits, 1, 3)
    assert all(gone(pid) for pid in pids)
    ranks.close()  # again, which is fine


def test_a_rank_that_was_killed_before_the_job_is_reported():
    with Ranks(1) as ranks:
        ranks.run(failing.identity)
        ranks.kill(0)
        with pytest.raises(RankFailed, match="rank 0: its process is not there any more"):
            ranks.run(failing.identity)


def test_no_process_outlives_its_ranks():
    before = set(multiprocessing.active_children())
    ranks = run_ranks(failing.identity, world=2, device_type="cpu")
    assert all(gone(pid) for _, _, _, pid in ranks)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_rank_outlives_a_parent_that_is_killed(tmp_path, number):
    script = tmp_path / "sleeping.py"
    script.write_text(SLEEPING)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(number)
        _, said = parent.communicate(timeout=60)  # which ends when all who have its pipes, the ranks too, have ended
    assert all(gone(pid) for pid in pids)
    assert said == ""


def test_an_answer_to_a_parent_that_is_gone_is_silent(capfd):
    ranks = Ranks(1)
    ranks.run(failing.identity)
    ranks._pipes[0].send((failing.sleeps, (0.5,)))
    ranks.close(grace=60.0)
    assert ranks._processes[0].exitcode == 0
    assert capfd.readouterr().err == ""


def test_an_interrupted_job_ends_its_ranks_at_once(monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    def job(ranks):
        with ranks:
            ranks.run(failing.sleeps, 100)

    ranks = Ranks(1)
    ranks.run(failing.identity)
    monkeypatch.setattr(launch, "wait", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        job(ranks)
    assert time.monotonic() - began < launch.GRACE
    assert not ranks._processes[0].is_alive()


def test_tensors_of_ranks_that_have_ended_are_there():
    for rank, y in enumerate(run_ranks(failing.tensors, world=2, device_type="cpu")):
        assert y.tolist() == [[float(rank)] * 3] * 2


# How many ranks


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return monkeypatch


@pytest.mark.usefixtures("plain")
def test_a_cpu_gets_two_ranks_or_as_many_as_asked():
    assert resolve_world(None, "cpu") == 2
    assert resolve_world(5, "cpu") == 5


def test_gpus_get_a_rank_each(plain):
    plain.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_world(None, "cuda") == 4
    assert resolve_world(3, "cuda") == 3
    with pytest.raises(Unsupported, match="--world 5: this machine has 4 GPUs"):
        resolve_world(5, "cuda")


def test_no_gpu_is_an_error_that_names_the_way_out(plain):
    plain.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(Unsupported, match=r"sees no GPU on this machine. Use --device cpu"):
        resolve_world(None, "cuda")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("world", [0, -1])
def test_fewer_than_one_rank_is_refused(world):
    with pytest.raises(InvalidArgument, match=f"--world {world}: at least 1 rank"):
        resolve_world(world, "cpu")


def test_torchrun_says_how_many_ranks_there_are(plain):
    plain.setenv("RANK", "0")
    plain.setenv("WORLD_SIZE", "4")
    assert resolve_world(None, "cpu") == 4
    assert resolve_world(4, "cpu") == 4
    with pytest.raises(InvalidArgument, match="--world 2, but torchrun started 4 ranks"):
        resolve_world(2, "cpu")


@pytest.mark.parametrize("wrong", ["abc", "", "-1", "0", "1.5"])
def test_a_world_of_torchruns_that_is_no_number_is_refused(plain, wrong):
    plain.setenv("RANK", "0")
    plain.setenv("WORLD_SIZE", wrong)
    with pytest.raises(InvalidArgument, match=f"^WORLD_SIZE='{wrong}' in the environment; needed: a whole number"):
        resolve_world(None, "cpu")


def test_one_process_prints(plain):
    assert speaks()
    plain.setenv("RANK", "1")
    assert speaks()  # without WORLD_SIZE it is not torchrun's, and there is nobody else
    plain.setenv("WORLD_SIZE", "2")
    assert not speaks()
    plain.setenv("RANK", "00")
    assert speaks()


def test_a_rank_without_its_gpu_says_so(plain):
    plain.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(Unsupported, match="rank 3 needs GPU 1; torch sees 1"):
        join_group(3, 4, "cuda", None, 1.0, 1)


def test_a_rank_of_torchruns_that_is_no_number_is_refused(plain):
    plain.setenv("RANK", "first")
    plain.setenv("WORLD_SIZE", "1")
    with pytest.raises(InvalidArgument, match=r"^RANK='first' in the environment"):
        run_ranks(failing.identity, world=1, device_type="cpu")


def test_under_torchrun_the_job_runs_in_this_process(plain):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }.items():  # fmt: skip
        plain.setenv(name, value)
    assert run_ranks(failing.identity, "argument", world=1, device_type="cpu") == [
        (0, 1, "cpu", os.getpid(), "argument")
    ]
    assert not torch.distributed.is_initialized()


def test_a_rank_whose_peers_do_not_come_is_a_timeout():
    began = time.monotonic()
    with pytest.raises(PeerTimeout, match="rank 0 of 2: not all ranks came within 1 s"):
        launch.join_group(0, 2, "cpu", TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port, 1.0, 0)
    assert time.monotonic() - began < 10
    assert not torch.distributed.is_initialized()


def test_nothing_listens_any_more_when_ranks_have_ended():
    with Ranks(1) as ranks:
        port = ranks._store.port
    with socket.socket() as again, pytest.raises(ConnectionRefusedError):
        again.connect(("127.0.0.1", port))


def test_a_start_that_is_cut_short_leaves_no_rank_behind(monkeypatch):
    started, start = [], launch.BaseProcess.start

    def first_only(process):
        if started:
            raise KeyboardInterrupt
        started.append(process)
        start(process)

    monkeypatch.setattr(launch.BaseProcess, "start", first_only)
    with pytest.raises(KeyboardInterrupt):
        Ranks(3)
    assert not started[0].is_alive()


def test_ranks_meet_where_nobody_else_listens():
    """Many at once, none of which knows of the others' ports."""
    with ExitStack() as stack:
        started = [stack.enter_context(Ranks(2)) for _ in range(3)]
        assert len({ranks._store.port for ranks in started}) == 3
        for ranks in started:
            assert [answer[0] for answer in ranks.run(failing.identity, "argument")] == [0, 1]
