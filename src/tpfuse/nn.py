"""Modules that own this rank's shard of gamma and load it from a full checkpoint tensor.

`load_state_dict` takes either the full tensor, as checkpoints hold it, or the shard itself. With more ranks than KV
heads every KV head is replicated over `W / heads` neighbouring ranks, and gamma with it; the sums and the width of the
norm then both count every head that many times, so the norm stays exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpfuse.communicator import Communicator
from tpfuse.errors import InvalidArgument
from tpfuse.quant import Format
from tpfuse.reference import NormOutput
from tpfuse.rope import Rope


def shard(full: Tensor, rank: int, world: int, heads: int | None = None) -> Tensor:
    """This rank's part of a full `[D]` (or `[D, ...]`) tensor, as a view.

    heads: D is `heads` equal parts that must not be cut; with fewer heads than ranks, each rank gets one whole head
    and neighbouring ranks the same one. Raises InvalidArgument where that does not come out even.
    """
    parts = full.shape[0] if heads is None else heads
    if parts < 1 or full.shape[0] % parts:
        raise InvalidArgument(
            f"shard: {full.shape[0]} elements don't make {parts} equal {'heads' if heads is not None else 'parts'}."
        )
    if parts % world and world % parts:
        raise InvalidArgument(
            f"shard: {parts} {'heads' if heads else 'elements'} don't divide over {world} ranks; "
            "one must be a multiple of the other."
        )
    size = full.shape[0] // parts * max(1, parts // world)
    start = rank * parts // world * (full.shape[0] // parts)
    return full.narrow(0, start, size)


class _ShardedWeight(nn.Module):
    """A module with weights of which this rank holds a part. `_full` gives each weight's full size and heads."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__()
        self.comm = comm
        self._full: dict[str, tuple[int, int | None]] = {}

    def _add(self, name: str, size: int, heads: int | None, fill: float, dtype: torch.dtype | None) -> None:
        """Register a weight of full size `size`, filled until a checkpoint is loaded."""
        self._full[name] = (size, heads)
        if size < 1 or (heads is not None and heads < 1):
            raise InvalidArgument(f"{type(self).__name__}: {size} elements in {heads} heads; needed: 1 or more.")
        full = torch.empty(size, device="meta")
        local = shard(full, self.comm.rank, self.comm.world, heads).shape
        weight = torch.full(local, fill, dtype=dtype, device=self.comm.device)
        self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, (size, heads) in self._full.items():
            given = state_dict.get(prefix + name)
            if given is not None and given.shape == (size,):
                state_dict[prefix + name] = shard(given, self.comm.rank, self.comm.world, heads)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ShardedRMSNorm(_ShardedWeight):
    """RMSNorm of rows `[..., D/W]` over their full width D. `weight` is this rank's part of gamma `[D]`."""

    def __init__(
        self,
        width: int,
        comm: Communicator,
        *,
        heads: int | None = None,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(comm)
        self.eps, self.weight_bias = eps, weight_bias
        self.weight: nn.Parameter
        self._add("weight", width, heads, 1.0 - weight_bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.comm.rms_norm(x, self.weight, eps=self.eps, weight_bias=self.weight_bias)


class ShardedQKNorm(_ShardedWeight):
    """RMSNorm of q and k over their full widths with one exchange.

    `q_weight`, `k_weight`: this rank's parts of gammas of `heads * head_dim` elements.
    """

    def __init__(
        self,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        comm: Communicator,
        *,
        eps: float | tuple[float, float] = 1e-6,
        weight_bias: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(comm)
        self.eps, self.weight_bias = eps, weight_bias
        self.q_weight: nn.Parameter
        self.k_weight: nn.Parameter
        self._add("q_weight", q_heads * head_dim, q_heads, 1.0 - weight_bias, dtype)
        self._add("k_weight", kv_heads * head_dim, kv_heads, 1.0 - weight_bias, dtype)

    def forward(self, q: Tensor, k: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor]:
        weights = self.q_weight, self.k_weight
        return self.comm.qk_rms_norm(q, k, *weights, eps=self.eps, weight_bias=self.weight_bias, rope=rope)


class AllReduceRMSNorm(nn.Module):
    """All-reduce of partial sums, residual add and RMSNorm. `weight` is the whole gamma `[H]` on every rank.

    quant, keep_norm, residual_layout, and top_k of a call: as of `Communicator.all_reduce_rms_norm`.
    """

    def __init__(
        self,
        width: int,
        comm: Communicator,
        *,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
        dtype: torch.dtype | None = None,
        quant: Format | None = None,
        keep_norm: bool = False,
        residual_layout: str = "replicated",
    ) -> None:
        super().__init__()
        self.comm, self.eps, self.weight_bias = comm, eps, weight_bias
        self.quant, self.keep_norm, self.residual_layout = quant, keep_norm, residual_layout
        weight = torch.full((width,), 1.0 - weight_bias, dtype=dtype, device=comm.device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, top_k: int | None = None) -> NormOutput:
        return self.comm.all_reduce_rms_norm(
            x,
            self.weight,
            residual=residual,
            eps=self.eps,
            weight_bias=self.weight_bias,
            quant=self.quant,
            keep_norm=self.keep_norm,
            residual_layout=self.residual_layout,
            top_k=top_k,
        )
