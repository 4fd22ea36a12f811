"""Rewriting graphs for vLLM: what is found, what is left and why, and that results are the same."""

from __future__ import annotations

import pytest
import torch
import vllm_stand_ins as stand_ins
from vllm_stand_ins import SITES, TARGETS, WIDTH, all_reduce, count, ops, traced

from tpfuse.integrations.vllm import state
from tpfuse.integrations.vllm.graph import fuse

B16 = torch.bfloat16


@pytest.fixture
def serving(alone):
    """The Communicator of a group of one in the place of a worker's."""
    state.current = stand_ins.engaged(alone)
    yield state.current
    state.current = None


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
            "x is torch.float64, gamma torch.bfloat16",
            lambda x, w: ops.rms_norm(all_reduce(x), w, 1e-6),
            (X.double(), W),
        ),
        ("rows of 20000 elements; tpfuse takes 16384", lambda x, w: ops.rms_norm(all_reduce(x), w, 1e-6),
         (rows(1, 20000), rows(20000))),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_left_has_a_reason(why, function, inputs):
    (reason,) = left(function, *inputs)
    assert reason == f"all_reduce: {why}"
