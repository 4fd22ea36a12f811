"""MiniMax-M2's QK norm: vLLM's operator served by `qk_rms_norm`, and the attention's forward, where RoPE goes with it.

The operator alone is replaced in the dispatcher, so it is ours in eager code, in compiled code and in graphs, at any
number of tokens and any shape. The forward is replaced only if it calls what it is known to call, in that order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tpfuse.backends.cuda.sharded_norm import why_not
from tpfuse.integrations.serving import state
from tpfuse.integrations.vllm import operators  # noqa: F401  operators: registers torch.ops.tpfuse_vllm
from tpfuse.integrations.vllm.plugin import guarded, replace
from tpfuse.integrations.vllm.settings import LOG
from tpfuse.rope import Rope

PARAMETERS = ("qkv", "q_weight", "k_weight", "q_size", "kv_size", "tp_rank", "tp_world", "eps", "workspace")
FORWARD = (
    "qkv_proj", "MiniMaxText01RMSNormTP", "forward_qkv", "q_norm", "k_norm", "q_size", "kv_size", "rotary_emb", "attn",
    "o_proj",
)  # fmt: skip

_library: torch.library.Library | None = None  # an override lives as long as its library


def install() -> None:
    """Raises LookupError where vLLM's operator is not the known one."""
    global _library
    if _library is None:
        from vllm.model_executor.layers.minimax_rms_norm import rms_norm_tp
        from vllm.platforms import current_platform

        stock = rms_norm_tp._minimax_qk_norm_fusion
        if tuple(signature(stock).parameters) != PARAMETERS:
            raise LookupError(f"the operator takes {tuple(signature(stock).parameters)}; known: {PARAMETERS}")
        library = torch.library.Library("vllm", "IMPL")
        serve = operator_for(stock)
        with warnings.catch_warnings():  # torch warns of an override, which is the intention
            warnings.simplefilter("ignore")
            library.impl("minimax_qk_norm_fusion", serve, current_platform.dispatch_key, allow_override=True)
        _library = library
    _install_rope()


def operator_for(stock: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator that serves what it can, and calls through to vLLM's own for the rest."""

    def minimax_qk_norm_fusion(
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        q_size: int,
        kv_size: int,
        tp_rank: int,
        tp_world: int,
        eps: float,
        workspace: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        engaged = state.current
        q, k = qkv[:, :q_size], qkv[:, q_size : q_size + kv_size]
        if engaged is None or engaged.why_not_qk_norm(q, k, q_weight, k_weight, tp_world):
            if engaged is not None:
                engaged.leave(state.QK_NORM, q_weight)
            return stock(qkv, q_weight, k_weight, q_size, kv_size, tp_rank, tp_world, eps, workspace)
        return state.communicator(state.QK_NORM, q_weight).qk_rms_norm(q, k, q_weight, k_weight, eps=eps)

    return minimax_qk_norm_fusion


def _install_rope() -> None:
    """RoPE in the same kernel, where this worker's model is a MiniMax-M2."""
    from vllm.config import get_current_vllm_config

    engaged = state.current
    config = get_current_vllm_config().model_config
    if engaged is None or engaged.effective != "fused" or config is None:
        return
    if "MiniMaxM2ForCausalLM" not in (getattr(config.hf_config, "architectures", None) or ()):
        return
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.models.minimax_m2 import MiniMaxM2Attention

    found = MiniMaxM2Attention.forward.__code__.co_names
    if not hasattr(MiniMaxM2Attention.forward, "tpfuse_stock") and found != FORWARD:
        LOG.warning("RoPE in the QK norm: left to vLLM: MiniMaxM2Attention.forward uses %s; known: %s", found, FORWARD)
        return

    def build(stock: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any) -> None:
        stock(attention, *args, **kwargs)
        attention.tpfuse_rope = False
        guarded("RoPE in the QK norm", lambda: setattr(attention, "tpfuse_rope", _tables(attention, RotaryEmbedding)))

    replace(MiniMaxM2Attention, "__init__", build)
    if not hasattr(MiniMaxM2Attention.forward, "tpfuse_stock"):
        MiniMaxM2Attention.forward = forward_for(MiniMaxM2Attention.forward)


def forward_for(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of an attention with `tpfuse_rope`. A plain function: torch.compile traces it."""

    def forward(self: Any, positions: Tensor, hidden_states: Tensor) -> Tensor:
        if not self.tpfuse_rope:
            return stock(self, positions, hidden_states)
        rotary = self.rotary_emb
        qkv, _ = self.qkv_proj(hidden_states)
        q, k = torch.ops.tpfuse_vllm.qk_norm_rope(
            qkv, self.q_norm.weight, self.k_norm.weight, rotary.tpfuse_cos, rotary.tpfuse_sin, positions,
            self.q_size, self.kv_size, rotary.head_size, not rotary.is_neox_style, self.q_norm.variance_epsilon,
        )  # fmt: skip
        _, _, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        output, _ = self.o_proj(self.attn(q, k, v))
        result: Tensor = output
        return result

    forward.tpfuse_stock = stock  # type: ignore[attr-defined]
    return forward


def _tables(attention: Any, plain: Any) -> bool:
    """Give the rotation its tables, and say whether it can be fused.

    Buffers of the module that rotates, which all layers share: sleep mode saves buffers. The values are vLLM's own,
    which are rounded to the model's dtype."""
    engaged, rotary = state.current, attention.rotary_emb
    if engaged is None or engaged.effective != "fused":
        return False
    kind = type(rotary)
    if kind.forward_native is not plain.forward_native or kind.forward_cuda is not plain.forward_cuda:
        LOG.warning("RoPE in the QK norm: left to vLLM: %s rotates in a way of its own", kind.__name__)
        return False
    if attention.q_norm.variance_epsilon != attention.k_norm.variance_epsilon:
        LOG.warning("RoPE in the QK norm: left to vLLM: q and k have another eps each")
        return False
    if rotary.cos_sin_cache.is_meta:  # filled behind our back, and ours would not be
        LOG.warning("RoPE in the QK norm: left to vLLM: the model is built without values")
        return False
    if not hasattr(rotary, "tpfuse_cos"):
        cos, sin = rotary.cos_sin_cache.float().chunk(2, dim=-1)
        rotary.register_buffer("tpfuse_cos", cos.contiguous(), persistent=False)
        rotary.register_buffer("tpfuse_sin", sin.contiguous(), persistent=False)
    rope = Rope(
        rotary.tpfuse_cos, rotary.tpfuse_sin, rotary.tpfuse_cos, rotary.head_size, rotary.rotary_dim,
        not rotary.is_neox_style,
    )  # fmt: skip
    reason = why_not((attention.q_size, attention.kv_size), rope)
    if reason:
        LOG.warning("RoPE in the QK norm: left to vLLM: %s", reason)
    return not reason
