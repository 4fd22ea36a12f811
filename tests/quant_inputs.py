"""What encoders are given by the tests of kernels/quant.h, in the emulated GPU and on real ones."""

from __future__ import annotations

from math import inf, nan

import torch
from torch import Tensor

from tpfuse import quant


def numbers() -> Tensor:
    """fp32: all bf16, all fp16, and around each number halfway between two of E4M3 or of E2M1."""
    every = torch.arange(-32768, 32768).to(torch.int16)
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    e2m1 = torch.tensor(quant.E2M1)
    ties = torch.cat([(e4m3[1:] + e4m3[:-1]) / 2, e4m3, (e2m1[1:] + e2m1[:-1]) / 2, e2m1])
    near = torch.cat([ties, ties.nextafter(torch.tensor(inf)), ties.nextafter(torch.tensor(-inf))])
    scattered = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 50_000)
    return torch.cat([every.view(torch.bfloat16).float(), every.view(torch.float16).float(), near, -near, scattered])


def rows_of(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, and of all numbers that are awkward."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(count, width, generator=generator) * 10.0 ** torch.randint(-6, 4, (count, 1), generator=generator)
    x[:, ::7] *= 100
    x = x.to(dtype)
    x[1::11] = 0
    x[2::11] = -0.0
    x[3::11, ::3] = torch.finfo(dtype).smallest_normal / 4
    x[4::11, 1] = nan
    x[5::11, 2] = -inf
    x[6::11, 3] = torch.finfo(dtype).max
    x[7::11] = 448 * 2.0 ** torch.randint(-9, 8, (width,), generator=generator).to(dtype)  # the edges of MXFP8
    x[8::11, :16] *= 2.0**-20
    return x.float()


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the payload of an fp32 NaN."""
    if a.dtype == torch.float32:
        return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) and torch.equal(a.isnan(), b.isnan())
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
