"""Tiny random models of each architecture, saved as safetensors, and what tests run on them on ranks.

Weights are larger than a training would start with, and every tensor is random (norms and biases too), so that each
has a say in the logits, and greedy decoding does not fall into a cycle of one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpfuse.launch import Rank

VOCABULARY = 96
PROMPT = [[5, 11, 3, 42, 7, 19, 23], [2, 90, 33, 8, 64, 1, 77]]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Boundaries behind a mixer in a forward, and norms of q and k over the ranks.
BOUNDARIES = {
    "llama": 6,
    "llama, few KV heads": 6,
    "qwen3": 6,
    "minimax-m2": 6,
    "minimax-m2, few KV heads": 6,
    "minimax-m3": 6,
    "minimax-m3, few KV heads": 6,
    "nemotron-h": 6,
    "nemotron-h, latent experts": 6,
}
QK_NORMS = {"minimax-m2": 3, "minimax-m2, few KV heads": 3}
MOE = {
    "intermediate_size": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
}
M3 = {  # blocks of 4 keys of which a query sees 2 and its own, so that the indexer matters from the prompt on
    "dense_intermediate_size": 64,
    "shared_intermediate_size": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "rotary_dim": 4,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
    "intermediate_size": 64,
    "mlp_bias": True,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 4,
    "ssm_state_size": 8,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_logits_to_keep": 0,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"intermediate_size": 64, "attention_bias": True, "mlp_bias": True}),
    "llama, few KV heads": ("LlamaConfig", {"intermediate_size": 64, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"intermediate_size": 64, "tie_word_embeddings": True}),
    "minimax-m2": ("MiniMaxM2Config", MOE),
    "minimax-m2, few KV heads": ("MiniMaxM2Config", {**MOE, "num_key_value_heads": 2}),
    "minimax-m3": ("MiniMaxM3VLTextConfig", {**MOE, **M3}),
    "minimax-m3, few KV heads": ("MiniMaxM3VLTextConfig", {**MOE, **M3, "num_key_value_heads": 2, "index_n_heads": 2}),
    "nemotron-h": ("NemotronHConfig", NEMOTRON_H),
    "nemotron-h, latent experts": ("NemotronHConfig", {**NEMOTRON_H, "moe_latent_size": 16, "use_bias": True}),
}
# Not of the models that every test runs: one that tpfuse does not know; ones that need no choice between experts.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"intermediate_size": 64}),
    "minimax-m2, all experts": ("MiniMaxM2Config", {**MOE, "num_experts_per_tok": 8}),
    "minimax-m3, all experts": (
        "MiniMaxM3VLTextConfig",
        {**MOE, **M3, "num_experts_per_tok": 8, "index_topk_blocks": 64},
    ),
    "nemotron-h, all experts": ("NemotronHConfig", {**NEMOTRON_H, "num_experts_per_tok": 8}),
}


def expected_calls(name: str, mode: str) -> dict[str, int]:
    """Each boundary is one collective, whatever the mode, and no mixer has another one."""
    expected = {"all_reduce" if mode == "off" else "all_reduce_rms_norm": BOUNDARIES[name]}
    return expected | ({"qk_rms_norm": QK_NORMS[name]} if name in QK_NORMS else {})


def make(name: str, folder: Path) -> Path:
    """A checkpoint of a tiny random model, in fp32."""
    import transformers

    kind, fields = (CONFIGS | OTHERS)[name]
    config = getattr(transformers, kind)(**{**COMMON, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        scale = 0.1 if tensor.dim() < 2 else 0.7 / tensor.shape[-1] ** 0.5
        tensor.data.copy_(noise * scale + (1.0 if "norm" in name and "M3" not in type(model).__name__ else 0.0))


def load(
    path: Path, mode: str, world: int, *, dtype: torch.dtype = torch.float32, experts: str = "", **distributed: Any
) -> Any:
    """The model on this rank. mode: tpfuse's, or "stock", or "whole" for one that is not divided. experts: the
    implementation of the experts, where one is needed."""
    import transformers
    from transformers.distributed import DistributedConfig

    from tpfuse.integrations import transformers as fused

    if mode in ("stock", "whole"):
        fused.disable()
    else:
        fused.enable(mode)
    config = DistributedConfig(tp_size=world, tp_plan="auto", **distributed) if mode != "whole" and world > 1 else None
    settings: dict[str, Any] = {"dtype": dtype, "distributed_config": config}
    if hasattr(transformers.AutoConfig.from_pretrained(path), "num_experts_per_tok"):
        if experts:
            settings["experts_implementation"] = experts
        elif dtype == torch.float64:
            settings["experts_implementation"] = "eager"  # grouped_mm has no fp64
        elif torch.cuda.is_available():
            settings["experts_implementation"] = "batched_mm"  # nor, on GPUs, an fp32 that a graph may capture
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(path, **settings)
    finally:
        fused.disable()


@contextmanager
def closing(model: Any) -> Iterator[Any]:
    yield model
    if hasattr(model, "_tpfuse"):
        model._tpfuse.comm.close()


def calls(model: Any) -> Counter[str]:
    """Collectives of tpfuse so far, by operation."""
    return Counter({c.route.op: c.calls for c in model._tpfuse.comm.report().counters})


def logits(rank: Rank, path: Path, mode: str, distributed: dict[str, Any] | None = None) -> dict[str, Any]:
    """Logits of a whole forward, and the collectives that it took."""
    with closing(load(path, mode, rank.world, **(distributed or {}))) as model:
        found: dict[str, Any] = {"logits": model(torch.tensor(PROMPT)).logits.detach()}
        if mode in ("off", "control", "fused"):
            found["calls"] = calls(model)
        return found


def greedy(rank: Rank, path: Path, mode: str, tokens: int = 64, settings: dict[str, Any] | None = None) -> Tensor:
    with closing(load(path, mode, rank.world)) as model:
        return model.generate(torch.tensor(PROMPT), max_new_tokens=tokens, do_sample=False, **(settings or {}))


def saved(rank: Rank, path: Path, into: Path, mode: str) -> None:
    """The model loaded in shards and saved again."""
    with closing(load(path, mode, rank.world)) as model:
        model.save_pretrained(into)
