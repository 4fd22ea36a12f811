"""Rewriting graphs for vLLM: what is found, what is left and why, and that results are the same."""

from __future__ import annotations

import pytest
import torch
import vllm_stand_ins as stand_ins
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from vllm_stand_ins import SITES, TARGETS, WIDTH, all_reduce, count, ops, traced

from tpfuse import Communicator
from tpfuse.integrations.serving import state
from tpfuse.integrations.vllm.graph import fuse
from tpfuse.quant import FORMATS

B16 = torch.bfloat16


@pytest.fixture
def serving(alone):
    with stand_ins.serving(alone) as engaged:
        yield engaged


@pytest.fixture
def wide(alone):
    """The same, for rows that have whole groups of 128."""
    with Communicator(alone.group, timeout=5.0) as comm, stand_ins.serving(comm) as engaged:
        yield engaged


def rows(*shape, dtype=B16):
    return torch.randn(*shape, dtype=dtype)


def left(function, *inputs):
    findings = fuse(traced(function, *inputs).graph, TARGETS)
    assert findings.fused == 0
    return findings.left


@pytest.mark.parametrize("dtype", [torch.float32, B16, torch.float16])
def test_every_site_of_a_model_is_fused_and_gives_the_same(dtype, serving):
    given = stand_ins.inputs(0, dtype)
    module = traced(stand_ins.model, *given)
    expected = module(*given)
    assert fuse(module.graph, TARGETS).fused == SITES
    module.graph.lint()
    module.recompile()
    assert not {"all_reduce", "rms_norm", "fused_add_rms_norm"} & set(count(module.graph))
    for y, reference_y in zip(module(*given), expected, strict=True):
        torch.testing.assert_close(y, reference_y)
    assert len(serving.fused[state.BOUNDARY]) == SITES


def test_any_number_of_rows_and_no_guard_on_it():
    """As vLLM compiles: the number of tokens is a symbol, widths are numbers."""
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)

    def fake(tensor):
        kinds = [DimDynamic.DYNAMIC if tensor.dim() == 2 and n == 0 else DimDynamic.STATIC for n in range(tensor.dim())]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    def boundary(x, r, w, scale):
        norm, new = ops.fused_add_rms_norm(all_reduce(x).view(-1, 256), r, w, 1e-6)
        again = all_reduce(norm * 2).view(-1) * 2  # its width is a symbol
        kernel = static_kernel(norm, scale)
        return *kernel, *per_token(ops.rms_norm(all_reduce(norm), w, 1e-6), scale), new, again

    given = [fake(tensor) for tensor in (rows(3, 256), rows(3, 256), rows(256), torch.tensor([0.02]))]
    with mode, torch.no_grad():
        module = make_fx(boundary, select_decomp_table())(*given)
    before = len(shapes.guards)
    findings = fuse(module.graph, TARGETS)
    module.graph.lint()
    assert (findings.fused, findings.quantised, len(findings.left)) == (2, 2, 1)
    assert len(shapes.guards) == before


def test_two_ranks_give_what_all_reduce_and_norm_give(on_ranks):
    for result in on_ranks(2, stand_ins.run_model, torch.float32):
        assert result["fused"] == SITES
        assert result["calls"] == {"all_reduce_rms_norm": SITES}
        for y, expected in zip(result["found"], result["expected"], strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_gemmas_gamma_goes_in_as_it_is(serving):
    def boundary(x, residual, w):
        return ops.fused_add_rms_norm(all_reduce(x), residual, w.float() + 1.0, 1e-6)

    given = rows(3, WIDTH), rows(3, WIDTH), rows(WIDTH)
    module = traced(boundary, *given)
    fuse(module.graph, TARGETS)
    module.recompile()
    assert set(count(module.graph)) == {"all_reduce_add_rms_norm", "getitem"}
    exact = serving.comm.all_reduce_rms_norm(given[0], given[2], residual=given[1], eps=1e-6, weight_bias=1.0)
    assert torch.equal(module(*given)[0], exact.norm)


def test_one_added_in_bf16_stays_added_in_bf16(serving):
    def boundary(x, w):
        return ops.rms_norm(all_reduce(x), w + 1.0, 1e-6)

    module = traced(boundary, rows(3, WIDTH), rows(WIDTH))
    assert fuse(module.graph, TARGETS).fused == 1
    assert count(module.graph)["add"] == 1


def test_an_addition_may_stand_either_way_round(serving):
    """vLLM makes its operator of additions in models of transformers, in their order."""
    given = rows(3, WIDTH), rows(3, WIDTH), rows(WIDTH)
    module = traced(lambda x, r, w: ops.fused_add_rms_norm(r, all_reduce(x), w, 1e-6), *given)
    assert fuse(module.graph, TARGETS).fused == 1
    module.recompile()
    exact = serving.comm.all_reduce_rms_norm(given[0], given[2], residual=given[1], eps=1e-6)
    for y, wanted in zip(module(*given), (exact.norm, exact.residual), strict=True):
        assert torch.equal(y, wanted)


def test_a_sum_that_nobody_else_wants_is_not_returned(serving):
    module = traced(lambda x, w: ops.rms_norm(all_reduce(x), w, 1e-6), rows(3, WIDTH), rows(WIDTH))
    fuse(module.graph, TARGETS)
    assert count(module.graph) == {"all_reduce_rms_norm": 1}


def test_users_of_the_sum_before_the_norm_are_ordered_behind_it(serving):
    def boundary(x, w):
        total = all_reduce(x)
        doubled = total * 2
        return doubled, ops.rms_norm(total, w, 1e-6)

    given = rows(3, WIDTH), rows(WIDTH)
    module = traced(boundary, *given)
    expected = module(*given)
    assert fuse(module.graph, TARGETS).fused == 1
    module.graph.lint()
    module.recompile()
    for y, reference_y in zip(module(*given), expected, strict=True):
        torch.testing.assert_close(y, reference_y)


def test_only_looking_changes_nothing():
    module = traced(stand_ins.model, *stand_ins.inputs(0, B16))
    before = count(module.graph)
    assert fuse(module.graph, TARGETS, rewrite=False).fused == SITES
    assert count(module.graph) == before


def test_what_is_to_be_kept_is_kept_with_its_reason():
    module = traced(stand_ins.model, *stand_ins.inputs(0, B16))
    findings = fuse(module.graph, TARGETS, keep=lambda norm: "somebody else's")
    assert findings.fused == 0
    assert [reason.partition(": ")[2] for reason in findings.left] == ["somebody else's"] * SITES


def test_an_all_reduce_of_another_group_is_not_ours():
    def boundary(x, w):
        return ops.rms_norm(all_reduce(x, "dp:0"), w, 1e-6)

    assert left(boundary, rows(3, WIDTH), rows(WIDTH)) == []


# Quantisation


def static(norm, scale):
    """FP8 with a given scale, as vLLM spells it where it lets Inductor make the kernel."""
    return ((norm.float() * scale.reciprocal()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn),)


def per_token(norm, _):
    return _by_token(norm, norm.abs().max(dim=-1)[0])  # as vLLM 0.24 has it


def per_token_by_amax(norm, _):
    return _by_token(norm, norm.abs().amax(dim=-1))  # as vLLM 0.33 has it


def _by_token(norm, largest):
    scale = (largest.unsqueeze(-1).float() / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return *static(norm, scale), scale


_KERNELS = torch.library.Library("_C", "FRAGMENT")  # the names and arguments of vLLM's kernels
for _schema in (
    "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
    "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
):
    _KERNELS.define(_schema)
    _name = _schema.partition("(")[0]
    torch.library.register_fake(f"_C::{_name}", lambda *_, **__: None, lib=_KERNELS)


def static_kernel(norm, scale, **given):
    empty = torch.empty_like(norm, dtype=torch.float8_e4m3fn)
    kernel = torch.ops._C.static_scaled_fp8_quant.default
    _, quant = auto_functionalized(kernel, result=empty, input=norm, scale=scale, **given)
    return (quant,)


def per_token_kernel(norm, _, scale_ub=None):
    empty, scale = torch.empty_like(norm, dtype=torch.float8_e4m3fn), norm.new_empty((norm.shape[0], 1)).float()
    kernel = torch.ops._C.dynamic_per_token_scaled_fp8_quant.default
    return auto_functionalized(kernel, result=empty, input=norm, scale=scale, scale_ub=scale_ub)[1:]


def per_group_kernel(norm, _):
    empty = torch.empty_like(norm, dtype=torch.float8_e4m3fn)
    scale = torch.empty((norm.shape[0], norm.shape[1] // 128), dtype=torch.float32)
    return auto_functionalized(
        torch.ops._C.per_token_group_fp8_quant.default, input=norm, output_q=empty, output_s=scale, group_size=128,
        eps=1e-10, fp8_min=-448.0, fp8_max=448.0, scale_ue8m0=False, dummy_is_scale_transposed=False,
        dummy_is_tma_aligned=False,
    )[1:]  # fmt: skip


QUANTS = {
    "static": (static, "fp8_static"),
    "per token": (per_token, "fp8_per_token"),
    "per token, amax": (per_token_by_amax, "fp8_per_token"),
    "static, kernel": (static_kernel, "fp8_static"),
    "per token, kernel": (per_token_kernel, "fp8_per_token"),
    "per group, kernel": (per_group_kernel, "fp8_per_group"),
}


@pytest.mark.parametrize("others", [False, True], ids=["alone", "norm used, too"])
@pytest.mark.parametrize("residual", [False, True], ids=["no residual", "residual"])
@pytest.mark.parametrize("name", QUANTS)
def test_a_quantisation_goes_in(name, residual, others, wide):
    quantise, kind = QUANTS[name]

    def boundary(x, r, w, scale):
        if residual:
            norm, new = ops.fused_add_rms_norm(all_reduce(x), r, w, 1e-6)
        else:
            norm, new = ops.rms_norm(all_reduce(x), w, 1e-6), r
        return *quantise(norm, scale), new, norm * 2 if others else new

    given = rows(3, 256), rows(3, 256), rows(256), torch.tensor([0.02])
    module = traced(boundary, *given)
    findings = fuse(module.graph, TARGETS)
    assert (findings.fused, findings.quantised) == (1, 1)
    assert count(module.graph).keys() <= {"all_reduce_rms_norm_quant", "getitem", "mul"}
    module.graph.lint()
    module.recompile()
    x, r, w, scale = given
    exact = wide.comm.all_reduce_rms_norm(
        x, w, residual=r if residual else None, quant=FORMATS[kind](scale if kind == "fp8_static" else None),
        keep_norm=True,
    )  # fmt: skip
    found = module(*given)
    expected = [exact.quant, *([] if kind == "fp8_static" else [exact.scale]), exact.residual if residual else r]
    for y, reference in zip(found, [*expected, exact.norm * 2 if others else expected[-1]], strict=True):
        assert torch.equal(y.view(torch.uint8), reference.view(torch.uint8))


@pytest.mark.parametrize("name", ["static", "per token", "per token, amax"])
def test_what_vllm_computes_is_what_tpfuse_computes(name, wide):
    quantise, kind = QUANTS[name]
    x, scale = rows(3, 256), torch.tensor([0.02])
    y = FORMATS[kind](scale if kind == "fp8_static" else None).encode(x)
    for found, expected in zip(quantise(x, scale), y, strict=False):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    "other",
    [
        lambda norm, scale: (norm.float() * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn),
        lambda norm, scale: (norm.float() * scale.reciprocal()).clamp(-240.0, 240.0).to(torch.float8_e4m3fn),
        lambda norm, scale: static(norm, norm.float().abs().max().reshape(1) * 0 + scale.repeat(3).unsqueeze(-1))[0],
        lambda norm, scale: per_token(norm * 2, scale)[0],
        lambda norm, scale: static(norm, (norm.abs().max().unsqueeze(-1).float() / 448.0).clamp(min=1e-6))[0],
        lambda norm, scale: static_kernel(norm, (norm.abs().max().unsqueeze(-1).float() / 448.0).clamp(min=1e-6))[0],
        lambda norm, scale: static_kernel(norm, scale, group_shape=[1, 128])[0],
        lambda norm, scale: per_token_kernel(norm, scale, scale_ub=scale)[0],
    ],
    ids=[
        "no reciprocal", "another range", "a scale for each row from elsewhere", "of another tensor",
        "a scale of the norm itself", "a scale of the norm itself, kernel", "scales by group, kernel",
        "a bound on the scales, kernel",
    ],
)  # fmt: skip
def test_another_quantisation_stays_behind_the_fused_norm(other, wide):
    def boundary(x, w, scale):
        return other(ops.rms_norm(all_reduce(x), w, 1e-6), scale)

    module = traced(boundary, rows(3, 256), rows(256), torch.tensor([0.02]))
    findings = fuse(module.graph, TARGETS)
    assert (findings.fused, findings.quantised) == (1, 0)
    module.graph.lint()


def test_where_something_raises_the_graph_still_computes_the_same(serving):
    seen = []

    def keep(norm):
        seen.append(norm)
        if len(seen) == 3:
            raise RuntimeError("unexpected")
        return ""

    given = stand_ins.inputs(0, torch.float32)
    module = traced(stand_ins.model, *given)
    expected = module(*given)
    with pytest.raises(RuntimeError, match="unexpected"):
        fuse(module.graph, TARGETS, keep=keep)
    module.graph.lint()
    module.recompile()
    assert count(module.graph)["all_reduce"] == SITES - 2
    for y, reference_y in zip(module(*given), expected, strict=True):
        torch.testing.assert_close(y, reference_y)


# What is left


X, R, W = rows(3, WIDTH), rows(3, WIDTH), rows(WIDTH)


@pytest.mark.parametrize(
    ("why", "function", "inputs"),
    [
        ("no norm behind it but aten.mul.Tensor", lambda x: all_reduce(x) * 2, (X,)),
        ("no norm behind it but the end of the graph", lambda x: all_reduce(x), (X,)),
        ("a norm without gamma", lambda x: ops.rms_norm(all_reduce(x), None, 1e-6), (X,)),
        ("a norm over a part of the row", lambda x, w: ops.rms_norm(all_reduce(x), w, 1e-6, 32), (X, W)),
        (
            "the sum itself is used beside the norm that adds a residual",
            lambda x, r, w: (total := all_reduce(x), ops.fused_add_rms_norm(total, r, w, 1e-6)),
            (X, R, W),
        ),
        (
            "the residual is torch.float32, the sum torch.bfloat16",
            lambda x, r, w: ops.fused_add_rms_norm(all_reduce(x), r, w, 1e-6),
            (X, R.float(), W),
        ),
        (
            "gamma is [64], strides [0], rows have 64 elements",
            lambda x, w: ops.rms_norm(all_reduce(x), w[:1].expand(WIDTH), 1e-6),
            (X, W),
        ),
        (
            "x is torch.float64, gamma torch.bfloat16",
            lambda x, w: ops.rms_norm(all_reduce(x), w, 1e-6),
            (X.double(), W),
        ),
        (
            "the residual is [1, 64], the sum [3, 64]",
            lambda x, r, w: ops.fused_add_rms_norm(all_reduce(x), r, w, 1e-6),
            (X, R[:1], W),
        ),
        (
            "elements of a row of the residual are not contiguous",
            lambda x, r, w: ops.fused_add_rms_norm(all_reduce(x), r, w, 1e-6),
            (X, rows(WIDTH, 3).t(), W),
        ),
        (
            "elements of a row are not contiguous",
            lambda x, w: ops.rms_norm(all_reduce(x), w, 1e-6),
            (rows(WIDTH, 3).t(), W),
        ),
        (
            "the sum is its own residual",
            lambda x, w: ops.fused_add_rms_norm(total := all_reduce(x), total, w, 1e-6),
            (X, W),
        ),
        (
            "gamma is made of the sum",
            lambda x, w: ops.rms_norm(total := all_reduce(x), w + total[0].mean() * 0, 1e-6),
            (X, W),
        ),
        ("rows of 20000 elements; tpfuse takes 16384", lambda x, w: ops.rms_norm(all_reduce(x), w, 1e-6),
         (rows(1, 20000), rows(20000))),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_left_has_a_reason(why, function, inputs):
    (reason,) = left(function, *inputs)
    assert reason == f"all_reduce: {why}"
