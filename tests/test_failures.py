"""Calls that go wrong: between ranks, each with an error that says who is where; and with arguments of the wrong kind,
which are refused before anything is exchanged."""

from __future__ import annotations

import re
from dataclasses import replace
from multiprocessing.connection import wait
from threading import Event, Thread
from types import SimpleNamespace

import failing
import jobs
import pytest
import torch
from failing import LATE, QUICK
from jobs import Case

from tpfuse import Communicator
from tpfuse.backends import collective
from tpfuse.backends.cuda.all_reduce import DEFAULTS
from tpfuse.errors import CommunicatorClosed, InvalidArgument, RankMismatch, TpfuseError, Unsupported
from tpfuse.launch import RankFailed, Ranks

# Ranks that call differently


@pytest.mark.parametrize(
    ("field", "other", "shown"),
    [
        ("rows", Case("qk_rms_norm", (7,)), "rows=7, rank 0 has 5"),
        ("op", Case("rms_norm", (5,)), "op=rms_norm, rank 0 has qk_rms_norm"),
        ("width", Case("qk_rms_norm", (5,), width=32), "width=32, rank 0 has 48"),
        ("width of k", Case("qk_rms_norm", (5,), width2=8), "width2=8, rank 0 has 16"),
        ("dtype", Case("qk_rms_norm", (5,), dtype=torch.float32), "dtype=torch.float32, rank 0 has torch.bfloat16"),
        ("eps", Case("qk_rms_norm", (5,), eps=(1e-5, 1e-6)), "eps=1e-05, rank 0 has 1e-06"),
        ("eps of k", Case("qk_rms_norm", (5,), eps=(1e-6, 1e-5)), "eps2=1e-05, rank 0 has 1e-06"),
        ("weight_bias", Case("qk_rms_norm", (5,), weight_bias=1.0), "weight_bias=1.0, rank 0 has 0.0"),
        ("no rows", Case("qk_rms_norm", (0,)), "rows=0, rank 0 has 5"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" not in value else "",
)
def test_a_call_that_differs_is_named_with_its_rank_on_every_rank(on_ranks, field, other, shown):
    usual = Case("qk_rms_norm", (5,))
    for seen in on_ranks(3, failing.each_calls, [usual, usual, other], 10.0):
        assert seen.error == "RankMismatch"
        assert f"rank 2 has {shown}" in seen.message
        assert "call #1, qk_rms_norm(5 rows x 48+16, bfloat16) on rank 0" in seen.message
        assert "rank 1 has" not in seen.message
        assert seen.seconds < LATE


def test_a_residual_that_only_some_ranks_have_is_named(on_ranks):
    case = Case("all_reduce_rms_norm", (5,), residual=torch.float32)
    for seen in on_ranks(2, failing.each_calls, [case, replace(case, residual=None)], 10.0):
        assert seen.error == "RankMismatch"
        assert "rank 1 has residual=None, rank 0 has torch.float32" in seen.message


def test_a_mismatch_leaves_the_communicator_usable(on_ranks):
    usual, other = Case("all_reduce", (5,)), Case("all_reduce", (7,))
    results = on_ranks(2, failing.calls_again, [usual, other], usual, 10.0)
    assert [first.error for first, _ in results] == ["RankMismatch"] * 2
    jobs.check(usual, 2, [second.value for _, second in results])


# Ranks that do not come


@pytest.mark.parametrize("absent", [0, 1, 2])
@pytest.mark.parametrize("op", ["qk_rms_norm", "all_reduce_rms_norm"])
def test_a_rank_that_does_not_join_a_call_is_named_in_bounded_time(on_ranks, op, absent):
    case = Case(op)
    outcomes = on_ranks(3, failing.each_calls, [None if rank == absent else case for rank in range(3)], QUICK)
    for rank, seen in enumerate(outcomes):
        if rank != absent:
            assert seen.error == "PeerTimeout"
            assert f"call #1, {op}(5 rows x 48" in seen.message
            assert f"on rank {rank}: rank {absent} did not arrive within 2 s" in seen.message
            assert QUICK * 0.9 < seen.seconds < 2 * QUICK + LATE  # the timeout, and as long to hear from the others


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("late", [None, 2.5 * QUICK])
def test_a_rank_that_does_not_prepare_in_time_is_named_in_bounded_time(on_ranks, odd, late):
    first, second = on_ranks(2, failing.prepares, odd, late, QUICK)[1 - odd]
    assert first.error == second.error == "PeerTimeout"
    assert f"rank {odd} of 2 did not call prepare(), or make a call that torch.distributed serves, within 2 s" in (
        first.message
    )
    assert QUICK * 0.9 < first.seconds < QUICK + LATE
    assert second.seconds < 0.5


def test_a_rank_that_prepares_too_late_does_not_go_on_alone(on_ranks):
    late, again = on_ranks(2, failing.prepares, 1, 2.5 * QUICK, QUICK)[1]
    assert late.error == again.error == "PeerTimeout"
    assert "rank 0 of 2 did not call prepare()" in late.message


def test_a_slow_rank_is_waited_for(on_ranks):
    case = Case("all_reduce")
    outcomes = on_ranks(2, failing.each_calls, [case, case], 10.0, [0.0, 0.7])
    assert [seen.error for seen in outcomes] == ["", ""]
    assert outcomes[0].seconds > 0.5
    jobs.check(case, 2, [seen.value for seen in outcomes])


def test_after_a_timeout_the_communicator_fails_at_once_with_the_same_error(on_ranks):
    case = Case("all_reduce")
    first, second = on_ranks(2, failing.calls_again, [case, None], case, QUICK)[0]
    assert first.error == second.error == "PeerTimeout"
    assert first.message == second.message
    assert second.seconds < 0.5


@pytest.mark.parametrize("dying", [2, 0])
@pytest.mark.parametrize("store", ["lives", "dies"])
def test_a_rank_that_is_killed_between_calls_is_named_while_the_store_lives(tmp_path, dying, store):
    def die_with_it(ranks):
        wait([ranks._processes[dying].sentinel])
        ranks._store = None

    with Ranks(3) as ranks:
        if store == "dies":
            Thread(target=die_with_it, args=(ranks,)).start()
        with pytest.raises(RankFailed, match=f"rank {dying}: the process died with exit code -9"):
            ranks.run(failing.dies_in_the_middle, dying, 5.0, tmp_path)
    lost = "and so did the store that could say which rank is missing"
    for rank in {0, 1, 2} - {dying}:
        seen = (tmp_path / str(rank)).read_text()
        assert seen.startswith("PeerTimeout: call #2, all_reduce(3 rows x 8, float32)")
        assert f"on rank {rank}: " in seen
        assert (f"rank {dying} did not arrive" if store == "lives" else lost) in seen


# Arguments. A group of one is enough, and 64 elements are as wide as it goes.


X, GAMMA = torch.ones(3, 8), torch.ones(8)


def gamma_of(x):
    return torch.ones(x.shape[-1:])


OPS = {
    "rms_norm": lambda comm, x: comm.rms_norm(x, gamma_of(x)),
    "qk_rms_norm": lambda comm, x: comm.qk_rms_norm(x, x, gamma_of(x), gamma_of(x)),
    "all_reduce": lambda comm, x: comm.all_reduce(x),
    "all_reduce_rms_norm": lambda comm, x: comm.all_reduce_rms_norm(x, gamma_of(x)),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (X.double(), InvalidArgument, "has dtype torch.float64; supported: float32, bfloat16 or float16"),
        (X.int(), InvalidArgument, "has dtype torch.int32"),
        (X.to("meta"), InvalidArgument, "is on meta, the communicator on cpu"),
        (torch.ones(8, 3).t(), InvalidArgument, "the last dimension of . has stride 3"),
        (torch.ones(3, 16)[:, ::2], InvalidArgument, "the last dimension of . has stride 2"),
        (torch.ones(3, 65), InvalidArgument, "is 65 wide, the communicator was made for max_hidden=64"),
        (torch.ones(3, 0), InvalidArgument, r"has shape \[3, 0\]; needed: \[..., width\]"),
        (torch.ones(3, 8, requires_grad=True), Unsupported, "requires a gradient; tpfuse is for inference"),
    ],
    ids=["float64", "int32", "device", "transposed", "every other", "wide", "empty", "gradient"],
)
def test_an_activation_of_the_wrong_kind_is_refused(alone, op, x, error, text):
    with pytest.raises(error, match=f"{op}: .*{text}"):
        OPS[op](alone, x)


def test_a_number_is_not_a_row(alone):
    with pytest.raises(InvalidArgument, match=r"has shape \[\]"):
        alone.all_reduce(torch.tensor(1.0))


def test_a_gradient_is_fine_where_none_is_recorded(alone):
    with torch.no_grad():
        assert not alone.rms_norm(X.clone().requires_grad_(), GAMMA).requires_grad


@pytest.mark.parametrize("weight_grad", [False, True])
def test_results_never_require_a_gradient(alone, weight_grad):
    gamma = GAMMA.clone().requires_grad_(weight_grad)
    assert not alone.rms_norm(X, gamma).requires_grad
    assert not alone.all_reduce_rms_norm(X, gamma, residual=X).norm.requires_grad


@pytest.mark.parametrize(
    ("gamma", "text"),
    [
        (torch.ones(7), r"has shape \[7\]; needed: \[8\], this rank's part of gamma"),
        (torch.ones(1, 8), r"has shape \[1, 8\]"),
        (torch.ones(16), r"has shape \[16\]"),
        (torch.ones(8, dtype=torch.float64), "has dtype torch.float64"),
        (torch.ones(16)[::2], "must be contiguous"),
        (torch.ones(8, device="meta"), "it is on meta"),
    ],
    ids=["short", "matrix", "long", "dtype", "strided", "device"],
)
def test_a_weight_of_the_wrong_kind_is_refused(alone, gamma, text):
    with pytest.raises(InvalidArgument, match=f"rms_norm: weight .*{text}"):
        alone.rms_norm(X, gamma)
    with pytest.raises(InvalidArgument, match=f"qk_rms_norm: q_weight .*{text}"):
        alone.qk_rms_norm(X, X, gamma, GAMMA)
    with pytest.raises(InvalidArgument, match=f"qk_rms_norm: k_weight .*{text}"):
        alone.qk_rms_norm(X, X, GAMMA, gamma)
    with pytest.raises(InvalidArgument, match=f"all_reduce_rms_norm: weight .*{text}"):
        alone.all_reduce_rms_norm(X, gamma)


@pytest.mark.parametrize(
    "k", [torch.ones(4, 8), torch.ones(3, 1, 8), torch.ones(3, 8, dtype=torch.bfloat16)], ids=["rows", "dims", "dtype"]
)
def test_q_and_k_with_different_rows_or_dtypes_are_refused(alone, k):
    with pytest.raises(InvalidArgument, match=r"qk_rms_norm: q is .* needed: the same leading dimensions and dtype"):
        alone.qk_rms_norm(X, k, GAMMA, GAMMA)


@pytest.mark.parametrize(
    ("residual", "text"),
    [
        (torch.ones(4, 8), r"has shape \[4, 8\].*needed: \[3, 8\]"),
        (torch.ones(1, 3, 8), r"has shape \[1, 3, 8\]"),
        (torch.ones(3, 8, dtype=torch.int32), "has dtype torch.int32"),
        (torch.ones(3, 8, device="meta"), "on meta"),
        (torch.ones(8, 3).t(), "has stride 3"),
    ],
    ids=["rows", "dims", "dtype", "device", "strides"],
)
def test_a_residual_of_the_wrong_kind_is_refused(alone, residual, text):
    with pytest.raises(InvalidArgument, match=f"all_reduce_rms_norm: .*residual.*{text}"):
        alone.all_reduce_rms_norm(X, GAMMA, residual=residual)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (torch.ones(4, 8), "out has shape"),
        (torch.ones(3, 8, dtype=torch.bfloat16), "out has dtype torch.bfloat16; needed: torch.float32"),
        (torch.ones(8, 3).t(), "last dimension of out has stride 3"),
    ],
    ids=["rows", "dtype", "strides"],
)
def test_an_out_of_the_wrong_kind_is_refused(alone, out, text):
    with pytest.raises(InvalidArgument, match=f"rms_norm: .*{text}"):
        alone.rms_norm(X, GAMMA, out=out)
    with pytest.raises(InvalidArgument, match=f"all_reduce: .*{text}"):
        alone.all_reduce(X, out=out)
    with pytest.raises(InvalidArgument, match=f"qk_rms_norm: .*{text}"):
        alone.qk_rms_norm(X, X, GAMMA, GAMMA, out=(torch.ones(3, 8), out))


def test_an_out_whose_rows_are_not_at_one_stride_is_refused(alone):
    x = torch.ones(2, 3, 8)
    with pytest.raises(
        InvalidArgument, match=r"out has shape \[2, 3, 8\] and strides \(8, 16, 1\); needed: rows at one"
    ):
        alone.rms_norm(x, GAMMA, out=x.transpose(0, 1).contiguous().transpose(0, 1))


def test_an_out_whose_rows_share_memory_is_refused(alone):
    with pytest.raises(InvalidArgument, match="out"):
        alone.rms_norm(X, GAMMA, out=torch.ones(8).expand(3, 8))


def test_a_format_that_is_none_is_refused(alone):
    with pytest.raises(InvalidArgument, match=re.escape("quant='fp8'; needed: a format of tpfuse.quant, such as")):
        alone.all_reduce_rms_norm(X, GAMMA, quant="fp8")


def test_a_refused_call_is_not_counted(alone):
    def calls():
        return sum(counter["calls"] for counter in alone.report().as_dict()["counters"])

    before = calls()
    with pytest.raises(InvalidArgument):
        alone.rms_norm(X.double(), GAMMA)
    assert calls() == before
    alone.rms_norm(X, GAMMA)
    assert calls() == before + 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("alone")
def test_a_closed_communicator_says_that_it_is_closed(op):
    comm = Communicator()
    comm.close()
    with pytest.raises(CommunicatorClosed, match=f"communicator {comm.name} is closed; make a new one"):
        OPS[op](comm, X)
    with pytest.raises(CommunicatorClosed):
        comm.prepare()


def test_a_backend_is_given_back_if_there_is_no_communicator(alone, monkeypatch):
    closed = []
    backend = SimpleNamespace(thresholds=DEFAULTS[2], close=lambda: closed.append(True))
    monkeypatch.setattr(Communicator, "_start_cuda", lambda self, facts: (backend, ""))
    differs = iter([None, RankMismatch("another plan")])

    def agree(*_):
        if (error := next(differs)) is not None:
            raise error

    monkeypatch.setattr("tpfuse.communicator.agree", agree)
    with pytest.raises(RankMismatch):
        Communicator(alone.group)
    assert closed == [True]


class TestWatchdog:
    def follow(self, query):
        """One call in flight, behind work of which `query` says whether it is done."""
        failed, aborted = [], Event()
        watch = collective.Watchdog(SimpleNamespace(abort=aborted.set), 0.1, lambda *seen: failed.append(seen))
        work = SimpleNamespace(is_completed=lambda: False)
        watch._calls.append(collective.InFlight(7, "a call", SimpleNamespace(query=query), work))
        return watch, failed, aborted

    def test_a_call_that_does_not_end_fails_the_communicator_and_aborts_the_group(self):
        watch, failed, aborted = self.follow(lambda: True)
        assert aborted.wait(10)
        watch.stop()
        assert failed == [(7, "a call", "the exchange did not end on the device")]

    def test_a_capture_meanwhile_is_not_taken_for_a_failure(self):
        answers = iter([RuntimeError("CUDA error: operation not permitted when stream is capturing")] * 3)

        def query():
            if (error := next(answers, None)) is not None:
                raise error
            return True

        watch, failed, aborted = self.follow(query)
        assert aborted.wait(10)
        watch.stop()
        assert len(failed) == 1

    @pytest.mark.filterwarnings("ignore:tpfuse. calls are not watched any more")
    def test_a_device_that_fails_is_not_its_peers_fault(self):
        def query():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        watch, failed, aborted = self.follow(query)
        watch._thread.join(10)
        assert not watch._thread.is_alive()
        assert failed == []
        assert not aborted.is_set()


def test_a_prepare_that_failed_is_not_tried_again(alone, monkeypatch):
    def refuses() -> None:
        raise RuntimeError("no route to host")

    with Communicator(alone.group) as comm:
        monkeypatch.setattr(comm._collective, "prepare", refuses)
        for call in (comm.prepare, comm.prepare, lambda: comm.all_reduce(torch.ones(2, 8))):
            with pytest.raises(TpfuseError, match=r"prepare: torch\.distributed could not connect.*no route to host"):
                call()


def test_prepare_may_be_called_at_any_time(alone):
    alone.prepare()
    alone.prepare()


@pytest.mark.parametrize("field", ["eps", "weight_bias"])
def test_a_number_that_is_a_tensor_is_refused(alone, field):
    with pytest.raises(InvalidArgument, match=f"rms_norm: {field} is a Tensor; needed: a number"):
        alone.rms_norm(torch.ones(2, 8), torch.ones(8), **{field: torch.tensor(0.5)})
