"""`rms_norm` and `qk_rms_norm` of the cuda backend: which kernel serves which shape, and its launch.

The kernels and their protocol are in kernels/sharded_norm.h. This file decides by shape alone (rows, widths, dtype,
alignment), so that every rank launches the same kernel with the same grid. The architecture only decides what a block
keeps in registers, which peers don't see.

Which kernel (4x H200, 1536 + 256 columns a rank; benchmarks/results/ has the figures):
- `row`: a warp has a whole row. Fewest steps between arrival and store; best up to ROW_KERNEL_ROWS rows, where every
  row still has a warp of its own. A row has to fit a warp's registers.
- `block`: a block has 1 to 4 rows at a time and works ahead. Everything else.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from tpfuse.backends.collective import Launches
from tpfuse.backends.cuda import attribute
from tpfuse.backends.cuda.compile import arch_of, compile_kernel, load
from tpfuse.backends.cuda.launch import Launcher
from tpfuse.backends.cuda.workspace import Workspace
from tpfuse.errors import Unsupported
from tpfuse.rope import Rope

OPS = {"rms_norm": 1, "qk_rms_norm": 2}  # number of tensors; also the `op` of an error record
KINDS = {torch.float32: "float", torch.bfloat16: "tpfuse::bf16", torch.float16: "tpfuse::f16"}
GAMMA_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

ROW_KERNEL_ROWS = 2048
FEW_ROWS = 528
ROW_WARPS = 4  # rows, and warps, of a block of the row kernel
ROW_RESIDENT = 4
RESIDENT_THREADS = 896  # of the block kernel on a multiprocessor: leaves 72 registers a thread
# Registers in which the block kernel can work ahead with several rows at a time: NVRTC 13.4 spills below.
DEEP_REGISTERS = {"sm_90a": 72}
DEEP_REGISTERS_ELSEWHERE = 96
NO_TABLES = (0, 0, 0)  # of a rotation
MAX_TABLE_BYTES = 64 << 30  # 2^32 vectors
# The block kernel asks for its first rows before it waits for earlier grids if they are that few, or take more than a
# third of the L2: rows that are there already gain nothing, and the requests cost 2 to 20% (4x H200).
PREFETCH_ROWS = 16
GROUP = 256  # elements of a group: 32 lanes of 8
# Of a half-split rotation of 32, 64, 128 or 256 elements two lanes part the rows. With 16 they would read half sectors.
PARTNERS = (2, 4, 8, 16)

FIXED = struct.Struct("8QQQII")  # workspaces, error record, timeout, rank, op
SHAPE = struct.Struct("4q5I5f4I")  # arguments that are the same in calls that are alike, see `Served`
LAYOUT = f"6Q{SHAPE.size}s3Q"  # and addresses, which are not


@cache
def constant(name: str) -> int:
    """A constant that the kernels define, out of their source."""
    header = Path(__file__).parents[2] / "kernels" / "sharded_norm.h"
    found = re.search(rf"constexpr u32 {name} = (\d+);", header.read_text(encoding="utf-8"))
    assert found is not None, name
    return int(found[1])


BLOCK_GROUPS = constant("kBlockGroups")  # read here, so that torch.compile can trace why_not()


def workspace_bytes() -> int:
    """What the kernels need of a workspace: NormSlots::bytes."""
    packets = 8 * 16  # one of every rank
    blocks = constant("kBlockBlocks") * (4 + constant("kBlockRing") * constant("kBlockRows") * packets)
    rows = constant("kRowPlaces") * (4 + constant("kRowRing") * packets)
    return blocks + rows + 128  # the slots begin at a multiple of 128


def source() -> str:
    """What is compiled: the kernels, and a check that they stay inside of the workspace."""
    return f'#include "sharded_norm.h"\nstatic_assert(tpfuse::NormSlots::bytes <= {workspace_bytes()});\n'


@dataclass(frozen=True)
class Variant:
    """One compiled kernel. `groups`: of 256 elements, of each tensor."""

    kernel: str  # "row" or "block"
    dtype: torch.dtype
    world: int
    groups: tuple[int, ...]
    rows: int  # that a block has at a time
    aligned: bool
    turn: str = "none"  # of the rotation: "halves" or "neighbours"
    few: bool = False  # rows, so that a thread may have all registers
    partner: int = 0  # lanes from one half of a pair to the other, where two such lanes part the block's rows

    @property
    def vectors(self) -> int:
        """Groups that a warp of the block kernel holds of a row. In the 64 registers that 1024 threads leave, four do
        not fit, but in the 128 of half as many threads eight do."""
        least = -(-sum(self.groups) // 32)
        return least if least <= 2 else 8

    @property
    def turns_all(self) -> bool:
        """Whether each lane of the block kernel turns elements of several rows, alone or with another one's."""
        return self.turn != "none" and self.rows > 1 and not self.partner

    def deep(self, arch: str) -> bool:
        """Whether the block kernel has the registers to work ahead. Lanes that turn elements of several rows have not,
        but for neighbours on sm_90a, and with 2 or 16 lanes between halves not in 72: NVRTC spills 4 to 32 bytes."""
        if self.turns_all and not (self.turn == "neighbours" and arch in DEEP_REGISTERS):
            return False
        tight = (
            DEEP_REGISTERS_ELSEWHERE if self.partner in (2, 16) else DEEP_REGISTERS.get(arch, DEEP_REGISTERS_ELSEWHERE)
        )
        needed = 0 if self.rows == 1 else tight
        return self.aligned and sum(self.groups) <= 16 and self.register_budget(arch) >= needed

    @property
    def threads(self) -> int:
        if self.kernel == "row":
            return 32 * (ROW_WARPS + (self.few and self.turn != "none"))
        return 32 * -(-sum(self.groups) // self.vectors)

    @property
    def resident(self) -> int:
        """Blocks on a multiprocessor that the grid is made for; not a matter of alignment, which may differ by rank.
        One block of wide rows takes all registers."""
        if self.kernel == "row":
            return ROW_RESIDENT
        return 1 if self.vectors > 1 else max(1, min(16, RESIDENT_THREADS // self.threads))

    def budgeted(self, arch: str) -> int:
        """Blocks on a multiprocessor that the registers allow; rows of any alignment take more of them, and rotated
        rows, too, on every architecture but sm_90a: most where each lane turns elements of several rows."""
        turned = self.turn != "none"
        if self.few:
            return 1
        if self.kernel == "row":
            spare = 0 if not turned else 2 if arch != "sm_90a" else 0 if self.aligned else 1
            return ROW_RESIDENT - spare
        if self.aligned:
            spare = 0 if not turned or arch == "sm_90a" else 2 if self.turns_all else 1
            return max(1, self.resident - spare)
        return max(1, self.resident // 2)

    def register_budget(self, arch: str) -> int:
        """Of a thread. The warps share out over four files of 512 registers a lane, in units of 8."""
        warps = -(-self.budgeted(arch) * self.threads // 128)
        return min(255, 512 // warps // 8 * 8)

    def name_expression(self, arch: str) -> str:
        kind, aligned, turn = KINDS[self.dtype], str(self.aligned).lower(), f"tpfuse::Turn::{self.turn}"
        if self.kernel == "row":
            groups = [*self.groups, 0][:2]
            template = (kind, self.world, *groups, aligned, ROW_WARPS, self.budgeted(arch), str(self.few).lower(), turn)
            return f"tpfuse::norm_by_row<{', '.join(map(str, template))}>"
        deep, last = str(self.deep(arch)).lower(), (turn, self.partner)
        template = (kind, len(self.groups), self.world, self.vectors, self.rows, deep, aligned)
        return f"tpfuse::norm_by_block<{', '.join(map(str, (*template, self.threads, self.budgeted(arch), *last)))}>"

    def grid(self, rows: int, multiprocessors: int) -> int:
        chunks = -(-rows // self.rows)
        if self.kernel == "row":
            return chunks
        return min(chunks, constant("kBlockBlocks"), self.resident * multiprocessors)


def choose(
    rows: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    world: int,
    aligned: bool,
    turn: str = "none",
    rotary_dim: int = 0,
) -> Variant:
    """The kernel for a shape. A function of what is the same on every rank."""
    groups = tuple(-(-width // GROUP) for width in widths)
    held = sum(map(power_of_two, groups)) * dtype.itemsize  # registers of a row in a warp: 2 for each
    if rows <= ROW_KERNEL_ROWS and held <= 20:
        return Variant("row", dtype, world, groups, ROW_WARPS, aligned, turn, rows <= FEW_ROWS)
    most = 8 // dtype.itemsize if sum(groups) <= 16 and rows > ROW_KERNEL_ROWS // 2 else 1
    apart = rotary_dim // 16  # lanes of 8 elements from one half of a pair to the other
    partner = apart if turn == "halves" and most > 1 and apart in PARTNERS else 0
    return Variant("block", dtype, world, groups, most, aligned, turn, partner=partner)


def variants(worlds: Sequence[int] = (2, 3, 4, 8)) -> Iterator[Variant]:
    """A sample of what `choose` can ask for, for compile checks: every template with its extreme shapes."""
    shapes = (
        (256,),
        (2048,),
        (4096,),
        (8192,),
        (16384,),
        (1536, 256),
        (768, 128),
        (3072, 512),
        (6144, 1024),
        (2048, 512),
        (8448, 8448),
        (16384, 16384),
    )
    seen = set()
    turns = (("none", 0), ("neighbours", 64), *(("halves", rotary_dim) for rotary_dim in (48, 32, 64, 128, 256)))
    for world, widths, dtype, rows, aligned, (turn, rotary_dim) in product(
        worlds, shapes, KINDS, (1, 1024, 100_000), (True, False), turns
    ):
        variant = choose(rows, widths, dtype, world, aligned, turn, rotary_dim)
        if variant not in seen and (turn == "none" or len(widths) == 2):
            seen.add(variant)
            yield variant


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


class ShardedNorm:
    """Launches the kernels for one communicator."""

    def __init__(self, device: torch.device, rank: int, world: int, space: Workspace, timeout: float) -> None:
        assert device.index is not None
        self._index, self._world = device.index, world
        self._arch = arch_of(device.index)
        self._multiprocessors = attribute(device.index, "MULTIPROCESSOR_COUNT")
        self._prefetch_bytes = attribute(device.index, "L2_CACHE_SIZE") // 3
        bases = (*space.bases, *[0] * (8 - world))
        self._fixed = {
            count: FIXED.pack(*bases, space.error_pointer, int(timeout * 1e9), rank, count) for count in OPS.values()
        }
        self._launchers: dict[Variant, Launcher] = {}

    def __call__(
        self,
        launches: Launches,
        xs: Sequence[Tensor],
        weights: Sequence[Tensor],
        ys: Sequence[Tensor],
        eps: Sequence[float],
        weight_bias: float,
        stream: int,
        rope: Rope | None = None,
    ) -> None:
        """ys = norm of xs, which are one tensor, or q and k; of widths and rotated by a rope that `why_not` has
        nothing against.

        `[T, n]` each, T > 0, elements of a row contiguous, or contiguous `[..., n]`; ys may be xs. launches: of calls
        that differ in addresses alone.
        """
        x_at, x2_at = xs[0].data_ptr(), xs[-1].data_ptr()
        y_at, y2_at = ys[0].data_ptr(), ys[-1].data_ptr()
        w_at, w2_at = weights[0].data_ptr(), weights[-1].data_ptr()
        aligned = not (x_at | x2_at | y_at | y2_at | w_at | w2_at) & 15
        start = launches.get(aligned)
        if start is None:
            start = launches[aligned] = self._prepare(xs, weights, ys, eps, weight_bias, aligned, rope)
        launcher, grid, shape = start
        tables = NO_TABLES if rope is None else addresses(rope)
        launcher(grid, stream, x_at, x2_at, y_at, y2_at, w_at, w2_at, shape, *tables)

    def _prepare(
        self,
        xs: Sequence[Tensor],
        weights: Sequence[Tensor],
        ys: Sequence[Tensor],
        eps: Sequence[float],
        weight_bias: float,
        aligned: bool,
        rope: Rope | None,
    ) -> tuple[Launcher, int, bytes]:
        """What a call launches, on which grid, and its arguments but for addresses."""
        x, widths = xs[0], tuple(t.shape[-1] for t in xs)
        n, m = widths[0], widths[-1]
        rows, strides = x.numel() // n, [row_stride(t) for t in (xs[0], xs[-1], ys[0], ys[-1])]
        aligned = aligned and whole_vectors(x.element_size(), strides, n, m)
        turn = "none" if rope is None else "neighbours" if rope.interleaved else "halves"
        variant = choose(rows, widths, x.dtype, self._world, aligned, turn, 0 if rope is None else rope.rotary_dim)
        launcher, grid = self._launcher(variant), variant.grid(rows, self._multiprocessors)
        shape = SHAPE.pack(
            *strides, rows, n, m, GAMMA_CODES[weights[0].dtype], GAMMA_CODES[weights[-1].dtype], eps[0], eps[-1],
            1.0 / (n * self._world), 1.0 / (m * self._world), weight_bias,
            *((1, 0, 0) if rope is None else (rope.head_dim, rope.rotary_dim, len(rope.cos))),
            rows <= PREFETCH_ROWS or rows * sum(widths) * x.element_size() > self._prefetch_bytes,
        )  # fmt: skip
        return launcher, grid, shape

    def _launcher(self, variant: Variant) -> Launcher:
        found = self._launchers.get(variant)
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                raise Unsupported(
                    f"sharded norm: the kernel for {variant.groups} groups of {variant.dtype} is not compiled yet, and "
                    "a CUDA graph is being captured. Call it once with this dtype and these widths, and as many rows, "
                    "before the capture."
                )
            made = compile_kernel(source(), variant.name_expression(self._arch), arch=self._arch)
            found = self._launchers[variant] = Launcher(
                load(made, self._index), LAYOUT, fixed=self._fixed[len(variant.groups)], block=variant.threads, pdl=True
            )
        return found


def why_not(widths: Sequence[int], rope: Rope | None = None) -> str:
    """Why the kernels can't serve rows of these widths, or rotate by `rope`; empty if they can.

    From what is the same on every rank, so that all decide alike.
    """
    groups = sum(-(-width // GROUP) for width in widths)
    if groups > BLOCK_GROUPS:
        return f"cuda kernels take rows of up to {BLOCK_GROUPS * GROUP} elements a rank; given {sum(widths)}"
    if rope is None:
        return ""
    pairs = rope.rotary_dim // 2
    if GROUP % rope.head_dim or pairs % (4 if rope.interleaved else 8):
        return (
            f"cuda kernels rotate heads of a power of two up to {GROUP} elements, by multiples of 16 (interleaved: 8) "
            f"of them; given head_dim={rope.head_dim}, rotary_dim={rope.rotary_dim}"
        )
    if max(rope.cos.nbytes, rope.sin.nbytes) > MAX_TABLE_BYTES:
        return f"cuda kernels rotate by tables of up to 64 GiB; given {rope.cos.nbytes} and {rope.sin.nbytes} bytes"
    return ""


def addresses(rope: Rope) -> tuple[int, int, int]:
    return rope.cos.data_ptr(), rope.sin.data_ptr(), rope.positions.data_ptr()


def row_stride(x: Tensor) -> int:
    """From a row to the next, of `[T, n]` or of contiguous `[..., n]`."""
    return x.stride(0) if x.dim() == 2 else x.shape[-1]


def whole_vectors(itemsize: int, strides: Sequence[int], *widths: int) -> bool:
    """Whether rows that begin at a 16-byte vector of 8 elements all do, and end at one."""
    return all(stride * itemsize % 16 == 0 for stride in strides) and all(width % 8 == 0 for width in widths)
