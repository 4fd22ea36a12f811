"""Compiles a C++ driver together with the emulated machine, and runs it.

Drivers run as processes of their own, so that a sanitizer's abort or a crash fails one test and does not end pytest.
Binaries are cached under the hash of what the compiler really sees, the preprocessed source, so that an edited kernel
rebuilds exactly the drivers that include it. The machine itself is compiled once per sanitizer setting.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "src" / "tpfuse" / "kernels"
# Contraction off: kernels' exact additions must round here as they do on a GPU. Lines are all that reports need of -g.
FLAGS = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{HERE}", f"-I{KERNELS}")
ASAN = ("-fsanitize=address", "-fno-omit-frame-pointer")
UBSAN = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")


def compiler() -> str | None:
    """The host compiler, or None: then the emulation's tests are skipped."""
    found = (shutil.which(name) for name in ("c++", "g++", "clang++", "clang++-19"))
    return next(filter(None, found), None)


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"tpfuse-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def kept(name: str, suffix: str, text: str) -> Path:
    """A file in the cache folder; its name follows from its text, or binaries made from it could not be kept."""
    path = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}{suffix}"
    if not path.exists():
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(text)
        scratch.replace(path)
    return path


def build(driver: Path, *, sanitize: bool = False) -> Path:
    """The binary of `driver` (a .cpp with a main), compiled if it is not there yet."""
    machine_flags = FLAGS + (ASAN if sanitize else ())
    # Undefined behaviour is looked for in kernels; in the machine it would only triple the time to compile.
    driver_flags = machine_flags + (UBSAN if sanitize else ())
    machine = _compile(HERE / "simt.cpp", (*machine_flags, "-c"), ())
    return _compile(driver, driver_flags, (str(machine),))


def run(
    driver: Path, *arguments: str, sanitize: bool = False, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Builds and runs `driver`; the caller looks at the exit status and the output."""
    # The machine's fibers own memory that an early exit leaves behind: leaks are not what is tested.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
    return subprocess.run(
        [build(driver, sanitize=sanitize), *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        timeout=timeout,
        check=False,
    )


@functools.cache
def _compile(source: Path, flags: tuple[str, ...], objects: tuple[str, ...]) -> Path:
    command = [compiler() or "c++", *flags]
    seen = _output([*command, "-E", str(source)])
    key = hashlib.sha256(repr((seen, command, objects)).encode()).hexdigest()[:20]
    target = cache_folder() / f"{source.stem}-{key}{'.o' if '-c' in flags else ''}"
    if not target.exists():
        # Written beside and renamed: another process sees either nothing or the whole file.
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            finished = Path(scratch) / target.name
            _output([*command, str(source), *objects, "-o", str(finished)])
            finished.replace(target)
    return target


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout
