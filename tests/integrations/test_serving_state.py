"""What makes a worker rely on the kernels, and what makes it stop: a trial before, a question at each step."""

from __future__ import annotations

import sys
from itertools import count
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tpfuse import reference
from tpfuse.agreement import Board
from tpfuse.errors import PeerTimeout
from tpfuse.integrations.serving import state
from tpfuse.integrations.sglang import plugin as sglang_plugin

GAVE_UP = "rank 1 did not arrive"
numbers = count()


@pytest.fixture
def comm():
    """Stands in for kernels: to the bit what the contract says, as no other backend is."""
    return SimpleNamespace(
        rank=0,
        world=1,
        device=torch.device("cpu"),
        all_reduce_rms_norm=lambda x, weight, residual: reference.all_reduce_rms_norm([x], weight, residual=residual),
        rms_norm=lambda x, weight: reference.rms_norm([x], [weight])[0],
        check=lambda: None,
    )


def test_a_trial_of_what_is_right(comm):
    assert state.trial(comm) == ""


@pytest.mark.parametrize(
    ("op", "field"), [("all_reduce_rms_norm", "norm"), ("all_reduce_rms_norm", "residual"), ("rms_norm", "")]
)
def test_a_trial_finds_one_wrong_row(comm, monkeypatch, op, field):
    stock = getattr(comm, op)

    def wrong(x, *args, **kwargs):
        found = stock(x, *args, **kwargs)
        if len(x) == state.TRIAL_ROWS[-1]:
            (getattr(found, field) if field else found)[7, 5] += 0.125
        return found

    monkeypatch.setattr(comm, op, wrong)
    assert state.trial(comm).startswith(f"{op} of 1600 rows is wrong on these GPUs; `tpfuse check")


def test_a_kernel_that_gave_up_says_more_than_its_wrong_rows(comm, monkeypatch):
    monkeypatch.setattr(comm, "rms_norm", lambda x, _: torch.zeros_like(x))
    monkeypatch.setattr(comm, "check", failing)
    with pytest.raises(PeerTimeout, match=GAVE_UP):
        state.trial(comm)


def failing():
    raise PeerTimeout(GAVE_UP)


class Kernels:
    """A Communicator whose plan is fused. `made`: all of a run."""

    def __init__(self, group, mode, timeout):
        self.timeout, self.closed = timeout, False
        self.plan = SimpleNamespace(effective_mode="fused", routes=())
        self._board = Board(group, f"kernels/{next(numbers)}")
        Kernels.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.closed = True


def engaged(wrong):
    """What a worker comes to where trial() gives `wrong()`, and its Communicators."""
    stock = state.Communicator, state.trial
    state.Communicator, state.trial, Kernels.made = Kernels, lambda _: wrong(), []
    try:
        group = SimpleNamespace(device_group=dist.group.WORLD)
        made = state.engage("vLLM", "fused", group)
        return made.effective, made.reason, [(comm.timeout, comm.closed) for comm in Kernels.made]
    finally:
        state.Communicator, state.trial = stock
        state.current = None


def test_kernels_that_pass_get_the_time_that_a_server_needs(alone):
    assert engaged(lambda: "") == ("fused", "", [(60.0, True), (300.0, False)])


@pytest.mark.parametrize(("wrong", "reason"), [(lambda: "sums are wrong", "sums are wrong"), (failing, GAVE_UP)])
def test_kernels_that_fail_stay_out(alone, wrong, reason):
    effective, why, made = engaged(wrong)
    assert (effective, made) == ("off", [(60.0, True)])
    assert reason in why


def fails_on_one(rank):
    return engaged(lambda: "sums are wrong" if rank.rank == 1 else "")


def test_kernels_that_fail_on_one_rank_stay_out_on_all(on_ranks):
    assert on_ranks(2, fails_on_one) == [("off", "rank 1: sums are wrong", [(60.0, True)])] * 2


# Steps of a worker


@pytest.fixture
def worker(monkeypatch):
    """A worker of vLLM, with tpfuse's questions placed; `worker.fails()` makes a kernel give up."""

    class Worker:
        def execute_model(self, result):
            return result

        sample_tokens = execute_dummy_batch = execute_model

    class WorkerProc:
        def enqueue_output(self, output):
            return output.get_output() if hasattr(output, "get_output") else output

    for name, placed in {
        "vllm.v1.worker.gpu_worker": {"Worker": Worker},
        "vllm.v1.executor.multiproc_executor": {"WorkerProc": WorkerProc},
    }.items():
        for parent in (name.partition(".")[0], *(name.rsplit(".", n)[0] for n in (2, 1))):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(placed)
        monkeypatch.setitem(sys.modules, name, module)
    from tpfuse.integrations.vllm import failures

    comm = SimpleNamespace(check=lambda: None)
    monkeypatch.setattr(state, "current", SimpleNamespace(comm=comm))
    return SimpleNamespace(
        install=failures.install, Worker=Worker, steps=Worker(), process=WorkerProc(),
        fails=lambda: setattr(comm, "check", failing),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["execute_model", "sample_tokens", "execute_dummy_batch"])
def test_no_step_begins_after_a_kernel_gave_up(worker, name):
    worker.install()
    assert getattr(worker.steps, name)(None) is None
    worker.fails()
    with pytest.raises(PeerTimeout, match=GAVE_UP):
        getattr(worker.steps, name)(None)


def test_results_that_are_on_the_host_are_asked_about(worker, monkeypatch):
    monkeypatch.setattr(worker.Worker, "sample_tokens", lambda self: worker.fails() or "tokens")
    worker.install()
    with pytest.raises(PeerTimeout, match=GAVE_UP):
        worker.steps.sample_tokens()


def test_results_that_are_waited_for_are_asked_about_then(worker):
    worker.install()
    output = worker.steps.execute_model(SimpleNamespace(get_output=lambda: "tokens"))
    assert output.get_output() == "tokens"
    output = worker.steps.execute_model(SimpleNamespace(get_output=lambda: "tokens"))
    worker.fails()
    with pytest.raises(PeerTimeout, match=GAVE_UP):
        output.get_output()


def test_an_error_of_a_result_is_handed_on_as_a_result(worker):
    """In the thread that waits for results, where an exception would end it without a word."""
    worker.install()
    output = worker.steps.execute_model(SimpleNamespace(get_output=lambda: "tokens"))
    worker.fails()
    handed_on = worker.process.enqueue_output(output)
    assert isinstance(handed_on, PeerTimeout)
    assert worker.process.enqueue_output("tokens") == "tokens"


def test_a_worker_of_another_vllm_is_told(worker):
    del worker.Worker.execute_dummy_batch
    with pytest.raises(LookupError, match=r"Worker\.execute_dummy_batch is not there"):
        worker.install()


def test_sglangs_steps_ask_before_they_begin(worker):
    assert sglang_plugin._checked(lambda batch: batch, "batch") == "batch"
    worker.fails()
    with pytest.raises(PeerTimeout, match=GAVE_UP):
        sglang_plugin._checked(lambda batch: batch, "batch")
