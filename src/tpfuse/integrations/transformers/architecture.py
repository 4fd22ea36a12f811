"""What tpfuse has to know of a model family, as data: which weights are divided and how, which modules return partial
sums, and where the norms stand. One family is one file of `architectures/`; docs/add-a-model.md walks through one.

Names are those of the modules inside the base model, with `*` for a number: `layers.*.self_attn.q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tpfuse.communicator import Communicator
from tpfuse.integrations.transformers.split import Segment, Split

Config = Any  # a transformers configuration
Forward = Callable[..., Any]
Module = Any  # a module of transformers: its fields are not tpfuse's to type
Local = Callable[[Module, Config, int], Mapping[str, Any]]
MakeForward = Callable[[Module, Communicator], Forward]


@dataclass(frozen=True)
class Rule:
    """How a weight is divided, or the weight and bias of a Linear. style: transformers' word for it, for its plan."""

    dim: int
    segments: Callable[[Config, int], tuple[Segment, ...]]
    style: str

    def split(self, config: Config, tensor: Tensor) -> Split | None:
        """None: the bias of a Linear that returns a partial sum. It is added by one rank, or it would count W times."""
        if self.style == "rowwise" and tensor.dim() == 1:
            return None
        return Split(self.dim, self.segments(config, tensor.shape[self.dim]))


def columns(units: str = "", *, dim: int = 0, packed: int = 1, copies: bool = False) -> Rule:
    """Divide the outputs: a rank computes some of the columns.

    units: the config's field that counts what must not be cut, such as heads. packed: so many equal projections in one.
    copies: with fewer units than ranks, give neighbouring ranks the same one.
    """
    return Rule(dim, _segments(units, packed, copies), "colwise")


def rows(units: str = "", *, dim: int = 1) -> Rule:
    """Divide the inputs: a rank computes a partial sum of all outputs."""
    return Rule(dim, _segments(units, 1, False), "rowwise")


def parts(segments: Callable[[Config], tuple[Segment, ...]]) -> Rule:
    """Divide outputs that are several different things side by side."""
    return Rule(0, lambda config, _: segments(config), "colwise")


def _segments(units: str, packed: int, copies: bool) -> Callable[[Config, int], tuple[Segment, ...]]:
    def segments(config: Config, size: int) -> tuple[Segment, ...]:
        count = getattr(config, units) if units else size // packed
        return (Segment(size // packed, count, units or "columns", copies),) * packed

    return segments


@dataclass(frozen=True)
class Architecture:
    """A model family. base: the class that holds the layers.

    layer: makes the forward of a layer that defers; the stock forward serves where nothing is deferred.
    reduces: the mixers, whose output is a partial sum.
    norms: the norms that may find a deferred sum before them; final_norm: the one behind the last layer.
    head_norms: norms of single heads, which become one operation where norms may defer.
    norm_eps, norm_bias: the field of eps of all of these, and what is added to their gamma.
    shards, and beside it one of tensor_experts and expert_parallel: what is divided.
    local, expert_local: fields of modules that count what one rank has, always and with expert parallelism.
    forwards: modules whose forward is replaced in every mode.
    together: Linears of a module whose weights lie in one tensor, for forwards that multiply once (`together.py`).
    check: raises Unsupported for what can't be divided, where Segments don't say it.
    """

    base: str
    layer: Callable[[Module, Module], Forward]
    reduces: tuple[str, ...]
    norms: tuple[str, ...]
    shards: Mapping[str, Rule]
    tensor_experts: Mapping[str, Rule] = field(default_factory=dict)
    expert_parallel: Mapping[str, Rule] = field(default_factory=dict)
    local: Mapping[str, Local] = field(default_factory=dict)
    expert_local: Mapping[str, Local] = field(default_factory=dict)
    head_norms: tuple[str, ...] = ()
    forwards: Mapping[str, MakeForward] = field(default_factory=dict)
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    check: Callable[[Config, int], None] = lambda config, world: None
    layers: str = "layers"
    final_norm: str = "norm"
    norm_eps: str = "variance_epsilon"
    norm_bias: float = 0.0

    def rules(self, expert_parallel: bool) -> Mapping[str, Rule]:
        return {**self.shards, **(self.expert_parallel if expert_parallel else self.tensor_experts)}

    def locals(self, expert_parallel: bool) -> Mapping[str, Local]:
        return {**self.local, **(self.expert_local if expert_parallel else {})}

    def is_mixer(self, name: str) -> bool:
        """Whether a module is a mixer or inside of one."""
        return any(name == mixer or name.startswith(mixer + ".") for mixer in self.reduces)


def pattern_of(name: str) -> str:
    """`layers.3.mlp` as `layers.*.mlp`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def heads_of(config: Config, world: int) -> tuple[int, int]:
    """Query heads and KV heads of one rank."""
    return config.num_attention_heads // world, max(1, config.num_key_value_heads // world)


def local_groups(module: Module, config: Config, world: int) -> dict[str, int]:
    """`local` of an attention: how many of its rank's query heads share a KV head."""
    query, kv = heads_of(config, world)
    return {"num_key_value_groups": query // kv}


def attention(prefix: str) -> dict[str, Rule]:
    """`shards` of an attention with q, k, v and o projections. Where ranks outnumber KV heads, these are copied."""
    kv = columns("num_key_value_heads", copies=True)
    return {
        f"{prefix}.q_proj": columns("num_attention_heads"),
        f"{prefix}.k_proj": kv,
        f"{prefix}.v_proj": kv,
        f"{prefix}.o_proj": rows("num_attention_heads"),
    }
