"""The `collective` backend on real Gloo groups, against the contract.

Its promise (`jobs.slack`): 1 ulp, beside what another order of fp32 additions may move; bitwise for one and two ranks'
sums; and whatever the result is, the same bits on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import jobs
import pytest
import torch
from jobs import DTYPES, OPS, Case
from ulps import same_bits, worst

WORLDS = (1, 2, 3, 4)
MODES = ("off", "control", "fused")
ROWS = (33, 0, 1, 5, 3)  # in this order: a call of another size must not see anything of the one before

worlds = pytest.mark.parametrize("world", WORLDS)
peers = pytest.mark.parametrize("world", WORLDS[1:])
modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ops = pytest.mark.parametrize("op", OPS)


def run(on_ranks, world, cases, mode="fused"):
    """The results as [case][rank]."""
    return list(zip(*on_ranks(world, jobs.run_cases, cases, mode), strict=True))


def run_and_check(on_ranks, world, cases, mode="fused"):
    results = run(on_ranks, world, cases, mode)
    for case, result in zip(cases, results, strict=True):
        jobs.check(case, world, result)
    return results


@worlds
@modes
@dtypes
@ops
def test_every_number_of_rows_is_within_the_contract(on_ranks, op, dtype, mode, world):
    run_and_check(on_ranks, world, [Case(op, (rows,), dtype=dtype, seed=rows) for rows in ROWS], mode)


@worlds
@modes
@pytest.mark.parametrize("residual", DTYPES, ids=str)
@dtypes
def test_the_residual_has_a_dtype_of_its_own(on_ranks, dtype, residual, mode, world):
    case = Case("all_reduce_rms_norm", (5,), dtype=dtype, residual=residual, seed=3)
    ((results),) = run_and_check(on_ranks, world, [case], mode)
    assert [y.dtype for y in results[0]] == [dtype, residual]


@worlds
@modes
@pytest.mark.parametrize("gamma", DTYPES, ids=str)
@dtypes
def test_gamma_has_a_dtype_of_its_own(on_ranks, dtype, gamma, mode, world):
    run_and_check(on_ranks, world, [Case(op, dtype=dtype, gamma=gamma) for op in OPS], mode)


@worlds
@modes
@ops
def test_leading_dimensions_are_rows(on_ranks, op, mode, world):
    cases = [Case(op, rows) for rows in ((), (1, 1), (2, 3), (2, 1, 4), (3, 0))]
    for case, results in zip(cases, run_and_check(on_ranks, world, cases, mode), strict=True):
        assert results[0][0].shape == (*case.rows, case.width)


@worlds
@modes
@ops
def test_rows_may_be_strided_views(on_ranks, op, mode, world):
    cases = [Case(op, rows, strided=True, residual=torch.float32) for rows in ((5,), (2, 3))]
    run_and_check(on_ranks, world, cases, mode)


@worlds
@modes
@ops
def test_leading_dimensions_may_be_permuted(on_ranks, op, mode, world):
    run_and_check(on_ranks, world, [Case(op, (2, 3), permuted=True)], mode)


@worlds
@modes
@pytest.mark.parametrize("width", [1, 2, 7, 257, 3072])
@ops
def test_every_width_works(on_ranks, op, width, mode, world):
    cases = [Case(op, (3,), width=width, width2=max(1, width // 6), dtype=dtype) for dtype in DTYPES]
    run_and_check(on_ranks, world, cases, mode)


@worlds
@modes
def test_q_and_k_have_an_eps_each(on_ranks, mode, world):
    case = Case("qk_rms_norm", eps=(1e-6, 30.0))
    run_and_check(on_ranks, world, [case, replace(case, eps=(30.0, 1e-6))], mode)


@worlds
@modes
@pytest.mark.parametrize("op", ["rms_norm", "qk_rms_norm", "all_reduce_rms_norm"])
def test_weight_bias_is_added_in_fp32(on_ranks, op, mode, world):
    run_and_check(on_ranks, world, [Case(op, weight_bias=1.0, dtype=dtype, width=512) for dtype in DTYPES], mode)


@worlds
@modes
@pytest.mark.parametrize("op", ["rms_norm", "qk_rms_norm", "all_reduce_rms_norm"])
def test_eps_is_added_to_the_mean(on_ranks, op, mode, world):
    run_and_check(on_ranks, world, [Case(op, eps=100.0, dtype=dtype) for dtype in DTYPES], mode)


# Nothing is left out, and all ranks agree


@peers
@modes
@dtypes
@ops
def test_a_rank_that_is_left_out_would_be_seen(on_ranks, op, dtype, mode, world):
    case = Case(op, (2 * world,), dtype=dtype)
    (results,) = run_and_check(on_ranks, world, [case], mode)
    for rank in range(world):
        with pytest.raises(AssertionError, match="elements are off"):
            jobs.check(case, world, results, without=rank)


@peers
@modes
@dtypes
@pytest.mark.parametrize("op", ["all_reduce", "all_reduce_rms_norm"])
def test_a_reduced_tensor_has_the_same_bits_on_every_rank(on_ranks, op, dtype, mode, world):
    cases = [Case(op, (rows,), width=300, dtype=dtype, residual=torch.float32) for rows in (1, 33)]
    for results in run(on_ranks, world, cases, mode):
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@peers
@modes
@dtypes
@pytest.mark.parametrize("op", ["rms_norm", "qk_rms_norm"])
def test_ranks_with_the_same_shard_get_the_same_bits(on_ranks, op, dtype, mode, world):
    (results,) = run(on_ranks, world, [Case(op, (33,), dtype=dtype, alike=True)], mode)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("world", [1, 2])
@modes
@dtypes
def test_the_sum_of_one_or_two_ranks_is_the_contract_bit_for_bit(on_ranks, dtype, mode, world):
    cases = [Case("all_reduce", (33,), width=300, dtype=dtype, seed=seed) for seed in range(3)]
    for case, results in zip(cases, run(on_ranks, world, cases, mode), strict=True):
        assert worst(results[0][0], jobs.expected(case, world)[0][0]) == 0


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_sum_is_the_contract_bit_for_bit(on_ranks, dtype, world):
    plain = Case("all_reduce", (700,), width=1501, dtype=dtype)  # over 2 MiB; not a multiple of 3 elements
    cases = [plain, replace(plain, strided=True), replace(plain, rows=(2, 350), permuted=True)]
    cases += [replace(plain, out="in place"), replace(plain, width=1536)]
    for case, results in zip(cases, run(on_ranks, world, cases), strict=True):
        for (y,) in results:
            assert y.shape == (*case.rows, case.width)
            assert worst(y, jobs.expected(case, world)[0][0]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_sums_take_every_16_bit_number(on_ranks, dtype):
    for total, exact in on_ranks(3, jobs.add_all_patterns, dtype, 17):
        assert worst(total, exact) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_ranks_add_every_16_bit_number_exactly(on_ranks, dtype):
    """Subnormals, ties, overflow, infinities and NaN: against every rank's part of all 65536 patterns, shuffled."""
    totals, exact = zip(*on_ranks(2, jobs.add_all_patterns, dtype), strict=True)
    assert worst(totals[0], exact[0]) == 0
    assert same_bits(totals[0], totals[1])


@worlds
@modes
def test_the_same_call_gives_the_same_bits_again(on_ranks, mode, world):
    for op in OPS:
        case = Case(op, (33,), width=300)
        first, second = run(on_ranks, world, [case, case], mode)
        for a, b in zip(first, second, strict=True):
            assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


# Memory


@worlds
@modes
@pytest.mark.parametrize("strided", [False, True])
@ops
def test_results_are_new_contiguous_tensors_and_nothing_else_changes(on_ranks, op, strided, mode, world):
    case = Case(op, (2, 3), strided=strided, residual=torch.float32)
    seen = on_ranks(world, jobs.run_looking_at_memory, case, mode)
    for one in seen:
        assert one["contiguous"]
        assert not set(one["places"]) & set(one["inputs"])
        assert one["changed"] == []
    jobs.check(case, world, [one["outputs"] for one in seen])


@worlds
@modes
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("out", ["given", "in place"])
@pytest.mark.parametrize("op", ["rms_norm", "qk_rms_norm", "all_reduce"])
def test_results_go_where_they_are_wanted_and_nothing_beside_them_changes(on_ranks, op, out, strided, mode, world):
    case = Case(op, (2, 3), strided=strided, out=out)
    seen = on_ranks(world, jobs.run_looking_at_memory, case, mode)
    for one in seen:
        assert one["places"] == one["outs"]
        assert one["changed"] == []
    jobs.check(case, world, [one["outputs"] for one in seen])


@worlds
@modes
@pytest.mark.parametrize("op", ["rms_norm", "qk_rms_norm", "all_reduce"])
@pytest.mark.parametrize("rows", [(0,), (2, 0, 3)], ids=str)
def test_no_rows_have_an_out_too(on_ranks, rows, op, mode, world):
    for one in on_ranks(world, jobs.run_looking_at_memory, Case(op, rows, out="given"), mode):
        assert one["places"] == one["outs"]


# Ordinary inputs


@peers
@modes
@pytest.mark.parametrize("op", ["rms_norm", "qk_rms_norm"])
@pytest.mark.parametrize("bad", [nan, inf])
def test_a_rank_that_brings_nan_or_infinity_spoils_that_row_on_every_rank(on_ranks, bad, op, mode, world):
    case = Case(op, (3,))
    results = on_ranks(world, jobs.run_spoiled, case, mode, bad)
    for rank, (y, *_) in enumerate(results):
        assert y[[0, 2]].isfinite().all()
        if bad is inf and rank != world - 1:
            assert (y[1] == 0).all()
        else:
            assert y[1].isnan().any()


@worlds
@modes
@dtypes
@ops
def test_zero_rows_give_zeros(on_ranks, op, dtype, mode, world):
    for outputs in on_ranks(world, jobs.run_zeros, Case(op, (3,), dtype=dtype, residual=dtype), mode):
        assert all((y == 0).all() for y in outputs)
