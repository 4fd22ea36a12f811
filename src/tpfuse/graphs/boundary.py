"""The operator behind which attention stands: `torch.ops.tpfuse.attention`, which writes to a buffer of the caller's.

Attention reads caches, tables and host-side numbers, so it is not captured. As an operator of its own it is where
`Piecewise` splits; and because it returns nothing and writes to a buffer that a captured piece has made, the next piece
finds the result at the address that it was captured with, without a copy.

The operator knows its attention by name, as the other operators know their communicator.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from tpfuse.errors import InvalidArgument, Unsupported

_LIBRARY = torch.library.Library("tpfuse", "FRAGMENT")  # lives as long as the process
_made: dict[str, int] = {}
_by_name: weakref.WeakValueDictionary[str, Attention] = weakref.WeakValueDictionary()


class Core(Protocol):
    """What computes. All tensors have the rows of the real tokens; out is the caller's buffer, cut to them.

    It either returns the result, of any float dtype (best what it accumulated in), shaped like out; or writes to out
    and returns None or out. selected: [T, ...] for sparse attention, else None: positions for `sparse`, and what a core
    of one's own makes them from.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, selected: Tensor | None, out: Tensor) -> Tensor | None: ...


class Attention:
    """One attention layer as an operator; see `attention`."""

    def __init__(self, name: str, core: Core | None, out: Tensor | None) -> None:
        serial = _made.get(name, 0)
        _made[name] = serial + 1
        self.given, self.name, self.core, self.out = name, f"{name}/{serial}", core, out
        _by_name[self.name] = self

    def __reduce__(self) -> Any:
        """A copy is a layer of its own: an operator's name leads to one core."""
        return Attention, (self.given, self.core, self.out)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, selected: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Attention of q `[T, ...]` to the layer's keys and values. Returns the first T rows of the buffer.

        selected: `[T, ...]`, for sparse attention; see `Core`. out: `[at least T, ...]`, float; if neither this call
        nor the layer has one, it is made like q.
        """
        if out is not None and self.out is not None and out is not self.out:
            raise InvalidArgument(
                f"attention {self.name}: two outputs, one given with the layer and one with the call; needed: one."
            )
        given = self.out if out is None else out
        target = torch.empty_like(q) if given is None else given
        torch.ops.tpfuse.attention(q, k, v, selected, target, self.name)
        return target if given is None else target[: q.shape[0]]

    def run(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None, out: Tensor) -> None:
        """What the operator does."""
        rows = q.shape[0]
        if out.shape[0] < rows:
            raise InvalidArgument(
                f"attention {self.name}: out has {out.shape[0]} rows, q {rows}; needed: as many or more."
            )
        if rows == 0:
            return
        target = out[:rows]
        core = self.core or (dense if selected is None else sparse)
        result = core(q, k, v, selected=selected, out=target)
        if result is None or _same_memory(result, target):
            return
        if result.numel() != target.numel() or result.shape[0] != rows:
            raise InvalidArgument(
                f"attention {self.name}: the core returned {tuple(result.shape)}, out has {tuple(target.shape)} for "
                f"{rows} tokens; needed: the same."
            )
        if result.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
            raise InvalidArgument(
                f"attention {self.name}: the core returned another part of out's memory; needed: out, None, or a "
                "tensor of its own."
            )
        target.copy_(result.view(target.shape))  # the one cast


def attention(name: str, core: Core | None = None, *, out: Tensor | None = None) -> Attention:
    """One attention layer, dense or sparse, as an operator that `Piecewise` can split at ("tpfuse::attention").

        self.attend = tpfuse.graphs.attention("layers.3", core)
        y = self.attend(q, k, v)        # or with selected=..., out=...

    name: for messages; it need not be unique. core: see `Core`; None: `dense`, or `sparse` where a call has `selected`.
    out: `[max tokens, ...]`, a buffer that every call writes to; a call that brings another one raises InvalidArgument.

    Rows of the buffer beyond q's are not touched. Keep the object as long as the code that was compiled with it.
    """
    return Attention(name, core, out)


def dense(q: Tensor, k: Tensor, v: Tensor, *, selected: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Causal attention in plain torch. q: `[T, heads, D]`; k, v: `[K, kv_heads, D]`, the last T of them q's own
    tokens. Returns `[T, heads, D]`, float32, accumulated in it."""
    return _attend(q, k, v, _causal(q, k))


def sparse(q: Tensor, k: Tensor, v: Tensor, *, selected: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`dense`, restricted to keys that are selected: `[T, n]`, positions in k; negative ones are ignored, later ones
    than the token itself are not seen. A token that sees nothing gets zeros."""
    if selected is None:
        raise InvalidArgument("sparse attention: selected is None; needed: `[T, n]`, positions of keys; or use dense.")
    keys = k.shape[0]
    chosen = torch.zeros(q.shape[0], keys + 1, dtype=torch.bool, device=q.device)
    chosen.scatter_(1, torch.where((selected < 0) | (selected >= keys), keys, selected).long(), True)
    return _attend(q, k, v, chosen[:, :-1] & _causal(q, k))


def _causal(q: Tensor, k: Tensor) -> Tensor:
    past = k.shape[0] - q.shape[0]
    if past < 0:
        raise InvalidArgument(
            f"attention: {k.shape[0]} keys for {q.shape[0]} tokens; needed: the tokens' own, at least."
        )
    return torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril(past)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,khd->htk", q.float(), keys) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)  # tokens that see nothing
    return torch.einsum("htk,khd->thd", weights, values)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _run(q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None, out: Tensor, layer: str) -> None:
    found = _by_name.get(layer)
    if found is None:
        raise Unsupported(
            f"no attention named {layer!r} in this process; living: {sorted(_by_name)[:8]}. Keep the object that "
            "tpfuse.graphs.attention returned as long as code compiled with it runs."
        )
    found.run(q, k, v, selected, out)


_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? selected, Tensor(a!) out, str layer) -> ()")
_LIBRARY.impl("attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("tpfuse::attention", lambda q, k, v, selected, out, layer: None, lib=_LIBRARY)
