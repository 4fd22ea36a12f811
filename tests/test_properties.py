"""Shapes, strides and dtypes that nobody thought of: any call on two ranks is within the contract."""

from __future__ import annotations

import jobs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import DTYPES, OPS, Case

dtypes = st.sampled_from(DTYPES)
eps = st.sampled_from([1e-6, 1e-5, 1.0, 1e3])


@st.composite
def cases(draw):
    op = draw(st.sampled_from(OPS))
    rows = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    permuted = len(rows) > 1 and draw(st.booleans())
    outs = ["new"] if op == "all_reduce_rms_norm" else ["new", "given"] if permuted else ["new", "given", "in place"]
    return Case(
        op=op,
        rows=rows,
        width=draw(st.integers(1, 300)),
        width2=draw(st.integers(1, 40)),
        dtype=draw(dtypes),
        gamma=draw(dtypes),
        residual=draw(st.none() | dtypes),
        eps=(draw(eps), draw(eps)) if op == "qk_rms_norm" else draw(eps),
        weight_bias=draw(st.sampled_from([0.0, 1.0])),
        strided=draw(st.booleans()),
        permuted=permuted,
        out=draw(st.sampled_from(outs)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases(), mode=st.sampled_from(["off", "control", "fused"]))
def test_any_call_on_two_ranks_is_within_the_contract(on_ranks, case, mode):
    results = on_ranks(2, jobs.run_cases, [case], mode)
    jobs.check(case, 2, [outputs for (outputs,) in results])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(sequence=st.lists(cases(), min_size=2, max_size=6))
def test_any_sequence_of_calls_on_two_ranks_is_within_the_contract(on_ranks, sequence):
    """Ops, sizes and dtypes mixed on one communicator."""
    results = on_ranks(2, jobs.run_cases, sequence, "fused")
    for case, outputs in zip(sequence, zip(*results, strict=True), strict=True):
        jobs.check(case, 2, outputs)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(width=st.integers(1, 5000), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_sum_of_squares_is_the_sum_of_squares(width, rows, seed):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    exact = x.double().square().sum(-1)
    depth = 1 + max(width, 256).bit_length()  # one rounding for the square, one for each level of the tree
    assert ((jobs.reference.sum_of_squares(x).double() - exact).abs() <= depth * jobs.U * exact).all()
