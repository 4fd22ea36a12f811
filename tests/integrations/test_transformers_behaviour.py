"""What people do with a model beside calling it: other caches, compilation, hooks, mistakes."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import behaviour as jobs
import pytest
import tiny_models as tiny
import torch
from ulps import error

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tpfuse[transformers]'")

from tpfuse import Communicator
from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.integrations import transformers as integration
from tpfuse.integrations.transformers.integration import SETTINGS, _refuse
from tpfuse.integrations.transformers.layers import head_norm

KINDS = ("llama", "minimax-m2", "minimax-m3", "nemotron-h")
ONE_OF_EACH = pytest.mark.parametrize("name", KINDS)


def make(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(name, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made: dict[str, Path] = {}
    return lambda name: made.setdefault(name, made.get(name) or make(name, tmp_path_factory))


def whole(on_ranks, path):
    return on_ranks(1, tiny.logits, path, "whole")[0]["logits"]


# Caches


@pytest.mark.parametrize(("name", "heads"), [("minimax-m2", 1), ("minimax-m2, few KV heads", 1), ("nemotron-h", 1)])
def test_a_rank_caches_its_own_heads(name, heads, checkpoint, on_ranks):
    for shapes in on_ranks(4, jobs.cache_shapes, checkpoint(name), "fused"):
        assert {shape[1] for shape in shapes} == {heads}


@ONE_OF_EACH
def test_a_static_cache_gives_the_same_tokens(name, checkpoint, on_ranks):
    settings = {"cache_implementation": "static"}
    expected = on_ranks(1, tiny.greedy, checkpoint(name), "whole", 24)[0]
    for tokens in on_ranks(2, tiny.greedy, checkpoint(name), "fused", 24, settings):
        assert torch.equal(tokens, expected)


def test_continuous_batching_gives_the_same_tokens(checkpoint, on_ranks):
    path = checkpoint("minimax-m2")
    expected = on_ranks(1, tiny.greedy, path, "whole", 8)[0][:, len(tiny.PROMPT[0]) :].tolist()
    assert on_ranks(2, jobs.continuous, path, "fused", 8)[0] == expected


# Experts over the ranks


@pytest.mark.parametrize("mode", ["off", "fused"])
@pytest.mark.parametrize("name", ["minimax-m2", "minimax-m3"])
def test_expert_parallel(name, mode, checkpoint, on_ranks):
    expected = whole(on_ranks, checkpoint(name))
    for found in on_ranks(2, tiny.logits, checkpoint(name), mode, {"enable_expert_parallel": True}):
        assert (found["logits"] - expected).abs().max() <= 1e-5
        assert found["calls"] == tiny.expected_calls(name, mode)


# torch.compile


@pytest.mark.parametrize(("name", "mode"), [*((name, "fused") for name in KINDS), ("minimax-m2", "off")])
def test_compiled_as_one_graph(name, mode, checkpoint, on_ranks):
    expected = whole(on_ranks, checkpoint(name))
    for found in on_ranks(2, jobs.compiled, checkpoint(name), mode, "aot_eager"):
        assert all((logits - expected).abs().max() <= 1e-5 for logits in found["logits"])
        assert found["graphs"] == 1
        assert found["calls"] == {op: 2 * calls for op, calls in tiny.expected_calls(name, mode).items()}


# Looking inside


@ONE_OF_EACH
def test_hidden_states_are_whole_and_later_forwards_defer_again(name, checkpoint, on_ranks):
    expected = on_ranks(1, jobs.hidden_states, checkpoint(name), "whole")[0]["hidden_states"]
    for found in on_ranks(2, jobs.hidden_states, checkpoint(name), "fused"):
        assert len(found["hidden_states"]) == len(expected)
        for ours, theirs in zip(found["hidden_states"], expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5
        assert found["calls"] == tiny.expected_calls(name, "fused")


@pytest.mark.parametrize(
    "module", ["layers.0", "layers.1.mlp", "layers.1.self_attn", "layers.2", "layers.1.input_layernorm", "norm"]
)
@pytest.mark.parametrize("name", ["llama", "minimax-m2"])
def test_a_hook_sees_what_it_would_see_in_the_whole_model(name, module, checkpoint, on_ranks):
    expected = on_ranks(1, jobs.hooked, checkpoint(name), "whole", module)[0]
    for found in on_ranks(2, jobs.hooked, checkpoint(name), "fused", module):
        assert (found["seen"] - expected["seen"]).abs().max() <= 1e-5
        assert (found["logits"] - expected["logits"]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "module", ["layers.1", "layers.1.input_layernorm", "layers.1.post_attention_layernorm", "norm"]
)
def test_a_hook_before_a_layer_sees_a_tensor(module, checkpoint, on_ranks):
    expected = on_ranks(1, jobs.hooked, checkpoint("llama"), "whole", module, True)[0]
    for found in on_ranks(2, jobs.hooked, checkpoint("llama"), "fused", module, True):
        assert (found["seen"] - expected["seen"]).abs().max() <= 1e-5


def test_a_layer_called_alone_reduces_at_once(checkpoint, on_ranks):
    for found in on_ranks(2, jobs.layer_alone, checkpoint("llama")):
        assert isinstance(found, torch.Tensor)


# Weights


@ONE_OF_EACH
def test_a_state_dict_is_loaded_again(name, checkpoint, on_ranks):
    for before, cleared, after in on_ranks(2, jobs.reloaded, checkpoint(name)):
        assert not torch.equal(before, cleared)
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("how", "compiler"),
    [("assigned", ""), ("converted", ""), ("data", ""), ("assigned", "aot_eager"), ("converted", "aot_eager")],
)
def test_weights_that_are_replaced_are_those_that_multiply(how, compiler, checkpoint, on_ranks):
    for before, written, replaced in on_ranks(2, jobs.replaced_weights, checkpoint("minimax-m2"), how, compiler):
        assert not torch.allclose(before, written, rtol=0, atol=1e-3)
        torch.testing.assert_close(replaced, written, rtol=0, atol=1e-5)


def test_q_k_and_v_stay_one_product_unless_one_is_assigned(checkpoint, on_ranks):
    assert on_ranks(2, jobs.one_product, checkpoint("minimax-m2")) == [[True, True, True, False]] * 2


@pytest.mark.parametrize("how", ["hook", "hook before", "adapter"])
def test_a_projection_that_is_watched_or_wrapped_is_called(how, checkpoint, on_ranks):
    for found, expected in on_ranks(2, jobs.watched_projection, checkpoint("minimax-m2"), how):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_state_dict_has_the_dtype_of_a_converted_model(checkpoint, on_ranks):
    assert on_ranks(2, jobs.other_dtypes, checkpoint("llama"), torch.bfloat16) == [[], []]


def test_a_model_is_not_copied_silently_in_part(checkpoint, on_ranks):
    for said in on_ranks(2, jobs.copied, checkpoint("llama")):
        assert len(said) == 3
        assert all("can't be copied" in text for text in said)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", *(f"{name}, all experts" for name in ("minimax-m2", "minimax-m3", "nemotron-h"))]
)
def test_sixteen_bits_are_no_further_from_fp64_than_stock(name, checkpoint, on_ranks):
    """Of models that choose between experts one token may go another way, so here each expert gets every token."""
    exact = on_ranks(1, jobs.typed, checkpoint(name), "whole", torch.float64)[0].double()
    errors = {
        mode: (on_ranks(2, jobs.typed, checkpoint(name), mode, torch.bfloat16)[0].double() - exact).square().mean()
        for mode in ("stock", "control", "fused")
    }
    assert errors["control"] <= 1.1 * errors["stock"], errors
    assert errors["fused"] <= 1.1 * errors["stock"], errors


# Refusals


def test_what_does_not_divide_is_refused_with_the_reason(checkpoint, on_ranks):
    with pytest.raises(Unsupported, match=r"layers\.0\.mixer\.dt_bias: 4 groups don't divide over 8 ranks"):
        on_ranks(2, jobs.refused, checkpoint("nemotron-h"), 8)


@pytest.mark.parametrize(
    ("distributed", "quantised", "says"),
    [
        ({"pp_size": 2}, None, "pp_size=2; not with pipeline parallelism"),
        ({"fsdp_size": 4}, None, "fsdp_size=4; not with FSDP"),
        ({"ep_size": 2}, None, "not with the expert parallelism of transformers 5.23"),
        ({}, SimpleNamespace(), "a quantised checkpoint (SimpleNamespace)"),
        ({}, SimpleNamespace(dequantize=False), "Load it with a configuration that has dequantize=True"),
    ],
)
def test_what_a_model_may_not_ask_for(distributed, quantised, says):
    config = SimpleNamespace(distributed_config=SimpleNamespace(**distributed), quantization_config=quantised)
    with pytest.raises(Unsupported, match=re.escape(says)):
        _refuse(SimpleNamespace(config=config))


def test_what_a_model_may_ask_for():
    for quantised in (None, SimpleNamespace(dequantize=True)):
        sizes = SimpleNamespace(tp_size=4, pp_size=1, fsdp_size=None)
        _refuse(SimpleNamespace(config=SimpleNamespace(distributed_config=sizes, quantization_config=quantised)))


def test_a_model_that_is_not_ours_says_so():
    with pytest.raises(InvalidArgument, match=r"Linear: not a model of tpfuse\. Call enable"):
        integration.applied(torch.nn.Linear(1, 1))


def test_unknown_modes_are_refused():
    with pytest.raises(InvalidArgument, match="mode='fast'; supported: off, control, fused"):
        integration.enable("fast")


def test_settings_that_a_communicator_does_not_have_are_refused():
    with pytest.raises(InvalidArgument, match="unknown setting foo; supported: backend, max_hidden, timeout"):
        integration.enable("fused", foo=1, timeout=5.0)


def test_settings_are_those_of_the_communicator():
    assert {"group", "device", "mode", *SETTINGS} == set(signature(Communicator).parameters)


def test_another_transformers_is_refused(monkeypatch):
    from transformers.distributed import mixin

    monkeypatch.setattr(mixin, "apply_tensor_parallelism", lambda model: model)
    with pytest.raises(Unsupported, match=r"apply_tensor_parallelism\(model\); known: \(model, tp_mesh\), \("):
        integration.enable()


def test_disable_puts_everything_back():
    from transformers import PreTrainedModel
    from transformers.distributed import mixin

    before = mixin.apply_tensor_parallelism, PreTrainedModel.__dict__["_finalize_model_loading"]
    integration.enable()
    integration.enable("control")
    assert mixin.apply_tensor_parallelism is not before[0]
    integration.disable()
    integration.disable()
    assert (mixin.apply_tensor_parallelism, PreTrainedModel.__dict__["_finalize_model_loading"]) == before


def test_an_unknown_architecture_runs_by_the_stock_plan_and_says_so(checkpoint, on_ranks):
    expected = whole(on_ranks, checkpoint("mistral"))
    for logits, warnings in on_ranks(2, jobs.unknown, checkpoint("mistral")):
        assert (logits - expected).abs().max() <= 1e-5
        assert any("MistralForCausalLM runs by transformers' own TP plan" in warning for warning in warnings)


def test_a_new_dense_family_is_a_line(checkpoint, on_ranks):
    expected = whole(on_ranks, checkpoint("mistral"))
    for found in on_ranks(2, jobs.registered, checkpoint("mistral")):
        assert (found["logits"] - expected).abs().max() <= 1e-5
        assert found["calls"] == {"all_reduce_rms_norm": 6}


@ONE_OF_EACH
def test_the_benchmark_decodes_what_generate_does(name, checkpoint, on_ranks):
    expected = on_ranks(1, tiny.greedy, checkpoint(name), "whole", 24)[0][:, len(tiny.PROMPT[0]) :]
    for world, mode in ((1, "whole"), (2, "stock"), (2, "fused")):
        for tokens in on_ranks(world, jobs.decoded, checkpoint(name), mode, 24):
            assert torch.equal(tokens, expected), (world, mode)


@pytest.mark.parametrize(("name", "mode"), [*((name, "fused") for name in KINDS), ("minimax-m2", "stock")])
def test_a_decode_step_compiles_as_one_graph(name, mode, checkpoint, on_ranks):
    expected = on_ranks(1, tiny.greedy, checkpoint(name), "whole", 24)[0][:, len(tiny.PROMPT[0]) :]
    for tokens in on_ranks(2, jobs.decoded, checkpoint(name), mode, 24, "aot_eager"):
        assert torch.equal(tokens, expected)


def test_no_rank_runs_what_another_could_not_compile(on_ranks):
    says = "bench model: a decode step does not compile: rank 1: ValueError: no such kernel"
    assert on_ranks(2, jobs.uncompiled) == [says, says]


# Norms of single heads


def norms_of_heads():
    """Modules of transformers, with the eps and bias of ours."""
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    return (MiniMaxM3VLRMSNorm(64, eps=1e-6), 1e-6, 1.0), (Qwen3RMSNorm(64, eps=1e-6), 1e-6, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [0, 1], ids=["minimax-m3", "qwen3"])
def test_a_norm_of_heads_is_no_further_from_fp64_than_stock(kind, dtype):
    module, eps, bias = norms_of_heads()[kind]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(512, 3, 64, generator=generator) * 5).to(dtype)
    module.weight.data.copy_(torch.randn(64, generator=generator))
    module.to(dtype)
    gamma = module.weight.detach().double() + bias
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps) * gamma
    with torch.no_grad():
        ours, stock = head_norm(module, eps, bias)(x), module(x)
    assert error(ours, exact) <= 0.501  # one rounding
    assert error(ours, exact) <= error(stock, exact) + 1e-3


def test_off_keeps_the_norms_of_its_author(checkpoint, on_ranks):
    for mode, ours in (("off", False), ("control", True), ("fused", True)):
        found = on_ranks(2, jobs.replaced, checkpoint("minimax-m3"), mode, r"(indexer\.)?[qk]_norm$")
        assert found == [[ours] * (2 + 4 + 4)] * 2, mode
