"""The fused all-reduce + residual + RMSNorm: the method of RMSNorm and GemmaRMSNorm that a layer calls where it has
left its sum to the norm.

SGLang decides away from here which layers do that. So a call that comes here still owes its sum, and what is not served
goes to SGLang's own method, which knows how to pay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpfuse.integrations.serving import state
from tpfuse.integrations.sglang import groups, hooks, operators  # noqa: F401  operators: registers torch.ops.tpfuse_sglang
from tpfuse.integrations.sglang.groups import Group, same
from tpfuse.integrations.sglang.hooks import ENGINE, LOG

WHAT = "all-reduce + norm"
NORMS = "sglang.srt.layers.layernorm"
METHOD = "forward_with_allreduce_fusion"
PARAMETERS = ("self", "x", "residual", "post_residual_addition", "use_attn_tp_group")
# class, what the norm adds to its gamma
CLASSES = (("RMSNorm", 0.0), ("GemmaRMSNorm", 1.0))
# What makes a norm another one than gamma * x / rms(x), with the values that it has in a plain one.
PLAIN = {
    "has_weight": True,
    "variance_size_override": None,
    "cast_x_before_out_mul": False,
    "fp32_residual": False,
    "override_orig_dtype": None,
}

Result = Tensor | tuple[Tensor, Tensor]


def install() -> None:
    """Raises LookupError where a norm of SGLang is not the known one."""
    for name, _ in CLASSES:
        hooks.known(f"{NORMS}.{name}.{METHOD}", PARAMETERS)
    experts: Group | None = None
    try:
        experts = groups.experts()
    except LookupError as error:  # before SGLang 0.5.21
        LOG.warning("%s behind experts: left to %s: %s", WHAT, ENGINE, error)
    for name, weight_bias in CLASSES:
        hooks.place(f"{NORMS}.{name}.{METHOD}", forward_for(groups.attention(), experts, weight_bias))


def forward_for(attention: Group, experts: Group | None, weight_bias: float) -> Callable[..., Result]:
    """The hook that serves what it can, and calls through to SGLang's own for the rest. experts: None if unknown."""

    def forward(
        stock: Callable[..., Result],
        norm: Any,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        use_attn_tp_group: bool = True,
    ) -> Result:
        engaged = state.current
        if engaged is None or residual is None:  # without a residual there is nothing to reduce either
            return stock(norm, x, residual, post_residual_addition, use_attn_tp_group)
        # While a draft model has an attention-TP group of its own, SGLang sums the experts' outputs over as many ranks,
        # but names the target's group for them. So both groups are asked.
        ours = same(attention(), engaged.group)
        if not use_attn_tp_group:
            ours = ours and experts is not None and same(experts(), engaged.group)
        reason = "" if ours else "another group"
        if post_residual_addition is not None:
            reason = "something is added to the residual"
        reason = reason or why_not(norm) or engaged.why_not_boundary(x, residual, norm.weight)
        if reason:
            if not torch.compiler.is_compiling():
                engaged.leave(state.BOUNDARY, norm.weight, reason)
            return stock(norm, x, residual, post_residual_addition, use_attn_tp_group)
        y: Result = torch.ops.tpfuse_sglang.all_reduce_add_rms_norm(
            x, residual, norm.weight, norm.variance_epsilon, weight_bias
        )
        return y

    return forward


def why_not(norm: Any) -> str:
    """Why a norm is left to SGLang, by what it is; empty if it is a plain one."""
    plain = all(getattr(norm, name, value) == value for name, value in PLAIN.items())
    return "" if plain else "a norm of its own kind"
