"""How one dimension of a weight is divided over the ranks, as data.

A dimension is a row of segments (gate and up of a packed projection; z, x, B, C and dt of Mamba's), and each segment
is a number of units that must not be cut: heads, groups, single columns. Every rank gets its part of every segment.
With fewer units than ranks, neighbouring ranks get the same one, where the segment allows copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tpfuse.errors import Unsupported


@dataclass(frozen=True)
class Segment:
    """`size` elements in `units` equal parts. copies: fewer units than ranks are replicated, else they are refused."""

    size: int
    units: int
    what: str = "columns"  # what a unit is, for messages
    copies: bool = False

    def range(self, rank: int, world: int) -> tuple[int, int]:
        """First element and number of elements of this rank."""
        unit = self.size // self.units
        return rank * self.units // world * unit, unit * max(1, self.units // world)

    def check(self, world: int, name: str) -> None:
        """Raise Unsupported unless it divides over so many ranks."""
        if self.size % self.units:
            raise Unsupported(f"{name}: {self.size} elements don't make {self.units} equal {self.what}.")
        if self.units % world and not (self.copies and world % self.units == 0):
            needed = f"a divisor{' or a multiple' if self.copies else ''} of {self.units}"
            raise Unsupported(f"{name}: {self.units} {self.what} don't divide over {world} ranks; needed: {needed}.")


@dataclass(frozen=True)
class Split:
    """The division of dimension `dim`."""

    dim: int
    segments: tuple[Segment, ...]

    def ranges(self, rank: int, world: int) -> Iterator[tuple[int, int]]:
        """First element and number of elements of each of this rank's pieces."""
        start = 0
        for segment in self.segments:
            first, size = segment.range(rank, world)
            yield start + first, size
            start += segment.size

    def size(self, world: int) -> int:
        """Elements that a rank has."""
        return sum(size for _, size in self.ranges(0, world))

    def cut(self, full: Tensor, rank: int, world: int) -> Tensor:
        """This rank's part of a full tensor, contiguous and in memory of its own."""
        pieces = [full.narrow(self.dim, start, size) for start, size in self.ranges(rank, world)]
        return (
            torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
        )

    def join(self, gathered: Tensor, world: int) -> Tensor:
        """The full tensor, from all ranks' parts one behind the other along `dim`."""
        size = sum(segment.size for segment in self.segments)
        index = torch.empty(size, dtype=torch.int64)
        at = 0
        for rank in range(world):
            for start, length in self.ranges(rank, world):
                index[start : start + length] = torch.arange(at, at + length)
                at += length
        ordered = gathered.shape[self.dim] == size and bool((index == torch.arange(size)).all())
        return gathered if ordered else gathered.index_select(self.dim, index.to(gathered.device))
