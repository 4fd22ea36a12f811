"""MoE layers: vLLM's operator for experts and the all-reduce + norm behind it as one operator, without a sum over
experts in between.

A layer's experts leave a row for each expert of a token, `[T, top_k, H]`, in vLLM's workspace. `moe_sum` adds them up,
and a copy takes the sum to the layer's output. Our operator runs vLLM's with both left out, and hands the terms to the
all-reduce, which adds them as it reads them.

Design record
- One operator, instead of one for experts that returns the terms. They lie in memory that the experts of the next
  layer overwrite; in a graph they would be a tensor like any other, whose memory Inductor gives to the next one.
- So what is left out is decided as the operator runs, by the layer that it runs. Equal layers are compiled once, so a
  pass can't know the layer; and a graph from a cache is right whichever experts vLLM has chosen since.
- Where nothing was left out, as other experts add up otherwise, the result is whole, and reduced as such.
- A sum that was left out and yet used would be wrong output without an error. Hence KNOWN: exact types, whose code
  between `moe_sum` and the end of the layer does nothing. Beyond that, what vLLM's operator returns must be the very
  tensor that the sum was for, and the first time of each layer it must come back as it was filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from tpfuse.backends.cuda import all_reduce
from tpfuse.communicator import boundary_outputs
from tpfuse.errors import Unsupported
from tpfuse.integrations.serving import state
from tpfuse.integrations.vllm.graph import Experts
from tpfuse.integrations.vllm.operators import boundary
from tpfuse.integrations.vllm.plugin import replace
from tpfuse.quant import named
from tpfuse.reference import NormOutput

ARGUMENTS = ("hidden_states", "router_logits", "shared_experts_input", "input_ids", "layer_name", "hidden_dim_unpadded")
SUM = ("input", "output")  # the parameters of moe_sum; 0.33 has more, with defaults: what uses them is vLLM's to add up
APPLY = ("self", "output", "fused_expert_output", "topk_weights", "topk_ids", "apply_router_weight_on_input")
# What a layer is made of where its sum can be left out: attribute, types.
KNOWN = {
    "": ("MoERunner",),
    "routed_experts": ("RoutedExperts",),
    "routed_experts.quant_method": (
        "UnquantizedFusedMoEMethod",
        "Fp8MoEMethod",
        "CompressedTensorsW8A8Fp8MoEMethod",
    ),
    "routed_experts.quant_method.moe_kernel.impl": ("FusedMoEKernelModularImpl",),
    "routed_experts.quant_method.moe_kernel.impl.prepare_finalize": ("MoEPrepareAndFinalizeNoDPEPModular",),
    "routed_experts.quant_method.moe_kernel.impl.fused_experts": ("TritonExperts",),
}
MARK = 1.0

_library: torch.library.Library | None = None  # the operator lives as long as its library
_layer: Callable[[Any], Any] | None = None  # the layer of a layer_name


def install() -> None:
    """Define the operator, and have the two functions leave out what it asks them to. Raises LookupError where they
    are not the known ones."""
    global _library, _layer
    _layer = None
    import vllm._custom_ops as custom_ops
    from vllm.model_executor.layers.fused_moe.runner import moe_runner
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    known(torch.ops.vllm.moe_forward.default._schema.arguments, ARGUMENTS, "vllm::moe_forward")
    known(parameters(moe_runner._moe_forward), ARGUMENTS, "_moe_forward")
    known(parameters(custom_ops.moe_sum)[: len(SUM)], SUM, "moe_sum")
    known(parameters(TopKWeightAndReduceNoOP.apply), APPLY, "TopKWeightAndReduceNoOP.apply")
    _layer = layers_of(moe_runner)
    if _library is None:
        _library = define(torch.ops.vllm.moe_forward.default, moe_runner._moe_forward)
    replace(custom_ops, "moe_sum", moe_sum)
    replace(TopKWeightAndReduceNoOP, "apply", apply)


def known(found: Any, expected: tuple[str, ...], what: str) -> None:
    names = tuple(getattr(name, "name", name) for name in found)
    if names != expected:
        raise LookupError(f"{what} takes {names}; known: {expected}")


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(signature(getattr(function, "tpfuse_stock", function)).parameters)


def layers_of(moe_runner: Any) -> Callable[[Any], Any]:
    """What finds the layer that vLLM's operator is about to run."""
    resolve = moe_runner._resolve_layer_name

    def layer(layer_name: Any) -> Any:
        name, context = resolve(layer_name), moe_runner.get_forward_context()
        if name == "from_forward_context":  # the next of all; vLLM's operator is the one that counts on
            name = context.all_moe_layers[context.moe_layer_index]
        return context.no_compile_layers[name]

    return layer


def targets() -> Experts | None:
    """What a pass looks for, and what it puts there."""
    if _library is None or _layer is None:
        return None
    ours = torch.ops.tpfuse_vllm.moe_forward_all_reduce_rms_norm.default
    return Experts(torch.ops.vllm.moe_forward.default, ours)


# The operator


def define(stock: Any, function: Callable[..., Any]) -> torch.library.Library:
    """Register `torch.ops.tpfuse_vllm.moe_forward_all_reduce_rms_norm` for vLLM's operator, made of a function.

    Its last arguments are those of vLLM's, written to or not: the type of a layer's name is vLLM's own."""
    written = [one.name for one in stock._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    theirs = torch.library.infer_schema(function, mutates_args=written).partition("(")[2].rpartition(") -> ")[0]
    name = "moe_forward_all_reduce_rms_norm"
    library = torch.library.Library("tpfuse_vllm", "FRAGMENT")
    library.define(
        f"{name}(Tensor residual, Tensor weight, Tensor? given, float eps, float weight_bias, str quant, "
        f"bool keep_norm, {theirs}) -> (Tensor, Tensor, Tensor, Tensor)",
        # Not vLLM's tags: exact strides are those before Inductor's passes, which a node of a pass does not have.
        tags=(torch.Tag.needs_fixed_stride_order,),
    )
    library.impl(name, moe_forward_all_reduce_rms_norm, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpfuse_vllm::{name}", _fake, lib=library)
    return library


def moe_forward_all_reduce_rms_norm(
    residual: Tensor,
    weight: Tensor,
    given: Tensor | None,
    eps: float,
    weight_bias: float,
    quant: str,
    keep_norm: bool,
    hidden_states: Tensor,
    router_logits: Tensor,
    shared_experts_input: Tensor | None,
    input_ids: Tensor | None,
    layer_name: Any,
    hidden_dim_unpadded: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm, residual, quant and scale, as all_reduce_rms_norm_quant; those that are not there have no elements.

    The terms are read by the all-reduce's kernel. Whatever writes to their memory next, the experts of the next layer
    or what the allocator gives it to, comes later on the same stream, in CUDA graphs, too."""

    def layer() -> Tensor:
        y: Tensor = torch.ops.vllm.moe_forward(
            hidden_states, router_logits, shared_experts_input, input_ids, layer_name, hidden_dim_unpadded
        )
        return y

    x, top_k = terms_of(layer, layer_name, hidden_states, weight)
    y = boundary(x, residual, weight, given, eps, weight_bias, quant, keep_norm, top_k)
    return _all(y, given, hidden_states)


def _fake(
    residual: Tensor,
    _weight: Tensor,
    given: Tensor | None,
    _eps: float,
    _bias: float,
    quant: str,
    keep_norm: bool,
    hidden_states: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = boundary_outputs(hidden_states, residual, named(quant, given), keep_norm)
    return _all(y, given, hidden_states)


def _all(y: NormOutput, given: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm, residual, quant, scale = (like.new_empty(0) if one is None or one is given else one for one in y)
    return norm, residual, quant, scale


def terms_of(run: Callable[[], Tensor], layer_name: Any, hidden: Tensor, gamma: Tensor) -> tuple[Tensor, int | None]:
    """What the experts of a layer have to give to the all-reduce: their terms `[T, top_k, H]` and top_k, or, as before,
    their sum `[T, H]` and None. gamma: what the site is told by, as everywhere."""
    engaged = state.current
    if engaged is None:  # closed: the all-reduce will say so
        return run(), None
    reason = why_not(layer_name)
    if reason:
        engaged.leave(state.EXPERTS, gamma, reason)
        return run(), None
    with keeping(hidden, marked=_first_time(engaged, hidden, gamma)) as kept:
        whole = run()
    if kept.terms is None:
        engaged.leave(state.EXPERTS, gamma, "vLLM adds up in another way")
        return whole, None
    kept.check(whole)
    if kept.marked:
        engaged.looked_at.add(gamma.data_ptr())
    engaged.fused[state.EXPERTS].add(gamma.data_ptr())
    return kept.terms, kept.terms.shape[1]


def _first_time(engaged: state.Engaged, hidden: Tensor, gamma: Tensor) -> bool:
    """Whether to look at what comes back: once for a layer, which waits for the GPU. A graph's capture may not wait."""
    capturing = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    return gamma.data_ptr() not in engaged.looked_at and not capturing


def why_not(layer_name: Any) -> str:
    """Why the sum over experts of a layer stays vLLM's; empty if it can be left out. The same on every rank."""
    try:
        assert _layer is not None
        return unknown(_layer(layer_name))
    except Exception as error:
        return f"its layer is not as it is known: {type(error).__name__}: {error}"


def unknown(layer: Any) -> str:
    """What of a layer is not as it is known; empty if nothing."""
    for path, types in KNOWN.items():
        kind = type(attrgetter(path)(layer) if path else layer)
        if kind.__name__ not in types or kind.__module__.partition(".")[0] != "vllm":
            return f"{kind.__name__} is not known"
    config, experts = layer.moe_config, layer.routed_experts.quant_method.moe_kernel.impl.fused_experts
    if layer.shared_experts is not None:
        return "shared experts"
    if config.dp_size != 1 or getattr(config, "pcp_size", 1) != 1 or config.is_sequence_parallel:
        return "tokens are spread over ranks"
    return "LoRA" if getattr(experts, "_lora_context", None) is not None else ""


# What is left out while it runs


@dataclass
class Kept:
    """What the two functions left out in one run of vLLM's operator. marked: whether the output is filled, to see
    whether anybody changes it."""

    hidden: Tensor  # [T, H]
    marked: bool
    terms: Tensor | None = None  # [T, top_k, H]
    total: Tensor | None = None  # what their sum was to be written to
    output: Tensor | None = None  # what that was to be copied to

    def keep(self, terms: Tensor, total: Tensor) -> bool:
        """Whether a sum is left out: the first one of this run, if it is that of all tokens."""
        hidden = self.hidden
        fits = terms.dim() == 3 and (terms.shape[0], terms.shape[2]) == total.shape == hidden.shape
        fits = fits and not all_reduce.why_not(terms.shape[2], terms.shape[1])
        alike = terms.dtype == total.dtype == hidden.dtype and terms.device == hidden.device
        if self.terms is not None or not fits or not alike or not terms.is_contiguous() or not terms.numel():
            return False
        self.terms, self.total = terms, total
        return True

    def hand(self, total: Tensor, output: Tensor | None) -> bool:
        """Whether the copy of a sum is left out."""
        if self.total is not total or self.output is not None or output is None:
            return False
        if output.shape != total.shape or output.dtype != total.dtype:
            return False
        self.output = output
        self.marked = self.marked and not _overlap(output, self.terms)
        if self.marked:
            output.fill_(MARK)
        return True

    def check(self, whole: Tensor) -> None:
        """Raises Unsupported if what was left out was used."""
        if whole is not self.output:
            raise Unsupported(_LOST.format("returned another tensor than the sum over experts"))
        if self.marked and not bool((whole == MARK).all()):
            raise Unsupported(_LOST.format("changed the sum over experts"))


def _overlap(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


_LOST = (
    "tpfuse: vLLM's layer of experts {}, which tpfuse had left to the all-reduce; what it gave is no result. "
    "TPFUSE_VLLM=control or off serves without tpfuse."
)
# By context, so what runs at the same time in another thread has none, or its own.
_kept: ContextVar[Kept | None] = ContextVar("tpfuse_experts_kept", default=None)


@contextmanager
def keeping(hidden: Tensor, marked: bool) -> Iterator[Kept]:
    """Leave out the sum over experts and its copy in here."""
    kept = Kept(hidden, marked)
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def moe_sum(stock: Callable[..., None], input: Tensor, output: Tensor, *more: Any, **named: Any) -> None:
    """vLLM's moe_sum. With more than the two it adds up only some of the terms."""
    kept = _now()
    if kept is None or more or named or not kept.keep(input, output):
        stock(input, output, *more, **named)


def apply(
    stock: Callable[..., Tensor],
    self: Any,
    output: Tensor | None,
    fused_expert_output: Tensor,
    *more: Any,
    **named: Any,
) -> Tensor:
    """The apply of vLLM's TopKWeightAndReduceNoOP, which copies a sum to the layer's output."""
    kept = _now()
    if kept is not None and kept.hand(fused_expert_output, output):
        assert output is not None
        return output
    return stock(self, output, fused_expert_output, *more, **named)


def _now() -> Kept | None:
    """What is kept here; nothing is while torch.compile traces a caller of these functions."""
    return None if torch.compiler.is_compiling() else _kept.get()
