"""platform.h compiles for every target with the instructions it promises, from one kernel that uses all of it.

No GPU is needed: NVRTC and clang compile anywhere. What is missing on a machine is skipped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .build import HERE, KERNELS

KERNEL = '#include "every_primitive.h"\n'
NAMES = ["tpfuse::every_primitive<tpfuse::bf16>", "tpfuse::every_primitive<tpfuse::f16>"]
PTX = [
    r"ld\.global\.v4\.u32",
    r"ld\.global\.nc\.v4\.u32",
    r"ld\.global\.L1::no_allocate\.v4\.u32",
    r"st\.global\.v4\.u32",
    r"st\.global\.cs\.v4\.u32",
    r"ld\.relaxed\.sys\.global\.(u32|u64|b128)",
    r"st\.relaxed\.sys\.global\.(u32|u64|b128)",
    r"shfl\.sync\.(bfly|idx)",
    r"vote\.sync\.(any|all)",
    r"bar\.warp\.sync",
    r"(add|mul|div|sqrt)\.rn\.f32",
    r"cvt\.rn\.bf16x2\.f32",
    r"cvt\.rn\.f16x2\.f32",
    r"%globaltimer",
]
PDL = [r"griddepcontrol\.wait", r"griddepcontrol\.launch_dependents"]


def ptx(arch: str) -> str:
    """cuda.core asks the driver before it hands out PTX, so NVRTC is called directly."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    _, program = nvrtc.nvrtcCreateProgram(KERNEL.encode(), b"every_primitive.cu", 0, [], [])
    for name in NAMES:
        nvrtc.nvrtcAddNameExpression(program, name.encode())
    options = [f"-arch={arch}".encode(), b"-std=c++17", f"-I{KERNELS}".encode(), f"-I{HERE}".encode()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text: bytes = b" " * size
    nvrtc.nvrtcGetPTX(program, text)
    return text.decode()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "sm_120"])
def test_nvrtc(arch: str) -> None:
    core = pytest.importorskip("cuda.core")
    options = core.ProgramOptions(arch=arch, std="c++17", include_path=[str(KERNELS), str(HERE)])
    cubin = core.Program(KERNEL, "c++", options).compile("cubin", name_expressions=NAMES)
    assert len(cubin.code) > 0


@pytest.mark.parametrize("arch", ["compute_80", "compute_90a"])
def test_ptx(arch: str) -> None:
    text = ptx(arch)
    missing = [pattern for pattern in PTX if not re.search(pattern, text)]
    assert not missing
    for pattern in PDL:
        assert bool(re.search(pattern, text)) == (arch != "compute_80")
    assert not re.search(r"\bfma\.|\b(ld|st)\.(v[24]\.)?[ubf](16|32|64)\b", text), "a contraction, or a generic access"


@pytest.mark.parametrize(("arch", "system"), [("gfx90a", "glc slc"), ("gfx942", "sc0 sc1")])
def test_clang_hip(arch: str, system: str, tmp_path: Path) -> None:
    clang = shutil.which("clang++-19")
    if clang is None:
        pytest.skip("no clang++-19")
    source = tmp_path / "kernel.hip"
    instances = [f"template __attribute__((global)) void {name}(tpfuse::Everything);\n" for name in NAMES]
    source.write_text(KERNEL + "".join(instances))
    flags = f"-x hip --offload-arch={arch} -nogpulib -nogpuinc --cuda-device-only -std=c++17 -O3 -Wall -Wextra -Werror"
    command = [clang, *flags.split(), f"-I{KERNELS}", f"-I{HERE}", "-S", str(source), "-o", "-"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for pattern in [
        rf"global_load_dwordx4 .* off {system}\n\ts_waitcnt vmcnt\(0\)",
        rf"global_store_dwordx4 .* off {system}\n\ts_nop 0",
        r"global_load_dwordx2 .* off (glc|sc0 sc1)",
        r"global_store_dwordx2 .* off",
        r"ds_bpermute_b32",
        r"s_memrealtime",
        r"s_sleep 1",
    ]:
        assert re.search(pattern, result.stdout), pattern
    assert not re.search(r"\tflat_(load|store)", result.stdout)
