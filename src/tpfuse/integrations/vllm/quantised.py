"""Finding the quantisation behind a norm in a graph of vLLM: to FP8 with a given scale, or one for each token, or for
each 128 elements of a token.

vLLM has each of the first two in two forms: an operator of its own, functionalised, or plain torch operations, where it
lets Inductor make the kernel. Their arithmetic is that of tpfuse.quant: the norm is rounded to its dtype, multiplied by
the reciprocal of the scale, and rounded to E4M3.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from tpfuse.quant import E4M3_MAX, GROUP_FLOOR, TOKEN_FLOOR, FP8PerGroup, group_floor

aten, prims = torch.ops.aten, torch.ops.prims
FP8 = torch.float8_e4m3fn
WHOLE = (None, (-1, -1), [-1, -1])  # group shapes of one scale for the whole tensor

# A scale for each token, from its last operation to its first, and what each has beside its input.
# `norm.abs().max(-1)[0]`: vLLM 0.24; `norm.abs().amax(-1)`: 0.33
_SCALED = (aten.clamp_min.default, aten.div.Tensor, prims.convert_element_type.default, aten.unsqueeze.default)
_NUMBERS = (TOKEN_FLOOR, E4M3_MAX, torch.float32, -1)
SCALES: dict[tuple[Any, ...], tuple[Any, ...]] = {
    (*_SCALED, operator.getitem, aten.max.dim, aten.abs.default): (*_NUMBERS, 0, -1),
    (*_SCALED, aten.amax.default, aten.abs.default): (*_NUMBERS, [-1]),
}


@dataclass(frozen=True)
class Quantised:
    """A quantisation. kind: a key of tpfuse.quant.FORMATS. given: the scale that it takes; scale: the one it makes.
    inputs: the nodes that it reads the norm with."""

    kind: str
    given: fx.Node | None
    quant: fx.Node
    scale: fx.Node | None
    inputs: tuple[fx.Node, ...]


def behind(norm: fx.Node) -> Quantised | None:
    """The first quantisation of a norm that tpfuse has, too."""
    for user in norm.users:
        found = _operator(user, norm) if user.target is auto_functionalized else _operations(user, norm)
        if found is not None:
            return found
    return None


def _operator(node: fx.Node, norm: fx.Node) -> Quantised | None:
    """vLLM's own kernels. What they write to comes back behind the first output, in the order of the schema."""
    given: dict[str, Any] = dict(node.kwargs)
    name = str(node.args[0]).removeprefix("_C.").partition(".")[0]
    if given.get("input") is not norm:
        return None
    outputs = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    quant, scale = outputs.get(1), outputs.get(2)
    if quant is None or quant.meta["val"].dtype != FP8:
        return None
    if name == "static_scaled_fp8_quant" and given.get("group_shape") in WHOLE and _is_one(given["scale"]):
        return Quantised("fp8_static", given["scale"], quant, None, (node,))
    if name == "dynamic_per_token_scaled_fp8_quant" and given.get("scale_ub") is None:
        return Quantised("fp8_per_token", None, quant, scale, (node,))
    if name == "per_token_group_fp8_quant" and _is_plain_group(given):
        return Quantised(_group_kind(given), None, quant, scale, (node,))
    return None


def _is_plain_group(given: dict[str, Any]) -> bool:
    numbers = (given["group_size"], given["fp8_max"], given["scale_ue8m0"])
    return numbers == (FP8PerGroup.group, E4M3_MAX, False) and group_floor(given["eps"]) == GROUP_FLOOR


def _group_kind(given: dict[str, Any]) -> str:
    if given.get("dummy_is_tma_aligned"):
        return "fp8_per_group_tma_aligned"
    return "fp8_per_group_column_major" if given.get("dummy_is_scale_transposed") else "fp8_per_group"


def _operations(node: fx.Node, norm: fx.Node) -> Quantised | None:
    """`(norm.float() * scale.reciprocal()).clamp(-448, 448).to(FP8)`."""
    if not _is(node, prims.convert_element_type.default, norm, torch.float32):
        return None
    product = _only_user(node)
    if product is None or product.target is not aten.mul.Tensor:
        return None
    factor = product.args[1] if product.args[0] is node else product.args[0]
    low = _only_user(product)
    high = _only_user(low)
    quant = _only_user(high)
    if not (
        _is(low, aten.clamp_min.default, product, -E4M3_MAX)
        and _is(high, aten.clamp_max.default, low, E4M3_MAX)
        and _is(quant, prims.convert_element_type.default, high, FP8)
    ):
        return None
    assert quant is not None
    if not isinstance(factor, fx.Node) or factor.target is not aten.reciprocal.default:
        return None
    scale = factor.args[0]
    assert isinstance(scale, fx.Node)
    largest = _largest(scale, norm)
    if largest is not None:
        return Quantised("fp8_per_token", None, quant, scale, (node, largest))
    return Quantised("fp8_static", scale, quant, None, (node,)) if _is_one(scale) else None


def _largest(scale: fx.Node, norm: fx.Node) -> fx.Node | None:
    """The node that reads the norm, if a scale is made of it as in SCALES."""
    steps = tuple(_back(scale))
    made: tuple[Any, ...] = tuple(step.target for step in steps)
    numbers = SCALES.get(made)
    if numbers is None or steps[-1].args[0] is not norm:
        return None
    return steps[-1] if tuple(step.args[1] for step in steps[:-1]) == numbers else None


def _back(node: Any) -> Iterator[fx.Node]:
    """A node and what came before it, by first arguments, up to an abs."""
    while isinstance(node, fx.Node) and node.args:
        yield node
        if node.target is aten.abs.default:
            return
        node = node.args[0]


def _is(node: fx.Node | None, target: Any, *args: Any) -> bool:
    return node is not None and node.target is target and node.args == args


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _is_one(node: fx.Node) -> bool:
    """Whether a node is one float32. A size that is a symbol is not one, and comparing it would make a guard."""
    value = node.meta["val"]
    return value.dtype == torch.float32 and all(isinstance(size, int) and size == 1 for size in value.shape)
