"""The KV cache of packed batches, and attention to it: what stands behind the split operator of `packed.py`.

A slot holds one request: its keys and values, `[slots, length, KV heads, head_dim]` a layer, and the keys of M3's
indexer. A batch packs the new tokens of several requests into one dimension. What depends on how they belong to
requests (where they go in the cache, what they see) is made once a step, in `Batch`, and read by every layer; masks,
by the first layer that needs them.

Design record
- Requests with as many new tokens as each other are one `Group`, and one attention call: all decodes of a batch
  together, and each prefill chunk with those of its length. Groups are packed one after the other, so the rows of a
  group are a slice.
- Requests of a group with as many keys as each other need no mask: keys are cut to their number, and attention is
  causal from the end. That is one request alone, such as a prefill chunk, and decodes that began together.
  A CausalBias goes to flash attention by itself, behind the first chunk of a prompt. So do decodes, which hide
  nothing: without a mask torch 2.13 may prefer cuDNN on H100 and H200, which builds a plan for each number of keys that
  it has not seen, so at every token. fp32 on GPUs, which flash attention has not, keeps masks, and so do AMD's GPUs,
  where nobody has checked from which end attention is causal.
- With a mask, query heads that share a KV head are folded into the queries: `[requests, KV heads, new * heads of it,
  head_dim]`. So no key is copied for a second head, any kernel of scaled_dot_product_attention takes the mask, and the
  indexer, which chooses keys by KV head, needs no mask a query head. Keys come in whole blocks, for kernels that want
  aligned masks.
- Where the cache has no more blocks than the indexer may choose, it chooses all, and its scores are not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.functional import scaled_dot_product_attention

from tpfuse.errors import InvalidArgument

BLOCK = 64  # masks are of keys in multiples of it; M3's blocks take its place


@dataclass(frozen=True)
class Indexer:
    """What M3 selects keys by: of `blocks` blocks of `size` keys, the best, and the last `local` in any case."""

    size: int
    blocks: int
    local: int
    dim: int


@dataclass
class Masks:
    """What requests see of the first `keys` places of their slots. Each is made for the first layer that asks."""

    positions: Tensor  # [requests, 1, new, 1]
    keys: int  # a multiple of `block`
    block: int
    nearest: int  # blocks that an indexer always chooses
    share: int  # query heads of a KV head
    dtype: torch.dtype

    @cached_property
    def visible(self) -> Tensor:
        """`[requests, 1, new, keys]`."""
        return torch.arange(self.keys, device=self.positions.device) <= self.positions

    @cached_property
    def bias(self) -> Tensor:
        """The same as what is added to scores."""
        return self.added(self.visible)

    def added(self, visible: Tensor) -> Tensor:
        """A mask as what is added to the scores of all query heads of a KV head: `[requests, KV heads, new * query
        heads of one, keys]`."""
        bias = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
        return bias.unsqueeze(3).expand(-1, -1, -1, self.share, -1).flatten(2, 3)

    @cached_property
    def local(self) -> Tensor:
        """The blocks that an indexer always chooses: `[requests, 1, new, local]`."""
        nearest = torch.arange(self.nearest, device=self.positions.device)
        return (self.positions // self.block - nearest).clamp(min=0)


class Causal(CausalBias):
    """Without memory for a mask that is never made: torch's own takes 8 bytes of the host's for each query and key."""

    def __new__(cls, *_: Any) -> Causal:
        return torch.Tensor.__new__(cls)


@dataclass(frozen=True)
class Group:
    """Requests of a batch with `new` tokens each."""

    rows: slice  # of the packed tokens
    requests: int
    new: int
    keys: int  # of the longest request, its new tokens included
    slots: slice | Tensor
    causal: CausalBias | None  # instead of a mask, where each request has so many keys
    masks: Masks


@dataclass(frozen=True)
class Batch:
    """The new tokens of one step, packed. `order`: the slots as they are packed."""

    order: tuple[int, ...]
    new: Mapping[int, int]
    groups: tuple[Group, ...]
    positions: Tensor  # [T]
    places: Tensor  # [T], in the cache with its slots one behind the other
    last: Tensor  # the row of each request's last token, in the order of `new`


class KVCache:
    """Keys and values of `slots` requests of up to `length` tokens, of a model's attention layers.

    heads: query heads of this rank; kv_heads: KV heads; indexers: for each layer its indexer, or None.
    """

    def __init__(
        self,
        slots: int,
        length: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        indexers: tuple[Indexer | None, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if slots < 1 or length < 1:
            raise InvalidArgument(f"KV cache: {slots} slots of {length} tokens; needed: at least one of each.")
        self.slots, self.length = slots, length
        self.cached = [0] * slots  # tokens of each slot
        self.batch: Batch | None = None  # of the step that is running
        self._share, self._indexers = heads // kv_heads, indexers
        self._sparse = next((indexer for indexer in indexers if indexer is not None), None)
        self._block = self._sparse.size if self._sparse else BLOCK
        self._dtype, self._device = dtype, device
        self._pinned = device.type == "cuda"
        self._causal = _causal_from_the_end(dtype, device)
        places = -(-length // self._block) * self._block
        self._places = places
        with torch.inference_mode(False):

            def zeros(*shape: int) -> Tensor:
                return torch.zeros(slots, places, *shape, dtype=dtype, device=device)

            self.keys = [zeros(kv_heads, head_dim) for _ in indexers]
            self.values = [zeros(kv_heads, head_dim) for _ in indexers]
            self.index_keys = [None if indexer is None else zeros(indexer.dim) for indexer in indexers]

    def check(self, new: Mapping[int, int]) -> None:
        """Raise InvalidArgument unless these slots have room for so many new tokens."""
        if not new:
            raise InvalidArgument("step: no tokens; needed: the new tokens of at least one slot.")
        for slot, count in new.items():
            if not 0 <= slot < self.slots:
                raise InvalidArgument(f"step: slot {slot}; there are 0 to {self.slots - 1}.")
            if count < 1 or self.cached[slot] + count > self.length:
                raise InvalidArgument(
                    f"step: slot {slot} has {self.cached[slot]} of {self.length} tokens and gets {count}; needed: at "
                    "least one, and room for it. free(slot) empties it."
                )

    def pack(self, new: Mapping[int, int]) -> Batch:
        """The batch of so many new tokens for each slot."""
        self.check(new)
        order = sorted(new, key=lambda slot: (new[slot], slot))
        counts = torch.tensor([new[slot] for slot in order])
        ends = dict(zip(order, accumulate(new[slot] for slot in order), strict=True))
        tokens = ends[order[-1]]
        on_host = torch.empty(2 * tokens + len(new), dtype=torch.int64, pin_memory=self._pinned)
        positions, places, last = on_host.split((tokens, tokens, len(new)))
        before = torch.tensor([self.cached[slot] + new[slot] - ends[slot] for slot in order])
        first_places = torch.tensor([slot * self._places for slot in order])
        torch.add(torch.arange(tokens), before.repeat_interleave(counts), out=positions)
        torch.add(positions, first_places.repeat_interleave(counts), out=places)
        last.copy_(torch.tensor([ends[slot] - 1 for slot in new]))
        positions, places, last = self._moved(on_host).split((tokens, tokens, len(new)))
        groups, first = [], 0
        for count in sorted(set(new.values())):
            members = [slot for slot in order if new[slot] == count]
            rows = slice(first, first + count * len(members))
            groups.append(self._group(members, count, rows, positions[rows]))
            first = rows.stop
        return Batch(tuple(order), dict(new), tuple(groups), positions, places, last)

    def take(self, batch: Batch) -> None:
        """The tokens of a batch are in the cache."""
        for slot, count in batch.new.items():
            self.cached[slot] += count

    def attend(
        self, layer: int, scale: float, q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None, out: Tensor
    ) -> None:
        """Write the batch's keys and values of a layer, and attend to what its requests have: q `[T, heads, D]`.

        selected: `[T, index heads + 1, dim]`, the indexer's queries and, last, its key of each token.
        """
        batch, index_keys = self.batch, self.index_keys[layer]
        assert batch is not None
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, batch.places, k)
        values.flatten(0, 1).index_copy_(0, batch.places, v)
        if index_keys is not None:
            assert selected is not None
            index_keys.flatten(0, 1).index_copy_(0, batch.places, selected[:, -1])
        indexer = self._indexers[layer]
        mask: Tensor
        for group in batch.groups:
            if indexer is not None and group.keys > indexer.blocks * indexer.size:
                assert selected is not None
                assert index_keys is not None
                mask = group.masks.added(_chosen(indexer, group, selected[group.rows, :-1], index_keys))
            else:
                mask = group.masks.bias if group.causal is None else group.causal
            shape = (group.requests, group.new, -1, self._share)
            queries, target = (rows[group.rows].unflatten(1, shape[2:]).unflatten(0, shape[:2]) for rows in (q, out))
            target.copy_(self._attended(group, scale, queries, keys, values, mask))

    def _attended(
        self, group: Group, scale: float, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        """Attention of queries `[requests, new, KV heads, share, D]` to what a mask leaves. Returns the same shape."""
        causal = isinstance(mask, CausalBias)
        seen = group.keys if causal else group.masks.keys
        k, v = keys[group.slots, :seen].transpose(1, 2), values[group.slots, :seen].transpose(1, 2)
        found: Tensor
        if causal:
            q = queries.flatten(2, 3).transpose(1, 2)
            found = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=self._share > 1)
            found = found.transpose(1, 2).unflatten(2, (-1, self._share))
        else:
            q = queries.permute(0, 2, 1, 3, 4).flatten(2, 3)
            found = scaled_dot_product_attention(q, k, v, mask, scale=scale)
            found = found.unflatten(2, (group.new, self._share)).permute(0, 2, 1, 3, 4)
        return found

    def _group(self, members: list[int], new: int, rows: slice, positions: Tensor) -> Group:
        cached = {self.cached[slot] for slot in members}
        keys = max(cached) + new
        first = members[0]
        slots: slice | Tensor = slice(first, first + len(members))
        if members != list(range(first, first + len(members))):
            slots = self._moved(torch.tensor(members, pin_memory=self._pinned))
        causal = Causal(CausalVariant.LOWER_RIGHT, new, keys) if self._causal and len(cached) == 1 else None
        whole = -(-keys // self._block) * self._block
        local = self._sparse.local if self._sparse else 0
        masks = Masks(positions.view(len(members), 1, new, 1), whole, self._block, local, self._share, self._dtype)
        return Group(rows, len(members), new, keys, slots, causal, masks)

    def _moved(self, numbers: Tensor) -> Tensor:
        """On the device, without waiting for it, from pinned memory: a copy from other memory would wait."""
        return numbers.to(self._device, non_blocking=True)


def _causal_from_the_end(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention that is causal from the end is as fast there as a mask, and known to be right."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None and half)


def _chosen(indexer: Indexer, group: Group, queries: Tensor, keys: Tensor) -> Tensor:
    """The keys that M3's indexer lets each KV head see, as its own forward and build_block_mask choose them: the blocks
    with the highest score of a key, scores in fp32. `[requests, index heads, new, keys]`."""
    masks = group.masks
    queries = queries.unflatten(0, (group.requests, group.new)).transpose(1, 2).float()
    scores = queries @ keys[group.slots, : masks.keys].float().unsqueeze(1).mT
    scores = scores.masked_fill(~masks.visible, -torch.inf)
    blocks = scores.unflatten(-1, (-1, indexer.size)).amax(-1)
    if indexer.local:
        blocks.scatter_(-1, masks.local.expand(-1, blocks.shape[1], -1, -1), torch.inf)
    best, at = blocks.topk(indexer.blocks, -1)
    kept = torch.zeros(blocks.shape, dtype=torch.bool, device=blocks.device).scatter_(-1, at, best > -torch.inf)
    return kept.unsqueeze(-1).expand(*kept.shape, indexer.size).flatten(-2) & masks.visible


def indexer_of(module: Any) -> Indexer:
    """The numbers of an indexer of transformers."""
    return Indexer(module.block_size, module.topk_blocks, module.local_blocks, module.head_dim)
