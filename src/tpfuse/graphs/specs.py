"""What a value is for a given number of tokens.

`Rows`: a tensor with tokens along one dimension. `Count`: a whole number made of the number of tokens. `Fixed`:
everything else. Specs come from the shapes of the trace, so that a value never has to be asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from tpfuse.errors import InvalidArgument


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
    """What doesn't depend on the number of tokens: weights, caches, constants, other numbers."""


Spec = Rows | Count | Fixed


def expression_of(size: Any) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


_TOKENS = sympy.Symbol("tokens", integer=True, nonnegative=True)


def spec_of(name: str, value: Any, tokens: frozenset[sympy.Symbol]) -> Spec:
    """What a value is, from its example. Numbers that are not made of tokens are fixed: a graph has them as they were,
    which the runner compares."""

    def in_tokens(size: Any) -> sympy.Expr:
        return expression_of(size).xreplace(dict.fromkeys(tokens, _TOKENS))

    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expression = in_tokens(value)
        if _TOKENS not in expression.free_symbols:
            return Fixed()
        if not isinstance(value, torch.SymInt) or len(expression.free_symbols) > 1:
            raise InvalidArgument(
                f"Piecewise: {name} ({expression}) crosses a border of a piece; supported: whole numbers made of the "
                "number of tokens alone. Compute it inside the operator that is split off, or inside one piece."
            )
        return Count(expression)
    if not isinstance(value, Tensor):
        return Fixed()
    shape = [in_tokens(size) for size in value.shape]
    dims = [dim for dim, size in enumerate(shape) if _TOKENS in size.free_symbols]
    if not dims:
        return Fixed()
    per_token = shape[dims[0]] / _TOKENS
    if not per_token.is_Integer or sum(not size.is_Integer for size in shape) > 1:
        raise InvalidArgument(
            f"Piecewise: {name} {tuple(map(str, shape))} crosses a border of a piece; supported: tokens, or a whole "
            "multiple of them, in ONE dimension. Make it inside the operator that is split off, or inside one piece."
        )
    one = tuple(int(per_token) if dim == dims[0] else int(size) for dim, size in enumerate(shape))
    return Rows(dims[0], int(per_token), one, value.dtype, value.device)
