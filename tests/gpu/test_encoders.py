"""kernels/quant.h on a real GPU computes the bits of tpfuse.quant: the hardware's conversion to E4M3, division and
shuffles included. The emulated GPU has the same tests, without the first of these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quant_inputs import numbers, rows_of, same
from torch import Tensor

from tpfuse.backends.cuda.compile import arch_of, compile_kernel, load
from tpfuse.backends.cuda.launch import Launcher
from tpfuse.quant import FORMATS, Format

KERNEL = Path(__file__).parents[1] / "simt" / "quant_rows.h"
LAYOUT = "4Q3I"  # QuantRows
formats = pytest.mark.parametrize("name", FORMATS)


def encoded(fmt: Format, x: Tensor) -> tuple[Tensor, Tensor]:
    """quant and scale of fp32 rows on the GPU, as the kernel writes them."""
    rows, width = x.shape
    name = f"tpfuse::quantise_rows<tpfuse::quant::Kind::{fmt.kind}, tpfuse::quant::Layout::{fmt.layout}>"
    source = KERNEL.read_text(encoding="utf-8").replace("#pragma once", "")
    function = load(compile_kernel(source, name, arch=arch_of(x.device.index)), x.device.index)
    quant, scale = fmt.empty(x)
    if fmt.kind != "fp8_static":
        scale.untyped_storage().fill_(0xFF)
    given = 0 if fmt.given is None else fmt.given.data_ptr()
    start = Launcher(function, LAYOUT, block=-(-width // 256) * 32)
    pointers = (x.data_ptr(), given, quant.data_ptr(), scale.data_ptr())
    start(rows, torch.cuda.current_stream().cuda_stream, *pointers, rows, width, fmt.pitch(rows, width))
    torch.cuda.synchronize()
    return quant, scale


def made(name: str, given: float) -> tuple[Format, Format]:
    """The format on the GPU and on the CPU."""
    return FORMATS[name](torch.tensor([given], device="cuda:0")), FORMATS[name](torch.tensor([given]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (33, 896), (130, 384), (257, 8192)])
@formats
def test_rows(name: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x = rows_of(rows, width, dtype)
    on_gpu, on_cpu = made(name, 0.37)
    for got, wanted in zip(encoded(on_gpu, x.to("cuda:0")), on_cpu.encode(x), strict=True):
        assert same(got.cpu(), wanted)


@pytest.mark.gpu
@formats
def test_every_number(name: str) -> None:
    """With a scale of 1 where it is given, the conversions themselves; else each number beside others."""
    x = numbers()
    x = x[: x.numel() // 128 * 128].view(-1, 128)
    on_gpu, on_cpu = made(name, 1.0)
    for got, wanted in zip(encoded(on_gpu, x.to("cuda:0")), on_cpu.encode(x), strict=True):
        assert same(got.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@formats
def test_the_reference_has_the_same_bits_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    x = rows_of(130, 384, dtype)
    on_gpu, on_cpu = made(name, 0.37)
    for got, wanted in zip(on_gpu.encode(x.to("cuda:0")), on_cpu.encode(x), strict=True):
        assert same(got.cpu(), wanted)
