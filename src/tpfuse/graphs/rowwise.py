"""Whether a piece treats each token for itself, as far as its graph tells.

A graph computes all rows that it was captured for, padding among them, so what it makes of several rows at once is
another value than the model's: their mean, the last of them, a product with their number. Some of that can be seen:

- a result without tokens that is made from rows: `y.mean(0)`, `y[-1]`;
- arithmetic of floating point numbers with the number of tokens, `y / y.shape[0]`, and tensors filled with it (whole
  numbers that are computed with it are indices, which go with the padded rows);
- reading memory by strides, `as_strided`: padded buffers have other ones.

What mixes rows and gives rows (`y - y.mean(0)`, `cumsum(0)`) can't: docs/graphs.md says that it must be split off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tpfuse.errors import InvalidArgument
from tpfuse.graphs.nodes import value_of, written
from tpfuse.graphs.specs import Count, Fixed, Rows, Spec, expression_of

ARITHMETIC = frozenset(
    {
        "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "truediv", "true_divide", "floordiv",
        "floor_divide", "pow", "mod", "fmod", "remainder",
    }
)  # fmt: skip
FILLS = frozenset({"fill", "full", "full_like", "new_full", "new_tensor", "scalar_tensor", "tensor"})
FACTORS = ("alpha", "beta", "fill_value", "value")
HELP = (
    "A graph would compute it with padding. Split off the operator that does it, or do it with what the compiled model "
    "returns."
)


def check(piece: GraphModule, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
    """Raises InvalidArgument for what can be seen."""
    of_rows: set[Node] = set()  # what depends on rows or on their number
    specs = dict(zip(piece.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in piece.graph.nodes:
        if node in specs:
            of_rows |= {node} if isinstance(specs[node], (Rows, Count)) else set()
        elif node.op != "output" and of_rows.intersection(node.all_input_nodes):
            _check_call(node, of_rows)
            of_rows |= {*written(node)} if _is_new(node) else {node, *written(node)}
    returned = piece.graph.output_node().args[0]
    for value, spec in zip(returned if isinstance(returned, (tuple, list)) else [returned], outputs, strict=True):
        if isinstance(spec, Fixed) and value in of_rows:
            raise InvalidArgument(
                f"Piecewise: {value}, which a piece makes from all its rows, has no dimension of tokens. {HELP}"
            )


def _is_new(node: Node) -> bool:
    """Whether a node's value has nothing of the rows in it: a constant number, a tensor that is made like another."""
    value = value_of(node)
    if isinstance(value, (int, float)) or (isinstance(value, NUMBERS) and not expression_of(value).free_symbols):
        return True
    fixed = isinstance(value, Tensor) and not any(isinstance(size, torch.SymInt) for size in value.shape)
    return fixed and (_name(node).startswith("new_") or _name(node).endswith("_like"))


def _check_call(node: Node, of_rows: set[Node]) -> None:
    name, value = _name(node), value_of(node)
    if name == "as_strided":
        raise InvalidArgument(
            f"Piecewise: {node} reads rows by their strides, which are others in a padded buffer. Use views instead."
        )
    used = [*node.args, *(node.kwargs.get(factor) for factor in FACTORS)]
    number = next((n for n in used if isinstance(n, Node) and n in of_rows and isinstance(value_of(n), NUMBERS)), None)
    if number is None or not isinstance(value, Tensor):
        return
    factor = any(node.kwargs.get(factor) is number for factor in FACTORS)
    if name in FILLS or factor or (name in ARITHMETIC and (value.is_floating_point() or value.is_complex())):
        raise InvalidArgument(f"Piecewise: {node} computes with {number}, made of the number of tokens. {HELP}")


NUMBERS: Any = (torch.SymInt, torch.SymFloat)


def _name(node: Node) -> str:
    """The operation behind `mul_`, `imul`, `mul.Tensor`."""
    target = node.target
    name = (target if isinstance(target, str) else getattr(target, "__name__", "")).partition(".")[0].strip("_")
    return name[1:] if name[:1] == "i" and name[1:] in ARITHMETIC else name
