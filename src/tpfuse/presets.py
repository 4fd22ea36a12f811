"""The shapes of the models that tpfuse is measured on, as data. Sources: the models' public configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

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

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that a layer of this model runs, in the order of a layer; the QK norm also without its rotation."""
        norms = ("qk_rms_norm", "qk_rms_norm_rope") if self.qk else ()
        return (*norms, "all_reduce", "all_reduce_rms_norm")


_ALL = (
    # 48 query and 8 KV heads of 128, of which 64 are rotated; the QK norm spans all heads.
    Preset("minimax-m2", 3072, 1e-6, 0.0, (6144, 1024), (128, 64), torch.bfloat16, torch.bfloat16),
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
