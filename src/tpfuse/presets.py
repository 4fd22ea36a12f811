"""The shapes of the models that tpfuse is measured on, as data. Sources: the models' public configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from tpfuse.errors import InvalidArgument


@dataclass(frozen=True)
class Preset:
    """What the ops of one model look like. Widths are of whole rows, before sharding."""

    name: str
    hidden: int  # width of all_reduce and all_reduce_rms_norm
    eps: float
    weight_bias: float  # 1.0: Gemma's norm, gamma + 1
    qk: tuple[int, int] | None  # widths of q and k where the model norms them over the ranks; v is as wide as k
    rope: tuple[int, int] | None  # head_dim and rotary_dim of the rotation behind that norm
    dtype: torch.dtype  # activations and gamma
    residual_dtype: torch.dtype
    top_k: int = 0  # experts of a token, where their sum is all that a layer's MoE block brings

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that a layer of this model runs, in the order of a layer; the QK norm also without its rotation."""
        norms = ("qk_rms_norm", "qk_rms_norm_rope") if self.qk else ()
        experts = ("all_reduce_rms_norm_experts",) if self.top_k else ()
        return (*norms, "all_reduce", "all_reduce_rms_norm", *experts)


_ALL = (
    # 48 query and 8 KV heads of 128, of which 64 are rotated; the QK norm spans all heads.
    Preset("minimax-m2", 3072, 1e-6, 0.0, (6144, 1024), (128, 64), torch.bfloat16, torch.bfloat16, 8),
    # Its QK norm is per head, so nothing of it crosses the ranks.
    Preset("minimax-m3", 6144, 1e-6, 1.0, None, None, torch.bfloat16, torch.bfloat16),
    # residual_in_fp32: the residual stream is fp32 beside bf16 activations.
    Preset("nemotron-h", 4096, 1e-5, 0.0, None, None, torch.bfloat16, torch.float32),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises InvalidArgument with the names there are."""
    if name not in PRESETS:
        raise InvalidArgument(f"preset {name!r}; there are: {', '.join(PRESETS)}.")
    return PRESETS[name]


@dataclass(frozen=True)
class ModelPreset:
    """A whole model: a configuration class of transformers and its fields, where they are not the class's own.

    layers: how many it has; a field with an entry a layer is cut to as many as are asked for.
    """

    name: str
    config: str
    fields: Mapping[str, Any]
    layers: int
    dtype: torch.dtype = torch.bfloat16

    def with_layers(self, layers: int | None) -> dict[str, Any]:
        """The fields of a model of the first so many layers."""
        count = self.layers if layers is None else layers
        if not 0 < count <= self.layers:
            raise InvalidArgument(f"{self.name} with {count} layers; it has {self.layers}, and needs at least 1.")
        cut = {name: value[:count] if isinstance(value, tuple) else value for name, value in self.fields.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in cut.items()} | {
            "num_hidden_layers": count
        }


_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_M2_ROPE = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
_TINY = {
    "vocab_size": 256, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "intermediate_size": 64, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_TINY_MOE = _TINY | {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_parameters": _M2_ROPE}


def _kinds(pattern: str) -> tuple[str, ...]:
    """Nemotron-H's layers, as its checkpoints write them."""
    return tuple(_KINDS[letter] for letter in pattern)


_MODELS = (
    ModelPreset("minimax-m2", "MiniMaxM2Config", {"rope_parameters": _M2_ROPE}, 62),
    ModelPreset(
        "minimax-m3",
        "MiniMaxM3VLTextConfig",
        {
            "rope_parameters": _M2_ROPE,
            "mlp_layer_types": ("dense",) * 3 + ("sparse",) * 57,
            "layer_types": ("full_attention",) * 3 + ("minimax_m3_sparse",) * 57,
        },
        60,
    ),
    # The 8B model: no experts.
    ModelPreset(
        "nemotron-h",
        "NemotronHConfig",
        {"layers_block_type": _kinds("M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-")},
        52,
    ),
    ModelPreset(
        "nemotron-3-nano",
        "NemotronHConfig",
        {
            "layers_block_type": _kinds("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
            "hidden_size": 2688,
            "num_key_value_heads": 2,
            "mamba_num_heads": 64,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "routed_scaling_factor": 2.5,
        },
        52,
    ),
    ModelPreset("tiny-llama", "LlamaConfig", _TINY, 4, torch.float32),
    ModelPreset("tiny-minimax-m2", "MiniMaxM2Config", _TINY_MOE, 4, torch.float32),
    ModelPreset(
        "tiny-minimax-m3",
        "MiniMaxM3VLTextConfig",
        _TINY_MOE
        | {
            "dense_intermediate_size": 128,
            "shared_intermediate_size": 64,
            "mlp_layer_types": ("dense", "sparse", "sparse", "sparse"),
            "layer_types": ("full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "minimax_m3_sparse"),
            "index_head_dim": 16,
            "index_block_size": 16,
            "index_topk_blocks": 2,
        },
        4,
        torch.float32,
    ),
    ModelPreset(
        "tiny-nemotron-h",
        "NemotronHConfig",
        _TINY
        | {
            "layers_block_type": _kinds("ME*-"),
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 4,
            "ssm_state_size": 16,
            "chunk_size": 32,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
        4,
        torch.float32,
    ),
)

MODELS: Mapping[str, ModelPreset] = MappingProxyType({model.name: model for model in _MODELS})


def find_model(name: str) -> ModelPreset:
    """The model of that name. Raises InvalidArgument with the names there are."""
    if name not in MODELS:
        raise InvalidArgument(f"model preset {name!r}; there are: {', '.join(MODELS)}.")
    return MODELS[name]
