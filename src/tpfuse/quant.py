"""Formats of quantised outputs: what is stored, where its scales lie, and the arithmetic to the last bit.

A format is a small frozen object that is given as `quant=`. Its `encode` is the contract of the kernels, in plain
torch on any device: each operation is ONE fp32 operation of IEEE 754, in the order written here, so that a kernel
(kernels/quant.h) computes the same bits. docs/quantisation.md has shapes, layouts and who reads them;
docs/contract.md the reasons.

What is quantised is the ROUNDED norm, widened to fp32. With `amax` the largest magnitude that one scale covers:

    fp8_static      inverse = 1 / scale                             the scale is given
    fp8_per_token   scale = max(amax / 448, 1 / (448 * 512))        inverse = 1 / scale
    fp8_per_group   scale = max(amax / 448, 1e-10 / 448)            inverse = 1 / scale
    mxfp8           scale = 2^e, the least with 448 * 2^e >= amax   inverse = 2^-e
    nvfp4           scale = e4m3(global * (amax * (1/6)))           inverse = 1 / (scale * (1/global)), 0 if scale is 0
    quant = e4m3(y * inverse), or e2m1(y * inverse)

Conversions round to nearest even and saturate. NaN is 0x7f in E4M3; E2M1 has none and stores 6, and the scale is NaN.
A NaN makes amax NaN, and with it the scale and everything under it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tpfuse.errors import InvalidArgument

E4M3_MAX = 448.0
E2M1_MAX = 6.0
# Of amax / 448, as vLLM has them: a token of zeros has a scale too. 1e-10 is meant for amax, hence the division.
TOKEN_FLOOR = 1.0 / (E4M3_MAX * 512.0)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits of the code; the fourth is the sign
# Halfway between neighbours of E2M1; a tie goes to the even code, so the odd ones belong to the code above.
_HALFWAY = tuple((a + b) / 2 for a, b in pairwise(E2M1))
ROW_TILE, COLUMN_TILE = 128, 4  # of swizzled scales


def group_floor(eps: float) -> float:
    """eps / 448 in fp32. Not by torch: this runs at import, where a default dtype or device would change it."""
    return c_float(c_float(eps).value / E4M3_MAX).value


GROUP_FLOOR = group_floor(1e-10)


@dataclass(frozen=True, eq=False)
class Format(ABC):
    """A quantised format. `encode` and `decode` are the reference; `empty` makes what a kernel fills."""

    kind: ClassVar[str]  # the enumerator of kernels/quant.h
    group: ClassVar[int]  # elements that one scale covers; 0: the whole row
    packed: ClassVar[int] = 1  # elements in a byte
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    scale_dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def layout(self) -> str:
        """How scales lie in memory: row_major, column_major or swizzled, the enumerators of kernels/quant.h."""
        return "row_major"

    @property
    def name(self) -> str:
        """Kind and layout: the key in FORMATS."""
        return self.kind

    @property
    def given(self) -> Tensor | None:
        """The one-element tensor that the user brings: the scale of fp8_static, the global scale of nvfp4."""
        return None

    def __repr__(self) -> str:
        return f"quant.{self.name}"

    def check(self, op: str, x: Tensor) -> None:
        """Raise InvalidArgument unless rows like x can be quantised."""
        width = x.shape[-1]
        if width % (self.group or self.packed):
            raise InvalidArgument(
                f"{op}: quant={self!r} has a scale for each {self.group} elements, x is {width} wide; "
                f"needed: a multiple of {self.group}."
            )
        scale = self.given
        if scale is not None and (
            scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != x.device or scale.requires_grad
        ):
            raise InvalidArgument(
                f"{op}: the tensor in quant={self!r} is {list(scale.shape)} {scale.dtype} on {scale.device}; "
                f"needed: one float32 on {x.device}, without gradient."
            )

    def groups(self, width: int) -> int:
        """Scales of a row."""
        return width // self.group if self.group else 1

    def pitch(self, rows: int, width: int) -> int:
        """The number that a kernel needs to find a scale: scales of a row (row_major), floats from a column to the
        next (column_major), tiles side by side (swizzled)."""
        return -(-self.groups(width) // COLUMN_TILE) if self.layout == "swizzled" else self.groups(width)

    def empty(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quant and scale for rows like x, not filled. The scale of fp8_static is the given one."""
        lead, width = x.shape[:-1], x.shape[-1]
        quant = torch.empty((*lead, width // self.packed), dtype=self.dtype, device=x.device)
        return quant, self._empty_scale(lead, width, x.device)

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """`(quant, scale)` of rows `[..., H]` of any float dtype."""
        self.check("encode", y)
        wide = y.float().unflatten(-1, (-1, self.group or y.shape[-1]))
        scale, inverse = self._scales(wide)
        scaled = (wide * inverse.unsqueeze(-1)).flatten(-2)
        return self._round(scaled), self._lay_out(scale)

    def decode(self, quant: Tensor, scale: Tensor) -> Tensor:
        """fp32 `[..., H]`: what the bytes stand for."""
        elements, factors = self.unpack(quant, scale)
        groups: Tensor = elements.unflatten(-1, (factors.shape[-1], -1)) * factors.unsqueeze(-1)
        return groups.flatten(-2)

    def unpack(self, quant: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """fp32: the elements `[..., H]` before they are scaled, and the factor of each group, `[..., groups]`."""
        elements = self._widen(quant)
        stored = self._row_major(scale, elements)
        if stored.shape != (*elements.shape[:-1], self.groups(elements.shape[-1])):
            raise InvalidArgument(
                f"decode: {self!r} with quant {list(quant.shape)} and scale {list(scale.shape)}; needed: the two that "
                "encode() or a call returned."
            )
        return elements, self._factors(stored)

    @abstractmethod
    def _scales(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The scales of fp32 `[..., groups, elements]`, as they are stored, and what elements are multiplied by."""

    def _round(self, scaled: Tensor) -> Tensor:
        return to_e4m3(scaled)

    def _widen(self, quant: Tensor) -> Tensor:
        return quant.float()

    def _factors(self, scale: Tensor) -> Tensor:
        """fp32: what the stored scales stand for."""
        return scale.float()

    def _empty_scale(self, lead: torch.Size, width: int, device: torch.device) -> Tensor:
        return torch.empty((*lead, self.groups(width)), dtype=self.scale_dtype, device=device)

    def _lay_out(self, scale: Tensor) -> Tensor:
        return scale

    def _row_major(self, scale: Tensor, values: Tensor) -> Tensor:
        """The inverse of `_lay_out`; values: `[..., H]`."""
        return scale


@dataclass(frozen=True, eq=False, repr=False)
class FP8Static(Format):
    """E4M3, one scale for the whole tensor, known before: `y = quant * scale`. scale: fp32, one element."""

    kind = "fp8_static"
    group = 0
    scale: Tensor

    def __post_init__(self) -> None:
        needed(self.scale)

    @property
    def given(self) -> Tensor:
        return self.scale

    def _scales(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale, 1.0 / self.scale.reshape(())

    def _empty_scale(self, lead: torch.Size, width: int, device: torch.device) -> Tensor:
        return self.scale

    def _row_major(self, scale: Tensor, values: Tensor) -> Tensor:
        return scale.reshape(1).expand(*values.shape[:-1], 1) if scale.numel() == 1 else scale


@dataclass(frozen=True, eq=False, repr=False)
class FP8PerToken(Format):
    """E4M3, one scale a row, computed from its largest magnitude. Scales: fp32 `[..., 1]`."""

    kind = "fp8_per_token"
    group = 0
    floor: ClassVar[float] = TOKEN_FLOOR

    def _scales(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        amax = groups.abs().amax(-1)
        # A tensor, not a number: on GPUs torch divides by a number by multiplying with its reciprocal.
        scale = (amax / amax.new_full((), E4M3_MAX)).clamp(min=self.floor)
        return scale, 1.0 / scale


@dataclass(frozen=True, eq=False, repr=False)
class FP8PerGroup(FP8PerToken):
    """E4M3, one fp32 scale for 128 neighbouring elements. Scales: `[..., H/128]`.

    column_major: the scales of a column lie together, `stride(-2)` is 1. tma_aligned: columns then start at multiples
    of 16 bytes, so the stride from one to the next is the number of rows, rounded up to 4.
    """

    kind = "fp8_per_group"
    group = 128
    floor: ClassVar[float] = GROUP_FLOOR
    column_major: bool = False
    tma_aligned: bool = False

    def __post_init__(self) -> None:
        if self.tma_aligned and not self.column_major:
            raise InvalidArgument("FP8PerGroup: tma_aligned=True is about columns; needed with it: column_major=True.")

    @property
    def layout(self) -> str:
        return "column_major" if self.column_major else "row_major"

    @property
    def name(self) -> str:
        suffix = "_tma_aligned" if self.tma_aligned else "_column_major" if self.column_major else ""
        return self.kind + suffix

    def pitch(self, rows: int, width: int) -> int:
        return -(-rows // 4) * 4 if self.tma_aligned else rows if self.column_major else self.groups(width)

    def _empty_scale(self, lead: torch.Size, width: int, device: torch.device) -> Tensor:
        rows, groups = prod(lead), self.groups(width)
        if not self.column_major:
            return super()._empty_scale(lead, width, device)
        columns = torch.empty((groups, self.pitch(rows, width)), dtype=torch.float32, device=device)
        return columns[:, :rows].t().view(*lead, groups)

    def _lay_out(self, scale: Tensor) -> Tensor:
        lead, groups = scale.shape[:-1], scale.shape[-1]
        return self._empty_scale(lead, groups * self.group, scale.device).copy_(scale) if self.column_major else scale


@dataclass(frozen=True, eq=False, repr=False)
class _Swizzlable(Format):
    """Formats whose scales are bytes, row-major `[..., groups]` or swizzled; see `swizzle`."""

    @property
    @abstractmethod
    def swizzles(self) -> bool: ...

    @property
    def layout(self) -> str:
        return "swizzled" if self.swizzles else "row_major"

    @property
    def name(self) -> str:
        return self.kind + ("_swizzled" if self.swizzles else "")

    def _empty_scale(self, lead: torch.Size, width: int, device: torch.device) -> Tensor:
        if not self.swizzles:
            return super()._empty_scale(lead, width, device)
        return torch.empty(swizzled_shape(prod(lead), self.groups(width)), dtype=self.scale_dtype, device=device)

    def _lay_out(self, scale: Tensor) -> Tensor:
        return swizzle(scale) if self.swizzles else scale

    def _row_major(self, scale: Tensor, values: Tensor) -> Tensor:
        lead, groups = values.shape[:-1], self.groups(values.shape[-1])
        if not self.swizzles or scale.numel() != prod(swizzled_shape(prod(lead), groups)):
            return scale
        return unswizzle(scale, prod(lead), groups).view(*lead, groups)


@dataclass(frozen=True, eq=False, repr=False)
class MXFP8(_Swizzlable):
    """OCP MXFP8: E4M3, a power of two for 32 neighbouring elements, as its biased exponent (E8M0) in uint8.

    swizzled: scales in tiles of 128 x 4, see `swizzle`; else `[..., H/32]`.
    """

    kind = "mxfp8"
    group = 32
    scale_dtype = torch.uint8
    swizzled: bool = False

    @property
    def swizzles(self) -> bool:
        return self.swizzled

    def _scales(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """448 is 1.75 * 2^8: the exponent of amax less 8, and one more where its mantissa is above 1.75. NaN is 255."""
        amax = groups.abs().amax(-1)
        bits = amax.view(torch.int32)
        exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()).clamp(min=0)
        inverse = ((254 - exponent) << 23).view(torch.float32)
        nan = amax.isnan()
        return torch.where(nan, 255, exponent).to(torch.uint8), inverse.masked_fill(nan, torch.nan)

    def _factors(self, scale: Tensor) -> Tensor:
        exponent = scale.int()
        factor = torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)  # 2^-127 is subnormal
        return factor.masked_fill(exponent == 255, torch.nan)


@dataclass(frozen=True, eq=False, repr=False)
class NVFP4(_Swizzlable):
    """NVFP4: E2M1, two in a byte (the first in the low half), and an E4M3 scale for 16 neighbouring elements.

    global_scale: fp32, one element, what block scales are multiplied by before they are rounded: `448 * 6 / amax` of
    the tensor. `y = quant * scale / global_scale`. swizzled: scales in tiles of 128 x 4; else `[..., H/16]`.
    """

    kind = "nvfp4"
    group = 16
    packed = 2
    dtype = torch.uint8
    scale_dtype = torch.float8_e4m3fn
    global_scale: Tensor
    swizzled: bool = True

    def __post_init__(self) -> None:
        needed(self.global_scale)

    @property
    def given(self) -> Tensor:
        return self.global_scale

    @property
    def swizzles(self) -> bool:
        return self.swizzled

    def _scales(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        amax = groups.abs().amax(-1)
        scale = to_e4m3(self.global_scale.reshape(()) * (amax * (1.0 / E2M1_MAX)))
        return scale, (1.0 / self._factors(scale)).masked_fill(scale.float() == 0, 0.0)

    def _round(self, scaled: Tensor) -> Tensor:
        codes = to_e2m1(scaled)
        return codes[..., 0::2] | codes[..., 1::2] << 4

    def _widen(self, quant: Tensor) -> Tensor:
        codes = torch.stack((quant & 15, quant >> 4), -1).flatten(-2).long()
        return torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float32, device=quant.device)[codes]

    def _factors(self, scale: Tensor) -> Tensor:
        return scale.float() * (1.0 / self.global_scale.reshape(()))


# Every format by its name, made of the tensor that is given with it.
FORMATS: dict[str, Callable[[Tensor | None], Format]] = {
    "fp8_static": lambda given: FP8Static(needed(given)),
    "fp8_per_token": lambda given: FP8PerToken(),
    "fp8_per_group": lambda given: FP8PerGroup(),
    "fp8_per_group_column_major": lambda given: FP8PerGroup(column_major=True),
    "fp8_per_group_tma_aligned": lambda given: FP8PerGroup(column_major=True, tma_aligned=True),
    "mxfp8": lambda given: MXFP8(),
    "mxfp8_swizzled": lambda given: MXFP8(swizzled=True),
    "nvfp4": lambda given: NVFP4(needed(given), swizzled=False),
    "nvfp4_swizzled": lambda given: NVFP4(needed(given)),
}


def named(name: str, given: Tensor | None) -> Format | None:
    """How an operator's arguments become a format: a key of FORMATS and the tensor that is given with it. None for an
    empty name."""
    return FORMATS[name](given) if name else None


def needed(given: object) -> Tensor:
    if not isinstance(given, Tensor):
        raise InvalidArgument(
            f"quant: this format needs its scale, a tensor of one float32; given: {type(given).__name__}."
        )
    return given


def to_e4m3(x: Tensor) -> Tensor:
    """fp32 to float8_e4m3fn: to nearest even, beyond 448 to 448, NaN to 0x7f whatever its sign."""
    return torch.where(x.isnan(), torch.nan, x.clamp(-E4M3_MAX, E4M3_MAX)).to(torch.float8_e4m3fn)


def to_e2m1(x: Tensor) -> Tensor:
    """fp32 to the codes of E2M1, 0 to 15, one in a uint8: to nearest, ties to the even code, beyond 6 and NaN to 6."""
    magnitude, code = x.abs(), torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for i, halfway in enumerate(_HALFWAY):
        code += ~(magnitude < halfway if i % 2 else magnitude <= halfway)  # NaN is above all
    return torch.where(x.signbit() & ~x.isnan(), code + 8, code)


def swizzled_shape(rows: int, groups: int) -> tuple[int, int]:
    """Scales of `rows` rows, padded to whole tiles."""
    return -(-rows // ROW_TILE) * ROW_TILE, -(-groups // COLUMN_TILE) * COLUMN_TILE


def swizzle(scale: Tensor) -> Tensor:
    """Row-major scales `[..., groups]`, of one byte each, in the order that tensor cores of Blackwell read.

    Tiles of 128 rows x 4 columns lie one after the other, row by row of tiles. In a tile, row r and column c lie at
    byte `(r % 32) * 16 + (r / 32) * 4 + c`. What pads the last tiles is zero. The shape is that of the padded matrix.
    """
    rows, groups = prod(scale.shape[:-1]), scale.shape[-1]
    padded = swizzled_shape(rows, groups)
    matrix = torch.zeros(padded, dtype=torch.uint8, device=scale.device)
    matrix[:rows, :groups] = scale.reshape(rows, groups).view(torch.uint8)
    tiles = matrix.view(padded[0] // ROW_TILE, 4, 32, padded[1] // COLUMN_TILE, COLUMN_TILE)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded).view(scale.dtype)


def unswizzle(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Row-major `[rows, groups]` of swizzled scales."""
    high, wide = swizzled_shape(rows, groups)
    tiles = scale.view(torch.uint8).view(high // ROW_TILE, wide // COLUMN_TILE, 32, 4, COLUMN_TILE)
    matrix = tiles.permute(0, 3, 2, 1, 4).reshape(high, wide)
    return matrix[:rows, :groups].contiguous().view(scale.dtype)
