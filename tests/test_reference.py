"""The numerical contract: `reference.py` against float64, and the facts about it that the backends rely on."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
import torch
from ulps import assert_within, error, same_bits, worst

from tpfuse import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (1, 7, 256, 257, 1536, 3072)  # of one rank

# One rounding for 16 bits; in fp32 the roundings of the sum, its mean, the root, the division and two products remain.
ULPS = {torch.bfloat16: 0.51, torch.float16: 0.51, torch.float32: 4.0}


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def ranks_of(world, *shape, dtype=torch.float32, seed=0):
    """One tensor a rank, each of another scale."""
    return [randn(*shape, dtype=dtype, seed=seed + r, scale=0.1 * 10**r) for r in range(world)]


def norm64(xs, weights, eps, weight_bias):
    """Sharded RMSNorm from its formula, in float64."""
    mean = torch.cat([x.double() for x in xs], dim=-1).square().mean(-1, keepdim=True)
    return [x.double() / (mean + eps).sqrt() * (w.double() + weight_bias) for x, w in zip(xs, weights, strict=True)]


# Against float64


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_the_formula(dtype, width, world):
    xs = ranks_of(world, 5, width, dtype=dtype)
    weights = ranks_of(world, width, dtype=dtype, seed=50)
    results = reference.rms_norm(xs, weights, eps=1e-3, weight_bias=1.0)
    for y, exact in zip(results, norm64(xs, weights, 1e-3, 1.0), strict=True):
        assert y.dtype == dtype
        assert error(y, exact) <= ULPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_rms_norm_is_two_norms_each_over_its_own_width_with_its_own_eps(dtype):
    qs, ks = ranks_of(3, 4, 96, dtype=dtype), ranks_of(3, 4, 16, dtype=dtype, seed=9)
    q_weights, k_weights = ranks_of(3, 96, seed=20), ranks_of(3, 16, seed=30)
    results = reference.qk_rms_norm(qs, ks, q_weights, k_weights, eps=(1e-6, 30.0))
    for (q, k), exact_q, exact_k in zip(
        results, norm64(qs, q_weights, 1e-6, 0.0), norm64(ks, k_weights, 30.0, 0.0), strict=True
    ):
        assert error(q, exact_q) <= ULPS[dtype]
        assert error(k, exact_k) <= ULPS[dtype]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_is_the_sum_rounded_once(dtype, world):
    xs = [x.abs() for x in ranks_of(min(world, 5), 64, 33, dtype=dtype)] * 2
    xs = xs[:world]
    exact = sum(x.double() for x in xs)
    # fp32 rounds W - 1 times; a 16-bit result shows that only where the sum is next to a tie
    assert error(reference.all_reduce(xs), exact) <= (0.5 * (world - 1) if dtype == torch.float32 else 0.51)


def test_all_reduce_adds_in_rank_order():
    xs = [torch.tensor([v]) for v in (1e8, 1.0, -1e8, 1.0)]
    assert reference.all_reduce(xs).item() == ((np.float32(1e8) + np.float32(1)) - np.float32(1e8)) + np.float32(1)
    assert reference.all_reduce([xs[0], xs[2], xs[1], xs[3]]).item() == 2.0


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_rms_norm_is_the_formula_on_the_rounded_sum(dtype, residual_dtype):
    xs, weight = ranks_of(3, 6, 200, dtype=dtype), randn(200, seed=7)
    residual = randn(6, 200, dtype=residual_dtype, seed=8)
    y = reference.all_reduce_rms_norm(xs, weight, residual=residual, eps=1e-5, weight_bias=1.0)
    r = reference.all_reduce(xs).double() + residual.double()
    (exact,) = norm64([r], [weight], 1e-5, 1.0)
    assert y.norm.dtype == dtype
    assert y.residual.dtype == residual_dtype
    assert error(y.norm, exact) <= ULPS[dtype]
    assert error(y.residual, r) <= 0.51
    assert y.quant is None
    assert y.scale is None


def test_all_reduce_rms_norm_without_residual_returns_none_for_it():
    y = reference.all_reduce_rms_norm(ranks_of(2, 3, 8), torch.ones(8))
    assert y.residual is None
    (exact,) = norm64([reference.all_reduce(ranks_of(2, 3, 8))], [torch.ones(8)], 1e-6, 0.0)
    assert error(y.norm, exact) <= ULPS[torch.float32]


# The tree of sums


def test_fold_adds_the_upper_half_to_the_lower_half():
    a, b, c, d = 1e8, 1.0, -1e8, 1.0
    assert reference.fold(torch.tensor([a, b, c, d])).item() == (a + c) + (b + d) == 2.0
    assert reference.fold(torch.tensor([a, c, b, d])).item() == 0.0  # 1e8 + 1 is 1e8 in fp32


@pytest.mark.parametrize("width", [1, 8, 9, 255, 256, 257, 700, 1536, 2048])
def test_sum_of_squares_is_eight_elements_then_32_lanes_then_groups(width):
    def tree(values):
        while len(values) > 1:
            half = len(values) // 2
            values = [values[i] + values[i + half] for i in range(half)]
        return values[0]

    x = randn(width, seed=width)
    groups = 1
    while groups * 256 < width:
        groups *= 2
    square = [np.float32(v) * np.float32(v) for v in x.tolist()] + [np.float32(0)] * (groups * 256 - width)
    lanes = [tree(square[i : i + 8]) for i in range(0, len(square), 8)]
    total = tree([tree(lanes[i : i + 32]) for i in range(0, len(lanes), 32)])
    assert reference.sum_of_squares(x).item() == total


@pytest.mark.parametrize("width", [3, 256, 1000, 6144])
def test_sum_of_squares_of_a_row_does_not_depend_on_the_rows_beside_it(width):
    x = randn(33, width)
    alone = torch.stack([reference.sum_of_squares(row) for row in x])
    assert same_bits(reference.sum_of_squares(x), alone)
    assert same_bits(reference.sum_of_squares(x[5:12]), alone[5:12])
    assert same_bits(reference.sum_of_squares(x.view(3, 11, width)), alone.view(3, 11))


@pytest.mark.parametrize("zeros", [1, 5, 250, 256, 2000])
def test_zeros_behind_a_row_do_not_change_its_sum_of_squares(zeros):
    x = randn(4, 700)
    assert same_bits(reference.sum_of_squares(torch.nn.functional.pad(x, (0, zeros))), reference.sum_of_squares(x))


def test_sum_of_squares_does_not_depend_on_strides():
    wide = randn(4, 1000)
    part = wide[:, 3:703]
    assert same_bits(reference.sum_of_squares(part), reference.sum_of_squares(part.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_of_16_bit_values_are_taken_in_fp32(dtype):
    x = torch.full((1, 1000), 100.0, dtype=dtype)  # 1e7 in all: beyond fp16, and beyond the precision of bf16
    assert reference.sum_of_squares(x).item() == 1e7


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(dtype):
    xs, residual = ranks_of(3, 33, 300, dtype=dtype), randn(33, 300)
    weights = ranks_of(3, 300, seed=40)
    norms = reference.rms_norm(xs, weights)
    sums = reference.all_reduce_rms_norm(xs, weights[0], residual=residual)
    for t in (0, 7, 32):
        row = [x[t : t + 1] for x in xs]
        for y, whole in zip(reference.rms_norm(row, weights), norms, strict=True):
            assert same_bits(y, whole[t : t + 1])
        one = reference.all_reduce_rms_norm(row, weights[0], residual=residual[t : t + 1])
        assert same_bits(one.norm, sums.norm[t : t + 1])
        assert same_bits(one.residual, sums.residual[t : t + 1])


# Where is rounded, and what is added where


@pytest.mark.parametrize("exponent", [0, 1])
def test_square_root_and_division_are_ieee_fp32_for_every_mantissa(exponent):
    x = torch.ldexp(torch.arange(2**23, 2**24).float(), torch.tensor(exponent - 23))
    assert torch.equal(reference.inverse_rms(x, 1, 0.0), torch.from_numpy(np.float32(1) / np.sqrt(x.numpy())))


def test_the_mean_is_a_product_with_the_fp32_reciprocal_of_the_width():
    total = randn(1000).abs()
    mean = total.numpy() * (np.float32(1) / np.float32(6144))
    inverse = np.float32(1) / np.sqrt(mean + np.float32(1e-6))
    assert torch.equal(reference.inverse_rms(total, 6144, 1e-6), torch.from_numpy(inverse))


def test_eps_is_added_to_the_mean_not_to_the_sum():
    xs = [torch.full((1, 64), 1e-3)] * 4  # rms 1e-3, so that mean and eps are equal
    for y in reference.rms_norm(xs, [torch.ones(64)] * 4, eps=1e-6):
        assert_within(y, torch.full((1, 64), 0.5**0.5), ulps=2)


def test_the_residual_keeps_its_own_dtype():
    x = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    residual = torch.full((1, 4), 2.0**-20)
    y = reference.all_reduce_rms_norm([x], torch.ones(4), residual=residual)
    assert y.residual.dtype == torch.float32
    assert y.residual[0, 0].item() == 1.0 + 2.0**-20  # a bf16 stream would have lost it
    assert y.norm.dtype == torch.bfloat16


def test_the_norm_is_taken_of_the_residual_before_it_is_rounded():
    x = torch.tensor([[256.0, 256.0]])
    residual = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    y = reference.all_reduce_rms_norm([x], torch.ones(2), residual=residual, eps=0.0)
    assert y.residual.tolist() == [[256.0, 256.0]]  # 257 is not a bf16
    assert y.norm[0, 0] / y.norm[0, 1] == pytest.approx(257 / 256, rel=1e-6)


def test_the_sum_is_rounded_before_the_residual_is_added():
    xs = [torch.tensor([[256.0]], dtype=torch.bfloat16), torch.tensor([[1.0]], dtype=torch.bfloat16)]
    y = reference.all_reduce_rms_norm(xs, torch.ones(1), residual=torch.tensor([[0.0]]))
    assert y.residual.item() == 256.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weight_bias_is_added_in_fp32(dtype):
    gamma = torch.full((8,), 2.0**-9, dtype=torch.bfloat16)
    assert (gamma + 1).float()[0].item() == 1.0  # bf16 can't hold the sum
    ones = torch.ones(1, 8, dtype=dtype)
    (norm,) = reference.rms_norm([ones], [gamma], eps=0.0, weight_bias=1.0)
    fused = reference.all_reduce_rms_norm([ones], gamma, eps=0.0, weight_bias=1.0)
    exact = torch.full((1, 8), 1 + 2.0**-9).to(dtype)
    assert same_bits(norm, exact)
    assert same_bits(fused.norm, exact)


def test_gamma_is_widened_not_rounded_to_the_dtype_of_the_row():
    gamma = torch.tensor([1 + 2.0**-9, 1.0])  # fp32, not a bf16
    x = torch.tensor([[1.5, 1.5]], dtype=torch.bfloat16)
    (y,) = reference.rms_norm([x], [gamma * 257], eps=0.0)
    assert y[0, 0].item() == torch.tensor(257 * (1 + 2.0**-9)).bfloat16().item() != torch.tensor(257.0).bfloat16()


# Ordinary inputs


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_give_zeros(dtype):
    x = torch.zeros(2, 16, dtype=dtype)
    x[1] = -0.0
    (y,) = reference.rms_norm([x], [torch.ones(16)], eps=1e-6)
    assert worst(y, torch.zeros_like(y)) == 0
    fused = reference.all_reduce_rms_norm([x, x], torch.ones(16), residual=x)
    assert worst(fused.norm, torch.zeros_like(y)) == 0
    assert worst(fused.residual, torch.zeros_like(y)) == 0


def test_negative_zeros_sum_to_a_zero_of_either_sign():
    minus = torch.full((4,), -0.0, dtype=torch.bfloat16)
    assert worst(reference.all_reduce([minus, minus]), torch.zeros_like(minus)) == 0
    assert reference.all_reduce([minus, torch.ones_like(minus)]).tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_numbers(dtype):
    tiny = torch.finfo(dtype).smallest_normal / 4
    x = torch.full((1, 16), tiny, dtype=dtype)
    assert x[0, 0] > 0
    assert reference.all_reduce([x, x, x])[0, 0].double().item() == 3 * tiny
    eps = 1e-6
    (y,) = reference.rms_norm([x], [torch.ones(16)], eps=eps)
    (exact,) = norm64([x], [torch.ones(16)], eps, 0.0)
    assert error(y, exact) <= ULPS[dtype]
    assert (y > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_fills_its_row_and_no_other(dtype):
    x = randn(3, 16, dtype=dtype)
    x[1, 4] = nan
    y, other = reference.rms_norm([x, randn(3, 16, dtype=dtype, seed=1)], [torch.ones(16)] * 2)
    for part in (y, other):  # the sum is of all ranks
        assert part[1].isnan().all()
        assert part[[0, 2]].isfinite().all()
    total = reference.all_reduce([x, x])
    assert total.isnan().nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinity_becomes_nan_and_the_rest_of_its_row_zero(dtype):
    x = randn(2, 16, dtype=dtype)
    x[0, 4] = -inf
    (y,) = reference.rms_norm([x], [torch.ones(16)])
    assert y[0].isnan().nonzero().tolist() == [[4]]
    assert (y[0, :4] == 0).all()
    assert y[1].isfinite().all()
    assert reference.all_reduce([x, x])[0, 4].item() == -inf
    assert reference.all_reduce([x, -x])[0, 4].isnan()


def test_a_sum_beyond_the_largest_fp16_is_infinite():
    x = torch.tensor([65504.0, -65504.0, 1.0], dtype=torch.float16)
    assert reference.all_reduce([x, x]).tolist() == [inf, -inf, 2.0]


def test_the_largest_fp16_values_are_normed():
    x = torch.full((1, 64), 65504.0, dtype=torch.float16)
    (y,) = reference.rms_norm([x], [torch.ones(64)])
    assert y.tolist() == [[1.0] * 64]


def test_squares_beyond_fp32_give_zeros_as_every_fp32_norm_does():
    x = torch.full((1, 8), 1e30, dtype=torch.bfloat16)
    (y,) = reference.rms_norm([x], [torch.ones(8)])
    assert y.tolist() == [[0.0] * 8]
