"""MiniMax-M2 and the text model of MiniMax-M3. Attention is divided by heads, KV cache included. Experts stay as the
stock plan has them: divided each, or over the ranks.

M2's norms of q and k span all heads, so they exchange the sums of squares, both in one collective, and rotate the
normed rows in the same operation. M3's are per head. Its indexer has one head for each KV head, and chooses the keys
that the query heads of that KV head see: so the heads of the indexer, and the mask that it makes, go with the KV heads.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpfuse.communicator import Communicator
from tpfuse.errors import Unsupported
from tpfuse.integrations.transformers.architecture import (
    Architecture,
    Config,
    Forward,
    Module,
    attention,
    columns,
    heads_of,
    local_groups,
    rows,
)
from tpfuse.integrations.transformers.layers import two_norms
from tpfuse.integrations.transformers.together import products
from tpfuse.rope import Rope

NORMS = ("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm")
TENSOR_EXPERTS = {
    "layers.*.mlp.experts.gate_up_proj": columns(dim=1, packed=2),
    "layers.*.mlp.experts.down_proj": rows(dim=2),
}
EXPERT_PARALLEL = {
    "layers.*.mlp.experts.gate_up_proj": columns("num_local_experts"),
    "layers.*.mlp.experts.down_proj": columns("num_local_experts"),
}


def rotary(module: Module, comm: Communicator) -> Forward:
    """The rotary embedding, once a forward, as what `qk_rms_norm` takes: fp32 tables of the positions at hand."""
    stock = module.forward

    def forward(x: Tensor, position_ids: Tensor) -> Rope:
        cos, sin = stock(torch.empty(0, dtype=torch.float32, device=x.device), position_ids)
        rotary_dim = cos.shape[-1]
        cos, sin = (angles[..., : rotary_dim // 2].flatten(0, 1).contiguous() for angles in (cos, sin))
        rows_of_batch = torch.arange(position_ids.numel(), device=x.device).view(position_ids.shape)
        positions = rows_of_batch.expand(x.shape[:2]).contiguous()
        return Rope(cos, sin, positions, module.config.head_dim, rotary_dim)

    return forward


def normed_attention(module: Module, comm: Communicator) -> Forward:
    """Attention whose q and k are normed over the heads of all ranks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.minimax_m2.modeling_minimax_m2 import eager_attention_forward

    eps = module.q_norm.variance_epsilon, module.k_norm.variance_epsilon

    def forward(
        hidden_states: Tensor,
        position_embeddings: Rope,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        gammas = module.q_norm.weight, module.k_norm.weight
        q, k, v = products(module, hidden_states)
        q, k = comm.qk_rms_norm(q, k, *gammas, eps=eps, rope=position_embeddings)
        q, k, v = (states.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for states in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
        output, weights = attend(module, q, k, v, attention_mask, dropout=0.0, scaling=module.scaling, **kwargs)
        return module.o_proj(output.flatten(2)), weights

    return forward


def local_experts(module: Module, config: Config, world: int) -> dict[str, int]:
    """`expert_local` of the experts: how many of them a rank has."""
    return {"num_experts": config.num_local_experts // world}


MINIMAX_M2 = Architecture(
    base="MiniMaxM2Model",
    layer=two_norms,
    reduces=("layers.*.self_attn", "layers.*.mlp"),
    norms=NORMS,
    shards={
        **attention("layers.*.self_attn"),
        "layers.*.self_attn.q_norm": columns("num_attention_heads"),
        "layers.*.self_attn.k_norm": columns("num_key_value_heads", copies=True),
    },
    tensor_experts=TENSOR_EXPERTS,
    expert_parallel=EXPERT_PARALLEL,
    local={"layers.*.self_attn": local_groups},
    expert_local={"layers.*.mlp.experts": local_experts},
    forwards={"rotary_emb": rotary, "layers.*.self_attn": normed_attention},
    together={"layers.*.self_attn": ("q_proj", "k_proj", "v_proj")},
)


def local_indexer(module: Module, config: Config, world: int) -> dict[str, Any]:
    """`local` of M3's indexer: its heads, and the configuration from which it reads how many query heads they serve."""
    mine = copy(config)
    mine.num_attention_heads, heads = heads_of(config, world)
    return {"num_heads": heads, "config": mine}


def check_indexer(config: Config, world: int) -> None:
    if config.index_n_heads != config.num_key_value_heads:
        raise Unsupported(
            f"MiniMax-M3 with {config.index_n_heads} index heads and {config.num_key_value_heads} KV heads; "
            "supported: as many index heads as KV heads, because they are divided together."
        )


DENSE_MLP = {"gate_up_proj": columns(packed=2), "down_proj": rows()}

MINIMAX_M3 = replace(
    MINIMAX_M2,
    base="MiniMaxM3VLTextModel",
    shards={
        **attention("layers.*.self_attn"),
        "layers.*.self_attn.indexer.q_proj": columns("index_n_heads", copies=True),
        **{f"layers.*.mlp.{name}": rule for name, rule in DENSE_MLP.items()},
        **{f"layers.*.mlp.shared_experts.{name}": rule for name, rule in DENSE_MLP.items()},
    },
    local={"layers.*.self_attn": local_groups, "layers.*.self_attn.indexer": local_indexer},
    head_norms=tuple(f"layers.*.self_attn.{name}" for name in ("q_norm", "k_norm", "indexer.q_norm", "indexer.k_norm")),
    forwards={},
    together={},
    check=check_indexer,
    norm_eps="eps",
    norm_bias=1.0,
)
