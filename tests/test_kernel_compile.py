"""Kernels compile for every architecture, within the registers that their launches count on, and without spills.

No GPU is needed. There are some hundreds of variants and four architectures, a quarter of a second each: every
architecture gets another part of the variants, and all of them with TPFUSE_COMPILE_ALL=1.
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
from tpfuse.backends.cuda.compile import ARCHS, KERNELS, compile_kernel, resources
from tpfuse.backends.cuda.sharded_norm import Variant, choose, source, variants

PART = 34  # one variant in so many, for each architecture
USUAL = [
    choose(rows, widths, torch.bfloat16, world, True, turn, rotary_dim=64)
    for rows in (1, 100_000)
    for widths in ((1536, 256), (768, 128))
    for world in (4, 8)
    for turn in ("none", "halves")
]
# Shared memory of a multiprocessor that blocks can have, less the 1 KB that each of them costs besides.
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90a": 228 << 10, "sm_100a": 228 << 10, "sm_120": 100 << 10}


def part_for(arch: str) -> list[Variant]:
    """What is compiled for `arch`: the shapes of models always, and a part of the rest."""
    everything = list(dict.fromkeys([*USUAL, *variants()]))
    if os.environ.get("TPFUSE_COMPILE_ALL"):
        return everything
    first = len(USUAL) + PART * ARCHS.index(arch) // len(ARCHS)
    return everything[: len(set(USUAL))] + everything[first::PART]


def objections(variant: Variant, arch: str) -> list[str]:
    """What is wrong with the compiled kernel."""
    name = variant.name_expression(arch)
    used = resources(compile_kernel(source(), name, arch=arch))
    budget = variant.register_budget(arch)
    shared = variant.resident * (used.shared_bytes + 1024)
    tests = {
        f"spills {used.spill_bytes} bytes, stack {used.stack_bytes}": used.spill_bytes == used.stack_bytes == 0,
        f"takes {used.registers} registers of {budget}": used.registers <= budget,
        f"{variant.resident} blocks need {shared} bytes of shared memory": shared <= SHARED_BYTES[arch],
        f"one block takes {used.shared_bytes} bytes of shared memory": used.shared_bytes <= 48 << 10,
    }
    return [f"{name}: {what}" for what, right in tests.items() if not right]


@pytest.mark.timeout(3600 if os.environ.get("TPFUSE_COMPILE_ALL") else 300)
@pytest.mark.parametrize("arch", ARCHS)
def test_variants_fit_a_multiprocessor(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core: pip install tpfuse[cuda]")
    monkeypatch.setenv("TPFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_made", {})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [text for texts in pool.map(lambda v: objections(v, arch), part_for(arch)) for text in texts]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_amd(arch: str, tmp_path: Path) -> None:
    """Every template with every type, and each of its switches; the AMD backend will choose among the same."""
    clang = shutil.which("clang++-19")
    if clang is None:
        pytest.skip("needs clang++-19: apt-get install clang-19")
    shapes = [((1536, 256), 1, 4), ((2048,), 1, 8), ((1536, 256), 100_000, 8), ((6144, 1024), 100_000, 2)]
    chosen = [
        choose(
            rows, widths, dtype, world, (number + turned) % 2 == 0, turn if len(widths) == 2 else "none", rotary_dim=64
        )
        for number, (widths, rows, world) in enumerate(shapes)
        for turned, (dtype, turn) in enumerate(
            [(torch.bfloat16, "none"), (torch.float16, "halves"), (torch.float32, "neighbours")]
        )
    ]
    names = dict.fromkeys(variant.name_expression("sm_90a") for variant in chosen)  # the target with every switch on
    instances = [f"template __attribute__((global)) void {name}(tpfuse::NormArgs);\n" for name in names]
    file = tmp_path / "kernels.hip"
    file.write_text(source() + "".join(instances))
    flags = f"-x hip --offload-arch={arch} -nogpulib -nogpuinc --cuda-device-only -std=c++17 -O3 -Wall -Wextra -Werror"
    command = [clang, *flags.split(), f"-I{KERNELS}", "-S", str(file), "-o", "-"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(".amdhsa_kernel") == len(names)
