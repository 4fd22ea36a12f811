"""The rotation that the QK norm can do on the way: against complex numbers, on ranks, compiled, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import OnRanks
from torch import Tensor

from tpfuse import Communicator, Rope, reference
from tpfuse.errors import InvalidArgument
from tpfuse.launch import Rank
from tpfuse.rope import rotate

HEAD, TURNED, ROWS = 16, 8, 6


def rope(interleaved: bool = False) -> Rope:
    angles = torch.arange(40.0).outer(1.0 / 100.0 ** (torch.arange(TURNED // 2) / TURNED * 2))
    positions = torch.tensor([0, 3, 39, 7, 7, 1])
    return Rope(angles.cos(), angles.sin(), positions, HEAD, TURNED, interleaved)


def pairs(x: Tensor, interleaved: bool) -> Tensor:
    """The rotated elements of every head as complex numbers."""
    turned = x.double().unflatten(-1, (-1, HEAD))[..., :TURNED]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    return torch.complex(first, second)


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers_do_and_the_rest_stays(interleaved: bool) -> None:
    r, x = rope(interleaved), torch.randn(ROWS, 3 * HEAD)
    y = rotate(x, r)
    unit = torch.complex(r.cos[r.positions].double(), r.sin[r.positions].double()).unsqueeze(-2)
    torch.testing.assert_close(pairs(y, interleaved), pairs(x, interleaved) * unit, rtol=0, atol=1e-6)
    assert torch.equal(y.unflatten(-1, (-1, HEAD))[..., TURNED:], x.unflatten(-1, (-1, HEAD))[..., TURNED:])


def on_a_rank(rank: Rank, mode: str, interleaved: bool) -> bool:
    """Eager and compiled, within one ulp of the reference."""
    generator = torch.Generator().manual_seed(0)
    qs = [torch.randn(ROWS, 2 * HEAD, generator=generator).bfloat16() * 4**i for i in range(rank.world)]
    ks = [torch.randn(ROWS, HEAD, generator=generator).bfloat16() for _ in range(rank.world)]
    q_weights = [torch.randn(2 * HEAD, generator=generator) for _ in range(rank.world)]
    k_weights = [torch.randn(HEAD, generator=generator) for _ in range(rank.world)]
    r, me = rope(interleaved), rank.rank
    want = reference.qk_rms_norm(qs, ks, q_weights, k_weights, rope=r)[me]
    with Communicator(mode=mode) as comm:
        eager = comm.qk_rms_norm(qs[me], ks[me], q_weights[me], k_weights[me], rope=r)
        compiled = torch.compile(comm.qk_rms_norm, fullgraph=True, backend="aot_eager")
        traced = compiled(qs[me], ks[me], q_weights[me], k_weights[me], rope=r)
    return all(
        bool(((got.float() - right.float()).abs() <= right.float().abs() * 2**-7).all())
        for got, right in zip((*eager, *traced), (*want, *want), strict=True)
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("mode", ["fused", "off"])
def test_ranks_rotate_as_the_reference_does(on_ranks: OnRanks, mode: str, interleaved: bool) -> None:
    assert on_ranks(2, on_a_rank, mode, interleaved) == [True, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotary_dim": 7}, "an even rotary_dim of at most head_dim"),
        ({"rotary_dim": 18}, "an even rotary_dim of at most head_dim"),
        ({"head_dim": 24}, "whole heads of rope's head_dim=24"),
        ({"cos": torch.zeros(40, 3)}, r"rope.cos is \[40, 3\]"),
        ({"sin": torch.zeros(40, 4).double()}, "needed: contiguous .* float32"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, "needed: 6 contiguous int64 positions"),
        ({"positions": torch.zeros(6)}, "needed: 6 contiguous int64 positions"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_does(change: dict[str, object], words: str) -> None:
    q, k = torch.zeros(ROWS, 2 * HEAD), torch.zeros(ROWS, HEAD)
    with pytest.raises(InvalidArgument, match=words):
        replace(rope(), **change).check("qk_rms_norm", q, k)  # type: ignore[arg-type]
