"""Compiling kernels with NVRTC, and the cache of what was compiled. No GPU is needed."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tpfuse.backends.cuda import compile as machine
from tpfuse.backends.cuda.compile import ARCHS, Object, arch_for, cache_folder, compile_kernel, resources
from tpfuse.errors import TpfuseError, Unsupported

pytest.importorskip("cuda.core", reason="needs cuda-core: pip install tpfuse[cuda]")

SMALL = """
#include "platform.h"
namespace tpfuse {
struct Args { u32* out; u32 n; };
constexpr u32 twice(u32 x) { return 2 * x; }
template <int N>
TPF_KERNEL(256, 1) void small(TPF_GRID_CONSTANT const Args a) {
  TPF_SHARED(float[256], sums);
  sums[thread_index()] = float(twice(a.n) + N);
  barrier();
  a.out[thread_index()] = u32(sums[255 - thread_index()]);
}
}
"""
SPILLING = """
extern "C" __global__ __launch_bounds__(1024, 2) void spilling(float* p) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i)
#pragma unroll
    for (int j = 0; j < 96; j += 7) x[i] += x[j] * x[(i + j) % 96];
#pragma unroll
  for (int i = 0; i < 96; ++i) p[i * 1024 + threadIdx.x] = x[i];
}
"""


def small(n: int = 3, arch: str = "sm_90a") -> Object:
    return compile_kernel(SMALL, f"tpfuse::small<{n}>", arch=arch)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on disk and in memory."""
    monkeypatch.setenv("TPFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_made", {})
    machine._warn_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is really compiled."""
    names: list[str] = []
    original = machine._compile

    def counted(key: str, source: str, name: str, options: dict[str, object]) -> Object:
        names.append(name)
        return original(key, source, name, options)

    monkeypatch.setattr(machine, "_compile", counted)
    return names


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture(arch: str) -> None:
    made = small(arch=arch)
    assert made.cubin.startswith(b"\x7fELF")
    assert made.symbol.startswith("_ZN6tpfuse5smallILi3EE")
    assert made.symbol.encode() in made.cubin
    used = resources(made)
    assert 0 < used.registers <= 32
    assert (used.spill_bytes, used.stack_bytes, used.shared_bytes) == (0, 0, 1024)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_spilling_kernel_is_reported(arch: str) -> None:
    used = resources(compile_kernel(SPILLING, "spilling", arch=arch))
    assert used.registers <= 64  # two blocks of 1024 fit on all but sm_120
    assert used.spill_bytes > 0
    assert used.stack_bytes > 0


def test_no_contraction() -> None:
    def cubin(expression: str) -> bytes:
        return compile_kernel(
            f'extern "C" __global__ void f(float* p) {{ *p = {expression}; }}', "f", arch="sm_90a"
        ).cubin

    assert cubin("p[1] * p[2] + p[3]") == cubin("__fadd_rn(__fmul_rn(p[1], p[2]), p[3])")
    assert cubin("p[1] * p[2] + p[3]") != cubin("fmaf(p[1], p[2], p[3])")


def test_an_error_carries_the_log_of_nvrtc() -> None:
    with pytest.raises(TpfuseError, match=r"(?s)tpfuse::small<3>.*sm_90a.*NVRTC.*no_such_thing.*is undefined"):
        compile_kernel(SMALL.replace("twice(a.n)", "no_such_thing"), "tpfuse::small<3>", arch="sm_90a")
    with pytest.raises(TpfuseError, match="no_such_kernel"):
        compile_kernel(SMALL, "tpfuse::no_such_kernel", arch="sm_90a")
    with pytest.raises(TpfuseError, match="sm_12"):
        compile_kernel(SMALL, "tpfuse::small<3>", arch="sm_12")


def test_headers_of_the_current_directory_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "platform.h").write_text("#error the wrong one")
    monkeypatch.chdir(tmp_path)
    assert small().cubin


def test_a_second_call_and_a_second_process_compile_nothing(
    compiles: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small()
    assert small() is first
    monkeypatch.setattr(machine, "_made", {})  # as a new process has it
    assert small() == first
    assert resources(small()) == resources(first)
    assert compiles == ["tpfuse::small<3>"]
    assert [path.name for path in folder.iterdir()] == [f"{first.key}.kernel"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_key_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for header in machine.KERNELS.glob("*.h"):
        (kernels / header.name).write_text(header.read_text())
    monkeypatch.setattr(machine, "KERNELS", kernels)
    keys = [small().key, small(4).key, small(arch="sm_80").key]
    keys.append(compile_kernel(SMALL + "\n", "tpfuse::small<3>", arch="sm_90a").key)
    monkeypatch.setattr(machine, "CACHE_FORMAT", -1)
    keys.append(small().key)
    monkeypatch.setattr(machine, "compiler", lambda: "another compiler")
    keys.append(small().key)
    (kernels / "platform.h").write_text((kernels / "platform.h").read_text() + "\n// edited\n")
    keys.append(small().key)
    assert len(set(keys)) == len(keys)


def test_a_header_edited_during_the_compile_is_not_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, versions = machine.compiler(), iter(range(100))
    monkeypatch.setattr(machine, "compiler", lambda: f"{original} {next(versions)}")
    assert small().cubin
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_entry_is_made_again(
    damage: str, compiles: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small()
    path = folder / f"{first.key}.kernel"
    good = path.read_bytes()
    if damage == "other":  # a whole entry, but of another kernel
        damaged = (folder / f"{small(4).key}.kernel").read_bytes()
        compiles.pop()
    else:
        flipped = good[:-100] + bytes([good[-100] ^ 1]) + good[-99:]
        damaged = {"truncated": good[:-1], "flipped": flipped, "empty": b""}[damage]
    path.write_bytes(damaged)
    monkeypatch.setattr(machine, "_made", {})
    assert small() == first
    assert compiles == ["tpfuse::small<3>"] * 2
    assert machine._read(first.key) == first


def compile_many(_: int) -> list[Object]:
    return [small(n) for n in range(3)]


def test_processes_at_once(folder: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=mp.get_context("spawn")) as pool:
        results = list(pool.map(compile_many, range(4)))
    assert all(result == results[0] for result in results)
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{made.key}.kernel" for made in results[0])


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(mode: int, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(TpfuseError, match=re.escape(f"{folder} can be written by others")):
        small()


def test_a_folder_of_someone_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TpfuseError, match="TPFUSE_CACHE_DIR"):
        small()


def test_a_folder_that_others_can_read_is_fine(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    assert (folder / f"{small().key}.kernel").exists()


def test_an_impossible_folder_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPFUSE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="can't keep compiled kernels"):
        assert small().cubin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small(4).cubin


def test_a_folder_that_can_only_be_read_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(range(9))

    def refuses(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", f"some-{next(names)}.new")

    monkeypatch.setattr("tempfile.mkstemp", refuses)
    with pytest.warns(UserWarning, match="cache: Read-only file system"):
        assert small().cubin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small(4).cubin


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert small().cubin
    assert list(folder.iterdir()) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path(os.environ["TPFUSE_CACHE_DIR"])
    monkeypatch.delenv("TPFUSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/tpfuse")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/tpfuse")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"),
        ((10, 3), "sm_100"), ((11, 0), "sm_110"), ((12, 0), "sm_120"), ((12, 1), "sm_120"),
    ],
)  # fmt: skip
def test_target_of_a_device(capability: tuple[int, int], arch: str) -> None:
    assert arch_for(*capability, [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]) == arch


def test_devices_without_a_target() -> None:
    with pytest.raises(Unsupported, match=r"7\.5.*needed: 8\.0"):
        arch_for(7, 5, machine.supported())
    with pytest.raises(Unsupported, match=r"no target for compute capability 99\.0; it has .*90"):
        arch_for(99, 0, machine.supported())


def test_every_target_compiles() -> None:
    assert {int(re.sub(r"\D", "", arch)) for arch in ARCHS} <= set(machine.supported())
