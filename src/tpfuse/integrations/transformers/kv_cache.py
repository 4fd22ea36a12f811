"""The KV cache of packed batches, and attention to it: what stands behind the split operator of `packed.py`.

A slot holds one request: its keys and values, `[slots, length, KV heads, head_dim]` a layer, and the keys of M3's
indexer. A batch packs the new tokens of several requests into one dimension. What depends on how they belong to
requests (where they go in the cache, what they see) is made once a step, in `Batch`, and read by every layer.

Design record
- Requests with as many new tokens as each other are one `Group`, and one attention call: all decodes of a batch
  together, and each prefill chunk with those of its length. Groups are packed one after the other, so the rows of a
  group are a slice.
- Query heads that share a KV head are folded into the queries: `[requests, KV heads, new * heads of it, head_dim]`.
  So no key is copied for a second head, any kernel of scaled_dot_product_attention takes the mask, and the indexer,
  which chooses keys by KV head, needs no mask a query head.
- Where the cache has no more blocks than the indexer may choose, it chooses all, and its scores are not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tpfuse.errors import InvalidArgument

BLOCK = 64  # groups see keys in multiples of it; M3's blocks take its place


@dataclass(frozen=True)
class Indexer:
    """What M3 selects keys by: of `blocks` blocks of `size` keys, the best, and the last `local` in any case."""

    size: int
    blocks: int
    local: int
    dim: int


@dataclass(frozen=True)
class Group:
    """Requests of a batch with `new` tokens each; they see the first `keys` places of their slots, where unmasked."""

    rows: slice  # of the packed tokens
    requests: int
    new: int
    keys: int
    slots: slice | Tensor
    visible: Tensor  # [requests, 1, new, keys]
    bias: Tensor  # the same as what is added to scores: [requests, 1, new * query heads of a KV head, keys]
    local: Tensor | None  # the blocks that an indexer always chooses: [requests, 1, new, local]


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
        places = -(-length // self._block) * self._block
        self._places = places
        with torch.inference_mode(False):

            def zeros(*shape: int) -> Tensor:
                return torch.zeros(slots, places, *shape, dtype=dtype, device=device)

            self.keys = [zeros(kv_heads, head_dim) for _ in indexers]
            self.values = [zeros(kv_heads, head_dim) for _ in indexers]
            self.index_keys = [None if indexer is None else zeros(indexer.dim) for indexer in indexers]

    @property
    def nbytes(self) -> int:
        tensors = (*self.keys, *self.values, *(keys for keys in self.index_keys if keys is not None))
        return sum(tensor.nbytes for tensor in tensors)

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
        positions: list[int] = []
        places: list[int] = []
        last: dict[int, int] = {}
        for slot in order:
            start = self.cached[slot]
            positions += range(start, start + new[slot])
            places += range(slot * self._places + start, slot * self._places + start + new[slot])
            last[slot] = len(positions) - 1
        tokens = len(positions)
        on_device = self._moved([*positions, *places, *(last[slot] for slot in new)])
        groups, first = [], 0
        for count in sorted(set(new.values())):
            members = [slot for slot in order if new[slot] == count]
            rows = slice(first, first + count * len(members))
            groups.append(self._group(members, count, rows, on_device[rows]))
            first = rows.stop
        return Batch(
            tuple(order), dict(new), tuple(groups), on_device[:tokens], on_device[tokens : 2 * tokens],
            on_device[2 * tokens :],
        )  # fmt: skip

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
        for group in batch.groups:
            bias, shape = group.bias, (group.requests, group.new)
            indexer = self._indexers[layer]
            if indexer is not None and group.keys > indexer.blocks * indexer.size:
                assert selected is not None
                assert index_keys is not None
                bias = self._bias(_chosen(indexer, group, selected[group.rows, :-1], index_keys))
            queries = q[group.rows].unflatten(0, shape).unflatten(2, (-1, self._share))  # requests, new, KV, share, D
            attended = scaled_dot_product_attention(
                queries.permute(0, 2, 1, 3, 4).flatten(2, 3),
                keys[group.slots, : group.keys].transpose(1, 2),
                values[group.slots, : group.keys].transpose(1, 2),
                attn_mask=bias,
                scale=scale,
            )
            target = out[group.rows].unflatten(0, shape).unflatten(2, (-1, self._share))
            target.copy_(attended.unflatten(2, (group.new, self._share)).permute(0, 2, 1, 3, 4))

    def _group(self, members: list[int], new: int, rows: slice, positions: Tensor) -> Group:
        longest = max(self.cached[slot] for slot in members) + new
        keys = -(-longest // self._block) * self._block
        positions = positions.view(len(members), 1, new, 1)
        visible = torch.arange(keys, device=self._device) <= positions
        local = None
        if self._sparse is not None and self._sparse.local:
            nearest = torch.arange(self._sparse.local, device=self._device)
            local = (positions // self._block - nearest).clamp(min=0)
        first, together = members[0], members == list(range(members[0], members[0] + len(members)))
        slots = slice(first, first + len(members)) if together else self._moved(members)
        return Group(rows, len(members), new, keys, slots, visible, self._bias(visible), local)

    def _bias(self, visible: Tensor) -> Tensor:
        """A mask as what is added to the scores of all query heads of a KV head."""
        bias = torch.zeros(visible.shape, dtype=self._dtype, device=self._device).masked_fill_(~visible, -torch.inf)
        return bias.unsqueeze(3).expand(-1, -1, -1, self._share, -1).flatten(2, 3)

    def _moved(self, numbers: list[int]) -> Tensor:
        """On the device, without waiting for it: a copy from memory that can be paged out would."""
        there = torch.tensor(numbers, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return there.to(self._device, non_blocking=True)


def _chosen(indexer: Indexer, group: Group, queries: Tensor, keys: Tensor) -> Tensor:
    """The keys that M3's indexer lets each KV head see, as its own forward and build_block_mask choose them: the blocks
    with the highest score of a key, scores in fp32. `[requests, index heads, new, keys]`."""
    queries = queries.unflatten(0, (group.requests, group.new)).transpose(1, 2).float()
    scores = queries @ keys[group.slots, : group.keys].float().unsqueeze(1).mT
    scores = scores.masked_fill(~group.visible, -torch.inf)
    blocks = scores.unflatten(-1, (-1, indexer.size)).amax(-1)
    if group.local is not None:
        blocks.scatter_(-1, group.local.expand(-1, blocks.shape[1], -1, -1), torch.inf)
    best, at = blocks.topk(indexer.blocks, -1)
    kept = torch.zeros(blocks.shape, dtype=torch.bool, device=blocks.device).scatter_(-1, at, best > -torch.inf)
    return kept.unsqueeze(-1).expand(*kept.shape, indexer.size).flatten(-2) & group.visible


def indexer_of(module: Any) -> Indexer:
    """The numbers of an indexer of transformers."""
    return Indexer(module.block_size, module.topk_blocks, module.local_blocks, module.head_dim)
