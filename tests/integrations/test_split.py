"""A split is cut and joined again to the bit, and what does not divide is refused."""

from __future__ import annotations

import pytest
import torch

from tpfuse.errors import Unsupported
from tpfuse.integrations.transformers.split import Segment, Split

SPLITS = {
    "columns": Split(0, (Segment(24, 24),)),
    "heads": Split(0, (Segment(24, 4, "heads"),)),
    "inputs": Split(1, (Segment(16, 16),)),
    "gate and up": Split(0, (Segment(12, 12),) * 2),
    "five things": Split(
        0, (Segment(8, 4), Segment(8, 4), Segment(4, 4, copies=True), Segment(0, 4), Segment(4, 4, copies=True))
    ),
    "few heads": Split(0, (Segment(24, 2, "heads", copies=True),)),
    "one head": Split(0, (Segment(24, 1, "heads", copies=True),)),
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", SPLITS)
def test_what_is_cut_is_joined_again(name, world):
    split, full = SPLITS[name], torch.randn(24, 16)
    for segment in split.segments:
        segment.check(world, name)
    parts = [split.cut(full, rank, world) for rank in range(world)]
    assert {part.shape[split.dim] for part in parts} == {split.size(world)}
    assert torch.equal(split.join(torch.cat(parts, split.dim), world), full)


def test_each_rank_gets_its_part_of_every_segment():
    split = Split(0, (Segment(4, 4), Segment(6, 2, "heads"), Segment(2, 1, "heads", copies=True)))
    parts = [split.cut(torch.arange(12), rank, 2).tolist() for rank in range(2)]
    assert parts == [[0, 1, 4, 5, 6, 10, 11], [2, 3, 7, 8, 9, 10, 11]]


def test_a_cut_is_memory_of_its_own():
    full = torch.zeros(8)
    Split(0, (Segment(8, 8),)).cut(full, 0, 2).fill_(1)
    assert full.sum() == 0


@pytest.mark.parametrize(
    ("segment", "world", "text"),
    [
        (Segment(12, 6, "heads"), 4, "k_proj: 6 heads don't divide over 4 ranks; needed: a divisor of 6."),
        (Segment(12, 3, "heads", copies=True), 4, "3 heads don't divide over 4 ranks; needed: a divisor or a multiple"),
        (Segment(12, 2, "groups"), 4, "2 groups don't divide over 4 ranks; needed: a divisor of 2."),
        (Segment(12, 5, "heads"), 1, "12 elements don't make 5 equal heads"),
    ],
)
def test_what_does_not_divide_is_refused(segment, world, text):
    with pytest.raises(Unsupported, match=text):
        segment.check(world, "k_proj")
