"""Nemotron-H: layers of one norm and one mixer, which is Mamba2, attention, an MLP or an MoE block.

Mamba2 is divided by groups, with the heads and states that belong to them. Its in_proj and conv1d are several things
side by side (gate, x, B, C, dt), each divided on its own. The gated norm spans a group, so it stays on its rank while
no group is cut: more ranks than groups are refused. In an MoE block the partial sums of routed and shared experts are
added before the one reduction; what stands between (the latent projection) is linear, and its bias is added once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpfuse.deferred import join, total
from tpfuse.integrations.transformers.architecture import (
    Architecture,
    Config,
    Forward,
    Module,
    attention,
    columns,
    local_groups,
    parts,
    rows,
)
from tpfuse.integrations.transformers.layers import Stream, shown
from tpfuse.integrations.transformers.split import Segment

MIXER = "layers.*.mixer"


def one_norm(layer: Module, follower: Module) -> Forward:
    """A layer of one norm and one mixer. What the mixer is given depends on its kind, as in the stock layer."""
    kind = layer.block_type

    def forward(
        hidden_states: Stream,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Stream:
        stream = shown(hidden_states, layer.norm)
        normed = layer.norm(stream)
        if kind == "linear_attention":
            mixed = layer.mixer(normed, cache_params=past_key_values, attention_mask=attention_mask, **kwargs)
        elif kind == "full_attention":
            kwargs |= {"past_key_values": past_key_values, "position_ids": position_ids, "use_cache": use_cache}
            mixed, _ = layer.mixer(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        else:
            mixed = layer.mixer(normed)
        return shown(join(total(stream), mixed), layer, follower)

    return forward


def inner(config: Config) -> Segment:
    return Segment(config.mamba_num_heads * config.mamba_head_dim, config.n_groups, "groups")


def states(config: Config) -> Segment:
    return Segment(config.n_groups * config.ssm_state_size, config.n_groups, "groups")


def heads(config: Config) -> Segment:
    return Segment(config.mamba_num_heads, config.n_groups, "groups")


CONVOLVED = parts(lambda c: (inner(c), states(c), states(c)))  # x, B, C
PROJECTED = parts(lambda c: (inner(c), inner(c), states(c), states(c), heads(c)))  # gate, x, B, C, dt
HEADS = parts(lambda c: (heads(c),))


def local_mixer(module: Module, config: Config, world: int) -> dict[str, int]:
    """`local` of a mixer, by its kind."""
    if hasattr(module, "conv1d"):
        width, state = inner(config).size // world, states(config).size // world
        return {
            "num_heads": config.mamba_num_heads // world,
            "n_groups": config.n_groups // world,
            "intermediate_size": width,
            "conv_dim": width + 2 * state,
        }
    return local_groups(module, config, world) if hasattr(module, "num_key_value_groups") else {}


NEMOTRON_H = Architecture(
    base="NemotronHModel",
    layer=one_norm,
    reduces=(MIXER,),
    norms=("layers.*.norm", "norm_f"),
    shards={
        **attention(MIXER),
        f"{MIXER}.in_proj": PROJECTED,
        f"{MIXER}.conv1d": CONVOLVED,
        f"{MIXER}.A_log": HEADS,
        f"{MIXER}.D": HEADS,
        f"{MIXER}.dt_bias": HEADS,
        f"{MIXER}.norm": parts(lambda c: (inner(c),)),
        f"{MIXER}.out_proj": rows("n_groups"),
        f"{MIXER}.up_proj": columns(),
        f"{MIXER}.down_proj": rows(),
        f"{MIXER}.shared_experts.up_proj": columns(),
        f"{MIXER}.shared_experts.down_proj": rows(),
        f"{MIXER}.fc2_latent_proj.bias": rows(),
    },
    tensor_experts={f"{MIXER}.experts.up_proj": columns(dim=1), f"{MIXER}.experts.down_proj": rows(dim=2)},
    local={MIXER: local_mixer},
    final_norm="norm_f",
)
