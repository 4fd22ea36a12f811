"""Llama and Qwen3: dense layers of two norms. Qwen3's norms of q and k are per head, so they stay on their rank."""

from __future__ import annotations

from dataclasses import replace

from tpfuse.integrations.transformers.architecture import Architecture, attention, columns, local_groups, rows
from tpfuse.integrations.transformers.layers import two_norms

LLAMA = Architecture(
    base="LlamaModel",
    layer=two_norms,
    reduces=("layers.*.self_attn", "layers.*.mlp"),
    norms=("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm"),
    shards={
        **attention("layers.*.self_attn"),
        "layers.*.mlp.gate_proj": columns(),
        "layers.*.mlp.up_proj": columns(),
        "layers.*.mlp.down_proj": rows(),
    },
    local={"layers.*.self_attn": local_groups},
)

QWEN3 = replace(LLAMA, base="Qwen3Model", head_norms=("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"))
