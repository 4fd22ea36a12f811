"""How often the ranks talk, counted below torch.distributed's functions. RMSNorm is scale invariant, so a partial sum
that is reduced twice gives the right norm: only a count sees it."""

from __future__ import annotations

from dataclasses import replace

import jobs
import pytest
import torch
from jobs import DTYPES, OPS, Case

peers = pytest.mark.parametrize("world", [2, 3, 4])
restructured = pytest.mark.parametrize("mode", ["control", "fused"])
MODES = ("off", "control", "fused")


@peers
@restructured
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_rms_norm_exchanges_two_fp32_numbers_a_row_once(on_ranks, dtype, mode, world):
    for seen in on_ranks(world, jobs.exchanges, Case("qk_rms_norm", (7,), dtype=dtype), mode):
        assert seen["data"] == [("allreduce", (7, 2), torch.float32)]


@peers
@restructured
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_exchanges_one_fp32_number_a_row_once(on_ranks, dtype, mode, world):
    for seen in on_ranks(world, jobs.exchanges, Case("rms_norm", (7,), dtype=dtype), mode):
        assert seen["data"] == [("allreduce", (7,), torch.float32)]


@peers
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["all_reduce", "all_reduce_rms_norm"])
def test_an_all_reduce_is_one_exchange_in_fp32_or_between_two_ranks_in_the_dtype(on_ranks, op, dtype, mode, world):
    case = Case(op, (2, 3), width=48, dtype=dtype, residual=torch.float32)
    for seen in on_ranks(world, jobs.exchanges, case, mode):
        assert seen["data"] == [("allreduce", (6, 48), dtype if world == 2 else torch.float32)]


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["all_reduce", "all_reduce_rms_norm"])
def test_a_large_sum_is_two_exchanges_in_its_dtype(on_ranks, op, dtype, world):
    case = Case(op, (700,), width=1501, dtype=dtype, residual=torch.float32)
    part = -(-700 * 1501 // world)
    for seen in on_ranks(world, jobs.exchanges, case, "control"):
        assert [(shape, dtype) for _, shape, dtype in seen["data"]] == [((part * world,), dtype), ((part,), dtype)]
        assert ["alltoall" in seen["data"][0][0], "allgather" in seen["data"][1][0]] == [True, True]


@peers
@pytest.mark.parametrize(("rows", "dtype"), [(699, torch.bfloat16), (700, torch.float32)], ids=str)
def test_what_is_smaller_or_fp32_is_one(on_ranks, rows, dtype, world):
    case = Case("all_reduce", (rows,), width=1500, dtype=dtype)
    for seen in on_ranks(world, jobs.exchanges, case, "control"):
        assert [name for name, *_ in seen["data"]] == ["allreduce"]


@peers
def test_mode_off_gathers_the_rows_of_q_and_of_k(on_ranks, world):
    for seen in on_ranks(world, jobs.exchanges, Case("qk_rms_norm", (7,), width=48, width2=16), "off"):
        assert [(shape, dtype) for _, shape, dtype in seen["data"]] == [
            ((7, 48), torch.bfloat16),
            ((7, 16), torch.bfloat16),
        ]
        assert all("allgather" in name for name, *_ in seen["data"])


@peers
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_no_rows_are_not_exchanged(on_ranks, op, mode, world):
    for seen in on_ranks(world, jobs.exchanges, Case(op, (0,)), mode):
        assert seen == {"data": [], "signatures": 1}


@peers
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_every_call_is_announced_once(on_ranks, op, mode, world):
    for seen in on_ranks(world, jobs.exchanges, Case(op), mode):
        assert seen["signatures"] == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_one_rank_exchanges_nothing(on_ranks, op, mode):
    assert on_ranks(1, jobs.exchanges, Case(op), mode) == [{"data": [], "signatures": 0}]


@peers
def test_a_double_reduction_is_seen_although_the_norm_is_right(on_ranks, world):
    case = Case("all_reduce_rms_norm", (2 * world,), dtype=torch.float32, eps=0.0)
    results = on_ranks(world, jobs.exchanges_of_double_reduction, case)
    jobs.check(case, world, [(norm,) for _, norm in results])  # nothing to see here
    for seen, _ in results:
        assert len(seen["data"]) == 2


@pytest.mark.parametrize("mode", MODES)
def test_strides_and_places_do_not_change_the_exchange(on_ranks, mode):
    plain = Case("qk_rms_norm", (2, 3))
    first = on_ranks(2, jobs.exchanges, plain, mode)
    for other in (replace(plain, strided=True), replace(plain, out="in place")):
        assert on_ranks(2, jobs.exchanges, other, mode) == first
