"""From a traced graph to steps: pieces, which can be captured, and the operators between them, which can't.

Every value that crosses a border between steps has a slot, and a spec that says what it is for a given number of
tokens: `Rows` (a tensor with tokens along one dimension), `Count` (a whole number made of the number of tokens),
`Fixed` (everything else). Specs come from the shapes of the trace, so that a value never has to be asked.

The cutting is torch.fx's `split_module`. An operator that is split off takes along the nodes that pick its results
apart, so tuples never cross a border; a step that computes only whole numbers is dropped, since specs know them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.passes.split_module import split_module

from tpfuse.errors import InvalidArgument

Compiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]  # a piece and its example inputs, to a callable
SplitOp = str | OpOverload | OpOverloadPacket | Callable[..., Any]


@dataclass(frozen=True)
class Rows:
    """A tensor whose dimension `dim` holds `per_token` entries for each token."""

    dim: int
    per_token: int
    shape: tuple[int, ...]  # for one token
    dtype: torch.dtype
    device: torch.device

    def numel(self, tokens: int) -> int:
        n = tokens
        for size in self.shape:
            n *= size
        return n

    def shape_of(self, tokens: int) -> tuple[int, ...]:
        return (*self.shape[: self.dim], self.per_token * tokens, *self.shape[self.dim + 1 :])

    def first(self, tensor: Tensor, tokens: int) -> Tensor:
        """The part of a longer tensor that belongs to the first `tokens` tokens: a view."""
        return tensor.narrow(self.dim, 0, self.per_token * tokens)

    def after(self, tensor: Tensor, tokens: int) -> Tensor:
        """The rest: the padding. A view."""
        start = self.per_token * tokens
        return tensor.narrow(self.dim, start, tensor.shape[self.dim] - start)

    def tokens_of(self, tensor: Tensor) -> int:
        return tensor.shape[self.dim] // self.per_token


@dataclass(frozen=True)
class Count:
    """A whole number that depends on the number of tokens alone."""

    expression: sympy.Expr
    _known: dict[int, int] = field(default_factory=dict, compare=False)

    def at(self, tokens: int) -> int:
        if tokens not in self._known:
            self._known[tokens] = int(self.expression.xreplace({_TOKENS: sympy.Integer(tokens)}))
        return self._known[tokens]


@dataclass(frozen=True)
class Fixed:
    """What doesn't depend on the number of tokens: weights, caches, constants."""


Spec = Rows | Count | Fixed


@dataclass(frozen=True)
class Step:
    """One part of the graph. Calls get the values of `inputs`, and give those of `outputs`, both by slot."""

    name: str
    run: Callable[..., Any]
    piece: bool  # captured; else an operator that was split off
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    single: bool  # the result is the one output, not a tuple of them
    writes: frozenset[int]  # inputs that operators in it say they write to

    def values(self, returned: Any) -> tuple[Any, ...]:
        return (returned,) if self.single else tuple(returned)


@dataclass(frozen=True)
class Partition:
    """A graph as steps. Slots 0 to `inputs` - 1 are the graph's inputs, in their order."""

    steps: tuple[Step, ...]
    specs: tuple[Spec, ...]  # by slot
    names: tuple[str, ...]  # by slot
    inputs: int
    results: tuple[int | None, ...]  # slots; None where the graph returns None
    counted: tuple[int, ...]  # the graph inputs that have tokens

    def tokens(self, args: Sequence[Any]) -> int:
        """How many tokens a call brings. Raises InvalidArgument where its inputs differ."""
        found = {
            slot: spec.tokens_of(args[slot]) for slot in self.counted if isinstance(spec := self.specs[slot], Rows)
        }
        if len(set(found.values())) > 1:
            each = ", ".join(f"{self.names[slot]} {tokens}" for slot, tokens in found.items())
            raise InvalidArgument(f"Piecewise: inputs bring different numbers of tokens: {each}; needed: the same.")
        return next(iter(found.values()))

    def slots_of(self, *, piece: bool) -> frozenset[int]:
        """The slots that pieces read, or that split operators read."""
        return frozenset(slot for step in self.steps if step.piece == piece for slot in step.inputs)

    def dropped_after(self) -> tuple[tuple[int, ...], ...]:
        """For each step the slots that nobody reads after it."""
        last = {slot: number for number, step in enumerate(self.steps) for slot in (*step.outputs, *step.inputs)}
        kept = set(self.results)
        return tuple(
            tuple(slot for slot, at in last.items() if at == number and slot not in kept)
            for number in range(len(self.steps))
        )


def split_targets(ops: Collection[SplitOp]) -> frozenset[Any]:
    """The targets of nodes to split at. ops: "tpfuse::attention", torch.ops.x.y, torch.ops.x.y.default, a function.

    Raises InvalidArgument for names that no operator has.
    """
    return frozenset(_named(op) if isinstance(op, str) else op for op in ops)


def _named(name: str) -> Any:
    space, _, rest = name.replace("::", ".").partition(".")
    found: Any = getattr(torch.ops, space)
    try:
        for part in rest.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise InvalidArgument(
            f"Piecewise: split_ops has {name!r}, which is no operator of torch.ops here. "
            "Give 'namespace::name' or the operator itself, and import what registers it first."
        ) from error
    return found


def splits(node: Node, targets: frozenset[Any]) -> bool:
    """Whether a node calls one of the operators; an operator's name without an overload means all of them."""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, OpOverload):
        return target in targets or target.overloadpacket in targets
    if isinstance(target, OpOverloadPacket):
        return target in targets or any(isinstance(op, OpOverload) and op.overloadpacket is target for op in targets)
    return target in targets


def value_of(node: Node) -> Any:
    """The example value that the trace left: a fake tensor, a SymInt, or nothing."""
    return node.meta.get("example_value", node.meta.get("val"))


def has_tokens(graph: GraphModule) -> bool:
    """Whether shapes of a graph's inputs depend on the number of tokens, the one dynamic dimension that there may be.

    torch may have several symbols for it (nothing in the graph tells that two inputs must agree), so what counts is
    their values in the trace; `Partition.tokens` compares them in each call. Raises InvalidArgument where they differ.
    """
    where: dict[Any, list[str]] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        sizes = value.shape if isinstance(value, Tensor) else ()
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and _expression(size).free_symbols:
                where.setdefault(_traced_value(size), []).append(f"dimension {dim} of {node.name}")
    if len(where) > 1:
        found = "; ".join(f"{value}: {', '.join(places[:3])}" for value, places in where.items())
        raise InvalidArgument(
            f"Piecewise: the graph has {len(where)} dynamic dimensions ({found}); supported: one, the number of "
            "tokens. Compile without dynamic=True, and mark only the tokens, with torch._dynamo.mark_dynamic; if "
            "torch made another one dynamic because it changed between calls, torch._dynamo.mark_static keeps it."
        )
    return bool(where)


def _traced_value(size: torch.SymInt) -> Any:
    """The number of tokens when the graph was traced, as far as `size` tells."""
    expression = _expression(size)
    if not expression.is_Symbol:
        return f"tokens from {expression}"
    return size.node.hint if size.node.has_hint() else "unbacked"


def partition(graph: GraphModule, targets: frozenset[Any], compiler: Compiler | None = None) -> Partition:
    """Cut a graph with one dynamic dimension at the operators in `targets`.

    compiler: makes a callable from a piece and its example inputs; None: the piece runs as it was traced.
    Raises InvalidArgument where a value that crosses a border has tokens in more than one dimension, or in none that
    is a multiple of their number.
    """
    parts = _parts(graph, targets)
    eager = {f"submod_{part}" for node, part in parts.items() if splits(node, targets)}
    cut = split_module(graph, None, lambda node: parts[node], keep_original_order=True)  # type: ignore[arg-type]
    table = _Slots()
    for node in cut.graph.find_nodes(op="placeholder"):
        table.add(node, value_of(node))
    inputs = len(table.specs)
    steps = []
    for node in cut.graph.find_nodes(op="call_module"):
        step = _step(node, cut.get_submodule(str(node.target)), str(node.target) not in eager, table, compiler)
        if not step.outputs or not all(isinstance(table.specs[slot], Count) for slot in step.outputs):
            steps.append(step)
    _check_borders(steps, table)
    counted = tuple(slot for slot, spec in enumerate(table.specs[:inputs]) if isinstance(spec, Rows))
    results = _slots_of_results(cut.graph.output_node(), table)
    return Partition(tuple(steps), tuple(table.specs), tuple(table.names), inputs, results, counted)


def _parts(graph: GraphModule, targets: frozenset[Any]) -> dict[Node, int]:
    """The number of each node's part: one for each operator to split at, with what picks its results apart."""
    parts: dict[Node, int] = {}
    part = 0
    for node in graph.graph.nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, Node) and splits(source, targets):
            parts[node] = parts[source]
        elif splits(node, targets):
            parts[node], part = part + 1, part + 2
        else:
            parts[node] = part
    return parts


class _Slots:
    """Slots while they are handed out."""

    def __init__(self) -> None:
        self.of: dict[Node, int] = {}
        self.specs: list[Spec] = []
        self.names: list[str] = []

    def add(self, node: Node, value: Any, name: str = "") -> int:
        self.of[node] = len(self.specs)
        self.specs.append(_spec(name or node.name, value))
        self.names.append(name or node.name)
        return self.of[node]


def _step(node: Node, module: torch.nn.Module, piece: bool, table: _Slots, compiler: Compiler | None) -> Step:
    assert isinstance(module, GraphModule)
    inputs = tuple(_known(argument, table) for argument in node.args)
    returned = module.graph.output_node().args[0]
    if isinstance(returned, Node):
        outputs: tuple[int, ...] = (table.add(node, value_of(returned), returned.name),)
    else:
        assert isinstance(returned, (tuple, list))
        picked = {user.args[1]: user for user in node.users}
        outputs = tuple(
            table.add(picked.get(n, inner), value_of(inner), inner.name) for n, inner in enumerate(returned)
        )
    _LazyGraphModule.force_recompile(module)
    run: Callable[..., Any] = (
        module.forward
    )  # what a Module's call does besides costs more than a split operator's host
    if piece and compiler is not None:
        run = compiler(module, [value_of(argument) for argument in module.graph.find_nodes(op="placeholder")])
    arguments = module.graph.find_nodes(op="placeholder")
    slots = dict(zip(arguments, inputs, strict=True))
    writes = frozenset(slots[target] for inner in module.graph.nodes for target in _written(inner) if target in slots)
    return Step(str(node.target), run, piece, inputs, outputs, isinstance(returned, Node), writes)


def _written(node: Node) -> list[Node]:
    """The arguments that an operator writes to, as its schema says. Other functions don't say."""
    target = node.target
    if isinstance(target, OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if not isinstance(target, OpOverload):
        return []
    arguments = target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
    written = (given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return [value for value in written if isinstance(value, Node)]


def _check_borders(steps: Sequence[Step], table: _Slots) -> None:
    """What split operators return lies elsewhere in each call, so pieces can read it only where it can be copied to."""
    returned = {slot: step for step in steps if not step.piece for slot in step.outputs}
    for slot in sorted({slot for step in steps if step.piece for slot in step.inputs} & returned.keys()):
        if isinstance(table.specs[slot], Fixed):
            raise InvalidArgument(
                f"Piecewise: {table.names[slot]}, which an operator that is split off returns ({returned[slot].name}), "
                "has no dimension of tokens, and a piece reads it; a graph would always read the first one. Let the "
                "operator write to a buffer of the model, or split off what reads it, too."
            )


def _known(value: Any, table: _Slots) -> int:
    if not isinstance(value, Node) or value not in table.of:
        raise InvalidArgument(
            f"Piecewise: {value} crosses from one piece to another, but is no input and no result of one. Constants "
            "of a model must be buffers or parameters."
        )
    return table.of[value]


def _slots_of_results(output: Node, table: _Slots) -> tuple[int | None, ...]:
    returned = output.args[0]
    assert isinstance(returned, (tuple, list))
    return tuple(None if value is None else _known(value, table) for value in returned)


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


_TOKENS = sympy.Symbol("tokens", integer=True, nonnegative=True)


def _in_tokens(size: Any) -> sympy.Expr:
    """A size in terms of the number of tokens: all symbols are that."""
    expression = _expression(size)
    return expression.xreplace(dict.fromkeys(expression.free_symbols, _TOKENS))


def _spec(name: str, value: Any) -> Spec:
    """What a value is, from its example."""
    if isinstance(value, torch.SymInt):
        expression = _in_tokens(value)
        return Count(expression) if expression.free_symbols else Fixed()
    if not isinstance(value, Tensor):
        return Fixed()
    shape = [_in_tokens(size) for size in value.shape]
    dims = [dim for dim, size in enumerate(shape) if size.free_symbols]
    if not dims:
        return Fixed()
    per_token = shape[dims[0]] / _TOKENS
    if len(dims) > 1 or not per_token.is_Integer:
        raise InvalidArgument(
            f"Piecewise: {name} {tuple(map(str, shape))} crosses a border of a piece; supported: tokens, or a whole "
            "multiple of them, in ONE dimension. Make it inside the operator that is split off, or inside one piece."
        )
    one = tuple(int(per_token) if dim == dims[0] else int(size) for dim, size in enumerate(shape))
    return Rows(dims[0], int(per_token), one, value.dtype, value.device)
