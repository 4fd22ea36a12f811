"""all_reduce_rms_norm of the outputs of experts: their sum comes first, rounded once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from ulps import same_bits

from tpfuse import Communicator, NormOutput, reference
from tpfuse.backends.collective import Call, sum_of_experts
from tpfuse.errors import InvalidArgument, RankMismatch
from tpfuse.launch import Rank
from tpfuse.quant import FP8PerToken

WIDTH = 64
GAMMA = torch.linspace(-1, 2, WIDTH)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def outputs(shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of a rank's experts: large ones cancel, so another order gives another sum."""
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(rank))
    if shape[-1] > 2:
        x[..., 0, :] *= 3000
        x[..., 1, :] -= x[..., 0, :]
    return x.to(dtype)


def stream(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(99))


def summed_before(comm: Communicator, x: Tensor, **how: object) -> NormOutput:
    return comm.all_reduce_rms_norm(reference.sum_of_experts(x), GAMMA, **how)


def same(one: NormOutput, other: NormOutput) -> bool:
    return all(
        a is b is None or (a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8)))
        for a, b in zip(one, other, strict=True)
    )


def test_terms_are_added_in_their_order_and_rounded_once() -> None:
    x = torch.tensor([3.0, 2.0**-7, 2.0**-7]).bfloat16().view(1, 3, 1)  # one ulp of 3 in bfloat16 is 2^-6
    assert reference.sum_of_experts(x).item() == 3.0 + 2.0**-6
    large = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)]).view(1, 4, 1)
    for summed in (reference.sum_of_experts, sum_of_experts):
        assert summed(large).item() == 0.0
        assert summed(large.flip(1)).item() == 2.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 8, 33])
def test_collective_sums_as_the_reference_does(top_k: int, dtype: torch.dtype) -> None:
    x = outputs((7, top_k), 0, dtype)
    before = x.clone()
    y = sum_of_experts(x)
    assert same_bits(y, reference.sum_of_experts(x))
    assert same_bits(x, before)
    assert y.is_contiguous()
    assert all(same_bits(sum_of_experts(x[t : t + 1]), y[t : t + 1]) for t in range(7))


LAYOUTS = {
    "contiguous": lambda x: x,
    "rows apart": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "wider rows": lambda x: torch.cat((x, x), -1)[..., :WIDTH],
    "one expert after the other": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "of a batch": lambda x: x.view(2, -1, *x.shape[1:]),
    "of a batch, permuted": lambda x: x.view(2, -1, *x.shape[1:]).transpose(0, 1).contiguous().transpose(0, 1),
}


def both_ways(rank: Rank, mode: str) -> list[tuple[str, NormOutput, NormOutput]]:
    """What experts' outputs give, and what their sums do."""
    found = []
    with Communicator(mode=mode, timeout=20.0) as comm:
        for name, laid in LAYOUTS.items():
            for top_k in (1, 3, 8):
                x = laid(outputs((6, top_k), rank.rank))
                own = stream((*x.shape[:-2],))
                for how in (
                    {},
                    {"residual": own},
                    {"residual": own.bfloat16(), "quant": FP8PerToken(), "keep_norm": True},
                    {"residual": comm.shard_rows(own), "residual_layout": "row_sharded"},
                ):
                    fused = comm.all_reduce_rms_norm(x, GAMMA, top_k=top_k, **how)  # type: ignore[arg-type]
                    assert fused.norm is not None
                    assert fused.norm.shape == (*x.shape[:-2], WIDTH)
                    found.append((f"{name}, {top_k}", fused, summed_before(comm, x, **how)))
    return found


@pytest.mark.parametrize("mode", ["fused", "control", "off"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_sum_changes_nothing_else(on_ranks, world: int, mode: str) -> None:
    for found in on_ranks(world, both_ways, mode):
        assert len(found) == len(LAYOUTS) * 3 * 4
        for name, fused, separate in found:
            assert same(fused, separate), name


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_no_rows(alone: Communicator, shape: tuple[int, ...]) -> None:
    y = alone.all_reduce_rms_norm(outputs(shape, 0), GAMMA, residual=stream(shape[:-1]), top_k=4)
    assert y.norm is not None
    assert y.norm.shape == (*shape[:-1], WIDTH)


@pytest.mark.parametrize("top_k", [0, -1, 2.0, True, "4"])
def test_top_k_is_a_number_of_experts(alone: Communicator, top_k: object) -> None:
    with pytest.raises(InvalidArgument, match="all_reduce_rms_norm: top_k="):
        alone.all_reduce_rms_norm(outputs((3, 4), 0), GAMMA, top_k=top_k)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "top_k"), [((3, 4), 5), ((4,), 3), ((4, 3), 4)])
def test_x_has_as_many_outputs_as_top_k_says(alone: Communicator, shape: tuple[int, ...], top_k: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"needed with top_k={top_k}: \[..., {top_k}, width\]"):
        alone.all_reduce_rms_norm(outputs(shape, 0), GAMMA, top_k=top_k)


def test_one_row_alone_is_no_row_of_experts(alone: Communicator) -> None:
    with pytest.raises(InvalidArgument, match=r"needed with top_k=1"):
        alone.all_reduce_rms_norm(torch.ones(WIDTH), GAMMA, top_k=1)


def test_the_residual_has_the_shape_of_the_sum(alone: Communicator) -> None:
    x = outputs((3, 4), 0)
    with pytest.raises(InvalidArgument, match=r"residual has shape \[3, 4, 64\].*needed: \[3, 64\]"):
        alone.all_reduce_rms_norm(x, GAMMA, residual=torch.zeros(x.shape), top_k=4)


def other_top_k(rank: Rank) -> str:
    comm = Communicator(timeout=20.0)
    top_k = 3 + rank.rank
    try:
        comm.all_reduce_rms_norm(outputs((5, top_k), 0), GAMMA, top_k=top_k)
    except RankMismatch as error:
        return str(error)
    return ""


def test_ranks_with_different_numbers_of_experts_are_told(on_ranks) -> None:
    for message in on_ranks(2, other_top_k):
        assert "rank 1 has top_k=4, rank 0 has 3" in message
        assert "5 rows x 64 of 3 experts" in message


def test_a_call_is_packed_with_its_experts() -> None:
    call = Call("all_reduce_rms_norm", 3, 64, 0, torch.bfloat16, None, 1e-6, 1e-6, 0.0, "", False, True, 8)
    assert Call.unpack(call.pack()) == call


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("quant", [None, FP8PerToken()], ids=["plain", "quantised"])
def test_compiled_code_gives_the_same(quant: FP8PerToken | None) -> None:
    x, residual = outputs((5, 4), 0), stream((5,))
    with Communicator() as comm:

        def layer(x: Tensor, residual: Tensor) -> NormOutput:
            return comm.all_reduce_rms_norm(x * 2, GAMMA, residual=residual, quant=quant, top_k=4)

        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, residual)
        assert same(NormOutput(*compiled), layer(x, residual))
