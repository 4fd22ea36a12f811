"""What a node of a traced graph calls, and what it writes to."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

_OF_SHAPES = frozenset({"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "detach_"})
_ASSIGNMENTS = frozenset(
    {
        operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
        operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
    }
)  # fmt: skip


def value_of(node: Node) -> Any:
    """The example value that the trace left: a fake tensor, a SymInt, or nothing."""
    return node.meta.get("example_value", node.meta.get("val"))


def packet_of(op: OpOverload | OpOverloadPacket) -> OpOverloadPacket:
    return op.overloadpacket if isinstance(op, OpOverload) else op


def torch_name(target: Any) -> str:
    """The name by which torch has an operation as a method or function; empty for what is not torch's own."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        space, _, name = str(packet_of(target)).rpartition(".")
        return name if space == "aten" else ""
    module = getattr(getattr(target, "__objclass__", target), "__module__", None)
    return getattr(target, "__name__", "") if str(module).partition(".")[0] == "torch" else ""


def written(node: Node) -> list[Node]:
    """The arguments that an operation says it writes to, by its schema or its name. Tensors count their writes besides,
    so this is no complete list."""
    target = node.target
    name = target if isinstance(target, str) else torch_name(target)
    in_place = name.endswith("_") and not name.endswith("__") and name not in _OF_SHAPES
    if isinstance(target, OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, OpOverload):
        arguments = target._schema.arguments
        given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
        targets = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    elif in_place or node.kwargs.get("inplace") is True or target in _ASSIGNMENTS:
        targets = [*node.args[:1], node.kwargs.get("out")]
    else:
        targets = [node.kwargs.get("out")]
    return [value for value in targets if isinstance(value, Node) and isinstance(value_of(value), Tensor)]
