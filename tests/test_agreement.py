"""Making a communicator: ranks that differ, are missing or fail are one clear error on every rank, in bounded time."""

from __future__ import annotations

import signal
import sys
import time
from subprocess import PIPE, Popen
from threading import Timer

import failing
import pytest
import torch.distributed as dist
from failing import LATE, QUICK

from tpfuse import Communicator, __version__, agreement
from tpfuse.errors import InvalidArgument, PeerTimeout, RankMismatch, TpfuseError, Unsupported


@pytest.mark.parametrize(
    ("field", "usual", "other"),
    [
        ("mode", "fused", "off"),
        ("backend", "auto", "collective"),
        ("max_hidden", 16384, 4096),
        ("timeout", 10.0, 9.0),
    ],
)
@pytest.mark.parametrize("odd", [1, 2])
def test_a_setting_that_differs_is_named_with_its_rank_on_every_rank(on_ranks, field, usual, other, odd):
    settings = [{"timeout": 10.0, field: other if rank == odd else usual} for rank in range(3)]
    for seen in on_ranks(3, failing.construct, settings):
        assert seen.error == "RankMismatch"
        assert f"rank {odd} has {field}={other!r}, rank 0 has {usual!r}" in seen.message
        assert f"rank {3 - odd} has {field}" not in seen.message
        assert seen.seconds < LATE


def test_if_rank_0_is_the_odd_one_every_other_rank_is_named(on_ranks):
    settings = [{"mode": mode, "timeout": 10.0} for mode in ("off", "fused", "fused")]
    messages = [seen.message for seen in on_ranks(3, failing.construct, settings)]
    assert "rank 1 has mode='fused', rank 0 has 'off'" in messages[0]
    assert "rank 2 has mode='fused', rank 0 has 'off'" in messages[0]
    assert messages[1:] == messages[:1] * 2


def test_all_differences_are_named_at_once(on_ranks):
    settings = [{"timeout": 10.0}, {"timeout": 10.0, "mode": "off", "max_hidden": 64}]
    for seen in on_ranks(2, failing.construct, settings):
        assert "mode='off'" in seen.message
        assert "max_hidden=64" in seen.message


def test_versions_that_differ_are_named(on_ranks):
    for seen in on_ranks(2, failing.construct_as_version, [__version__, "0.0.7"]):
        assert seen.error == "RankMismatch"
        assert f"rank 1 has tpfuse='0.0.7', rank 0 has {__version__!r}" in seen.message


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_rank_that_never_comes_is_named_within_the_timeout(on_ranks, absent):
    settings = [None if rank == absent else {"timeout": QUICK} for rank in range(3)]
    for rank, seen in enumerate(on_ranks(3, failing.construct, settings)):
        if rank != absent:
            assert seen.error == "PeerTimeout"
            assert f"rank {absent} of 3 did not construct a Communicator on this group within 2 s" in seen.message
            assert QUICK * 0.9 < seen.seconds < QUICK + LATE


def test_all_ranks_that_never_come_are_named(on_ranks):
    seen = on_ranks(3, failing.construct, [None, {"timeout": QUICK}, None])[1]
    assert seen.error == "PeerTimeout"
    assert "ranks 0, 2 of 3 did not construct" in seen.message


def test_a_slow_rank_is_waited_for(on_ranks):
    for seen in on_ranks(2, failing.construct_late, 1, 0.5, 10.0):
        assert seen.error == ""


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"backend": "telepathy"}, "backend='telepathy'"),
        ({"mode": "turbo"}, "mode='turbo'"),
        ({"device": "cuda"}, "cuda"),
        ({"timeout": -1.0}, "timeout=-1.0"),
    ],
)
def test_a_rank_that_fails_while_constructing_tells_the_others_why(on_ranks, settings, text):
    failed, *others = on_ranks(3, failing.construct, [settings, {"timeout": 10.0}, {"timeout": 10.0}])
    assert failed.error in ("InvalidArgument", "Unsupported")
    assert text in failed.message
    for seen in others:
        assert seen.error == "TpfuseError"
        assert "rank 0 could not start" in seen.message
        assert failed.message in seen.message
        assert seen.seconds < LATE


def test_a_group_can_be_used_after_a_failure_that_all_ranks_saw(on_ranks):
    for first, second in on_ranks(2, failing.construct_twice, [{"mode": "off"}, {"mode": "fused"}]):
        assert first.error == "RankMismatch"
        assert second.error == ""


def test_a_rank_that_comes_after_the_timeout_does_not_get_a_communicator(on_ranks):
    early, late = on_ranks(2, failing.construct_late, 1, 2.5 * QUICK, QUICK)
    assert early.error == "PeerTimeout"
    assert late.error == "PeerTimeout"


# The store that the ranks meet in is itself in a process, which can end or stop


class Ranks3:
    """Stands for a process group of three, of which this is rank 0."""

    rank = staticmethod(lambda: 0)
    size = staticmethod(lambda: 3)


SERVES = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


@pytest.fixture
def elsewhere(monkeypatch):
    """A board of rank 0 of 3, and the process that its store is in."""
    with Popen([sys.executable, "-c", SERVES], stdout=PIPE, text=True) as serving:
        store = dist.TCPStore("127.0.0.1", int(serving.stdout.readline()), is_master=False)
        monkeypatch.setattr(agreement, "_get_process_group_store", lambda group: store)
        yield agreement.Board(Ranks3, "test"), serving
        serving.kill()


def test_while_the_store_lives_the_ranks_that_are_not_there_are_missing(elsewhere):
    board, _ = elsewhere
    board.pin("here", {"call": "all_reduce"})
    assert board.read("here", 0.3) == {0: {"call": "all_reduce"}}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["ended", "stopped"])
def test_a_store_that_is_lost_puts_the_blame_on_no_rank_and_is_waited_for_in_bounded_time(elsewhere, how, monkeypatch):
    board, serving = elsewhere
    monkeypatch.setattr(agreement, "ANSWER", 0.5 if how == signal.SIGSTOP else 10.0)
    Timer(0.3, serving.send_signal, [how]).start()
    started = time.monotonic()
    told = str(agreement.diagnose(board, 2, "all_reduce(3 rows x 8)", "connection reset", 1.0))
    assert time.monotonic() - started < 1 + 2 * 0.5 + LATE
    assert "so did the store that could say which rank is missing" in told
    assert "did not arrive" not in told


def test_constructing_says_that_the_store_is_lost(elsewhere):
    board, serving = elsewhere
    serving.kill()
    with pytest.raises(PeerTimeout, match=r"the store that the ranks of the group meet in .* is gone"):
        agreement.agree(board, {"mode": "fused"}, 0.5)


# One process alone


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_torch_distributed_the_error_says_what_to_call():
    with pytest.raises(InvalidArgument, match=r"not initialised.*not started by torchrun.*init_process_group\(\)"):
        Communicator()


def test_under_torchrun_without_torch_distributed_the_error_says_so(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InvalidArgument, match="RANK and WORLD_SIZE are set"):
        Communicator()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"mode": "turbo"}, InvalidArgument, "mode='turbo'; supported: off, control, fused"),
        ({"backend": "telepathy"}, InvalidArgument, "backend='telepathy'; supported: auto, .*collective"),
        ({"timeout": 0}, InvalidArgument, "timeout=0; needed: seconds, more than 0"),
        ({"timeout": -3.5}, InvalidArgument, "timeout=-3.5"),
        ({"timeout": float("nan")}, InvalidArgument, "timeout=nan"),
        ({"max_hidden": 0}, InvalidArgument, "max_hidden=0"),
        ({"max_hidden": 12.5}, InvalidArgument, "max_hidden=12.5"),
        ({"group": "tp"}, InvalidArgument, "group is 'tp'"),
        ({"group": dist.GroupMember.NON_GROUP_MEMBER}, InvalidArgument, "process group of this rank"),
        ({"device": "meta"}, Unsupported, "device=meta, but the group serves"),
        ({"timeout": "30"}, InvalidArgument, "timeout='30'"),
        ({"timeout": float("inf")}, InvalidArgument, "timeout=inf"),
        ({"device": "gpu"}, InvalidArgument, "device='gpu'"),
    ],
    ids=str,
)
def test_a_bad_setting_says_what_was_given_and_what_is_supported(settings, error, text):
    with pytest.raises(error, match=text.replace("(", r"\(")):
        Communicator(**settings)


def test_a_group_of_another_rank_is_refused(on_ranks):
    outcomes = on_ranks(2, failing.construct_in_group_of_rank_0)
    assert [seen.error for seen in outcomes] == ["", "InvalidArgument"]


@pytest.mark.usefixtures("one_rank")
def test_a_communicator_can_be_closed_twice_and_says_that_it_is_closed():
    with Communicator() as comm:
        assert "rank 0 of 1 on cpu, control" in repr(comm)
    comm.close()
    assert repr(comm).endswith("closed>")


def test_errors_are_of_the_builtin_kinds_too():
    assert issubclass(InvalidArgument, ValueError)
    assert issubclass(PeerTimeout, TimeoutError)
    for kind in (InvalidArgument, Unsupported, RankMismatch, PeerTimeout):
        assert issubclass(kind, TpfuseError)
        assert issubclass(kind, RuntimeError)
