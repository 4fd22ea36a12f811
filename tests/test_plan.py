"""The plan as data, and the report of what really ran under it."""

from __future__ import annotations

import io
import json
from dataclasses import FrozenInstanceError

import jobs
import pytest
import torch
from jobs import Case
from rich.console import Console

from tpfuse.backends import collective
from tpfuse.backends.collective import Call
from tpfuse.plan import MODES, OPS, Counter, Facts, Plan, Report, Route, combined_mode

REASON = "backend cuda needs GPUs, the device is cpu; backend collective has no fused kernels"


def route(op="all_reduce", max_kib=None, *, mode="fused", algorithm="one-shot", reason=""):
    return Route(op, max_kib, "cuda", algorithm, mode, reason)


def plan_of(*routes, mode="fused"):
    """A plan in which the ops that are not given have one route."""
    given = {r.op for r in routes}
    rest = tuple(route(op, mode=mode) for op in OPS if op not in given)
    return Plan(mode, "auto", 4, (*routes, *rest))


def facts(mode="fused", world=4):
    return Facts(world, "cpu", "gloo", mode, "auto", 16384)


def text_of(thing, width=200):
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


# Choosing


@pytest.mark.parametrize(
    ("size_in_bytes", "algorithm"),
    [
        (0, "one-shot"), (1, "one-shot"), (16 << 10, "one-shot"),
        ((16 << 10) + 1, "two-shot"), (4 << 20, "two-shot"), ((4 << 20) + 1, "ring"),
    ],
)  # fmt: skip
def test_a_bound_is_the_last_size_that_its_route_serves(size_in_bytes, algorithm):
    plan = plan_of(route(max_kib=16), route(max_kib=4096, algorithm="two-shot"), route(max_kib=None, algorithm="ring"))
    assert plan.route("all_reduce", size_in_bytes).algorithm == algorithm


@pytest.mark.parametrize(
    ("width", "dtype", "size_in_bytes"),
    [
        (3072, torch.bfloat16, 3072 * 2),
        (3072, torch.float32, 3072 * 4),
        (3073, torch.float16, 3080 * 2),  # whole vectors of 8 elements
        (17, torch.float32, 24 * 4),
        (16, torch.bfloat16, 32),
        (9, torch.bfloat16, 32),
        (1, torch.float32, 32),  # at least
        (1, torch.float16, 32),
    ],
)
def test_the_size_of_a_call(width, dtype, size_in_bytes):
    for rows in (0, 1, 7):
        call = Call("all_reduce", rows, width, 0, dtype, None, 0.0, 0.0, 0.0)
        assert call.size_in_bytes == rows * size_in_bytes


def test_routes_of_ops_do_not_mix():
    plan = plan_of(route("rms_norm", 8), route("rms_norm", algorithm="two-shot"), route("all_reduce", algorithm="ring"))
    assert plan.route("rms_norm", 8 << 10).algorithm == "one-shot"
    assert plan.route("all_reduce", 8 << 10).algorithm == "ring"
    assert [r.max_kib for r in plan.of("rms_norm")] == [8, None]


@pytest.mark.parametrize(
    "bounds",
    [(), (16,), (None, 16), (16, 8, None), (16, 16, None), (None, None), (16, None, None)],
    ids=str,
)
def test_bounds_that_do_not_rise_to_none_are_refused(bounds):
    others = tuple(route(op) for op in OPS if op != "rms_norm")
    with pytest.raises(ValueError, match="routes of rms_norm need rising bounds that end with None"):
        Plan("fused", "auto", 4, (*others, *(route("rms_norm", bound) for bound in bounds)))


def test_a_plan_can_not_be_changed():
    with pytest.raises(FrozenInstanceError):
        plan_of().world = 8


# Modes


@pytest.mark.parametrize(
    ("modes", "one"),
    [
        ([], "none"),
        (["off"], "off"),
        (["fused", "fused"], "fused"),
        (["fused", "control"], "mixed"),
        (["fused", "any"], "fused"),
        (["any"], "none"),
    ],
)
def test_parts_of_different_modes_are_mixed(modes, one):
    assert combined_mode(modes) == one


def test_the_effective_mode_of_a_plan_is_mixed_where_part_of_it_falls_back():
    assert plan_of().effective_mode == "fused"
    assert plan_of(route(max_kib=16), route(mode="control", reason="too wide")).effective_mode == "mixed"


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_collective_serves_off_and_control_as_asked_and_fused_as_control(mode, world):
    for r in collective.routes(facts(mode, world)):
        assert r.backend == "collective"
        assert r.mode == ("control" if mode == "fused" else mode)
        assert bool(r.reason) == (mode == "fused")


def test_the_reason_for_a_fallback_says_why():
    assert {r.reason for r in collective.routes(facts("fused", 4))} == {"backend collective has no fused kernels"}
    assert {r.reason for r in collective.routes(facts("fused", 1))} == {"one rank: there is no exchange"}


def test_the_algorithm_says_what_is_exchanged():
    def algorithms(mode, world):
        return {r.op: r.algorithm for r in collective.routes(facts(mode, world))}

    assert algorithms("control", 4) == {
        "rms_norm": "all-reduce of sums",
        "qk_rms_norm": "all-reduce of sums",
        "all_reduce": "all-reduce",
        "all_reduce_rms_norm": "all-reduce, norm",
    }
    assert algorithms("off", 4)["qk_rms_norm"] == "all-gather, norm"
    assert set(algorithms("off", 1).values()) == {"local"}


# Reports


def report_of(*counters, mode="fused", effective="mixed"):
    plan = plan_of(route(max_kib=16), route(mode="control", reason="more than 16 KiB"))
    return Report(mode, effective, 1, 4, "cuda:1", "nccl", plan, counters)


COUNTERS = (
    Counter(route(max_kib=16), calls=3, captured=1, rows=12, bytes=98304),
    Counter(route(mode="control", reason="more than 16 KiB"), calls=1000, rows=64000, bytes=2**40),
)


def test_plan_and_report_are_json():
    data = json.loads(json.dumps(report_of(*COUNTERS).as_dict()))
    assert data["requested_mode"] == "fused"
    assert data["effective_mode"] == "mixed"
    assert data["reasons"] == ["more than 16 KiB"]
    assert data["plan"]["effective_mode"] == "mixed"
    assert data["plan"]["routes"][0] == {
        "op": "all_reduce", "max_kib": 16, "backend": "cuda", "algorithm": "one-shot", "mode": "fused", "reason": "",
    }  # fmt: skip
    assert data["counters"][1]["bytes"] == 2**40
    assert data["counters"][0]["max_kib"] == 16


def test_a_plan_prints_as_a_table():
    text = text_of(report_of().plan)
    assert "4 ranks, requested fused, effective mixed" in text
    assert "rows of a rank" in text
    assert "<= 16 KiB" in text
    assert "more than 16 KiB" in text
    assert all(op in text for op in OPS)


def test_a_report_prints_as_a_table_with_its_reasons():
    text = text_of(report_of(*COUNTERS))
    assert "rank 1 of 4 on cuda:1 (nccl): requested fused, effective mixed" in text
    assert "98,304" in text
    assert "not as requested: more than 16 KiB" in text


def test_a_narrow_terminal_folds_and_loses_nothing():
    text = "".join(c for c in text_of(report_of().plan, width=50) if c.isalnum())
    assert "morethan16KiB" in text or "more" in text


def test_a_report_without_calls_prints():
    assert "rank 1 of 4" in text_of(report_of())


# What a communicator counts


CASES = [
    Case("rms_norm", (5,), width=48),
    Case("rms_norm", (2, 3), width=48),
    Case("qk_rms_norm", (7,), width=48, width2=16),
    Case("qk_rms_norm", (0,), width=48, width2=16),
    Case("all_reduce", (3,), width=48),
    Case("all_reduce_rms_norm", (4,), width=48, residual=torch.float32),
    Case("all_reduce_rms_norm", (1,), width=48),
]
CALLS = {"rms_norm": (2, 11), "qk_rms_norm": (2, 7), "all_reduce": (1, 3), "all_reduce_rms_norm": (2, 5)}


def counted(report):
    return {c["op"]: (c["calls"], c["rows"], c["bytes"]) for c in report["counters"]}


@pytest.mark.parametrize("mode", ["control", "fused"])
@pytest.mark.parametrize(("world", "element"), [(1, 0), (2, 2), (3, 4), (4, 4)])
def test_calls_rows_and_bytes_are_counted(on_ranks, world, element, mode):
    """bf16 partial sums travel as such between two ranks and as fp32 among more; sums of squares are fp32."""
    number = 4 if world > 1 else 0
    sent = {
        "rms_norm": 11 * number,
        "qk_rms_norm": 7 * 2 * number,
        "all_reduce": 3 * 48 * element,
        "all_reduce_rms_norm": 5 * 48 * element,
    }
    for report in on_ranks(world, jobs.report_of, CASES, mode):
        assert counted(report) == {op: (*CALLS[op], sent[op]) for op in OPS}


@pytest.mark.parametrize("world", [2, 3])
def test_mode_off_counts_the_gathered_rows(on_ranks, world):
    for report in on_ranks(world, jobs.report_of, CASES, "off"):
        assert counted(report)["rms_norm"] == (2, 11, 11 * 48 * 2)
        assert counted(report)["qk_rms_norm"] == (2, 7, 7 * (48 + 16) * 2)


@pytest.mark.parametrize("mode", MODES)
def test_requested_and_effective_mode_are_different_fields(on_ranks, mode):
    for report in on_ranks(2, jobs.report_of, CASES, mode):
        effective = "control" if mode == "fused" else mode
        assert report["requested_mode"] == mode
        assert report["effective_mode"] == effective
        assert report["plan"]["requested_mode"] == mode
        assert report["plan"]["effective_mode"] == effective
        assert report["reasons"] == ([REASON] if mode == "fused" else [])


def test_a_report_names_rank_device_and_transport(on_ranks):
    for rank, report in enumerate(on_ranks(2, jobs.report_of, [], "fused")):
        assert (report["rank"], report["world"]) == (rank, 2)
        assert (report["device"], report["transport"]) == ("cpu", "gloo")
        assert report["counters"] == []
        assert report["effective_mode"] == "control"  # of the plan, as nothing ran yet


def test_the_plan_is_the_same_on_every_rank(on_ranks):
    plans = [report["plan"] for report in on_ranks(4, jobs.report_of, [], "fused")]
    assert plans == plans[:1] * 4
