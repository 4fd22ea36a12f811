"""From kernel source to a function on a device: NVRTC, a disk cache, and the loader.

    made = compile_kernel('#include "sharded_norm.h"', "tpfuse::rms_norm<4>", arch=arch_of(device))
    function = load(made, device)

Compiling needs no GPU; `resources()` then says what the kernel takes of a multiprocessor, so CI checks every variant
for registers and spills.

Design record
- `-v` goes to ptxas on every compile, and the log is stored beside the cubin: registers, stack, spills and shared
  memory without cuobjdump and without parsing ELF. It costs nothing measurable.
- `--fmad=false`: results are bitwise equal between platforms and algorithms only without contraction; a kernel that
  wants one FMA says so. `--device-as-default-execution-space`: NVRTC rejects unannotated functions otherwise, also
  constexpr ones, which clang and the host compiler take as they are.
- Kernels include kernels/*.h through an include path; the folder of the source (NVRTC: the current directory) is not
  searched, or any platform.h lying there would be compiled in. cuda.core has no in-memory headers. The key is
  taken again after the compile, and a header that was edited meanwhile keeps the result out of the cache.
- No lock around the cache: ranks that need the same kernel compile it at the same time, each on a core of its own, and
  the last `os.replace` wins. A compile takes 0.1 s; a lock would save cores, not time, and hang on some network disks.
- An architecture suffix `a` runs on exactly one compute capability (sm_90a: 9.0, sm_100a: 10.0). Others get the lowest
  generic target of their major version, which every device of that version runs.
- Loaded code is never unloaded: a captured graph may run it at any time, and it is a few tens of KB. `cuFuncLoad`
  defeats lazy loading, so that a first launch inside a capture loads nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tpfuse.backends.cuda import attribute, check, on_device, package
from tpfuse.errors import TpfuseError, Unsupported

KERNELS = Path(__file__).parents[2] / "kernels"
ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120")  # what CI compiles every kernel for
CACHE_FORMAT = 1

_EXACT = {(9, 0): "sm_90a", (10, 0): "sm_100a"}


@dataclass(frozen=True)
class Object:
    """A compiled kernel."""

    key: str  # of the cache: a hash of all that it was made from
    name: str  # as in the source: `tpfuse::rms_norm<4>`
    symbol: str  # the same, mangled
    arch: str
    log: str = field(repr=False, compare=False)  # NVRTC's and ptxas's; there are times in it
    cubin: bytes = field(repr=False, compare=False)  # NVRTC puts its process's number into it


@dataclass(frozen=True)
class Resources:
    """What a kernel takes, as ptxas reports it. Bytes are per thread, `shared_bytes` (static) per block."""

    registers: int
    spill_bytes: int  # stores plus loads
    stack_bytes: int  # local memory: spills, and arrays with indices that are not constant
    shared_bytes: int


@dataclass(frozen=True)
class Function:
    """A kernel loaded on a device."""

    handle: int  # CUfunction
    name: str
    device: int
    argument_bytes: int  # size of the one struct that it takes


_made: dict[str, Object] = {}
_loaded: dict[tuple[str, int], Function] = {}
_starting = threading.Lock()  # NVRTC loads parts of itself on first use, and fails now and then beside another thread


def compile_kernel(source: str, name_expression: str, *, arch: str) -> Object:
    """Compile one kernel, or find it in the cache. Any header of kernels/ may be included.

    Raises TpfuseError with NVRTC's log where the source does not compile, or where the cache folder is not safe to
    load code from; Unsupported where NVRTC is missing.
    """
    options: dict[str, Any] = {
        "arch": arch,
        "std": "c++17",
        "fma": False,
        "device_as_default_execution_space": True,
        "no_source_include": True,
        "ptxas_options": ["-v"],
    }
    key = _key(source, name_expression, options)
    found = _made.get(key) or _read(key)
    if found is None:
        found = _compile(key, source, name_expression, options)
        if _key(source, name_expression, options) == key:
            _write(found)
    _made[key] = found
    return found


def resources(made: Object) -> Resources:
    """What `made` takes of a multiprocessor, functions that it calls included."""
    _, _, rest = made.log.partition(f"Compiling entry function '{made.symbol}'")
    section = rest.partition("Compiling entry function")[0]
    used = re.search(r"Used (\d+) registers(.*)", section)
    functions = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section)
    if used is None or not functions:
        raise TpfuseError(f"{made.name}: ptxas did not report its resources. The log of the compile:\n{made.log}")
    stacks, stores, loads = (sum(map(int, column)) for column in zip(*functions, strict=True))
    shared = re.search(r"(\d+) bytes smem", used[2])
    return Resources(int(used[1]), stores + loads, stacks, int(shared[1]) if shared else 0)


def arch_of(device: int) -> str:
    """The target to compile for so that it runs on that device."""
    major, minor = (attribute(device, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    return arch_for(major, minor, supported())


def arch_for(major: int, minor: int, targets: Collection[int]) -> str:
    """The target for compute capability `major.minor`, given NVRTC's `targets` (80, 90, ...). Raises Unsupported."""
    if major < 8:
        raise Unsupported(f"backend cuda: the GPU has compute capability {major}.{minor}; needed: 8.0 or later.")
    fitting = [target for target in targets if target // 10 == major and target % 10 <= minor]
    if not fitting:
        raise Unsupported(
            f"backend cuda: this NVRTC ({compiler()}) has no target for compute capability {major}.{minor}; "
            f"it has {', '.join(map(str, sorted(targets)))}. Install a newer nvidia-cuda-nvrtc."
        )
    return _EXACT.get((major, minor), f"sm_{min(fitting)}")


def supported() -> list[int]:
    """The compute capabilities that this NVRTC compiles for, as 80, 90, ..."""
    compiler()
    return list(package("cuda.bindings.nvrtc").nvrtcGetSupportedArchs()[1])


def compiler() -> str:
    """Names the compiler, down to the build. Raises Unsupported where there is none."""
    with _starting:
        return _compiler()


@cache
def _compiler() -> str:
    core, nvrtc = package("cuda.core"), package("cuda.bindings.nvrtc")
    try:
        path = package("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc").abs_path
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise Unsupported(f"backend cuda: NVRTC was not found ({error}): pip install tpfuse[cuda]") from error
    size = os.path.getsize(path) if path else 0
    return f"NVRTC {major}.{minor} of {size} bytes, cuda-core {core.__version__}"


def load(made: Object, device: int) -> Function:
    """Load a kernel on a device, once a process. Not inside a graph capture."""
    found = _loaded.get((made.key, device))
    if found is None:
        with on_device(device) as driver:
            module = check(f"cuModuleLoadData of {made.name} for {made.arch}", driver.cuModuleLoadData(made.cubin))
            function = check("cuModuleGetFunction", driver.cuModuleGetFunction(module, made.symbol.encode()))
            check("cuFuncLoad", driver.cuFuncLoad(function))
            offset, size = check("cuFuncGetParamInfo", driver.cuFuncGetParamInfo(function, 0))
        found = _loaded[made.key, device] = Function(int(function), made.name, device, int(offset) + int(size))
    return found


def _core() -> Any:
    """cuda.core, after a first compile, which no other thread is near."""
    with _starting:
        return _started()


@cache
def _started() -> Any:
    core = package("cuda.core")
    core.Program("__global__ void nothing() {}", "c++", core.ProgramOptions(arch="sm_80")).compile("cubin")
    return core


def _compile(key: str, source: str, name: str, options: Mapping[str, Any]) -> Object:
    core = _core()
    log = io.StringIO()
    try:
        program = core.Program(source, "c++", core.ProgramOptions(name="tpfuse", include_path=str(KERNELS), **options))
        made = program.compile("cubin", name_expressions=[name], logs=log)
    except Exception as error:  # NVRTC's own error type is private to cuda.core; its text is the compiler's log
        raise TpfuseError(f"{name} does not compile for {options['arch']} with {compiler()}: {error}") from error
    symbol = made.symbol_mapping[name]
    symbol = symbol.decode() if isinstance(symbol, bytes) else symbol
    return Object(key, name, symbol, options["arch"], log.getvalue().strip("\0\n"), bytes(made.code))


def _key(source: str, name: str, options: Mapping[str, Any]) -> str:
    """A hash of everything that the compiled kernel depends on."""
    headers = {path.name: path.read_text() for path in sorted(KERNELS.glob("*.h"))}
    parts = [CACHE_FORMAT, compiler(), options, name, source, headers]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# The cache: one file a kernel, `<key>.kernel`. Its first line is the SHA-256 of all that follows, the second line the
# fields of Object as JSON, the rest the cubin. The code in it runs in this process, so the folder must be ours alone.


def cache_folder() -> Path:
    """Where compiled kernels are kept: $TPFUSE_CACHE_DIR, else $XDG_CACHE_HOME/tpfuse, else ~/.cache/tpfuse."""
    if chosen := os.environ.get("TPFUSE_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpfuse"


def check_folder() -> None:
    """Raise TpfuseError where kernels could not be loaded from the cache folder, as others may write to it."""
    with suppress(OSError):
        _safe_folder()


def _safe_folder() -> Path:
    """The cache folder, made if need be. Raises OSError where it can't be, TpfuseError where others may write to it."""
    try:
        folder = cache_folder()
    except RuntimeError as error:  # no home folder
        raise OSError(str(error)) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.stat()
    advice = "Code in it would run in this process. Set TPFUSE_CACHE_DIR to a folder of your own."
    if state.st_uid != os.geteuid():
        raise TpfuseError(
            f"kernel cache {folder} belongs to user {state.st_uid}, this process is user {os.geteuid()}. {advice}"
        )
    if state.st_mode & 0o022:
        raise TpfuseError(
            f"kernel cache {folder} can be written by others (mode {state.st_mode & 0o777:03o}): "
            f"chmod go-w {folder}. {advice}"
        )
    return folder


def _read(key: str) -> Object | None:
    """The entry of that key; None where there is none or where it is damaged."""
    try:
        entry = (_safe_folder() / f"{key}.kernel").read_bytes()
    except OSError:
        return None
    checksum, _, content = entry.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        return None
    fields, _, cubin = content.partition(b"\n")
    made = Object(**json.loads(fields), cubin=cubin)
    return made if made.key == key else None


def _write(made: Object) -> None:
    """Keep an object for later processes. Where that fails, warn once and go on."""
    fields = asdict(made)
    cubin = fields.pop("cubin")
    content = json.dumps(fields).encode() + b"\n" + cubin
    try:
        folder = _safe_folder()
        number, temporary = tempfile.mkstemp(dir=folder, prefix=f"{made.key[:16]}-", suffix=".new")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            os.replace(temporary, folder / f"{made.key}.kernel")
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        _warn_once(f"{cache_folder()}: {error.strerror}" if error.strerror else str(error))  # without a file's name


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"tpfuse can't keep compiled kernels ({reason}), so every process compiles them again. "
        "Set TPFUSE_CACHE_DIR to a folder that can be written.",
        stacklevel=4,
    )
