"""The `cuda` backend: our own kernels over NVLink or PCIe peer access.

compile.py turns kernel sources into loaded functions, launch.py starts them, workspace.py gives them memory that all
ranks reach. Importing any of them needs neither the CUDA packages nor a GPU: `missing()` says what is not there, and
the first real use raises the same words as Unsupported.

Design record
- The driver API only, through `cuda.bindings`. The runtime API would add a second library with a current device of its
  own beside torch's; the driver's primary context of a device is the one that torch uses, too.
- A primary context is retained once a process and never released: kernels, workspaces and captured graphs live in it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tpfuse.errors import TpfuseError, Unsupported

INSTALL = "pip install tpfuse[cuda]"


def package(name: str) -> Any:
    """The module `name` of NVIDIA's Python packages. Raises Unsupported where it can't be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"backend cuda needs {name}, which can't be imported ({error}): {INSTALL}") from error


@cache
def driver() -> Any:
    """`cuda.bindings.driver`, initialised. Raises Unsupported where there is no package, no driver or no GPU."""
    module = package("cuda.bindings.driver")
    try:
        check("cuInit", module.cuInit(0))
    except TpfuseError as error:
        raise Unsupported(f"backend cuda: {error}. Is there an NVIDIA GPU, and does its driver run?") from error
    except RuntimeError as error:  # cuda.pathfinder found no libcuda
        raise Unsupported("backend cuda: no NVIDIA driver on this machine (libcuda.so.1 was not found)") from error
    return module


def missing() -> str | None:
    """Why the backend can't work in this process, or None."""
    try:
        package("cuda.core")
        driver()
    except Unsupported as error:
        return str(error)
    return None


def check(call: str, result: tuple[Any, ...]) -> Any:
    """What a driver call returned, without its status. Raises TpfuseError with CUDA's name and words of the error."""
    status, *values = result
    if int(status):
        raise TpfuseError(f"{call} failed: {describe(int(status))}")
    return values[0] if len(values) == 1 else tuple(values)


def describe(status: int) -> str:
    """`CUDA_ERROR_OUT_OF_MEMORY (2): out of memory`."""
    module = package("cuda.bindings.driver")
    try:
        code = module.CUresult(status)
        name, text = (get(code)[1] for get in (module.cuGetErrorName, module.cuGetErrorString))
        return f"{name.decode()} ({status}): {text.decode()}"
    except (ValueError, AttributeError):  # newer than the bindings know: they have no name for it
        return f"CUDA error {status}"


@cache
def context(device: int) -> Any:
    """The primary context of a device, by its index in this process."""
    return check("cuDevicePrimaryCtxRetain", driver().cuDevicePrimaryCtxRetain(handle(device)))


@cache
def handle(device: int) -> Any:
    return check("cuDeviceGet", driver().cuDeviceGet(device))


@contextmanager
def on_device(device: int) -> Iterator[Any]:
    """Make a device's primary context current, and the one before it again at the end. Gives the driver module."""
    module = driver()
    check("cuCtxPushCurrent", module.cuCtxPushCurrent(context(device)))
    try:
        yield module
    finally:
        check("cuCtxPopCurrent", module.cuCtxPopCurrent())


def attribute(device: int, name: str) -> int:
    """A device attribute: `attribute(0, "MULTIPROCESSOR_COUNT")`."""
    module = driver()
    which = getattr(module.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(check("cuDeviceGetAttribute", module.cuDeviceGetAttribute(which, handle(device))))
