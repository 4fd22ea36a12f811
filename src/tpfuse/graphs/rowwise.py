"""Whether a piece treats each token for itself, as far as its graph tells.

A graph computes all rows that it was captured for, padding among them, so what it makes of several rows at once is
another value than the model's: their mean, the last of them, a product with their number. Some of that can be seen:

- a result without tokens that is made from rows: `y.mean(0)`, `y[-1]`;
- arithmetic between a tensor and the number of tokens: `y / y.shape[0]`;
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
from tpfuse.graphs.specs import Count, Fixed, Rows, Spec, value_of

ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "truediv", "true_divide", "floordiv", "pow", "mod"})
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
        elif node.op != "output" and of_rows.intersection(node.all_input_nodes) and not _is_new(node):
            of_rows.add(node)
            _check_call(node, of_rows)
    returned = piece.graph.output_node().args[0]
    for value, spec in zip(returned if isinstance(returned, (tuple, list)) else [returned], outputs, strict=True):
        if isinstance(spec, Fixed) and value in of_rows:
            raise InvalidArgument(
                f"Piecewise: {value}, which a piece makes from all its rows, has no dimension of tokens. {HELP}"
            )


def _is_new(node: Node) -> bool:
    """Whether a node's value has nothing of the rows in it: a constant number, a tensor made like another."""
    value = value_of(node)
    return isinstance(value, (int, float)) or (node.op == "call_method" and str(node.target).startswith("new_"))


def _check_call(node: Node, of_rows: set[Node]) -> None:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if _plain(name) == "as_strided":
        raise InvalidArgument(
            f"Piecewise: {node} reads rows by their strides, which are others in a padded buffer. Use views instead."
        )
    number = next((n for n in node.all_input_nodes if n in of_rows and isinstance(value_of(n), NUMBERS)), None)
    if number is not None and isinstance(value_of(node), Tensor) and _plain(name) in ARITHMETIC:
        raise InvalidArgument(
            f"Piecewise: {node} computes with {number}, which is made of the number of tokens. {HELP}"
        )


NUMBERS: Any = (torch.SymInt, torch.SymFloat)


def _plain(name: str) -> str:
    """The operation behind `mul_`, `imul`, `mul.Tensor`."""
    name = name.partition(".")[0].strip("_")
    return name[1:] if name[:1] == "i" and name[1:] in ARITHMETIC else name
