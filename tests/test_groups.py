"""More than one group or communicator at a time: each keeps to its own."""

from __future__ import annotations

from itertools import pairwise

import jobs
import pytest
import torch
from jobs import OPS, Case
from ulps import same_bits


def check_group(members, cases, results):
    """Every call of a group against the contract for that group alone."""
    for i, case in enumerate(cases):
        jobs.check(case, len(members), [results[rank][i] for rank in members])


@pytest.mark.parametrize("members", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0], [1, 2, 3]), ([3, 1], [0, 2])], ids=str)
def test_groups_with_different_shapes_work_at_the_same_time(on_ranks, members):
    """TP x DP: one replica has 33 rows of all ops, the other 1 row and a single op, and no call waits for the other."""
    busy = [Case(op, (33,), seed=i) for i, op in enumerate(OPS)]
    quiet = [Case("qk_rms_norm", (1,), width=96, dtype=torch.float32)]
    results = on_ranks(4, jobs.in_groups, members, [busy, quiet])
    # a group's ranks are numbered in the order of the global ones
    check_group(sorted(members[0]), busy, results)
    check_group(sorted(members[1]), quiet, results)


def test_a_rank_can_be_in_two_groups_and_alternate_between_them(on_ranks):
    rows, columns = Case("all_reduce", (5,)), Case("qk_rms_norm", (7,), dtype=torch.float16)
    results = on_ranks(4, jobs.in_crossed_groups, rows, columns)
    for a, b in ((0, 1), (2, 3)):
        jobs.check(rows, 2, [results[a][0], results[b][0]])
    for a, b in ((0, 2), (1, 3)):
        jobs.check(columns, 2, [results[a][1], results[b][1]])


def test_stages_of_a_pipeline_reduce_on_their_own(on_ranks):
    case = Case("all_reduce", (5,))
    results = on_ranks(4, jobs.pipeline, case)
    (first,) = jobs.expected(case, 2)[0]
    assert results[:2] == [None, None]
    for (y,) in results[2:]:
        assert same_bits(y, first + first)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("op", OPS)
def test_several_communicators_of_one_group_are_independent(on_ranks, op, world):
    case = Case(op, (5,))
    results = on_ranks(world, jobs.several_communicators, case)
    for which in range(4):
        jobs.check(case, world, [mine[which][1] for mine in results])
        assert [mine[which][2] for mine in results] == [2] * world


def test_communicators_of_one_group_have_different_names_that_all_ranks_share(on_ranks):
    results = on_ranks(2, jobs.several_communicators, Case("all_reduce"))
    names = [[name for name, *_ in mine] for mine in results]
    assert names[0] == names[1]
    assert len(set(names[0])) == 4
    assert all(a != b for a, b in pairwise(names[0]))
