"""Distances between floating-point tensors in units in the last place (ulps): the unit of the numerical contract."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
APART = 1 << 40  # the distance of a NaN from a number


def ordinal(x: Tensor) -> Tensor:
    """Neighbouring floats have neighbouring ordinals; both zeros have ordinal 0."""
    bits = x.contiguous().view(_BITS[x.dtype]).long()
    largest = torch.iinfo(_BITS[x.dtype]).max
    return torch.where(bits < 0, -(bits & largest), bits)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers a is from b, elementwise. NaN is at 0 from NaN and APART from everything else."""
    assert a.dtype == b.dtype, f"{a.dtype} beside {b.dtype}"
    assert a.shape == b.shape, f"{list(a.shape)} beside {list(b.shape)}"
    steps = (ordinal(a) - ordinal(b)).abs()
    return torch.where(a.isnan() | b.isnan(), torch.where(a.isnan() & b.isnan(), 0, APART), steps)


def worst(a: Tensor, b: Tensor) -> int:
    return int(distance(a, b).max()) if a.numel() else 0


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal. The sign of a zero counts, the payload of a NaN does not."""
    return worst(a, b) == 0 and bool(((a.signbit() == b.signbit()) | a.isnan()).all())


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64: the gap between neighbouring numbers of `dtype` at |x|, subnormals included."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1)


def error(a: Tensor, exact: Tensor) -> float:
    """The largest error of a, in ulps of its own dtype, against float64 values of which none is infinite or NaN."""
    assert exact.dtype == torch.float64
    return float(((a.double() - exact).abs() / spacing(exact, a.dtype)).max()) if a.numel() else 0.0


def assert_within(actual: Tensor, expected: Tensor, ulps: float, slack: Tensor | float = 0.0, what: str = "") -> None:
    """|actual - expected| <= ulps + slack, with slack an absolute float64; infinities and NaN must be the same."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = (actual.double() - expected.double()).abs()
    wrong = ~same & ~(gap <= ulps * spacing(expected, expected.dtype) + slack)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; at {list(where)}: "
            f"{float(actual[where])!r}, expected {float(expected[where])!r}, "
            f"{int(distance(actual, expected)[where])} ulps away"
        )
