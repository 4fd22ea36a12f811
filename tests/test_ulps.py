"""The ruler itself: distances that every other test relies on."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from ulps import APART, assert_within, distance, error, same_bits, spacing, worst

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1.5, -3e-39, 6e-5])
def test_the_next_number_is_one_ulp_away(dtype, value):
    x = torch.tensor([value]).to(dtype)
    assert worst(x, torch.nextafter(x, torch.tensor([inf], dtype=dtype))) == 1


def test_zeros_of_both_signs_are_at_distance_0_and_have_different_bits():
    plus, minus = torch.tensor([0.0]), torch.tensor([-0.0])
    assert worst(plus, minus) == 0
    assert not same_bits(plus, minus)


def test_the_smallest_subnormals_of_both_signs_are_two_ulps_apart():
    assert worst(torch.tensor([1e-45]), torch.tensor([-1e-45])) == 2


def test_nan_is_near_nan_only():
    x = torch.tensor([nan, 1.0, nan])
    y = torch.tensor([nan, nan, 1.0])
    assert distance(x, y).tolist() == [0, APART, APART]
    assert same_bits(x, x.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, 1.99, 2.0, 3e4, 6e-8, 0.0])
def test_spacing_is_the_gap_to_the_next_number(dtype, value):
    x = torch.tensor([value]).to(dtype)
    gap = torch.nextafter(x, torch.tensor([inf], dtype=dtype)).double() - x.double()
    assert spacing(x, dtype).item() == gap.item()


def test_half_an_ulp_is_the_error_of_rounding():
    exact = torch.linspace(0.1, 9, 1000, dtype=torch.float64)
    assert 0.4 < error(exact.to(torch.bfloat16), exact) <= 0.5


def test_assert_within_names_the_element_that_is_off():
    wanted = torch.ones(2, 3, dtype=torch.bfloat16)
    got = wanted.clone()
    got[1, 2] += 2 * 2**-7
    assert_within(got, wanted, ulps=2)
    with pytest.raises(AssertionError, match=r"1 of 6 elements are off; at \[1, 2\].*2 ulps away"):
        assert_within(got, wanted, ulps=1)


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_assert_within_wants_infinities_and_nan_to_be_the_same(value):
    wanted = torch.tensor([value])
    assert_within(wanted.clone(), wanted, ulps=1)
    with pytest.raises(AssertionError):
        assert_within(torch.tensor([1.0]), wanted, ulps=1)
    with pytest.raises(AssertionError):
        assert_within(wanted, torch.tensor([1.0]), ulps=1)
