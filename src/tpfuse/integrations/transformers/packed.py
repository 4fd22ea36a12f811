"""Packed batches of prefill chunks and decodes through a model of transformers, in piecewise CUDA graphs.

    packed = piecewise(model, sizes=[64, 128, 256, 512], slots=8, length=4096)
    packed.capture()
    logits = packed.step({0: prompt, 3: next_token})  # new tokens by slot; [2, vocabulary], of the last of each

The model's own code runs, under torch.compile, on `[1, T]` tokens without a cache of transformers. Its attention is an
implementation that is registered there as "tpfuse": each layer hands q, k and v, normed and rotated, to an operator
(`tpfuse::attention`), behind which the `KVCache` is. So Piecewise splits at attention and captures all else.

Design record
- The attention implementation of the configuration is "tpfuse" during a step only: generate() and forward() of the
  same model go on as before, with caches of transformers.
- M3's indexer selects within its own forward. During a step it returns what it selects by, rotated queries and keys,
  in the place of the selection, and the operator selects: that needs the cache.
- The head is a graph of its own, of as many rows as there are requests: one row a token would be 200,064 logits each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import embedding, linear

from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.graphs import Attention, Cleared, GraphReport, Piecewise, attention
from tpfuse.graphs.ahead import Ahead
from tpfuse.graphs.piecewise import any_size
from tpfuse.integrations.transformers.architecture import heads_of
from tpfuse.integrations.transformers.architectures import ARCHITECTURES
from tpfuse.integrations.transformers.integration import Applied
from tpfuse.integrations.transformers.kv_cache import KVCache, indexer_of

NAME = "tpfuse"  # of the attention implementation
LAYERS = ("full_attention", "minimax_m3_sparse")
EXPERTS = ("grouped_mm", "batched_mm")  # of transformers' implementations, those without decisions on the host
_compilations = 0  # so far in this process


class PackedModel:
    """A model that takes packed batches. backend: of torch.compile; None: eager. `piecewise` makes a PiecewiseModel.

    Requests live in slots. `step` adds tokens to them, `free` empties one. On every rank alike.
    """

    def __init__(self, model: Any, *, slots: int, length: int, backend: Any = None) -> None:
        applied = getattr(model, "_tpfuse", None)
        self._comm = applied.comm if isinstance(applied, Applied) else None
        world = 1 if self._comm is None else self._comm.world
        self._base = base = _base_of(model, divided=self._comm is not None)
        check_layers(base.config, type(model).__name__)
        if backend is not None:
            _check_experts(base)
        heads, kv_heads = heads_of(base.config, world)
        attentions = [layer.self_attn for layer in base.layers]
        indexers = [getattr(module, "indexer", None) for module in attentions]
        weight = base.embed_tokens.weight
        self.cache = KVCache(
            slots,
            length,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=attentions[0].head_dim,
            indexers=tuple(None if indexer is None else indexer_of(indexer) for indexer in indexers),
            dtype=weight.dtype,
            device=weight.device,
        )
        self._attentions = [
            attention(f"layers.{layer}", _core(self.cache, layer, module.scaling))
            for layer, module in enumerate(attentions)
        ]
        self._modules = attentions
        for indexer in indexers:
            if indexer is not None and not hasattr(indexer, "tpfuse_stock"):
                indexer.tpfuse_stock, indexer.forward = indexer.forward, _indexing(indexer, base.config)
        _register()

        embed = _embedding(base.embed_tokens)

        def hidden(ids: Tensor, positions: Tensor) -> Tensor:
            output = base(inputs_embeds=embed(ids), position_ids=positions, use_cache=False)
            return output.last_hidden_state  # type: ignore[no-any-return]

        head = _head(model.get_output_embeddings())

        def logits(rows: Tensor) -> Tensor:
            return head(rows)

        self._hidden: Callable[..., Tensor] = hidden if backend is None else _compiled(hidden, backend)
        self._logits: Callable[..., Tensor] = logits if backend is None else _compiled(logits, backend)

    @torch.no_grad()
    def step(self, tokens: Mapping[int, Tensor]) -> Tensor:
        """Run the new tokens of each slot, int64 on the model's device, behind what the slot has. Returns the logits of
        each one's last token, `[slots given, vocabulary]`, in their order here.

        Raises InvalidArgument for slots that there are not, and where there is no room.
        """
        cache = self.cache
        batch = cache.pack({slot: len(new) for slot, new in tokens.items()})
        ids = torch.cat([tokens[slot] for slot in batch.order]).unsqueeze(0)
        positions = batch.positions.unsqueeze(0)
        for tensor in (ids, positions):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        cache.batch = batch
        try:
            with self._attending():
                rows = self._hidden(ids, positions)[0].index_select(0, batch.last)
                torch._dynamo.maybe_mark_dynamic(rows, 0)
                logits = self._logits(rows)
        finally:
            cache.batch = None
        cache.take(batch)
        return logits

    def free(self, slot: int, keep: int = 0) -> None:
        """Forget what a slot has behind its first `keep` tokens."""
        if not 0 <= slot < self.cache.slots or not 0 <= keep <= self.cache.cached[slot]:
            raise InvalidArgument(f"free: slot {slot} of {self.cache.slots}, keep={keep}; needed: what it has.")
        self.cache.cached[slot] = keep

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """While in it, the model's attention is this one's."""
        config = self._base.config
        before = config._attn_implementation
        if getattr(self._modules[0], "tpfuse_attention", None) is not self._attentions[0]:
            for module, ours in zip(self._modules, self._attentions, strict=True):
                module.tpfuse_attention = ours
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before


class PiecewiseModel(PackedModel):
    """A PackedModel in piecewise CUDA graphs. `backend` is its `tpfuse.graphs.Piecewise`."""

    def __init__(self, model: Any, sizes: Collection[int], *, slots: int, length: int, **settings: Any) -> None:
        self.backend = Piecewise(["tpfuse::attention"], sizes, **settings)
        super().__init__(model, slots=slots, length=length, backend=self.backend)
        # A step that is done again writes the same keys and values to the same places.
        self._hidden, self._logits = self._calls = Ahead(self._hidden), Ahead(self._logits)
        if self._comm is not None:
            self._comm.prepare()

    def step(self, tokens: Mapping[int, Tensor]) -> Tensor:
        with any_size():  # a first step of one token, or one slot, must not become a graph of its own
            return super().step(tokens)

    def capture(self) -> None:
        """Capture all sizes. Collective; all slots must be free, and are afterwards."""
        cache = self.cache
        used = [slot for slot, cached in enumerate(cache.cached) if cached]
        if used or self.backend.sizes[0] > cache.slots * cache.length:
            raise InvalidArgument(
                f"capture: slots {used} in use, {cache.slots} slots of {cache.length} tokens for sizes up to "
                f"{self.backend.sizes[0]}; needed: free slots, and room for the largest size."
            )
        token = torch.zeros(self.backend.sizes[0], dtype=torch.int64, device=self._base.embed_tokens.weight.device)

        def step(size: int) -> None:
            requests = min(cache.slots, size)  # as many as there can be: the head's rows
            share, rest = divmod(size, requests)
            self.step({slot: token[: share + (slot < rest)] for slot in range(requests)})
            cache.cached = [0] * cache.slots

        self.backend.capture(step)

    def clear(self) -> Cleared:
        """Give graphs and their memory back; the next steps capture again. The KV cache stays."""
        for call in self._calls:
            call.forget()
        return self.backend.clear()

    def report(self) -> GraphReport:
        """What was captured, with seconds and bytes for each size, and what ran."""
        return self.backend.report()


def piecewise(model: Any, sizes: Collection[int], *, slots: int, length: int, **settings: Any) -> PiecewiseModel:
    """Run a model in piecewise CUDA graphs, on packed batches of prefill chunks and decodes.

    model: of a family that `enable()` divides, and divided by it, or on one rank; attention in each layer.
    sizes: numbers of tokens to capture. slots, length: of the KV cache, requests and tokens of each.
    settings: of `tpfuse.graphs.Piecewise`, such as compiler.

    Raises Unsupported for other models, and for implementations of experts that decide on the host.
    """
    return PiecewiseModel(model, sizes, slots=slots, length=length, **settings)


def _base_of(model: Any, divided: bool) -> Any:
    found = [module for module in model.modules() if type(module).__name__ in ARCHITECTURES]
    name = type(model).__name__
    if not found:
        raise Unsupported(f"piecewise: {name}; supported: models on {', '.join(ARCHITECTURES)}.")
    if not divided and getattr(model, "_tp_size", None) not in (None, 1):
        raise Unsupported(f"piecewise: {name} runs by transformers' own TP plan. Call enable() before it is loaded.")
    return found[0]


def check_layers(config: Any, name: str) -> None:
    """Raise Unsupported for layers that packed batches can't run through."""
    kinds = set(getattr(config, "layer_types", None) or ()) - set(LAYERS)
    kinds |= {"a sliding window"} if getattr(config, "sliding_window", None) else set()
    if kinds:
        raise Unsupported(
            f"piecewise: {name} has layers of {', '.join(sorted(kinds))}; supported: {' and '.join(LAYERS)}."
        )


def _check_experts(base: Any) -> None:
    """Raise Unsupported for an implementation of experts that a graph can't hold. What transformers takes in the place
    of grouped_mm where torch.compile traces another dtype than bfloat16 reads the counts on the host."""
    experts = next((module for module in base.modules() if hasattr(module, "has_gate")), None)
    if experts is None:
        return
    chosen, weight = base.config._experts_implementation, next(experts.parameters())
    unfit = chosen == "grouped_mm" and weight.device.type == "cuda" and weight.dtype != torch.bfloat16
    if chosen not in EXPERTS or unfit:
        raise Unsupported(
            f"piecewise: experts_implementation={chosen!r} in {weight.dtype} decides on the host; needed: 'grouped_mm' "
            "in bfloat16, or 'batched_mm', which copies the experts of each token, so it is for few."
        )


def _embedding(module: Any) -> Callable[[Tensor], Tensor]:
    """The embedding; where the stock plan divides it, each rank looks up what it has of the vocabulary, and all are
    added. As for the head: the module's own forward wraps tensors into DTensors, which have no address."""
    weight = module.weight
    if not isinstance(weight, DTensor):
        return module  # type: ignore[no-any-return]
    local, group = _part(weight, "embedding")
    first, name, ops = group.rank() * len(local), group.group_name, torch.ops._c10d_functional

    def embed(ids: Tensor) -> Tensor:
        row = ids - first
        foreign = (row < 0) | (row >= len(local))
        found = embedding(row.masked_fill(foreign, 0), local).masked_fill(foreign.unsqueeze(-1), 0)
        return ops.wait_tensor(ops.all_reduce(found, "sum", name))  # type: ignore[no-any-return]

    return embed


def _head(module: Any) -> Callable[[Tensor], Tensor]:
    """The lm_head; where the stock plan divides it, each rank computes some of the vocabulary, and all are gathered."""
    weight = module.weight
    if not isinstance(weight, DTensor):
        return module  # type: ignore[no-any-return]
    local, group = _part(weight, "lm_head")
    world, name, ops = group.size(), group.group_name, torch.ops._c10d_functional

    def logits(rows: Tensor) -> Tensor:
        parts = ops.wait_tensor(ops.all_gather_into_tensor(linear(rows, local), world, name))
        return torch.cat(parts.chunk(world), 1)

    return logits


def _part(weight: DTensor, what: str) -> tuple[Tensor, Any]:
    """This rank's rows of a weight that is divided over the vocabulary, and the ranks."""
    group = weight.device_mesh.get_group()
    if weight.placements != (Shard(0),) or len(weight) % group.size():
        raise Unsupported(
            f"piecewise: {what} {list(weight.shape)} is divided as {weight.placements} over {group.size()} ranks; "
            "supported: the vocabulary in equal parts."
        )
    return weight.to_local(), group


def _compiled(function: Any, backend: Any) -> Callable[..., Tensor]:
    """Compiled as a function with code of its own: Dynamo counts recompilations by code, and one copy of it for all
    packed models would be at its limit, which is an error, with the ninth. It keeps what it compiled by code, too, so
    with this model everything goes."""
    global _compilations
    _compilations += 1
    code = function.__code__.replace(co_name=f"{function.__name__}_{_compilations}")
    own = FunctionType(code, function.__globals__, code.co_name, closure=function.__closure__)
    return torch.compile(own, backend=backend, fullgraph=True)


def _core(cache: KVCache, layer: int, scale: float) -> Any:
    kept = ref(cache)  # the model's modules keep the core of the last packed model, which must not keep gigabytes

    def core(q: Tensor, k: Tensor, v: Tensor, *, selected: Tensor | None, out: Tensor) -> None:
        found = kept()
        assert found is not None
        found.attend(layer, scale, q, k, v, selected, out)

    return core


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of attention: `[1, heads, T, D]`, and `[1, T, heads, D]` back. block_indices: what
    `_indexing` returned."""
    ours: Attention = module.tpfuse_attention  # type: ignore[assignment]
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    selected = None if block_indices is None else block_indices[0].transpose(0, 1)
    attended = ours(q, k, v, selected=selected, out=query.new_empty(q.shape))
    return attended.unsqueeze(0), None


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


def _indexing(module: Any, config: Any) -> Callable[..., Tensor]:
    """The forward of M3's indexer: its own, or during a step its queries and key of each token, `[1, heads + 1, T, D]`,
    normed and rotated as in its own."""
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import apply_rotary_pos_emb

    stock = module.forward

    def forward(hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if config._attn_implementation != NAME:
            return stock(hidden_states, position_embeddings, *args, **kwargs)  # type: ignore[no-any-return]
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        queries = module.q_norm(module.q_proj(hidden_states).view(shape)).transpose(1, 2)
        keys = module.k_norm(module.k_proj(hidden_states).view(shape)).transpose(1, 2)
        cos, sin = (angles[..., : module.head_dim] for angles in position_embeddings)
        return torch.cat(apply_rotary_pos_emb(queries, keys, cos, sin), 1)

    return forward
