"""`tpfuse check` itself: it sees what is wrong, on whichever rank, and what it prints is short."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tpfuse import Communicator, NormOutput, check
from tpfuse.backends import collective
from tpfuse.launch import Rank
from tpfuse.quant import FORMATS

CASES = [case for case in check.cases() if case.width in (24, 72)]


def spoilt_on(rank: Rank, wrong: int) -> tuple[list[check.Outcome], str]:
    """The check's job with a few cases; one rank's results are wrong."""
    every, check.cases = check.cases, lambda: CASES
    scale, right = collective.Collective._scale, rank.rank != wrong
    if not right:
        collective.Collective._scale = lambda *args: 2 * scale(*args)
    try:
        return check.job(rank, "control", "collective")
    finally:
        check.cases, collective.Collective._scale = every, scale


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_every_rank_knows_which_rank_is_wrong(on_ranks, wrong):
    for outcomes, mode in on_ranks(3, spoilt_on, wrong):
        failed = [o for o in outcomes if not o.ok]
        assert mode == "control"
        assert [o.case for o in outcomes] == CASES
        assert {o.case.op for o in failed} == {"rms_norm", "qk_rms_norm"}
        assert {o.rank for o in failed} == {wrong}


SPOILT = {
    "rotate": ("qk_rms_norm", "rope-of-halves", "rope-of-neighbours"),
    "gather_rows": ("all_reduce_rms_norm", "row-sharded"),
    "sum_of_experts": ("all_reduce_rms_norm", "experts-3", "experts-8", "experts-10"),
}
IN_ITS_PLACE = {
    "rotate": lambda x, rope: x,
    "gather_rows": lambda self, y, rows: GATHER_ROWS(self, y, rows).flip(0),
    "sum_of_experts": lambda x: x[:, 0],
}
GATHER_ROWS = collective.Collective.gather_rows


def run_without(rank: Rank, what: str) -> list[tuple[check.Case, bool]]:
    """Small cases of the variants, with a part of the backend that does nothing; which of them fail."""
    place = collective.Collective if what == "gather_rows" else collective
    right = getattr(place, what)
    setattr(place, what, IN_ITS_PLACE[what])
    cases = [case for case in check.cases() if case.width in (72, 384)]
    try:
        with Communicator(mode="control", timeout=20.0) as comm:
            return [(case, check.run_case(comm, case).ok) for case in cases]
    finally:
        setattr(place, what, right)


@pytest.mark.parametrize("what", SPOILT)
def test_a_variant_that_does_not_do_its_part_is_seen(on_ranks, what):
    op, *variants = SPOILT[what]
    for found in on_ranks(2, run_without, what):
        assert any(case.op == op and set(case.variants) & set(variants) for case, _ in found)
        for case, ok in found:
            assert ok == (not set(case.variants) & set(variants)), case


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("alone")
def test_a_wrong_byte_of_a_quantised_output_is_seen(name):
    case = next(case for case in check.cases() if case.quant == name)
    fmt, norm = FORMATS[name](torch.ones(1)), torch.randn(5, 384)
    encoded = fmt.encode(norm)
    quant, scale = fmt.encode(norm)
    quant.view(torch.uint8)[3, 5] ^= 0x22
    _, other_scale = FORMATS[name](torch.full((1,), 2.0)).encode(norm * 3)
    with Communicator() as comm:
        for y, right in ((encoded, True), ((quant, scale), False), ((encoded[0], other_scale), False)):
            worst = check.Worst(comm, case)
            worst.quantised(fmt, "quant", NormOutput(None, None, *y), encoded)
            assert worst.outcome().ok == right


def test_the_cases_have_every_variant():
    cases = check.cases()
    assert {case.top_k for case in cases} >= {None, 1, 8}
    quantised = {(case.quant, case.row_sharded) for case in cases if case.op == "all_reduce_rms_norm"}
    assert quantised == {(name, sharded) for name in ("", *FORMATS) for sharded in (False, True)}
    assert {case.rope for case in cases if case.op == "qk_rms_norm"} == {"", "halves", "neighbours"}
    assert len({str(case) for case in cases}) == len(cases)


def only(rank: Rank, dtype: torch.dtype) -> check.Outcome:
    """A case of which the larger slices are summed in parts."""
    case = next(c for c in check.cases() if (c.op, c.width, c.dtype) == ("all_reduce", 8192, dtype))
    with Communicator(mode="control", timeout=20.0) as comm:
        return check.run_case(comm, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_sums_are_among_the_cases(on_ranks, dtype):
    assert check.ROWS[-1] * 8192 * 2 >= collective.LARGE
    for outcome in on_ranks(3, only, dtype):
        assert outcome.ok, outcome


def test_outcomes_that_do_not_come_are_a_failure(monkeypatch):
    def lost(*args):
        raise RuntimeError("Connection closed by peer\nwith a stack")

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lost)
    first, last = check.worst_of_all_ranks([check.Outcome(case, 0, 0.0, "") for case in CASES[:2]])
    assert first.ok
    assert not last.ok
    assert "did not come: RuntimeError: Connection closed by peer" in last.error
    assert "stack" not in last.error


def test_the_worst_of_the_ranks_counts():
    good, bad = (check.Outcome(CASES[0], rank, distance, "") for rank, distance in ((0, 0.5), (1, 1.5)))
    broken = replace(good, rank=2, distance=math.inf, error="Unsupported: no")
    assert check.merge([[good], [bad]]) == check.merge([[bad], [good]]) == [bad]
    assert check.merge([[good], [bad], [broken]]) == [broken]


def test_a_distance_is_never_nan():
    want = torch.ones(2)
    nowhere = torch.full((2,), math.nan, dtype=torch.float64)
    assert check.distance(want, want, nowhere, exact=False) == 0
    assert check.distance(want * 2, want, nowhere, exact=False) == math.inf


@pytest.mark.parametrize("distance", [0.0, 1.0, 12345.678, 1e43, math.inf])
def test_the_table_fits_into_80_columns(distance):
    outcomes = [check.Outcome(case, 0, distance, "norm, 3 rows, strided") for case in check.cases()]
    console = Console(width=80, file=io.StringIO())
    check.show(console, outcomes, "2 cpu ranks")
    said = console.file.getvalue()
    rows = [line for line in said.splitlines() if "│" in line]
    assert len(rows) == len(check.OPS) * len(check.DTYPES)  # no row is folded
    assert all(max(map(len, cell.split())) < 25 for row in rows for cell in row.split("│") if cell.strip())
    for width in (*check.WIDTHS, "6144+1024"):
        assert f"{width}" in said
    assert f"{len(outcomes) if distance <= 1 else 0} of {len(outcomes)} cases passed" in said


def test_errors_are_shown_as_they_are():
    console = Console(width=200, file=io.StringIO())
    check.show(console, [check.Outcome(c, 1, math.inf, "", "no [T, n] here") for c in check.cases()], "")
    assert "failed rms_norm 24 bfloat16 on rank 1: no [T, n] here" in console.file.getvalue()
