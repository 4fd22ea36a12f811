"""The forwards that defer: of layers, of the mixers in them, and of the norms that reduce; and of norms that don't.

The residual stream between layers is a tensor or a PendingReduction. The model's own loop hands it on; what others
capture of it is a tensor, because a layer that someone watches reduces what it returns.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import rms_norm

from tpfuse.deferred import Deferral, PendingReduction, Place, join, reduced, total, why_not_deferred, why_not_reduced
from tpfuse.integrations.transformers.architecture import Forward, Module

CAPTURING = "transformers.utils.output_capturing"
Stream = Tensor | PendingReduction


def two_norms(layer: Module, follower: Module) -> Forward:
    """Attention and MLP, each behind a norm: the layer of Llama and most others."""

    def forward(hidden_states: Stream, **kwargs: Any) -> Stream:
        stream = shown(hidden_states, layer.input_layernorm)
        normed = layer.input_layernorm(stream)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        stream = shown(join(total(stream), attended), layer.post_attention_layernorm)
        normed = layer.post_attention_layernorm(stream)
        return shown(join(total(stream), layer.mlp(normed)), layer, follower)

    return forward


def mixer(module: Module, deferral: Deferral, place: Place, origin: str) -> Forward:
    """A mixer whose own forward now gives a partial sum: it returns it deferred, or reduced where it can't wait."""
    stock, comm = module.forward, deferral.comm
    whole, at_once = bool(why_not_reduced(place)), bool(why_not_deferred(place))

    def settle(partial: Tensor) -> Stream:
        if whole:
            return partial
        if at_once or not deferral.open or watched(module):
            return comm.all_reduce(partial)
        return deferral.pending(partial, origin)

    @wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        return (settle(output[0]), *output[1:]) if isinstance(output, tuple) else settle(output)

    return forward


def norm(module: Module, eps: float, weight_bias: float) -> Forward:
    """A norm that reduces what is pending. Its own forward norms what is whole: the first layer's input."""
    stock = module.forward

    @wraps(stock)
    def forward(stream: Stream) -> Tensor:
        if isinstance(stream, PendingReduction):
            return stream.norm(module.weight, eps=eps, weight_bias=weight_bias)
        normed: Tensor = stock(stream)
        return normed

    return forward


def head_norm(module: Module, eps: float, weight_bias: float) -> Forward:
    """A norm of single heads, which a rank has whole: torch's one operation, where models have a chain. It computes in
    fp32 and rounds once; gamma and bias in 16 bits would be a rounding more, so with a bias all is widened before."""

    def forward(x: Tensor) -> Tensor:
        gamma: Tensor = module.weight
        if not weight_bias:
            return rms_norm(x, gamma.shape, gamma, eps)
        return rms_norm(x.float(), gamma.shape, gamma.float() + weight_bias, eps).to(x.dtype)

    return forward


def model(module: Module, deferral: Deferral) -> Forward:
    """The base model's forward, at whose end nothing may be pending."""
    stock = module.forward

    @wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with deferral.forward():
            return stock(*args, **kwargs)

    return forward


def shown(stream: Stream, *modules: nn.Module) -> Stream:
    """The residual stream as these modules may have it, who give or take it: whole, if a hook of one sees it."""
    return reduced(stream) if any(watched(module) for module in modules) else stream


def watched(module: nn.Module) -> bool:
    """Whether a hook sees what the module takes or returns. transformers' own hooks stay for good once they were
    needed, so they count only while they collect hidden states."""
    if module._forward_pre_hooks:
        return True
    return any(hook.__module__ != CAPTURING or _collecting() for hook in module._forward_hooks.values())


def _collecting() -> bool:
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    return collected is not None and "hidden_states" in collected
