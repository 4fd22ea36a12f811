"""kernels/quant.h computes the bits of tpfuse.quant, and compiles for every target.

The conversions are compared over every bf16 and every fp16 number and the neighbourhood of every tie; the encoders over
rows of all kinds, in the emulated GPU: shuffles, block maximum, addresses of scales and their padding included.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from quant_inputs import numbers, rows_of, same
from torch import Tensor

from tpfuse import quant
from tpfuse.backends.cuda.compile import ARCHS, compile_kernel, resources
from tpfuse.quant import FORMATS, Format

from .build import HERE, KERNELS, compiler, run

DRIVER = HERE / "quant_driver.cpp"
needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
formats = pytest.mark.parametrize("name", FORMATS)


@needs_compiler
def test_conversions(tmp_path: Path) -> None:
    x = numbers()
    x.numpy().tofile(tmp_path / "in")
    result = run(DRIVER, "convert", str(tmp_path / "in"), str(tmp_path / "out"), sanitize=True)
    assert result.returncode == 0, result.stdout
    content = bytearray((tmp_path / "out").read_bytes())
    got = torch.frombuffer(content, dtype=torch.uint8, count=2 * x.numel()).view(2, -1)
    assert torch.equal(got[0], quant.to_e4m3(x).view(torch.uint8))
    assert torch.equal(got[1], quant.to_e2m1(x))
    wide = torch.frombuffer(content, dtype=torch.float32, offset=2 * x.numel())
    assert same(wide, torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float())


def encoded(fmt: Format, x: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    """quant and scale as the kernel writes them, as bytes."""
    rows, width = x.shape
    given = torch.ones(1) if fmt.given is None else fmt.given.reshape(1)
    torch.cat([given, x.flatten()]).numpy().tofile(folder / "in")
    like, scale = fmt.empty(x)
    size = 0 if fmt.kind == "fp8_static" else scale.untyped_storage().nbytes()
    arguments = map(str, (rows, width, fmt.pitch(rows, width), like.numel(), max(size, 1)))
    result = run(DRIVER, "rows", str(folder / "in"), str(folder / "out"), fmt.name, *arguments)
    assert result.returncode == 0, result.stdout
    out = torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=torch.uint8)
    return out[: like.numel()].view(like.dtype).view(like.shape), out[like.numel() :][:size]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (33, 896), (130, 384)])
@formats
def test_rows(name: str, rows: int, width: int, dtype: torch.dtype, tmp_path: Path) -> None:
    fmt, x = FORMATS[name](torch.tensor([0.37])), rows_of(rows, width, dtype)
    quant_bytes, scale = encoded(fmt, x, tmp_path)
    wanted, wanted_scale = fmt.encode(x)
    assert same(quant_bytes, wanted)
    if fmt.kind == "fp8_static":
        return
    if fmt.layout == "column_major":
        columns = scale.view(torch.float32).view(-1, fmt.pitch(rows, width))
        assert same(columns[:, :rows].t(), wanted_scale)
    else:
        assert same(scale.view(wanted_scale.dtype).view(wanted_scale.shape), wanted_scale)


@needs_compiler
@pytest.mark.parametrize("name", ["mxfp8_swizzled", "nvfp4_swizzled"])
def test_padding_of_swizzled_scales_is_zero(name: str, tmp_path: Path) -> None:
    """Widths that are no whole tile, and rows that are: memory starts as 0xff."""
    fmt = FORMATS[name](torch.tensor([100.0]))
    for rows, width in ((3, 5 * fmt.group), (128, 4 * fmt.group), (129, 9 * fmt.group)):
        x = rows_of(rows, width, torch.bfloat16)
        _, scale = encoded(fmt, x, tmp_path)
        assert torch.equal(scale, fmt.encode(x)[1].view(torch.uint8).flatten())


# Compilers

KERNEL = '#include "quant_rows.h"\n'
MADE = [make(torch.ones(1)) for make in FORMATS.values()]
NAMES = [
    f"tpfuse::quantise_rows<tpfuse::quant::Kind::{kind}, tpfuse::quant::Layout::{layout}>"
    for kind, layout in dict.fromkeys((fmt.kind, fmt.layout) for fmt in MADE)
]


@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoders leave registers to the kernels that they are part of."""
    pytest.importorskip("cuda.core", reason="needs cuda-core: pip install tpfuse[cuda]")
    monkeypatch.setenv("TPFUSE_CACHE_DIR", str(tmp_path))
    source = (HERE / "quant_rows.h").read_text(encoding="utf-8").replace("#pragma once", "")
    for name in NAMES:
        used = resources(compile_kernel(source, name, arch=arch))
        assert (used.spill_bytes, used.stack_bytes) == (0, 0), name
        assert used.registers <= 40, name


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_clang_hip(arch: str, tmp_path: Path) -> None:
    clang = shutil.which("clang++-19")
    if clang is None:
        pytest.skip("no clang++-19")
    source = tmp_path / "kernel.hip"
    instances = [f"template __attribute__((global)) void {name}(tpfuse::QuantRows);\n" for name in NAMES]
    source.write_text(KERNEL + "".join(instances))
    flags = f"-x hip --offload-arch={arch} -nogpulib -nogpuinc --cuda-device-only -std=c++17 -O3 -Wall -Wextra -Werror"
    command = [clang, *flags.split(), f"-I{KERNELS}", f"-I{HERE}", "-S", str(source), "-o", "-"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
