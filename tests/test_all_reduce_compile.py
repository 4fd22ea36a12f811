"""The all-reduce kernels compile for every architecture, within the registers that their launches count on, and without
spills but where `spills_allowed` says so.

No GPU is needed. There are some thousands of variants, half a second each: some for each architecture,
and all of them, in hours, with TPFUSE_COMPILE_ALL=1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tpfuse.backends.cuda import compile as machine
from tpfuse.backends.cuda.all_reduce import Variant, source, variants
from tpfuse.backends.cuda.compile import ARCHS, KERNELS, compile_kernel, resources

ALL = bool(os.environ.get("TPFUSE_COMPILE_ALL"))
PART = 20  # variants for an architecture
# Of a multiprocessor: shared memory that blocks can have, less the 1 KB that each of them costs besides, and threads.
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90a": 228 << 10, "sm_100a": 228 << 10, "sm_120": 100 << 10}
THREADS = {"sm_80": 2048, "sm_90a": 2048, "sm_100a": 2048, "sm_120": 1536}


def spills_allowed(variant: Variant, arch: str) -> int:
    """Bytes, where fewer rows in flight would cost more than a few words of local memory."""
    if variant.dtype.itemsize * variant.world > 16 and variant.vectors > 2:
        return 288  # fp32 of many ranks in rows of more than 8192: a block of 512 threads has no more registers to give
    if variant.dtype == torch.float32 and variant.quant in ("mxfp8", "nvfp4"):
        return 96  # a scale for each 32 or 16 elements: 16 and 48 bytes on sm_90a in whole rows of two ranks
    if variant.terms > 1:
        return 208 if arch == "sm_80" else 48  # what is kept around the loop over terms; a block fewer is 10% slower
    if arch == "sm_80" and torch.float32 in (variant.dtype, variant.residual, variant.gamma):
        return 96  # the compiler needs more registers than for later targets
    return 0


def part_for(arch: str) -> list[Variant]:
    """What is compiled for `arch`: variants from end to end of the list, others than for the other architectures."""
    everything = list(variants(clusters=arch != "sm_80"))
    step = 1 if ALL else len(everything) // PART
    return everything[0 if ALL else step * ARCHS.index(arch) // len(ARCHS) :: step]


def objections(variant: Variant, arch: str) -> list[str]:
    """What is wrong with the compiled kernel."""
    used = resources(compile_kernel(source(), variant.name_expression, arch=arch))
    allowed = spills_allowed(variant, arch)
    shared = variant.resident * (used.shared_bytes + 1024)
    tests = {
        f"spills {used.spill_bytes} bytes, stack {used.stack_bytes}": used.spill_bytes <= allowed >= used.stack_bytes,
        f"takes {used.registers} registers of {variant.register_budget}": used.registers <= variant.register_budget,
        f"{variant.resident} blocks need {shared} bytes of shared memory": shared <= SHARED_BYTES[arch],
        f"{variant.resident} blocks of {variant.threads} threads": variant.resident * variant.threads <= THREADS[arch],
    }
    return [f"{arch} {variant.name_expression}: {what}" for what, right in tests.items() if not right]


@pytest.mark.timeout(6 * 3600 if ALL else 300)
@pytest.mark.parametrize("arch", ARCHS)
def test_variants_fit_a_multiprocessor(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core: pip install tpfuse[cuda]")
    monkeypatch.setenv("TPFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_made", {})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [text for texts in pool.map(lambda v: objections(v, arch), part_for(arch)) for text in texts]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def compile_amd(arch: str, names: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    clang = shutil.which("clang++-19")
    if clang is None:
        pytest.skip("needs clang++-19: apt-get install clang-19")
    instances = [f"template __attribute__((global)) void {name}(tpfuse::ReduceArgs);\n" for name in names]
    file = folder / "kernels.hip"
    file.write_text(source() + "".join(instances))
    flags = f"-x hip --offload-arch={arch} -nogpulib -nogpuinc --cuda-device-only -std=c++17 -O3 -Wall -Wextra -Werror"
    command = [clang, *flags.split(), f"-I{KERNELS}", "-S", str(file), "-o", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_amd(arch: str, tmp_path: Path) -> None:
    """Rows of one block: the AMD backend will choose among the same."""
    everything = [variant.name_expression for variant in variants(clusters=False)]
    names = everything[150 * (arch == "gfx942") :: 1 if ALL else 300]
    result = compile_amd(arch, names, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(".amdhsa_kernel") == len(names)


def test_no_clusters_on_amd(tmp_path: Path) -> None:
    split = next(variant for variant in variants() if variant.parts > 1 and variant.path == "norm")
    result = compile_amd("gfx942", [split.name_expression], tmp_path)
    assert result.returncode != 0
    assert "no clusters on this GPU" in result.stderr
