"""Which group a sum of SGLang is reduced over. Asked at each call: a draft model may have other groups for a while."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from tpfuse.integrations.sglang import hooks

FUSION = "sglang.srt.layers.flashinfer_comm_fusion"

Group = Callable[[], Any]  # gives SGLang's GroupCoordinator


def attention() -> Group:
    """The attention-TP group."""
    get: Group = import_module("sglang.srt.distributed.parallel_state").get_attn_tp_group
    return get


def experts() -> Group:
    """The group that experts' outputs are reduced over. Raises LookupError where SGLang does not tell."""
    resolve = hooks.known(f"{FUSION}.resolve_fusion_group", ("use_attn_tp_group",))
    return lambda: resolve(use_attn_tp_group=False)[2]


def same(found: Any, group: Any) -> bool:
    """Whether two groups have the same ranks: SGLang has several objects of them."""
    return found is group or found.ranks == group.ranks
