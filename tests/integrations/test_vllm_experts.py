"""The sum over experts in the all-reduce behind it: what of a graph becomes one operator, and what that leaves out of
vLLM's while it runs. With stand-ins for vLLM's operator, layer and functions."""

from __future__ import annotations

import dataclasses
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
import vllm_stand_ins as stand_ins
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch.utils._pytree import tree_leaves
from vllm_stand_ins import WIDTH, all_reduce, count, ops, traced

from tpfuse import Communicator
from tpfuse.errors import CommunicatorClosed, Unsupported
from tpfuse.integrations.serving import state
from tpfuse.integrations.vllm import experts, graph, passes
from tpfuse.integrations.vllm.graph import fuse
from tpfuse.integrations.vllm.plugin import replace
from tpfuse.quant import FORMATS

B16 = torch.bfloat16
TOP_K = 4


# vLLM, in as much as it takes: an operator, the layer that it runs, the two functions at the layer's end


def moe_forward(
    hidden_states: Tensor,
    router_logits: Tensor,
    shared_experts_input: Tensor | None,
    input_ids: Tensor | None,
    layer_name: str,
    hidden_dim_unpadded: int,
) -> Tensor:
    return VLLM.layers[layer_name](hidden_states, router_logits)


def stock_sum(input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    VLLM.sums += 1
    output.copy_(input.float().sum(1))


class NoOP:
    """As vLLM's TopKWeightAndReduceNoOP."""

    def apply(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input):
        if output is None:
            return fused_expert_output
        VLLM.copies += 1
        output.copy_(fused_expert_output)
        return output


VLLM = SimpleNamespace(layers={}, sums=0, copies=0)
_LIBRARY = torch.library.Library("vllm_stand_in", "FRAGMENT")
_SCHEMA = torch.library.infer_schema(moe_forward, mutates_args=["hidden_states"])
_LIBRARY.define(f"moe_forward{_SCHEMA}", tags=(torch.Tag.needs_fixed_stride_order,))
_LIBRARY.impl("moe_forward", moe_forward, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_stand_in::moe_forward", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)


class Layer:
    """A layer that ends as one with TritonExperts does."""

    def __init__(self):
        self.workspace = torch.empty(2, 16 * TOP_K * WIDTH * 4, dtype=B16)

    def terms(self, x, logits):
        y = self.workspace[0, : x.shape[0] * TOP_K * x.shape[1]].view(x.shape[0], TOP_K, x.shape[1])
        return y.copy_(x.unsqueeze(1) * logits[:, :TOP_K].unsqueeze(-1))

    def total(self, x):
        return self.workspace[1, : x.numel()].view_as(x)

    def __call__(self, x, logits):
        output, total = torch.empty_like(x), self.total(x)
        VLLM.moe_sum(self.terms(x, logits), total)
        VLLM.noop.apply(
            output=output, fused_expert_output=total, topk_weights=None, topk_ids=None,
            apply_router_weight_on_input=False,
        )  # fmt: skip
        return output


def known_layer(**changes):
    """What KNOWN asks for, by name, but for what is given."""

    def of(path, **attributes):
        name = experts.KNOWN[path][0] if path not in changes else changes[path]
        return type(name, (), {"__module__": "vllm.somewhere", **attributes})()

    method = "routed_experts.quant_method"
    impl = f"{method}.moe_kernel.impl"
    kernel = of(
        impl,
        prepare_finalize=of(f"{impl}.prepare_finalize"),
        fused_experts=of(f"{impl}.fused_experts", _lora_context=changes.get("lora")),
    )
    routed = of("routed_experts", quant_method=of(method, moe_kernel=SimpleNamespace(impl=kernel)))
    config = {"dp_size": 1, "pcp_size": 1, "is_sequence_parallel": False} | changes.get("config", {})
    return of(
        "",
        routed_experts=routed,
        moe_config=SimpleNamespace(**config),
        shared_experts=changes.get("shared"),
    )


class WithTerms(Communicator):
    """Notes each top_k."""

    def all_reduce_rms_norm(self, x, *args, top_k=None, **kwargs):
        self.seen = [*getattr(self, "seen", []), top_k]
        return super().all_reduce_rms_norm(x, *args, top_k=top_k, **kwargs)


@pytest.fixture
def serving(alone):
    with WithTerms(alone.group, timeout=5.0) as comm, stand_ins.serving(comm) as engaged:
        yield engaged


@pytest.fixture
def vllm(monkeypatch, serving):
    """experts.install() in a vLLM of stand-ins."""
    custom = ModuleType("vllm._custom_ops")
    custom.moe_sum = stock_sum
    noop = type("TopKWeightAndReduceNoOP", (NoOP,), {"apply": NoOP.apply})
    runner = ModuleType("vllm.model_executor.layers.fused_moe.runner.moe_runner")
    runner._moe_forward, runner._resolve_layer_name = moe_forward, lambda name: name
    context = SimpleNamespace(no_compile_layers={}, all_moe_layers=["a"], moe_layer_index=0)
    runner.get_forward_context = lambda: context
    reduce = ModuleType("vllm.model_executor.layers.fused_moe.topk_weight_and_reduce")
    reduce.TopKWeightAndReduceNoOP = noop
    for module in (custom, runner, reduce):
        parts = module.__name__.split(".")
        for n in range(1, len(parts)):
            name = ".".join(parts[:n])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name, ModuleType(name)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(sys.modules[module.__name__.rpartition(".")[0]], parts[-1], module)
    monkeypatch.setattr(torch.ops, "vllm", ops, raising=False)
    monkeypatch.setattr(experts, "_library", None)
    monkeypatch.setattr(experts, "_layer", None)
    VLLM.layers, VLLM.sums, VLLM.copies = {"a": Layer()}, 0, 0
    context.no_compile_layers["a"] = known_layer()
    VLLM.context, VLLM.custom, VLLM.noop = context, custom, noop()
    VLLM.moe_sum = lambda *args, **named: custom.moe_sum(*args, **named)
    experts.install()
    yield VLLM
    experts._library = None  # the operator goes with it
    torch.ops.tpfuse_vllm.__dict__.pop("moe_forward_all_reduce_rms_norm", None)


def rows(*shape, dtype=B16):
    return torch.randn(*shape, dtype=dtype)


def given(width=WIDTH):
    return rows(3, width), rows(3, 8), rows(3, width), rows(width)


# Graphs


def run(form, x, logits, **changes):
    named = {
        "router_logits": logits, "shared_experts_input": None, "input_ids": None, "layer_name": "a",
        "hidden_dim_unpadded": 0, **changes,
    }  # fmt: skip
    stock = ops.moe_forward.default
    if form == "v1":
        return auto_functionalized(stock, hidden_states=x, **named)
    if form == "v2":
        return auto_functionalized_v2(stock, _hidden_states_base_index=0, _all_bases=[x], **named)
    return (stock(x, *named.values()), x)


def boundary(form, view=False, **changes):
    def function(x, logits, residual, w):
        y, _ = run(form, x, logits, **changes)
        total = all_reduce(y)
        return ops.fused_add_rms_norm(total.view(-1, WIDTH) if view else total, residual, w, 1e-6)

    return function


def fused(module):
    return fuse(module.graph, with_experts())


def with_experts():
    return dataclasses.replace(stand_ins.TARGETS, experts=experts.targets())


@pytest.mark.parametrize("view", [False, True], ids=["plain", "behind a view"])
@pytest.mark.parametrize("form", ["v1", "v2"])
def test_experts_go_in_and_the_results_are_the_same(form, view, vllm, serving):
    inputs = given()
    module = traced(boundary(form, view), *inputs)
    expected = module(*(x.clone() for x in inputs))
    findings = fused(module)
    assert (findings.fused, findings.experts, findings.summed) == (1, 1, [])
    module.graph.lint()
    module.recompile()
    name = "auto_functionalized" + ("_v2" if form == "v2" else "")
    assert count(module.graph) == {name: 1, "getitem": 2}
    vllm.sums = vllm.copies = 0
    for y, reference in zip(module(*inputs), expected, strict=True):
        torch.testing.assert_close(y, reference, rtol=2**-7, atol=2**-7)
    assert (vllm.sums, vllm.copies, serving.comm.seen) == (0, 0, [TOP_K])
    assert "1 of 1 all-reduce + norms fused, 1 of 1 with their sum over experts" in serving.summary("left")


def test_a_graph_that_outlives_its_worker_says_so(vllm, serving):
    inputs = given()
    module = traced(boundary("v1"), *inputs)
    fused(module)
    module.recompile()
    state.current = None
    with pytest.raises(CommunicatorClosed, match="runs in a process where it stays out"):
        module(*inputs)


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "norm used, too"])
@pytest.mark.parametrize("kind", ["fp8_static", "fp8_per_token"])
def test_a_quantisation_goes_in_with_them(form, kind, others, vllm, serving):
    from test_vllm_graph import per_token, static

    def function(x, logits, residual, w, scale):
        norm, new = ops.fused_add_rms_norm(all_reduce(run(form, x, logits)[0]), residual, w, 1e-6)
        return *(static if kind == "fp8_static" else per_token)(norm, scale), new, norm * 2 if others else new

    inputs = *given(), torch.tensor([0.02])
    module = traced(function, *inputs)
    findings = fused(module)
    assert (findings.fused, findings.quantised, findings.experts) == (1, 1, 1)
    module.graph.lint()
    module.recompile()
    x, logits, r, w, scale = inputs
    exact = serving.comm.all_reduce_rms_norm(
        Layer().terms(x, logits), w, residual=r, quant=FORMATS[kind](scale if kind == "fp8_static" else None),
        keep_norm=True, top_k=TOP_K,
    )  # fmt: skip
    found = module(*inputs)
    expected = [exact.quant, *([] if kind == "fp8_static" else [exact.scale]), exact.residual]
    for y, reference in zip(found, [*expected, exact.norm * 2 if others else exact.residual], strict=True):
        assert torch.equal(y.view(torch.uint8), reference.view(torch.uint8))


def no_residual(x, logits, residual, w):
    return ops.rms_norm(all_reduce(run("v1", x, logits)[0]), w, 1e-6)


def result_used(x, logits, residual, w):
    y, _ = run("v1", x, logits)
    return *ops.fused_add_rms_norm(all_reduce(y), residual, w, 1e-6), y * 2


def written_used(x, logits, residual, w):
    y, x = run("v1", x, logits)
    return *ops.fused_add_rms_norm(all_reduce(y), residual, w, 1e-6), x * 2


def written_returned(x, logits, residual, w):
    y, x = run("v2", x, logits)
    return *ops.fused_add_rms_norm(all_reduce(y), residual, w, 1e-6), x


def written_is_the_residual(x, logits, residual, w):
    y, x = run("v1", x, logits)
    return ops.fused_add_rms_norm(all_reduce(y), x, w, 1e-6)


def read_is_the_residual(x, logits, residual, w):
    return ops.fused_add_rms_norm(all_reduce(run("v1", x, logits)[0]), x, w, 1e-6)


def a_view_is_the_residual(x, logits, residual, w):
    y = run("v2", x.view(-1).view(-1, WIDTH), logits)[0]
    return ops.fused_add_rms_norm(all_reduce(y), x, w, 1e-6)


def scaled(x, logits, residual, w):
    return ops.fused_add_rms_norm(all_reduce(run("v1", x, logits)[0] * 2.0), residual, w, 1e-6)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_residual, "experts before a norm without a residual"),
        (result_used, "the experts' result, or what they write to, is used elsewhere"),
        (written_used, "the experts' result, or what they write to, is used elsewhere"),
        (written_returned, "the experts' result, or what they write to, is used elsewhere"),
        (written_is_the_residual, "the experts' result, or what they write to, is used elsewhere"),
        (read_is_the_residual, "the experts write to what is the residual, too"),
        (a_view_is_the_residual, "the experts write to what is the residual, too"),
        (scaled, None),
        (boundary("direct"), "experts in a call of vllm_stand_in.moe_forward.default"),
        (boundary("v1", hidden_dim_unpadded=32), "experts of another width"),
    ],
)
def test_experts_that_stay(function, reason, vllm, serving):
    """Their sum is vLLM's; the all-reduce and the norm are ours all the same."""
    inputs = given()
    module = traced(function, *inputs)
    expected = module(*(x.clone() for x in inputs))
    findings = fused(module)
    assert (findings.fused, findings.experts) == (1, 0)
    assert [found.partition(": ")[2] for found in findings.summed] == ([] if reason is None else [reason])
    module.graph.lint()
    module.recompile()
    for y, reference in zip(tree_leaves(module(*inputs)), tree_leaves(expected), strict=True):
        torch.testing.assert_close(y, reference, rtol=2**-7, atol=2**-7)
    assert vllm.sums == 2


def test_what_keeps_its_sum_is_reported(vllm, serving, monkeypatch):
    operators = SimpleNamespace(default=None)
    theirs = SimpleNamespace(all_reduce=operators, rms_norm=operators, fused_add_rms_norm=operators)
    monkeypatch.setattr(passes, "torch", SimpleNamespace(ops=SimpleNamespace(vllm=theirs, vllm_ir=theirs)))
    found = graph.Findings(fused=2, summed=["model.layers.3: experts of another width"])
    monkeypatch.setattr(graph, "fuse", lambda *_, **__: found)
    passes.apply(None, serving, nvfp4=False)
    assert "1x sum over experts: model.layers.3: experts of another width" in serving.summary("left to vLLM")


def test_rows_in_three_dimensions_stay(vllm):
    def function(x, logits, residual, w):
        return ops.fused_add_rms_norm(all_reduce(run("v1", x, logits)[0]), residual, w, 1e-6)

    module = traced(function, rows(1, 3, WIDTH), rows(3, 8), rows(1, 3, WIDTH), rows(WIDTH))
    assert fused(module).experts == 0


def test_what_is_read_behind_the_experts_is_what_was_there(vllm, serving):
    """hidden_states is declared as written to; who reads it behind them gets what it was before."""

    def function(x, logits, residual, w):
        y = run("v1", hidden := x * 1.0, logits)[0]
        return *ops.fused_add_rms_norm(all_reduce(y), residual, w, 1e-6), hidden + 1.0

    class Writes(Layer):
        def __call__(self, x, logits):
            y = super().__call__(x, logits)
            x.zero_()
            return y

    vllm.layers["a"] = Writes()
    inputs = given()
    module = traced(function, *inputs)
    assert fused(module).experts == 1
    module.recompile()
    assert torch.equal(module(*inputs)[2], inputs[0] + 1.0)


def test_only_looking_leaves_experts_as_they_are(vllm):
    module = traced(boundary("v1"), *given())
    before = count(module.graph)
    assert fuse(module.graph, with_experts(), rewrite=False).experts == 1
    assert count(module.graph) == before


def test_without_the_operator_nothing_is_looked_for(vllm, monkeypatch):
    monkeypatch.setattr(experts, "_library", None)
    assert experts.targets() is None
    module = traced(boundary("v1"), *given())
    findings = fused(module)
    assert (findings.fused, findings.experts, findings.summed) == (1, 0, [])


# What is installed


def test_the_operator_has_vllms_arguments(vllm):
    ours = experts.targets().ours
    stock = [(a.name, str(a.type), a.alias_info is not None) for a in ops.moe_forward.default._schema.arguments]
    found = [(a.name, str(a.type), a.alias_info is not None) for a in ours._schema.arguments]
    assert found[-len(stock) :] == stock
    assert len(ours._schema.returns) == 4


@pytest.mark.parametrize("what", ["moe_sum", "apply", "moe_forward"])
def test_functions_with_other_arguments_are_left_alone(what, vllm, monkeypatch):
    if what == "moe_sum":
        monkeypatch.setattr(vllm.custom, "moe_sum", lambda output, input: None)
    elif what == "apply":
        monkeypatch.setattr(type(vllm.noop), "apply", lambda self, output: output)
    else:
        monkeypatch.setattr(torch.ops, "vllm", SimpleNamespace(moe_forward=ops.all_reduce))
    with pytest.raises(LookupError, match=f"{what} takes"):
        experts.install()


@pytest.mark.parametrize("name", ["norm", "quant, dynamic", "quant, static"])
def test_opcheck(name, vllm, serving):
    x, logits, residual, w = given()
    scale = torch.tensor([0.02])
    first = {
        "norm": (residual, w, None, 1e-6, 0.0, "", True),
        "quant, dynamic": (residual, w, None, 1e-6, 0.0, "fp8_per_token", True),
        "quant, static": (residual, w, scale, 1e-6, 0.0, "fp8_static", False),
    }[name]
    call = (*first, x, logits, None, None, "a", 0)
    torch.library.opcheck(experts.targets().ours, call, test_utils=("test_schema", "test_faketensor"))


# What is left out


def terms(vllm, layer=None, x=None, gamma=None):
    if layer is not None:
        vllm.layers["a"] = layer
    x = rows(3, WIDTH) if x is None else x
    logits = rows(x.shape[0], 8)
    found, top_k = experts.terms_of(
        lambda: ops.moe_forward(x, logits, None, None, "a", 0), "a", x, rows(WIDTH) if gamma is None else gamma
    )
    return x, logits, found, top_k


@pytest.mark.parametrize("inference", [False, True])
def test_sum_and_copy_are_left_out(inference, vllm, serving):
    gamma = rows(WIDTH)
    for _ in range(2):  # the first one is looked at
        with torch.inference_mode(inference):
            x, logits, found, top_k = terms(vllm, gamma=gamma)
            assert torch.equal(found, Layer().terms(x, logits))
        assert (vllm.sums, vllm.copies, top_k) == (0, 0, TOP_K)
    assert experts._kept.get() is None


@pytest.mark.parametrize("shared", [False, True], ids=["own memory", "memory of the terms"])
def test_a_sum_that_goes_to_the_output_at_once(shared, vllm, serving):
    """As in vLLM 0.33 on GPUs."""

    class AtOnce(Layer):
        def __call__(self, x, logits):
            output = self.workspace[0, -x.numel() :].view_as(x) if shared else torch.empty_like(x)
            vllm.moe_sum(self.terms(x, logits), output)
            return vllm.noop.apply(output, output, None, None, False)

    x, logits, found, top_k = terms(vllm, AtOnce())
    assert torch.equal(found, Layer().terms(x, logits))
    assert (vllm.sums, vllm.copies, top_k) == (0, 0, TOP_K)


def test_outside_nothing_is_left_out(vllm):
    layer, x = vllm.layers["a"], rows(3, WIDTH)
    layer(x, rows(3, 8))
    assert (vllm.sums, vllm.copies) == (1, 1)


def whole(vllm, serving, reason, layer=None, **more):
    x, logits, found, top_k = terms(vllm, layer, **more)
    assert top_k is None
    expected = (x.unsqueeze(1) * logits[:, :TOP_K].unsqueeze(-1)).float().sum(1).to(B16)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    assert f"1x sum over experts: {reason}" in serving.summary("left")
    assert "0 of 1 with their sum over experts" in serving.summary("left")


def test_experts_that_add_up_otherwise(vllm, serving):
    class Other(Layer):
        def __call__(self, x, logits):
            return self.terms(x, logits).float().sum(1).to(x.dtype)

    whole(vllm, serving, "vLLM adds up in another way", Other())


@pytest.mark.parametrize("what", ["map", "rows", "columns", "dtype", "too many"])
def test_sums_that_are_not_the_known_one(what, vllm, serving):
    class Other(Layer):
        def __call__(self, x, logits):
            y, total = self.terms(x, logits), torch.empty_like(x)
            if what == "map":
                vllm.moe_sum(y, total, None, torch.zeros(4))
            elif what == "rows":
                for part in range(x.shape[0]):
                    vllm.moe_sum(y[part : part + 1], total[part : part + 1])
            elif what == "too many":  # for the kernels, which all calls go to
                vllm.moe_sum(torch.cat((y, *[torch.zeros_like(y)] * 8), 1), total)
            elif what == "columns":
                vllm.moe_sum(y.transpose(1, 2).contiguous().transpose(1, 2), total)
            else:
                vllm.moe_sum(y.float(), wide := total.float())
                total = wide.to(x.dtype)
            return vllm.noop.apply(torch.empty_like(x), total, None, None, False)

    whole(vllm, serving, "vLLM adds up in another way", Other())
    assert vllm.sums == (3 if what == "rows" else 1)


def test_no_tokens_are_no_terms(vllm, serving):
    _, _, found, top_k = terms(vllm, x=rows(0, WIDTH))
    assert top_k is None
    assert found.shape == (0, WIDTH)


class Second(Layer):
    """Adds up twice."""

    def __call__(self, x, logits):
        output = super().__call__(x, logits)
        VLLM.moe_sum(self.terms(x * 2, logits), other := torch.empty_like(x))
        self.other = other
        return output


def test_a_second_sum_is_vllms(vllm):
    layer = Second()
    vllm.layers["a"] = layer
    x, logits = rows(3, WIDTH), rows(3, 8)
    with experts.keeping(x, False) as kept:
        layer(x, logits)
    assert vllm.sums == 1
    torch.testing.assert_close(layer.other, layer.terms(x * 2, logits).float().sum(1).to(B16))
    assert kept.terms is not None


class Handed(Layer):
    """Does something with the layer's output, behind what is left out."""

    def __init__(self, then):
        super().__init__()
        self.then = then

    def __call__(self, x, logits):
        return self.then(super().__call__(x, logits))


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda y: y.clone(), "returned another tensor"),
        (lambda y: y * 2.5, "returned another tensor"),
        (lambda y: y[:, : WIDTH // 2], "returned another tensor"),
        (lambda y: y.mul_(2.5), "changed the sum"),
        (lambda y: y.add_(1.0), "changed the sum"),
    ],
)
def test_a_sum_that_is_used_is_an_error(then, message, vllm, serving):
    with pytest.raises(Unsupported, match=f"{message}.*TPFUSE_VLLM=control or off"):
        terms(vllm, Handed(then))
    assert experts._kept.get() is None
    assert not serving.fused[state.EXPERTS]


def test_a_sum_that_is_not_handed_through_is_an_error(vllm):
    class Uncopied(Layer):
        def __call__(self, x, logits):
            vllm.moe_sum(self.terms(x, logits), total := self.total(x))
            return total

    with pytest.raises(Unsupported, match="returned another tensor"):
        terms(vllm, Uncopied())


def test_a_sum_without_an_output_to_go_to_is_an_error(vllm):
    """As where tokens are combined over ranks after it."""

    class Combined(Layer):
        def __call__(self, x, logits):
            vllm.moe_sum(self.terms(x, logits), total := self.total(x))
            return torch.empty_like(x).copy_(vllm.noop.apply(None, total, None, None, False))

    with pytest.raises(Unsupported, match="returned another tensor"):
        terms(vllm, Combined())


def test_layers_within_layers_keep_their_own(vllm):
    inner = Layer()

    class Nested(Layer):
        def __call__(self, x, logits):
            with experts.keeping(x, False) as kept:
                inner(x, logits)
            self.inner = kept
            return super().__call__(x, logits)

    layer = Nested()
    _, _, found, top_k = terms(vllm, layer)
    assert top_k == TOP_K
    assert found.data_ptr() == layer.workspace[0].data_ptr()
    assert layer.inner.terms.data_ptr() == inner.workspace[0].data_ptr()
    assert (vllm.sums, vllm.copies) == (0, 0)


def test_another_thread_is_not_concerned(vllm):
    x = rows(3, WIDTH)
    with experts.keeping(x, False) as kept:
        thread = threading.Thread(target=lambda: Layer()(x, rows(3, 8)))
        thread.start()
        thread.join()
    assert (vllm.sums, vllm.copies, kept.terms) == (1, 1, None)


def test_what_raises_leaves_nothing_behind(vllm):
    def broken(y):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        terms(vllm, Handed(broken))
    assert experts._kept.get() is None
    vllm.layers["a"] = layer = Layer()
    layer(rows(3, WIDTH), rows(3, 8))
    assert vllm.sums == 1


def test_traced_callers_get_vllms_own(vllm):
    owner = SimpleNamespace(moe_sum=lambda input, output: output.copy_(input.float().sum(1)))
    replace(owner, "moe_sum", experts.moe_sum)
    x, y = rows(3, 2, 8), rows(3, 8)
    torch.compile(lambda: owner.moe_sum(x, y), backend="eager", fullgraph=True)()
    assert torch.equal(y, x.float().sum(1).to(B16))


# Which layers


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"": "MoERunnerOfTheirs"}, "MoERunnerOfTheirs is not known"),
        ({"routed_experts.quant_method": "Mxfp4MoEMethod"}, "Mxfp4MoEMethod is not known"),
        ({"routed_experts.quant_method.moe_kernel.impl": "Monolithic"}, "Monolithic is not known"),
        ({"routed_experts.quant_method.moe_kernel.impl.fused_experts": "DeepGemmExperts"}, "DeepGemmExperts is not"),
        ({"routed_experts.quant_method.moe_kernel.impl.prepare_finalize": "DeepEP"}, "DeepEP is not known"),
        ({"config": {"dp_size": 2}}, "tokens are spread over ranks"),
        ({"config": {"pcp_size": 2}}, "tokens are spread over ranks"),
        ({"config": {"is_sequence_parallel": True}}, "tokens are spread over ranks"),
        ({"shared": object()}, "shared experts"),
        ({"lora": object()}, "LoRA"),
    ],
)
def test_other_layers_add_up_by_themselves(changes, reason, vllm, serving):
    vllm.context.no_compile_layers["a"] = known_layer(**changes)
    whole(vllm, serving, reason)
    assert (vllm.sums, vllm.copies) == (1, 1)


@pytest.mark.parametrize("layer", [None, SimpleNamespace(), Layer()], ids=["no layer", "no parts", "another"])
def test_layers_that_can_not_be_looked_at_add_up_by_themselves(layer, vllm, serving):
    if layer is None:
        del vllm.context.no_compile_layers["a"]
    else:
        vllm.context.no_compile_layers["a"] = layer
    whole(vllm, serving, "")


def test_layers_of_others_by_the_same_name_are_not_known(vllm):
    layer = known_layer()
    type(layer).__module__ = "elsewhere"
    assert experts.unknown(layer) == "MoERunner is not known"


def test_layers_are_found_by_their_turn_where_vllm_counts_them(vllm):
    vllm.context.all_moe_layers, vllm.context.moe_layer_index = ["b", "a"], 1
    assert experts._layer("from_forward_context") is vllm.context.no_compile_layers["a"]
    assert vllm.context.moe_layer_index == 1
