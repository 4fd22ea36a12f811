"""Deferral as a value: a mixer returns its partial sum unreduced, and the next norm reduces it.

A mixer is what stands between two norms: attention, an MLP, an MoE block, a Mamba block. On each rank its output is a
partial sum. `PendingReduction` is that partial sum together with the residual stream that it belongs to. It is not a
tensor, and only two things consume it: `norm()` or `boundary()`, one `all_reduce_rms_norm`, and `reduce()`, for whoever
must see the whole value. Consuming it twice, or never, is a DeferralError: RMSNorm does not see a factor, so a sum that
is reduced twice would go unnoticed, and one that is dropped is a layer that never was.

Two questions must not be one (an engine that merged them hung): is there a reduction at all, `why_not_reduced`; and
may it wait for a norm, `why_not_deferred`. Both answer with the reason, empty for yes.

Design record
- A `Deferral` is one model's. It hands out PendingReductions inside `with deferral.forward():`, and at the end of that
  block all must be consumed. Outside of it nothing stands behind a mixer, so `open` is false and mixers reduce at once.
- The value travels where the hidden states travel, from layer to layer and into the final norm, so the loop over the
  layers stays as the model's author wrote it. `total` is the residual stream for the layer that normed the value.
- Under torch.compile the same Python runs while tracing: consuming twice is found there, too. What is dropped is found
  by the first eager run: objects of a trace have no lifetime to watch.
- Tried and left: `__del__` as the witness of a drop. It can't raise, and torch.compile refuses it. An arithmetic of
  pending values (`residual + pending`), which leaves model code untouched: it hides the one thing that must be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tpfuse.communicator import Communicator
from tpfuse.errors import TpfuseError
from tpfuse.quant import Format
from tpfuse.reference import NormOutput


class DeferralError(TpfuseError):
    """A deferred reduction was dropped, consumed twice, or used as if it were a tensor."""


@dataclass(frozen=True)
class Place:
    """Where a mixer stands, as far as its reduction is concerned."""

    world: int  # ranks that share its weights
    data_parallel: bool = False  # each rank has all of its weights and tokens of its own (attention data parallelism)
    norm_follows: bool = True  # on this rank; false for the last mixer of a pipeline stage
    deferring: bool = True  # the mode wants it


def why_not_reduced(place: Place) -> str:
    """Why the mixer's output is whole as it is. Empty: it is a partial sum, which someone must reduce."""
    if place.world == 1:
        return "one rank: the output is whole"
    if place.data_parallel:
        return "attention data parallelism: each rank has the whole mixer and tokens of its own"
    return ""


def why_not_deferred(place: Place) -> str:
    """Why the reduction can't wait for a norm. Empty: it can. Never empty where there is nothing to reduce."""
    if reason := why_not_reduced(place):
        return reason
    if not place.norm_follows:
        return "pipeline edge: what leaves this rank must be whole"
    return "" if place.deferring else "the mode reduces at once"


class Deferral:
    """The deferred reductions of one model over one communicator."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._depth = 0
        self._made = 0
        self._pending: dict[int, str] = {}

    @property
    def open(self) -> bool:
        """Whether a forward is running, so that a norm stands behind each mixer."""
        return self._depth > 0

    def forward(self) -> Forward:
        """`with deferral.forward():` is one forward of the model. It may stand within another, which then counts."""
        return Forward(self)

    def pending(self, partial: Tensor, origin: str) -> PendingReduction:
        """This rank's partial sum, to be reduced by the next norm. origin: who made it, for messages."""
        if not self.open:
            raise DeferralError(f"{origin}: deferred outside of a forward, where no norm follows. Reduce it at once.")
        number = -1
        if not torch.compiler.is_compiling():
            number = self._made = self._made + 1
            self._pending[number] = origin
        return PendingReduction(partial, origin, self, number)


class Forward:
    """What `Deferral.forward` returns: at the end of the block all must be consumed. A class of its own because
    torch.compile enters a context that is made inside the compiled code, and no other."""

    def __init__(self, deferral: Deferral) -> None:
        self._deferral = deferral

    def __enter__(self) -> None:
        self._deferral._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deferral = self._deferral
        deferral._depth -= 1
        if deferral._depth or torch.compiler.is_compiling():
            return
        dropped, deferral._pending = list(deferral._pending.values()), {}
        if dropped and kind is None:
            raise DeferralError(
                f"{', '.join(dropped)}: partial sums that no norm and no reduce() consumed; the output lacks them. "
                "Pass each to the norm that follows it, or call reduce()."
            )


class PendingReduction:
    """`residual + the sum of every rank's partial`, not yet computed. Made by `Deferral.pending`."""

    def __init__(self, partial: Tensor, origin: str, deferral: Deferral, number: int) -> None:
        self.origin = origin
        self._number = number
        self._partial: Tensor | None = partial
        self._residual: Tensor | None = None
        self._total: Tensor | None = None
        self._deferral = deferral

    def onto(self, residual: Tensor) -> PendingReduction:
        """The same with the residual stream to which the sum is to be added."""
        if self._residual is not None:
            raise DeferralError(f"{self.origin}: has a residual already. A mixer's output is added once.")
        if self._partial is None:
            raise DeferralError(f"{self.origin}: consumed already, so nothing adds this residual. Put it on before.")
        self._residual = residual
        return self

    def norm(self, weight: Tensor, *, eps: float, weight_bias: float = 0.0) -> Tensor:
        """Reduce, add the residual, and norm, in one operation. Consumes this; `total` is the new residual stream."""
        norm = self.boundary(weight, eps=eps, weight_bias=weight_bias).norm
        assert norm is not None
        return norm

    def boundary(
        self,
        weight: Tensor,
        *,
        eps: float,
        weight_bias: float = 0.0,
        quant: Format | None = None,
        keep_norm: bool = False,
        residual_layout: str = "replicated",
    ) -> NormOutput:
        """`norm()` with all that `Communicator.all_reduce_rms_norm` can do, and all of its results."""
        partial = self._take()
        out = self._deferral.comm.all_reduce_rms_norm(
            partial, weight, residual=self._residual, eps=eps, weight_bias=weight_bias, quant=quant,
            keep_norm=keep_norm, residual_layout=residual_layout,
        )  # fmt: skip
        self._total = out.residual
        return out

    def reduce(self) -> Tensor:
        """The whole value, now, in the dtype of the residual as after a norm. Consumes this. Its residual must have all
        rows."""
        if self._residual is not None and self._partial is not None and self._residual.shape != self._partial.shape:
            raise DeferralError(
                f"{self.origin}: its residual has shape {list(self._residual.shape)}, the sum "
                f"{list(self._partial.shape)}. Of a residual that is sharded by rows, gather_rows() first."
            )
        summed = self._deferral.comm.all_reduce(self._take())
        self._total = summed if self._residual is None else (self._residual + summed).to(self._residual.dtype)
        return self._total

    @property
    def total(self) -> Tensor:
        """The residual stream after `norm()` or `reduce()`."""
        if self._total is None:
            reason = "normed without a residual" if self._partial is None else "not reduced yet"
            raise DeferralError(f"{self.origin}: no total, {reason}. A norm makes it, of a sum put onto a residual.")
        return self._total

    def _take(self) -> Tensor:
        if self._partial is None:
            raise DeferralError(f"{self.origin}: consumed already. Each partial sum is reduced exactly once.")
        partial, self._partial = self._partial, None
        if not torch.compiler.is_compiling():
            self._deferral._pending.pop(self._number, None)
        return partial

    def __repr__(self) -> str:
        return f"<PendingReduction of {self.origin}: {'consumed' if self._partial is None else 'pending'}>"

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: object = None
    ) -> Any:
        found = next((arg for arg in args if isinstance(arg, PendingReduction)), None)
        raise DeferralError(
            f"{getattr(function, '__name__', function)}() of {found!r}: it is not a tensor until it is reduced. "
            "Give it to the norm that follows, or call reduce()."
        )


def join(residual: Tensor, output: Tensor | PendingReduction) -> Tensor | PendingReduction:
    """The residual stream behind a mixer, whose output is whole or pending."""
    return output.onto(residual) if isinstance(output, PendingReduction) else residual + output


def total(stream: Tensor | PendingReduction) -> Tensor:
    """The residual stream as a tensor, after a norm has seen it."""
    return stream.total if isinstance(stream, PendingReduction) else stream


def reduced(stream: Tensor | PendingReduction) -> Tensor:
    """The residual stream as a tensor, for those who are no norm."""
    return stream.reduce() if isinstance(stream, PendingReduction) else stream
