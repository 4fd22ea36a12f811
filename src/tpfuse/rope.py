"""Rotary position embedding fused into the QK norm: rows times gamma are rotated, then scaled and rounded once.

With x1, x2 a pair of elements of a head and c, s the cosine and sine of its angle:
`x1' = x1 c - x2 s`, `x2' = x2 c + x1 s`, in fp32 (RoFormer, Su et al. 2021). Pairs are (i, i + rotary_dim/2), the
half-split order of most checkpoints, or (2i, 2i + 1) when interleaved. Elements from rotary_dim on stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpfuse.errors import InvalidArgument


@dataclass(frozen=True)
class Rope:
    """What a rotation needs.

    cos, sin: fp32 `[positions, rotary_dim / 2]`, one column a pair. positions: int64 `[T]`, or the leading dimensions
    of q; values must be rows of the tables (not checked: that would wait for the device). head_dim: elements of a head.
    rotary_dim: how many of them, from the first on, are rotated; even. interleaved: pairs are neighbours.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    head_dim: int
    rotary_dim: int
    interleaved: bool = False

    def check(self, op: str, q: Tensor, k: Tensor) -> None:
        """Raise InvalidArgument unless this rotates q and k."""
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise InvalidArgument(
                f"{op}: rope has rotary_dim={self.rotary_dim}, head_dim={self.head_dim}; "
                "needed: an even rotary_dim of at most head_dim."
            )
        if q.shape[-1] % self.head_dim or k.shape[-1] % self.head_dim:
            raise InvalidArgument(
                f"{op}: q is {q.shape[-1]} wide, k {k.shape[-1]}; "
                f"needed: whole heads of rope's head_dim={self.head_dim}."
            )
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            half = self.rotary_dim // 2
            shaped = (
                table.dim() == 2 and table.shape[1] == half and table.is_contiguous() and table.data_ptr() % 16 == 0
            )
            if table.dtype != torch.float32 or not shaped or table.device != q.device:
                raise InvalidArgument(
                    f"{op}: rope.{name} is {list(table.shape)} {table.dtype} on {table.device}; "
                    f"needed: contiguous [positions, {half}] float32 on {q.device}, from a multiple of 16 bytes on."
                )
        if self.cos.shape != self.sin.shape:
            raise InvalidArgument(
                f"{op}: rope.cos has {self.cos.shape[0]} positions, rope.sin {self.sin.shape[0]}; needed: the same."
            )
        leading, p = q.shape[:-1], self.positions
        fits = _sizes(p.shape) in (_sizes(leading), _sizes((leading.numel(),)))
        if p.dtype != torch.int64 or not fits or not p.is_contiguous() or p.device != q.device:
            raise InvalidArgument(
                f"{op}: rope.positions is {list(p.shape)} {p.dtype} on {p.device}; needed: {leading.numel()} "
                f"contiguous int64 positions, one a row, as [{leading.numel()}] or {list(leading)}, on {q.device}."
            )


def _sizes(shape: Sequence[int]) -> list[int]:
    """A shape without dimensions of one entry, which order nothing."""
    return [size for size in shape if size != 1]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """fp32 rows `[T, n]` of whole heads, rotated."""
    heads = x.unflatten(-1, (-1, rope.head_dim))
    turned, rest = heads[..., : rope.rotary_dim], heads[..., rope.rotary_dim :]
    positions = rope.positions.reshape(-1)
    cos, sin = rope.cos[positions].unsqueeze(-2), rope.sin[positions].unsqueeze(-2)
    if rope.interleaved:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    else:
        x1, x2 = turned.chunk(2, dim=-1)
        turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1).flatten(-2)
