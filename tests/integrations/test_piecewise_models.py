"""Packed batches through piecewise graphs give what the plain model gives, on one rank and two. On a CPU, with the
recording stand-in of tests/graphs for CUDA graphs."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import packed as jobs
import pytest
import tiny_models as tiny
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tpfuse[transformers]'")

from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.graphs import StaleGraph
from tpfuse.integrations import transformers as integration
from tpfuse.integrations.transformers.packed import PackedModel


@pytest.fixture
def model(tmp_path):
    """Name of a tiny model -> it, on this rank alone."""
    return lambda name: tiny.load(tiny.make(name, tmp_path), "whole", 1)


@pytest.mark.parametrize("name", ["minimax-m2", "minimax-m3", "llama"])
def test_packed_batches_are_the_plain_model(name, on_ranks, tmp_path):
    path = tiny.make(name, tmp_path)
    expected = on_ranks(1, jobs.plain, path)[0]
    for world, mode in ((1, "whole"), (2, "fused")):
        for found in on_ranks(world, jobs.packed_batches, path, mode, True):
            jobs.check(found, expected)
            # The layers' attention between pieces, and the head. Three batches had more tokens than the largest size.
            layers = tiny.COMMON["num_hidden_layers"]
            assert (found["report"]["pieces"], found["report"]["split_calls"]) == (layers + 2, layers), (world, mode)
            assert found["report"]["misses"] == {18: 2, 20: 1, 25: 1}


@pytest.mark.parametrize(("name", "world"), [("minimax-m3, few KV heads", 4), ("qwen3", 2)])
def test_copied_kv_heads_and_tied_embeddings(name, world, on_ranks, tmp_path):
    path = tiny.make(name, tmp_path)
    expected = on_ranks(1, jobs.plain, path)[0]
    for found in on_ranks(world, jobs.packed_batches, path, "fused", True):
        jobs.check(found, expected)


def test_as_many_packed_models_as_one_likes_and_nothing_of_them_stays(model):
    """Dynamo takes eight compilations of one piece of code; a KV cache may be gigabytes."""
    whole, token = model("llama"), torch.ones(1, dtype=torch.int64)
    torch._dynamo.reset()
    caches = []
    for _ in range(10):
        packed = integration.piecewise(whole, [4], slots=1, length=8)
        packed.step({0: token})
        with torch._dynamo.config.patch(error_on_recompile=True):
            packed.step({0: token.expand(3)})
        caches.append(weakref.ref(packed.cache))
        packed.clear()
    del packed
    gc.collect()
    assert [cache() for cache in caches] == [None] * 10


def test_what_changes_after_the_capture_is_seen_or_an_error(model):
    """Although steps replay before torch checks anything."""
    sys.path.append(str(Path(__file__).parent.parent / "graphs"))
    from stand_in import StandIn

    whole, token = model("llama"), torch.arange(1, 5)
    torch._dynamo.reset()
    packed = integration.piecewise(whole, [4], slots=1, length=8, mechanism=StandIn())
    plain = PackedModel(whole, slots=1, length=8)

    def check() -> None:
        for _ in range(4):
            packed.free(0)
            plain.free(0)
            assert (packed.step({0: token}) - plain.step({0: token})).abs().max() <= 1e-5
            assert packed.cache.cached == [4]

    with torch.no_grad():
        check()
        whole.load_state_dict({name: 1.1 * weight for name, weight in whole.state_dict().items()})
        check()
        whole.model.layers[1].self_attn.q_proj.forward = lambda x: torch.relu(x).repeat(1, 1, 2)[..., :64]
        check()
        del whole.model.layers[1].self_attn.q_proj.forward
        check()
        whole.config._attn_implementation = "eager"
        whole.eval()
        check()
        whole.train()
        check()
        with torch.inference_mode():
            check()
        whole.load_state_dict({name: 0.9 * weight for name, weight in whole.state_dict().items()}, assign=True)
        packed.free(0)
        with pytest.raises(StaleGraph):
            packed.step({0: token})
        assert packed.cache.cached == [0]
        packed.clear()
        check()


def test_what_step_free_and_capture_refuse(model):
    packed = integration.piecewise(model("llama"), [4, 8], slots=2, length=6)
    token = torch.ones(1, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match="no tokens"):
        packed.step({})
    with pytest.raises(InvalidArgument, match="slot 2; there are 0 to 1"):
        packed.step({2: token})
    packed.step({1: token.expand(5)})
    with pytest.raises(InvalidArgument, match="slot 1 has 5 of 6 tokens and gets 2"):
        packed.step({1: token.expand(2)})
    with pytest.raises(InvalidArgument, match=r"capture: slots \[1\] in use"):
        packed.capture()
    with pytest.raises(InvalidArgument, match="keep=6"):
        packed.free(1, keep=6)
    packed.free(1)
    packed.capture()
    assert packed.report().eager == {"tensors are on cpu; CUDA graphs need GPUs": 6}


def test_what_can_not_be_packed_is_refused(model):
    with pytest.raises(Unsupported, match="layers of linear_attention, mlp, moe; supported: full_attention"):
        integration.piecewise(model("nemotron-h"), [4], slots=1, length=8)
    experts = model("minimax-m2")
    experts.config._experts_implementation = "eager"
    with pytest.raises(Unsupported, match=r"experts_implementation='eager' in torch\.float32 decides on the host"):
        integration.piecewise(experts, [4], slots=1, length=8)
