"""Functions that models without compile passes call by themselves: MiniMax-M3's all-reduce + norm.

They are replaced in their module, and in modules that imported them by name before.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tpfuse.integrations.serving import state
from tpfuse.integrations.vllm import operators  # noqa: F401  operators: registers torch.ops.tpfuse_vllm
from tpfuse.integrations.vllm.plugin import rebind

PARAMETERS = ("hidden_states", "residual", "norm")
# module, function, what the norm adds to its gamma; vLLM 0.24 has the first, 0.33 both
FUNCTIONS = (
    ("vllm.model_executor.layers.fused_allreduce_gemma_rms_norm", "fused_allreduce_gemma_rms_norm", 1.0),
    ("vllm.models.common.ops.fused_allreduce_rms_norm", "fused_allreduce_rms_norm", 0.0),
)

Boundary = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]


def install() -> None:
    """Replace what there is of these. Raises LookupError where one takes other arguments."""
    for path, name, weight_bias in FUNCTIONS:
        try:
            home = import_module(path)
        except ImportError:
            continue
        stock = getattr(home, name, None)
        if stock is None or hasattr(stock, "tpfuse_stock"):
            continue
        if tuple(signature(stock).parameters) != PARAMETERS:
            raise LookupError(f"{name} takes {tuple(signature(stock).parameters)}; known: {PARAMETERS}")
        rebind(name, stock, boundary_for(stock, weight_bias))


def boundary_for(stock: Boundary, weight_bias: float) -> Boundary:
    """The function that serves what it can, and calls through to vLLM's own for the rest."""

    def boundary(hidden_states: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        engaged = state.current
        if engaged is None or not serves(engaged, hidden_states, residual, norm):
            if engaged is not None and isinstance(norm.weight, Tensor):
                engaged.leave(state.BOUNDARY, norm.weight)
            return stock(hidden_states, residual, norm)
        y: tuple[Tensor, Tensor] = torch.ops.tpfuse_vllm.all_reduce_add_rms_norm(
            hidden_states, residual, norm.weight, norm.variance_epsilon, weight_bias
        )
        return y

    boundary.tpfuse_stock = stock  # type: ignore[attr-defined]
    return boundary


def serves(engaged: state.Engaged, x: Tensor, residual: Tensor, norm: Any) -> bool:
    plain = hasattr(norm, "variance_epsilon") and getattr(norm, "variance_size_override", None) is None
    return plain and isinstance(norm.weight, Tensor) and not engaged.why_not_boundary(x, residual, norm.weight)
