"""The attention boundary: a buffer of the caller's, real tokens only, one cast, dense and sparse."""

from __future__ import annotations

import gc

import pytest
import torch
from stand_in import StandIn
from torch import Tensor

from tpfuse import graphs
from tpfuse.errors import InvalidArgument, TpfuseError


def qkv(tokens: int, dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, 8, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    causal = {"is_causal": True} if mask is None else {"attn_mask": mask}
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **causal).transpose(0, 1)


@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_dense(tokens: int) -> None:
    q, k, v = qkv(tokens)
    torch.testing.assert_close(graphs.attention("x")(q, k, v).double(), torch_attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_sparse_sees_what_is_selected_and_not_the_future() -> None:
    q, k, v = qkv(6)
    selected = torch.tensor([[0, -1], [0, 5], [2, 1], [3, 0], [4, -1], [-1, -1]])
    mask = torch.zeros(6, 6, dtype=torch.bool)
    for token, key in ((0, 0), (1, 0), (2, 2), (2, 1), (3, 3), (3, 0), (4, 4)):
        mask[token, key] = True
    given = graphs.attention("x")(q, k, v, selected=selected)
    wanted = torch_attention(q[:5], k, v, mask[:5])
    torch.testing.assert_close(given[:5].double(), wanted, rtol=1e-5, atol=1e-6)
    assert not given[5].any()


def test_what_is_selected_beyond_the_keys_is_not_seen() -> None:
    q, k, v = qkv(3)
    inside, beyond = torch.tensor([[0], [1], [2]]), torch.tensor([[0, 3], [1, 7], [2, 100]])
    attend = graphs.attention("x")
    torch.testing.assert_close(attend(q, k, v, selected=beyond), attend(q, k, v, selected=inside), rtol=0, atol=0)


@pytest.mark.parametrize("selected", [None, torch.tensor([[0, -1], [0, 1], [1, 2]])])
def test_what_is_not_finite_stays_so(selected: Tensor | None) -> None:
    q, k, v = qkv(3)
    q[1] = torch.nan
    given = graphs.attention("x")(q, k, v, selected=selected)
    assert given[1].isnan().all()
    assert given[[0, 2]].isfinite().all()


def test_fewer_keys_than_tokens_are_an_error() -> None:
    q, k, v = qkv(3)
    with pytest.raises(InvalidArgument, match="2 keys for 3 tokens"):
        graphs.attention("x")(q, k[:2], v[:2])


@pytest.mark.parametrize("selected", [None, torch.arange(16)[None, :].expand(16, 16)])
def test_accumulated_in_fp32_and_cast_once(selected: Tensor | None) -> None:
    q, k, v = qkv(16, torch.bfloat16)
    given = graphs.attention("x")(q, k, v, selected=selected)
    exact = torch_attention(q, k, v)
    assert given.dtype == torch.bfloat16
    distance = (given.double() - exact).abs() / exact.abs().clamp_min(1e-3)
    assert distance.max() <= 2**-8 + 1e-5  # half an ulp of bfloat16: one rounding


@pytest.mark.parametrize("given_to", ["call", "layer"])
def test_rows_beyond_the_real_tokens_are_not_touched(given_to: str) -> None:
    q, k, v = qkv(5)
    buffer = torch.full((8, 4, 8), torch.pi)
    attend = graphs.attention("x", out=buffer if given_to == "layer" else None)
    given = attend(q, k, v, out=buffer if given_to == "call" else None)
    assert given.data_ptr() == buffer.data_ptr()
    assert given.shape == (5, 4, 8)
    assert (buffer[5:] == torch.pi).all()
    torch.testing.assert_close(buffer[:5], graphs.dense(q, k, v))


def test_two_outputs_are_an_error() -> None:
    q, k, v = qkv(5)
    buffer = torch.empty_like(q)
    attend = graphs.attention("x", out=buffer)
    with pytest.raises(InvalidArgument, match="two outputs"):
        attend(q, k, v, out=torch.empty_like(q))
    assert attend(q, k, v, out=buffer).data_ptr() == buffer.data_ptr()


def test_a_core_may_write_to_the_buffer_itself() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor, *, selected: Tensor | None, out: Tensor) -> None:
        out.copy_(q + 1)

    q, k, v = qkv(3)
    assert torch.equal(graphs.attention("x", core)(q, k, v), q + 1)
    returning = graphs.attention("x", lambda q, k, v, *, selected, out: out.copy_(q + 1))
    assert torch.equal(returning(q, k, v), q + 1)


def test_a_core_that_returns_another_part_of_the_buffer_is_an_error() -> None:
    q, k, v = qkv(3)
    attend = graphs.attention("x", lambda q, k, v, *, selected, out: out.flatten(1))
    with pytest.raises(InvalidArgument, match="another part of out's memory"):
        attend(q, k, v)


def test_wrong_shapes_are_errors() -> None:
    q, k, v = qkv(3)
    with pytest.raises(InvalidArgument, match="out has 2 rows, q 3"):
        graphs.attention("x")(q, k, v, out=torch.empty(2, 4, 8))
    with pytest.raises(InvalidArgument, match=r"core returned \(3, 4, 4\)"):
        graphs.attention("x", lambda q, k, v, **_: q[..., :4])(q, k, v)


def test_no_tokens_do_not_reach_the_core() -> None:
    q, k, v = qkv(0)
    assert graphs.attention("x", lambda *_, **__: 1 / 0)(q, k, v).shape == (0, 4, 8)


def test_layers_of_one_name_are_told_apart_and_one_that_is_gone_is_an_error() -> None:
    q, k, v = qkv(3)
    first = graphs.attention("same", lambda q, k, v, **_: q * 1)
    second = graphs.attention("same", lambda q, k, v, **_: q * 2)
    assert torch.equal(first(q, k, v) * 2, second(q, k, v))
    name = first.name
    del first
    gc.collect()
    with pytest.raises(TpfuseError, match="no attention named 'same"):
        torch.ops.tpfuse.attention(q, k, v, None, torch.empty_like(q), name)


@pytest.mark.parametrize("kind", ["dense", "sparse", "layer's buffer"])
def test_in_a_compiled_model(kind: str) -> None:
    """What the operator writes is read by the next piece; padded rows of the piece's buffer are as they were."""
    torch._dynamo.reset()
    buffer = torch.full((16, 4, 8), torch.pi)
    attend = graphs.attention("x", out=buffer if kind == "layer's buffer" else None)

    def model(x: Tensor, selected: Tensor) -> Tensor:
        q = torch.relu(x)
        y = attend(q, q[:, :2] * 2, q[:, 2:] * 3, selected=selected if kind == "sparse" else None)
        return y * 2 + x

    backend = graphs.Piecewise(["tpfuse::attention"], [4, 8, 16], mechanism=StandIn())
    step = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for tokens in (5, 8, 3, 16, 5):
            x, selected = qkv(tokens)[0], torch.arange(tokens)[:, None] - torch.arange(2)
            for given in (x, selected):
                torch._dynamo.mark_dynamic(given, 0)
            untouched = buffer[tokens:].clone()
            given = step(x, selected)
            assert torch.equal(buffer[tokens:], untouched)
            torch.testing.assert_close(given, model(x, selected), rtol=1e-5, atol=1e-6)
    assert backend.report().replays > 0


def test_sparse_attention_without_a_selection_is_refused() -> None:
    q = torch.ones(2, 1, 4)
    with pytest.raises(InvalidArgument, match="selected is None"):
        graphs.sparse(q, q, q)
