"""From a traced graph to steps: pieces, which can be captured, and the operators between them, which can't.

Every value that crosses a border between steps has a slot, and a spec (`specs`).

The cutting is torch.fx's `split_module`. An operator that is split off takes along the nodes that pick its results
apart, so tuples never cross a border; a step that computes only whole numbers is dropped, since specs know them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.passes.split_module import split_module

from tpfuse.errors import InvalidArgument
from tpfuse.graphs import rowwise
from tpfuse.graphs.nodes import packet_of, torch_name, value_of, written
from tpfuse.graphs.specs import Count, Fixed, Rows, Spec, expression_of, spec_of

Compiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]  # a piece and its example inputs, to a callable
SplitOp = str | OpOverload | OpOverloadPacket | Callable[..., Any]


@dataclass(frozen=True)
class Step:
    """One part of the graph. Calls get the values of `inputs`, and give those of `outputs`, both by slot."""

    name: str
    run: Callable[..., Any]  # compiled, if it is a piece and the backend has a compiler
    traced: Callable[..., Any]  # takes inputs of any strides
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

    Raises InvalidArgument for names that no operator has, and for what is neither a name nor can be called.
    """
    for op in ops:
        if not isinstance(op, str) and not callable(op):
            raise InvalidArgument(
                f"Piecewise: split_ops has {op!r}; needed: 'namespace::name', an operator of torch.ops, or a function."
            )
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
    """Whether a node calls one of the operators; an operator's name without an overload means all of them, and torch's
    own operators are meant as functions and as methods, too, since that is how a traced model calls them."""
    return any(calls(node, target) for target in targets)


def calls(node: Node, target: Any) -> bool:
    """Whether a node calls this operator."""
    if node.op not in ("call_function", "call_method"):
        return False
    found = node.target
    if found is target:
        return True
    if isinstance(found, (OpOverload, OpOverloadPacket)) and isinstance(target, (OpOverload, OpOverloadPacket)):
        both = isinstance(found, OpOverload) and isinstance(target, OpOverload)
        return not both and packet_of(found) is packet_of(target)
    name = torch_name(target)
    return name != "" and name == (found if isinstance(found, str) else torch_name(found))


def token_symbols(graph: GraphModule) -> frozenset[sympy.Symbol]:
    """What stands for the number of tokens in the shapes of a graph's inputs; empty where they are constants.

    Tokens are the one dynamic dimension that there may be. torch may have several symbols for it (nothing in the graph
    tells that two inputs must agree), so what counts is their values in the trace; `Partition.tokens` compares them in
    each call. Raises InvalidArgument where they differ.
    """
    where: dict[Any, list[str]] = {}
    symbols: set[sympy.Symbol] = set()
    for node in graph.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        sizes = value.shape if isinstance(value, Tensor) else ()
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and (found := expression_of(size).free_symbols):
                symbols |= found
                where.setdefault(_traced_value(size), []).append(f"dimension {dim} of {node.name}")
    if len(where) > 1:
        each = "; ".join(f"{value}: {', '.join(places[:3])}" for value, places in where.items())
        raise InvalidArgument(
            f"Piecewise: the graph has {len(where)} dynamic dimensions ({each}); supported: one, the number of "
            "tokens. Compile without dynamic=True, and mark only the tokens, with torch._dynamo.mark_dynamic; if "
            "torch made another one dynamic because it changed between calls (a cache), torch._dynamo.mark_static "
            "keeps it."
        )
    return frozenset(symbols)


def _traced_value(size: torch.SymInt) -> Any:
    """The number of tokens when the graph was traced, as far as `size` tells."""
    expression = expression_of(size)
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
    table = _Slots(token_symbols(graph))
    for node in cut.graph.find_nodes(op="placeholder"):
        table.copied.add(table.add(node, value_of(node)))
    inputs = len(table.specs)
    steps = []
    for node in cut.graph.find_nodes(op="call_module"):
        module = cut.get_submodule(str(node.target))
        assert isinstance(module, GraphModule)
        step = _step(node, module, str(node.target) not in eager, table, compiler)
        if not (step.piece and _only_counts(module, [table.specs[slot] for slot in step.outputs])):
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

    def __init__(self, tokens: frozenset[sympy.Symbol]) -> None:
        self.tokens = tokens
        self.of: dict[Node, int] = {}
        self.specs: list[Spec] = []
        self.names: list[str] = []
        self.copied: set[int] = set()  # what pieces read from a padded buffer: inputs, results of split operators

    def add(self, node: Node, value: Any, name: str = "") -> int:
        self.of[node] = len(self.specs)
        self.specs.append(spec_of(name or node.name, value, self.tokens))
        self.names.append(name or node.name)
        return self.of[node]


def _only_counts(module: GraphModule, outputs: Sequence[Spec]) -> bool:
    """Whether a piece does nothing but compute with the number of tokens, which specs know."""
    made = (value_of(node) for node in module.graph.nodes if node.op not in ("placeholder", "output"))
    return all(isinstance(spec, Count) for spec in outputs) and not any(isinstance(v, Tensor | None) for v in made)


def _step(node: Node, module: GraphModule, piece: bool, table: _Slots, compiler: Compiler | None) -> Step:
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
    arguments = module.graph.find_nodes(op="placeholder")
    slots = dict(zip(arguments, inputs, strict=True))
    writes = frozenset(slots[target] for inner in module.graph.nodes for target in written(inner) if target in slots)
    if piece:
        refuse_writes(str(node.target), writes, table.specs, table.names)
        rowwise.check(module, [table.specs[slot] for slot in inputs], [table.specs[slot] for slot in outputs])
    else:
        table.copied.update(outputs)
    _LazyGraphModule.force_recompile(module)
    run = traced = module.forward  # a Module's call does more, which costs more than a split operator's host
    if piece and compiler is not None:
        run = compiler(module, [_example(argument, slots[argument], table) for argument in arguments])
    return Step(str(node.target), run, traced, piece, inputs, outputs, isinstance(returned, Node), writes)


def refuse_writes(piece: str, written: Collection[int], specs: Sequence[Spec], names: Sequence[str]) -> None:
    """Raises InvalidArgument where a piece writes to what has no tokens."""
    fixed = [names[slot] for slot in sorted(written) if not isinstance(specs[slot], Rows)]
    if fixed:
        raise InvalidArgument(
            f"Piecewise: {piece} writes to {', '.join(fixed)}, which has no dimension of tokens. A graph would do that "
            "for padding, too, and again in each warm-up. Put the operator that writes among split_ops."
        )


def _example(argument: Node, slot: int, table: _Slots) -> Any:
    """The example input of a piece, laid out as it will be: padded buffers are contiguous."""
    value = value_of(argument)
    return value.contiguous() if slot in table.copied and isinstance(table.specs[slot], Rows) else value


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
