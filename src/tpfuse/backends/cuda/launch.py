"""Starts a kernel with as little host time as Python allows: everything but the changing arguments is prebuilt.

    start = Launcher(function, "QQQiif", fixed=struct.pack("8QQ", *peers, errors), block=256, pdl=True)
    start(grid, stream, x, weight, y, rows, stride, eps)

A kernel takes ONE struct by value. Its fields that never change (peers' addresses, the error record) come first and are
written once, as `fixed`; the others are packed on every call, in the order of `layout`, a format of Python's struct
module with native alignment. Where some of these seldom change, they are best kept as packed bytes, one value `80s`.

Design record
- ctypes, not cuda.bindings. Measured on a CPU against a C function that does nothing (Python 3.11): the foreign call
  with prebuilt byref objects and NO argtypes takes 0.25 to 0.35 µs; with argtypes, which convert each argument again,
  0.45 to 0.6. Setting grid and stream takes 0.07, packing 0.04 a value: that is why there is a fixed part.
  cuda.bindings builds its result tuple and converts the config on every call; DESIGN.md section 3 has 18 µs for an
  argument array rebuilt on every call. Without argtypes nothing is checked, so only objects built here are passed.
- CDLL and not PyDLL (0.1 µs faster), because it lets go of the GIL: a launch blocks while the device's queue is full,
  and what would empty it may need this process's other threads.
- cuLaunchKernelEx copies the arguments before it returns, also into a graph node under capture, so one buffer serves
  every call. A launcher is for one thread at a time, like the communicator it belongs to.
- The driver knows the size of the kernel's struct: a layout that does not fit it is an error when the launcher is made,
  not a kernel that reads rubbish.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import c_char, c_uint, c_void_p
from functools import cache
from typing import Any

from tpfuse.backends.cuda import attribute, describe
from tpfuse.backends.cuda.compile import Function
from tpfuse.errors import InvalidArgument, TpfuseError, Unsupported

PROGRAMMATIC_STREAM_SERIALIZATION, CLUSTER_DIMENSION = 6, 4  # CUlaunchAttributeID


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; of the union of 64 bytes three ints are used at most."""

    _fields_ = (("id", c_uint), ("pad", c_uint), ("value", c_uint * 3), ("rest", c_char * 52))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig, the same in CUDA 12 and 13."""

    _fields_ = (
        ("grid_x", c_uint), ("grid_y", c_uint), ("grid_z", c_uint),
        ("block_x", c_uint), ("block_y", c_uint), ("block_z", c_uint),
        ("shared_bytes", c_uint), ("stream", c_void_p), ("attributes", c_void_p), ("attribute_count", c_uint),
    )  # fmt: skip


class Launcher:
    """Launches one kernel on one device, with a fixed block: `launcher(grid, stream, *values)`.

    cluster: blocks of a cluster, of which grids must be multiples. pdl: start before the kernel before it has ended.

    The kernel's device must be the current one. `stream`: the handle, e.g. torch's `stream.cuda_stream`; 0: the
    default stream. Raises TpfuseError with CUDA's words. Errors inside the kernel come later, from what waits for it.
    """

    def __init__(
        self,
        function: Function,
        layout: str,
        *,
        fixed: bytes = b"",
        block: int,
        cluster: int = 1,
        pdl: bool = False,
    ) -> None:
        check_layout(function, layout, len(fixed))
        packer = struct.Struct(layout)
        self._arguments = (c_char * max(len(fixed) + packer.size, function.argument_bytes))()
        ctypes.memmove(self._arguments, fixed, len(fixed))
        self._parameters = (c_void_p * 1)(ctypes.addressof(self._arguments))
        wanted = []
        if pdl and attribute(function.device, "COMPUTE_CAPABILITY_MAJOR") >= 9:
            wanted.append(LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1, 0, 0)))
        if cluster > 1:
            wanted.append(LaunchAttribute(CLUSTER_DIMENSION, 0, (cluster, 1, 1)))
        self._attributes = (LaunchAttribute * 2)(*wanted)
        self._config = LaunchConfig(1, 1, 1, block, 1, 1, 0, None, ctypes.addressof(self._attributes), len(wanted))
        self._name, self._offset, self._pack, self._launch = function.name, len(fixed), packer.pack_into, launch_call()
        self._call = (ctypes.byref(self._config), c_void_p(function.handle), ctypes.byref(self._parameters), None)

    def __call__(self, grid: int, stream: int, *values: int | float | bytes) -> None:
        self._pack(self._arguments, self._offset, *values)
        self._config.grid_x = grid
        self._config.stream = stream
        status = self._launch(*self._call)
        if status:
            raise TpfuseError(
                f"launch of {self._name} failed: {describe(status)} (grid {grid}, block {self._config.block_x})"
            )


def check_layout(function: Function, layout: str, fixed: int) -> None:
    """Raise InvalidArgument unless `fixed` bytes and then `layout` make up the kernel's struct."""
    size = fixed + struct.calcsize(layout)
    padded = fixed + struct.calcsize(f"{layout}0Q")
    if fixed % 8 or function.argument_bytes not in (size, padded):
        raise InvalidArgument(
            f"{function.name} takes a struct of {function.argument_bytes} bytes; given {fixed} fixed bytes (needed: a "
            f"multiple of 8) and the layout {layout!r} make {size}, or {padded} padded to 8."
        )


@cache
def launch_call() -> Any:
    """cuLaunchKernelEx, without argtypes."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError) as error:
        raise Unsupported(f"backend cuda: no NVIDIA driver of CUDA 12 or later here ({error})") from error
