"""`all_reduce` and `all_reduce_rms_norm` of the cuda backend: which kernel serves which call, and its launch.

The kernels and their protocol are in kernels/all_reduce.h. Algorithm, slots and launches follow from rows, width,
dtype, thresholds, the number of ranks and the GPU's model, all the same on every rank; alignment, which may differ,
changes nothing that peers see.

Which kernel (4x H200; benchmarks/results/ has the figures), by Thresholds, which `tpfuse tune` measures elsewhere:
- one-shot while a rank's rows take at most one_shot_kib: its W - 1 times these bytes cost less than a second flight
  over the links. It is bytes that decide, so a row counts twice if it is twice as wide, or in fp32.
- two-shot above.
- A row is split over blocks of 2 or 3 warps up to split_rows, where rows alone would leave multiprocessors idle.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from tpfuse.backends.collective import Launches
from tpfuse.backends.cuda import attribute
from tpfuse.backends.cuda.compile import arch_of, compile_kernel, load
from tpfuse.backends.cuda.launch import Launcher
from tpfuse.backends.cuda.sharded_norm import GROUP, KINDS, power_of_two, row_stride, whole_vectors
from tpfuse.backends.cuda.workspace import Fill, Workspace
from tpfuse.errors import Unsupported
from tpfuse.plan import slot_bytes, within
from tpfuse.quant import Format

OPS = {"all_reduce": 3, "all_reduce_rms_norm": 4}  # the `op` of an error record
MARK = 0x80000000  # kMark
HEADER = 128 << 10  # kReduceHeader
FLAGS = (HEADER - 4096) // 4  # of rows that free slots
WORKSPACE_BYTES = 60 << 20  # with the norms' own workspace less than 64 MiB
MAX_GROUPS = 64  # kReduceGroups
MAX_BLOCKS = 65535  # of a launch: the call counter has 16 bits for them; more rows take more launches

MAX_WIDTH = MAX_GROUPS * GROUP
MAX_TERMS = 32  # most outputs of experts in a row
MAX_SPLIT_ROWS = 1024
SPLIT = {"one_shot": 8, "two_shot": 6}  # most blocks of a row, up to split_rows
WIDE_WARPS = 24  # most warps of a block, else a thread has several vectors of a row

FIXED = struct.Struct("8QQQQIIII")  # workspaces, own, error record, timeout, rank, op, half, padding
SHAPE = struct.Struct("4q8I3f0Q")  # arguments that are the same in calls that are alike, see `Served`
LAYOUT = f"8Q{SHAPE.size}s"  # and addresses, which are not
NO_RESIDUAL = "tpfuse::Nothing"


@dataclass(frozen=True)
class Thresholds:
    """Up to which size a call goes one way; above, the other. The same on every rank. Results don't depend on them:
    all ways give the same bits.

    one_shot_kib: KiB of one rank's rows, `slot_bytes` each. split_rows: rows.
    """

    one_shot_kib: int
    split_rows: int

    def edges(self, row_bytes: int) -> tuple[int, ...]:
        """Row counts that stand for all others, of rows of so many bytes: whatever is compiled for these is all that
        there is."""
        bounds = ((self.one_shot_kib << 10) // row_bytes, self.split_rows)
        return tuple(sorted({1, *bounds, *(bound + 1 for bound in bounds)} - {0}))


# By number of ranks. Those of 2 and 4 follow from measurements on H200 (benchmarks/results/tune-h200x*.txt); the others
# are scaled from those of 4 by bytes.
DEFAULTS: Mapping[int, Thresholds] = {
    2: Thresholds(1536, 96),
    3: Thresholds(192, 128),
    4: Thresholds(128, 128),
    5: Thresholds(96, 128),
    6: Thresholds(96, 128),
    7: Thresholds(64, 128),
    8: Thresholds(64, 128),
}


@dataclass(frozen=True)
class Variant:
    """One compiled kernel. Names as in kernels/all_reduce.h."""

    algorithm: str  # "one_shot" or "two_shot"
    path: str  # "sum", "norm" or "early"
    dtype: torch.dtype
    residual: torch.dtype | None
    gamma: torch.dtype
    world: int
    parts: int
    vectors: int
    threads: int
    aligned: bool
    quant: str = "none"
    layout: str = "row_major"
    keep: bool = True
    terms: int = 1

    @property
    def resident(self) -> int:
        """Blocks on a multiprocessor that the registers are shared between.

        Rows in flight decide the speed of many rows, so there are as many as compile without spills,
        or with few (tests/test_all_reduce_compile.py says which): an owner holds the vectors of all ranks.
        """
        held = self.dtype.itemsize * self.world
        if self.vectors > 2 or held > 16 or (held > 8 and self.parts > 1):
            threads = 512
        elif self.vectors > 1 or self.parts > 1 or (held > 8 and not self.aligned):  # parts: few rows, so few blocks
            threads = 768
        else:
            threads = 1152 if held > 8 or not self.aligned else 1536
        return max(1, min(16, threads // self.threads))

    @property
    def register_budget(self) -> int:
        return min(255, 65536 // (self.resident * self.threads) // 8 * 8)

    @property
    def name_expression(self) -> str:
        residual = NO_RESIDUAL if self.residual is None else KINDS[self.residual]
        template = (
            KINDS[self.dtype], residual, KINDS[self.gamma], self.world, f"tpfuse::Path::{self.path}",
            f"tpfuse::quant::Kind::{self.quant}", f"tpfuse::quant::Layout::{self.layout}", str(self.keep).lower(),
            self.parts, self.vectors, str(self.aligned).lower(), self.threads, self.resident,
            self.terms,
        )  # fmt: skip
        return f"tpfuse::reduce_{self.algorithm}<tpfuse::Form<{', '.join(map(str, template))}>>"


def limits(world: int) -> Thresholds:
    """The largest thresholds: one-shot needs slots for every rank's row at once, of rows of any width and dtype.

    Wide rows run out of bytes. Narrow ones run out of flags, which bound the ring, long before.
    """

    def room(width: int, itemsize: int) -> int:
        slot = slot_bytes(width, itemsize)
        return slot * min(half_bytes() // (world * slot), ring_rows(width, itemsize, world, 1))

    return Thresholds(min(room(1, 2), room(MAX_WIDTH, 4)) >> 10, MAX_SPLIT_ROWS)


def algorithm_for(size_in_bytes: int, path: str, thresholds: Thresholds) -> str:
    """What serves rows of so many bytes in all, the same on every rank. Before a gather there is an owner of each row,
    so that is two-shot at any size."""
    return "one_shot" if within(size_in_bytes, thresholds.one_shot_kib) and path != "early" else "two_shot"


def spread(algorithm: str, width: int, held: int, split: bool) -> tuple[int, int, int]:
    """How a row is spread: blocks of a row, vectors of a thread, threads of a block. held: bytes of an element on all
    ranks. split: over blocks, if it is wide enough."""
    groups = -(-width // GROUP)
    most = min(SPLIT[algorithm], groups // 2) if split else 1
    if most > 1:
        warps = -(-groups // most)
        return -(-groups // warps), 1, 32 * warps
    vectors = power_of_two(-(-groups // (WIDE_WARPS if held <= 16 else 16)))
    return 1, vectors, 32 * -(-groups // vectors)


def ring_rows(width: int, itemsize: int, world: int, parts: int) -> int:
    """How many rows have slots in a half of the workspace: further ones wait for them to become free."""
    most = min(half_bytes() // (2 * slot_bytes(width, itemsize)), 2 * FLAGS // parts)
    return most // (2 * world) * 2 * world


def half_bytes() -> int:
    return (WORKSPACE_BYTES - HEADER) // 2 // 128 * 128


def why_not(width: int, terms: int = 1) -> str:
    """Why the kernels can't serve rows of this width, sums of so many experts' outputs; empty if they can."""
    if width > MAX_WIDTH:
        return f"cuda kernels reduce rows of up to {MAX_WIDTH} elements; given {width}"
    if terms > MAX_TERMS:
        return f"cuda kernels sum the outputs of up to {MAX_TERMS} experts; given {terms}"
    return ""


def goes_early(
    size_in_bytes: int, thresholds: Thresholds, row_sharded: bool, residual: bool, quant: bool, keep_norm: bool
) -> bool:
    """Whether rows of so many bytes in all are normed by their owners, before they are gathered: where only owners have
    the residual, and, above one-shot, where the quantised row is all that anybody needs."""
    small = within(size_in_bytes, thresholds.one_shot_kib)
    return row_sharded or (quant and not residual and not keep_norm and not small)


def source() -> str:
    """What is compiled, with a check that host and device agree about constants."""
    checks = {"kMark": MARK, "kReduceHeader": HEADER, "kReduceGroups": MAX_GROUPS}
    asserts = "".join(f"static_assert(tpfuse::{name} == {value}u);\n" for name, value in checks.items())
    return f'#include "all_reduce.h"\n{asserts}'


def variants(worlds: Sequence[int] = (2, 3, 4, 8), clusters: bool = True) -> Iterator[Variant]:
    """A sample of what calls can ask for, for compile checks: every template, with its extreme shapes."""
    f32, b16, f16 = torch.float32, torch.bfloat16, torch.float16
    types = ((b16, b16, b16), (b16, f32, b16), (b16, None, f32), (f16, f16, f32), (f32, f32, f32))
    formats = (
        ("none", "row_major", True),
        ("fp8_static", "row_major", False),
        ("fp8_per_token", "row_major", True),
        ("fp8_per_group", "column_major", False),
        ("mxfp8", "swizzled", False),
        ("nvfp4", "swizzled", False),
        ("nvfp4", "row_major", True),
    )
    seen = set()
    for world, (dtype, residual, gamma), rows, width, aligned in product(
        worlds, types, (1, 64, 4096), (256, 2880, 3072, 6144, 8192, 16384), (True, False)
    ):
        kinds = (("sum", formats[0], 1), *((path, fmt, 1) for path, fmt in product(("norm", "early"), formats)))
        summing = (("norm", formats[0], 8), ("norm", formats[2], 3), ("early", formats[0], 8))
        for path, (quant, layout, keep), terms in (*kinds, *summing):
            thresholds = DEFAULTS[world]
            algorithm = algorithm_for(rows * slot_bytes(width, dtype.itemsize), path, thresholds)
            split = clusters and rows <= thresholds.split_rows
            spreading = spread(algorithm, width, dtype.itemsize * world, split)
            stream, weight = (None, dtype) if path == "sum" else (residual, gamma)
            variant = Variant(
                algorithm, path, dtype, stream, weight, world, *spreading, aligned, quant, layout, keep, terms
            )  # fmt: skip
            if variant not in seen:
                seen.add(variant)
                yield variant


class Part(NamedTuple):
    """A launch of a call: of all its rows, or of as many as a launch may have."""

    launcher: Launcher
    grid: int
    offsets: tuple[int, ...]  # of its rows, from each address that the call is given
    shape: bytes  # arguments but for addresses


class AllReduce:
    """Launches the kernels for one communicator. `space`: made with `fills`."""

    def __init__(
        self,
        device: torch.device,
        rank: int,
        world: int,
        space: Workspace,
        timeout: float,
        thresholds: Thresholds,
    ) -> None:
        assert device.index is not None
        self._index, self._world, self._thresholds = device.index, world, thresholds
        self._arch = arch_of(device.index)
        self._clusters = attribute(device.index, "COMPUTE_CAPABILITY_MAJOR") >= 9
        bases = (*space.bases, *[0] * (8 - world))
        self._fixed = {
            op: FIXED.pack(*bases, bases[rank], space.error_pointer, int(timeout * 1e9), rank, code, half_bytes(), 0)
            for op, code in OPS.items()
        }
        self._launchers: dict[tuple[str, Variant], Launcher] = {}

    def all_reduce(self, launches: Launches, x: Tensor, y: Tensor, stream: int) -> None:
        """y = the sum of every rank's x, both `[T, H]` or contiguous `[..., H]`.

        launches: of calls that differ in addresses alone.
        """
        self._run(launches, "all_reduce", "sum", x, 0, y, None, None, None, None, None, None, 0.0, 0.0, stream)

    def all_reduce_rms_norm(
        self,
        launches: Launches,
        x: Tensor,
        top_k: int,
        weight: Tensor,
        residual: Tensor | None,
        new_residual: Tensor | None,
        norm: Tensor | None,
        quant: Format | None,
        bytes_: Tensor | None,
        scale: Tensor | None,
        eps: float,
        weight_bias: float,
        early: bool,
        stream: int,
    ) -> None:
        """Fills norm, new_residual, bytes_ and scale, whichever are not None. top_k: of x `[T, top_k, H]`, or 0."""
        path = "early" if early else "norm"
        self._run(
            launches, "all_reduce_rms_norm", path, x, top_k, norm, weight, residual, new_residual, quant, bytes_, scale,
            eps, weight_bias, stream,
        )  # fmt: skip

    def _run(
        self,
        launches: Launches,
        op: str,
        path: str,
        x: Tensor,
        top_k: int,
        y: Tensor | None,
        weight: Tensor | None,
        residual: Tensor | None,
        new_residual: Tensor | None,
        quant: Format | None,
        bytes_: Tensor | None,
        scale: Tensor | None,
        eps: float,
        weight_bias: float,
        stream: int,
    ) -> None:
        x_at, y_at = x.data_ptr(), 0 if y is None else y.data_ptr()
        residual_at = 0 if residual is None else residual.data_ptr()
        new_at = 0 if new_residual is None else new_residual.data_ptr()
        gamma_at = 0 if weight is None else weight.data_ptr()
        quant_at = (0, 0, 0) if quant is None else (address(bytes_), address(scale), address(quant.given))
        aligned = not (x_at | y_at | residual_at | gamma_at) & 15
        parts = launches.get(aligned)
        if parts is None:
            parts = launches[aligned] = self._prepare(
                op, path, x, top_k, y, weight, residual, new_residual, quant, eps, weight_bias, aligned
            )
        first, others = parts
        addresses = (x_at, y_at, residual_at, new_at, gamma_at, *quant_at)
        first.launcher(first.grid, stream, *addresses, first.shape)
        for part in others:
            part.launcher(part.grid, stream, *map(add, addresses, part.offsets), part.shape)

    def _prepare(
        self,
        op: str,
        path: str,
        x: Tensor,
        top_k: int,
        y: Tensor | None,
        weight: Tensor | None,
        residual: Tensor | None,
        new_residual: Tensor | None,
        quant: Format | None,
        eps: float,
        weight_bias: float,
        aligned: bool,
    ) -> tuple[Part, list[Part]]:
        """The launches of a call: the first one begins at the addresses that the call is given, others further on."""
        terms, width = top_k or 1, x.shape[-1]
        rows = x.numel() // (terms * width)
        x_stride, term_stride = (x.stride(0), x.stride(1)) if top_k else (row_stride(x), 0)
        y_stride = 0 if y is None else row_stride(y)
        residual_stride = 0 if residual is None else row_stride(residual)
        aligned = aligned and whole_vectors(x.element_size(), (x_stride, term_stride, y_stride), width)
        if residual is not None:
            aligned = aligned and whole_vectors(residual.element_size(), (residual_stride,))
        launcher, variant, ring, step = self._choose(op, path, rows, x, terms, y, weight, residual, quant, aligned)
        item, groups = x.element_size(), -(-width // GROUP)
        slot, pitch = slot_bytes(width, item), 0 if quant is None else quant.pitch(rows, width)
        parts = []
        for first in range(0, rows, step):
            count = min(step, rows - first)
            own = first // self._world if path == "early" else first
            offsets = (
                first * x_stride * item,
                first * y_stride * item,
                0 if residual is None else own * residual_stride * residual.element_size(),
                0 if new_residual is None else own * width * new_residual.element_size(),
                0,
                0 if quant is None else first * width // quant.packed,
                0,
                0,
            )
            shape = SHAPE.pack(
                x_stride, term_stride, y_stride, residual_stride, count, width, groups, slot, ring, first, rows, pitch,
                eps, 1.0 / width, weight_bias,
            )  # fmt: skip
            parts.append(Part(launcher, count * variant.parts, offsets, shape))
        return parts[0], parts[1:]

    def _choose(
        self,
        op: str,
        path: str,
        rows: int,
        x: Tensor,
        terms: int,
        y: Tensor | None,
        weight: Tensor | None,
        residual: Tensor | None,
        quant: Format | None,
        aligned: bool,
    ) -> tuple[Launcher, Variant, int, int]:
        """The launcher for a call, what it launches, the rows that have slots, and the rows of a launch."""
        width = x.shape[-1]
        slot = slot_bytes(width, x.element_size())
        kind, layout = ("none", "row_major") if quant is None else (quant.kind, quant.layout)
        stream = None if residual is None else residual.dtype
        gamma = x.dtype if weight is None else weight.dtype

        def variant(count: int) -> Variant:
            algorithm = algorithm_for(count * slot, path, self._thresholds)
            split = self._clusters and count <= self._thresholds.split_rows
            spreading = spread(algorithm, width, x.element_size() * self._world, split)
            return Variant(
                algorithm, path, x.dtype, stream, gamma, self._world, *spreading, aligned, kind, layout, y is not None,
                terms,
            )  # fmt: skip

        # Calls with other numbers of rows are likely to come, perhaps first while a graph is captured.
        if not torch.cuda.is_current_stream_capturing():
            for count in self._thresholds.edges(slot):
                self._launcher(op, variant(count))
        chosen = variant(rows)
        ring = ring_rows(width, x.element_size(), self._world, chosen.parts)
        step = MAX_BLOCKS // chosen.parts // self._world * self._world
        return self._launcher(op, chosen), chosen, ring, step

    def _launcher(self, op: str, variant: Variant) -> Launcher:
        found = self._launchers.get((op, variant))
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                raise Unsupported(
                    f"{op}: the kernel for {variant.dtype} and this width is not compiled yet, and a CUDA graph is "
                    "being captured. Call it once with these dtypes, this width, format and top_k before the capture."
                )
            made = compile_kernel(source(), variant.name_expression, arch=self._arch)
            found = self._launchers[op, variant] = Launcher(
                load(made, self._index), LAYOUT, fixed=self._fixed[op], block=variant.threads,
                cluster=variant.parts, pdl=True,
            )  # fmt: skip
        return found


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def fills() -> tuple[Fill, ...]:
    """What a new workspace holds: marks in both halves."""
    return (Fill(HEADER, WORKSPACE_BYTES - HEADER, MARK),)
