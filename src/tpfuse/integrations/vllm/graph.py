"""Rewriting FX graphs: an all-reduce and the norm behind it become one operator. Independent of vLLM: the operators to
look for are arguments.

What is recognised, with `sum = all_reduce(x)`, behind views that keep the rows or not:
- `fused_add_rms_norm(sum, residual, gamma)`, where nothing else wants the sum;
- `rms_norm(sum, gamma)`, where others may want the sum: the first norm of a model, whose residual it is;
- both with Gemma's gamma, `w.float() + 1`, which then stays the w that it is;
- with a residual, the operator for a layer of experts whose result is reduced, see experts.py;
- what quantises the norm to FP8, see quantised.py, with the norm itself if others want it, too.

It walks nodes instead of matching patterns: a pattern has to spell out eps, dtypes and who else uses what, so it misses
in silence. Here each all-reduce is either replaced or kept with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._inductor.fx_utils import get_node_storage
from torch._inductor.pattern_matcher import stable_topological_sort

from tpfuse.backends.cuda.all_reduce import why_not
from tpfuse.checks import DTYPES
from tpfuse.integrations.vllm import operators  # noqa: F401  registers torch.ops.tpfuse_vllm
from tpfuse.integrations.vllm.quantised import Quantised, behind
from tpfuse.quant import FP8PerGroup

aten, prims = torch.ops.aten, torch.ops.prims
FUNCTIONAL = (torch.ops.higher_order.auto_functionalized, torch.ops.higher_order.auto_functionalized_v2)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CASTS = (prims.convert_element_type.default, aten._to_copy.default)


@dataclass(frozen=True)
class Experts:
    """The operator for a layer of experts, and ours that is in its place and its site's: with the same arguments, and
    those of all_reduce_rms_norm_quant but x. It returns norm, residual, quant and scale, whichever there are."""

    stock: Any
    ours: Any


@dataclass(frozen=True)
class Targets:
    """What to look for. group: the name that all-reduces of the TP group carry."""

    all_reduce: Any  # (tensor, group_name)
    group: str
    rms_norm: Any  # (x, weight, epsilon, variance_size)
    add_rms_norm: Any  # (x, x_residual, weight, epsilon, variance_size)
    max_hidden: int
    experts: Experts | None = None


@dataclass
class Findings:
    """What became of the all-reduces of a graph: how many were fused, with how many quantisations and layers of
    experts, and why the others were not. summed: the experts that stay before a site that was fused, and why."""

    fused: int = 0
    quantised: int = 0
    experts: int = 0
    left: list[str] = field(default_factory=list)
    summed: list[str] = field(default_factory=list)


class _Unfit(Exception):
    """Why an all-reduce stays."""


@dataclass
class _Site:
    """An all-reduce with its norm. end: the all-reduce, or the last view of it."""

    x: fx.Node
    views: list[fx.Node]
    end: fx.Node
    norm: fx.Node
    residual: fx.Node | None
    weight: fx.Node
    weight_bias: float
    eps: float
    experts: fx.Node | None = None  # whose result x is, if they go in


def fuse(
    graph: fx.Graph, targets: Targets, *, keep: Callable[[fx.Node], str] = lambda norm: "", rewrite: bool = True
) -> Findings:
    """Fuse what can be fused. keep: says of a norm why it must stay as it is. rewrite=False: only look."""
    findings = Findings()
    try:
        for node in list(graph.nodes):
            if not _calls(node, targets.all_reduce) or arguments(node)["group_name"] != targets.group:
                continue
            try:
                site = _find(node, targets)
                if reason := keep(site.norm):
                    raise _Unfit(reason)
            except _Unfit as reason:
                findings.left.append(f"{origin(node)}: {reason}")
                continue
            try:
                site.experts = _experts(site, targets.experts)
            except _Unfit as reason:
                findings.summed.append(f"{origin(node)}: {reason}")
            if rewrite:
                findings.quantised += _rewrite(graph, site, targets)
            findings.fused += 1
            findings.experts += site.experts is not None
    finally:  # also where something raised: what was fused before stands, and the graph must be whole
        if rewrite:
            stable_topological_sort(graph)  # users of a sum may stand before the norm
            graph.eliminate_dead_code()
    return findings


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call of an operator, by name; those that are not given are None."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict.fromkeys(names) | dict(zip(names, node.args, strict=False)) | node.kwargs


def origin(node: fx.Node) -> str:
    """The module that a node comes from, or the node's name."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else node.name


def _find(node: fx.Node, targets: Targets) -> _Site:
    """The norm behind an all-reduce. Raises _Unfit."""
    x, views, end = arguments(node)["tensor"], [], node
    while len(end.users) == 1 and _keeps_width(view := next(iter(end.users)), end):
        views.append(view)
        end = view
    norms = [user for user in end.users if _calls(user, targets.rms_norm) and arguments(user)["x"] is end]
    adding = [user for user in end.users if _calls(user, targets.add_rms_norm)]
    adds = [user for user in adding if _added(user)[0] is end]
    if not norms and not adds:
        adds = adding  # as what a norm calls its residual
    if adds and len(end.users) > 1:
        raise _Unfit("the sum itself is used beside the norm that adds a residual")
    if not adds and not norms:
        raise _Unfit(f"no norm behind it but {', '.join(sorted({_label(user) for user in end.users})) or 'nothing'}")
    norm = (adds or norms)[0]
    given = arguments(norm)
    if given["variance_size"] is not None:
        raise _Unfit("a norm over a part of the row")
    if given["weight"] is None:
        raise _Unfit("a norm without gamma")
    weight, weight_bias = _gamma(given["weight"])
    if _made_from(weight, node):
        raise _Unfit("gamma is made of the sum")
    residual = next((added for added in _added(norm) if added is not end), None) if adds else None
    if adds and residual is None:
        raise _Unfit("the sum is its own residual")
    site = _Site(x, views, end, norm, residual, weight, weight_bias, given["epsilon"])
    _check(site, targets)
    return site


def _added(norm: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What a norm with a residual adds. Models call it as norm(sum, residual); a pass of vLLM that makes it of an
    addition keeps the order of that."""
    given = arguments(norm)
    return given["x"], given["x_residual"]


def _check(site: _Site, targets: Targets) -> None:
    """Raises _Unfit unless the kernels take these tensors."""
    x, weight = _value(site.x), _value(site.weight)
    width = x.shape[-1]
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise _Unfit(f"x is {x.dtype}, gamma {weight.dtype}")
    if not isinstance(width, int) or width > targets.max_hidden:
        raise _Unfit(f"rows of {width} elements; tpfuse takes {targets.max_hidden}")
    if reason := why_not(width):
        raise _Unfit(reason)
    if list(weight.shape) != [width] or weight.stride(0) != 1:
        raise _Unfit(f"gamma is {list(weight.shape)}, strides {list(weight.stride())}, rows have {width} elements")
    if x.stride(-1) != 1:
        raise _Unfit("elements of a row are not contiguous")
    if site.residual is not None:
        residual = _value(site.residual)
        if residual.dtype != x.dtype:
            raise _Unfit(f"the residual is {residual.dtype}, the sum {x.dtype}")
        shapes = [[n if isinstance(n, int) else None for n in value.shape] for value in (residual, _value(site.end))]
        if shapes[0] != shapes[1]:  # symbols are not compared, which would make guards
            raise _Unfit(f"the residual is {list(residual.shape)}, the sum {list(_value(site.end).shape)}")
        if residual.stride(-1) != 1:
            raise _Unfit("elements of a row of the residual are not contiguous")


def _experts(site: _Site, experts: Experts | None) -> fx.Node | None:
    """The call of the experts whose result a site reduces. Raises _Unfit where they can't go in."""
    call = site.x.args[0] if site.x.target is operator.getitem else site.x
    if experts is None or not isinstance(call, fx.Node) or experts.stock not in (call.target, *call.args[:1]):
        return None
    if call.target not in FUNCTIONAL or site.x.args[1] != 0:  # behind it, what it writes to may be read: it can't move
        raise _Unfit(f"experts in a call of {call.target}")
    if site.residual is None:
        raise _Unfit("experts before a norm without a residual")
    if len(site.x.users) > 1 or any(user.users or user.op == "output" for user in call.users if user is not site.x):
        raise _Unfit("the experts' result, or what they write to, is used elsewhere")
    if call.kwargs.get("hidden_dim_unpadded") != 0:
        raise _Unfit("experts of another width")
    # Within one call nothing would copy what is written to first and read then.
    theirs = set(map(get_node_storage, call.all_input_nodes))
    if theirs & {get_node_storage(site.residual), get_node_storage(site.weight)}:
        raise _Unfit("the experts write to what is the residual, too")
    if any(_value(node).dim() != 2 for node in (site.x, *site.views)):  # views from 2-D to 2-D keep all rows
        raise _Unfit("rows of experts in another shape")
    return call


def _rewrite(graph: fx.Graph, site: _Site, targets: Targets) -> bool:
    """Returns whether a quantisation went in, too."""
    ops, norm, end = torch.ops.tpfuse_vllm, site.norm, site.end
    wants_sum = site.residual is None and len(end.users) > 1
    quantised = None if wants_sum else quantised_of(site)
    with graph.inserting_before(norm):
        if site.experts is not None and targets.experts is not None:
            _rewrite_experts(graph, site, site.experts, targets.experts.ours, quantised)
            return quantised is not None
        x = site.x
        for view in site.views:
            x = _insert(graph, aten.reshape.default, (x, *view.args[1:]), view, _value(view))
        rest = (site.weight, site.eps, site.weight_bias)
        if quantised is not None:
            _rewrite_quantised(graph, site, x, quantised)
        elif site.residual is not None:
            target, call = ops.all_reduce_add_rms_norm.default, (x, site.residual, *rest)
            norm.replace_all_uses_with(_insert(graph, target, call, norm, _value(norm)))
        elif not wants_sum:
            target = ops.all_reduce_rms_norm.default
            norm.replace_all_uses_with(_insert(graph, target, (x, *rest), norm, _value(norm)))
        else:
            nodes = {norm: _value(norm), end: _value(end)}
            new = _insert(graph, ops.all_reduce_sum_rms_norm.default, (x, *rest), norm, tuple(nodes.values()))
            normed, total = _unpack(graph, new, nodes)
            norm.replace_all_uses_with(normed)
            end.replace_all_uses_with(total, delete_user_cb=lambda user: user is not norm)
    return quantised is not None


def quantised_of(site: _Site) -> Quantised | None:
    """The quantisation behind a site's norm, where rows go into its groups and its scale is there before the norm."""
    normed = _normed(site)
    found = None if normed is None else behind(normed)
    if found is None or (found.kind.startswith("fp8_per_group") and _value(site.x).shape[-1] % FP8PerGroup.group):
        return None
    return None if found.given is not None and _made_from(found.given, site.norm) else found


def _made_from(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node needs another one: a scale of the whole tensor, say, needs the norm that it is the scale of."""
    todo, seen = [node], set()
    while todo:
        at = todo.pop()
        if at is source:
            return True
        if at not in seen and source < at:  # what stands before the other one can't need it
            seen.add(at)
            todo += at.all_input_nodes
    return False


def _normed(site: _Site) -> fx.Node | None:
    """The node that is the norm itself."""
    return site.norm if site.residual is None else _item(site.norm, 0)


def _rewrite_experts(graph: fx.Graph, site: _Site, call: fx.Node, ours: Any, found: Quantised | None) -> None:
    """Our operator in the form that the experts' has: what it writes to stays declared."""
    kind, given, keep_norm = ("", None, True) if found is None else (found.kind, found.given, _kept(site, found))
    more: dict[str, Any] = {"residual": site.residual, "weight": site.weight, "given": given, "eps": site.eps}
    more |= {"weight_bias": site.weight_bias, "quant": kind, "keep_norm": keep_norm}
    nodes = [_normed(site) if keep_norm else None, _item(site.norm, 1)]
    nodes += [None, None] if found is None else [found.quant, found.scale]
    none = _value(site.x).new_empty(0)
    there = [_value(site.x) if keep_norm else none, _value(site.residual)]  # type: ignore[arg-type]
    there += [none if node is None else _value(node) for node in nodes[2:]]
    new = _insert(graph, call.target, (ours,), site.norm, (*there, *_value(call)[1:]), call.kwargs | more)
    for i, node in enumerate(nodes):
        if node is not None:
            node.replace_all_uses_with(_insert(graph, operator.getitem, (new, i), node, _value(node)))


def _kept(site: _Site, found: Quantised) -> bool:
    """Whether others than a quantisation want the norm."""
    normed = _normed(site)
    assert normed is not None
    return any(user not in found.inputs for user in normed.users)


def _rewrite_quantised(graph: fx.Graph, site: _Site, x: fx.Node, found: Quantised) -> None:
    normed, keep_norm = _normed(site), _kept(site, found)
    total = None if site.residual is None else _item(site.norm, 1)
    # The results in the operator's order, each in the place of a node; nobody may want the new residual.
    kept = normed if keep_norm else None
    nodes = {node: _value(node) for node in (kept, total or site.residual, found.quant, found.scale) if node}
    call = (x, site.residual, site.weight, found.given, site.eps, site.weight_bias, found.kind, keep_norm)
    target = torch.ops.tpfuse_vllm.all_reduce_rms_norm_quant.default
    new = _insert(graph, target, call, site.norm, list(nodes.values()))
    for node, result in zip(nodes, _unpack(graph, new, nodes), strict=True):
        if node is not site.residual:
            node.replace_all_uses_with(result)


def _unpack(graph: fx.Graph, new: fx.Node, nodes: dict[fx.Node, Any]) -> list[fx.Node]:
    """The results of a new node, each like the node that it takes the place of."""
    return [_insert(graph, operator.getitem, (new, i), node, value) for i, (node, value) in enumerate(nodes.items())]


def _item(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes one of a node's results."""
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == index), None)


def _insert(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node, value: Any, named: dict[str, Any] | None = None
) -> fx.Node:
    """A new node in the place of `like`. Of its meta only what is true of the new node, too."""
    node = graph.call_function(target, args, named)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    node.meta["val"] = value
    return node


def _gamma(weight: fx.Node) -> tuple[fx.Node, float]:
    """`(w, 1.0)` of Gemma's `w.float() + 1`; else the gamma as it is, and 0. Only sums in fp32: kernels add there."""
    if not _calls(weight, aten.add.Tensor) or weight.kwargs or weight.args[1] != 1:
        return weight, 0.0
    inner = weight.args[0]
    if not isinstance(inner, fx.Node) or _value(weight).dtype != torch.float32:
        return weight, 0.0
    if inner.target in CASTS and isinstance(inner.args[0], fx.Node):
        inner = inner.args[0]
    return inner, 1.0


def _keeps_width(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is a view that only rearranges rows."""
    if node.target not in VIEWS:
        return False
    ours, theirs = _value(node).shape[-1:], _value(source).shape[-1:]
    return all(isinstance(width, int) for width in (*ours, *theirs)) and ours == theirs  # symbols would make guards


def _calls(node: fx.Node, target: Any) -> bool:
    return node.op == "call_function" and node.target == target


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _label(node: fx.Node) -> str:
    return "the end of the graph" if node.op == "output" else str(node.target)
