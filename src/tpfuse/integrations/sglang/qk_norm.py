"""MiniMax-M2's QK norm: the method that stands before both of SGLang's own ways, the fused one and the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpfuse.integrations.serving import state
from tpfuse.integrations.sglang import groups, hooks, operators  # noqa: F401  operators: registers torch.ops.tpfuse_sglang
from tpfuse.integrations.sglang.groups import Group, same

CLASS = "sglang.srt.models.minimax_m2.MiniMaxM2QKRMSNorm"
ATTRIBUTES = ("_q_norm", "_k_norm", "_world_size", "_eps")  # of its objects, set where they are made

Pair = tuple[Tensor, Tensor]


def install() -> None:
    """Raises LookupError where SGLang's class is not the known one."""
    hooks.known(f"{CLASS}.forward", ("self", "q", "k"))
    made = hooks.known(f"{CLASS}.__init__", ("self", "q_norm", "k_norm"))
    missing = [name for name in ATTRIBUTES if name not in made.__code__.co_names]
    if missing:
        raise LookupError(f"{CLASS} has no {', '.join(missing)}")
    hooks.place(f"{CLASS}.forward", forward_for(groups.attention()))


def forward_for(attention: Group) -> Callable[..., Pair]:
    """The hook that serves what it can, and calls through to SGLang's own for the rest."""

    def forward(stock: Callable[..., Pair], norm: Any, q: Tensor, k: Tensor) -> Pair:
        engaged = state.current
        if engaged is None:
            return stock(norm, q, k)
        q_weight, k_weight = norm._q_norm.weight, norm._k_norm.weight
        reason = "" if same(attention(), engaged.group) else "another group"
        reason = reason or engaged.why_not_qk_norm(q, k, q_weight, k_weight, norm._world_size)
        if reason:
            if not torch.compiler.is_compiling():
                engaged.leave(state.QK_NORM, q_weight, reason)
            return stock(norm, q, k)
        y: Pair = torch.ops.tpfuse_sglang.qk_norm(q, k, q_weight, k_weight, norm._eps)
        return y

    return forward
