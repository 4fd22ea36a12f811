"""The numerical contract in plain torch: the same operations, on the tensors of ALL ranks at once.

This file is the oracle of every test. The kernels reproduce it bit for bit; the `collective` backend stays within
the distance that docs/contract.md states. It is written for reading, not for speed.

The rules (docs/contract.md gives the reasons):

* everything is accumulated in fp32, each operation rounded once (no fused multiply-add);
* ranks are added in rank order 0..W-1;
* sums of squares follow one fixed tree that depends on the width alone, see `sum_of_squares`;
* `1 / sqrt(total * (1/D) + eps)`: eps is added to the MEAN, square root and division are IEEE fp32;
* `round` is one rounding to the tensor's dtype, to nearest even.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tpfuse.quant import Format
from tpfuse.rope import Rope, rotate

VECTOR = 8  # elements that one lane sums
LANES = 32  # lanes of a group: a group is 256 neighbouring elements


class NormOutput(NamedTuple):
    """Result of `all_reduce_rms_norm`. What was not asked for is None.

    norm: `[..., H]` in the dtype of x; residual: `[..., H]` in the dtype of the given residual, the new residual
    stream; quant, scale: the quantised norm and its scales, when a format was given.
    """

    norm: Tensor | None
    residual: Tensor | None
    quant: Tensor | None
    scale: Tensor | None


def fold(x: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two) by adding the upper half to the lower half until one is left.

    It is what a butterfly of warp shuffles computes, so a kernel may hand the same tree to lanes, warps or blocks.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def sum_of_squares(x: Tensor) -> Tensor:
    """`[..., n]` to fp32 `[...]`: squares in fp32, summed over 8 elements, then 32 lanes, then the groups of 256.

    The row is padded with zeros to a whole number of groups, and the groups to a power of two. No step depends on
    the number of rows, threads or blocks.
    """
    groups = max(1, -(-x.shape[-1] // (VECTOR * LANES)))
    groups = 1 << (groups - 1).bit_length()
    square = x.float().square()
    square = torch.nn.functional.pad(square, (0, groups * LANES * VECTOR - x.shape[-1]))
    return fold(fold(fold(square.unflatten(-1, (groups, LANES, VECTOR)))))


def inverse_rms(total: Tensor, width: int, eps: float) -> Tensor:
    """fp32 `1 / sqrt(total / width + eps)`; `total / width` is a product with the fp32 reciprocal of width."""
    # by way of fp64, whose root rounds to the IEEE fp32 root: torch's own fp32 root on CPUs (MKL) is off for 1 in 200
    return 1.0 / (total * (1.0 / width) + eps).double().sqrt().float()


def apply_norm(x: Tensor, inverse: Tensor, weight: Tensor, weight_bias: float) -> Tensor:
    """fp32 `(x * inverse) * (weight + weight_bias)`, not yet rounded; `inverse` has one value a row."""
    return (x.float() * inverse.unsqueeze(-1)) * (weight.float() + weight_bias)


def apply_turned_norm(x: Tensor, inverse: Tensor, weight: Tensor, weight_bias: float, rope: Rope) -> Tensor:
    """fp32 `rotate(x * (weight + weight_bias)) * inverse`, not yet rounded: a rotation is linear, so a kernel does it
    while the sums of squares are under way."""
    return rotate(x.float() * (weight.float() + weight_bias), rope) * inverse.unsqueeze(-1)


def add_in_order(xs: Sequence[Tensor]) -> Tensor:
    """fp32 `x_0 + x_1 + ...`, one addition after the other."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total


def rms_norm(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    rope: Rope | None = None,
) -> list[Tensor]:
    """RMSNorm over a width that is split over ranks.

    xs: rank r's `[..., n]`; weights: rank r's gamma shard `[n]`. Returns rank r's `[..., n]`, in the dtype of x.
    `y_r = round(x_r / sqrt(sum over ranks of x^2 / (n W) + eps) * (gamma_r + weight_bias))`
    With rope, `x_r * (gamma_r + weight_bias)` is rotated, and multiplied by the inverse root last.
    """
    inverse = inverse_rms(add_in_order([sum_of_squares(x) for x in xs]), len(xs) * xs[0].shape[-1], eps)
    if rope is None:
        normed = [apply_norm(x, inverse, w, weight_bias) for x, w in zip(xs, weights, strict=True)]
    else:
        normed = [apply_turned_norm(x, inverse, w, weight_bias, rope) for x, w in zip(xs, weights, strict=True)]
    return [y.to(x.dtype) for x, y in zip(xs, normed, strict=True)]


def qk_rms_norm(
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    *,
    eps: float | tuple[float, float] = 1e-6,
    weight_bias: float = 0.0,
    rope: Rope | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """`rms_norm` of q and of k, each over its own width, rotated by `rope` before the rounding. Rank r's `(q, k)`."""
    q_eps, k_eps = eps if isinstance(eps, tuple) else (eps, eps)
    q = rms_norm(qs, q_weights, eps=q_eps, weight_bias=weight_bias, rope=rope)
    k = rms_norm(ks, k_weights, eps=k_eps, weight_bias=weight_bias, rope=rope)
    return list(zip(q, k, strict=True))


def sum_of_experts(x: Tensor) -> Tensor:
    """`round(x_0 + x_1 + ...)` over the last dimension but one of `[..., top_k, H]`, in fp32 and in that order."""
    return add_in_order(x.unbind(-2)).to(x.dtype)


def all_reduce(xs: Sequence[Tensor]) -> Tensor:
    """`round(x_0 + x_1 + ...)` in fp32 and rank order; the same on every rank. xs: `[..., H]` of each rank."""
    return add_in_order(xs).to(xs[0].dtype)


def all_reduce_rms_norm(
    xs: Sequence[Tensor],
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    quant: Format | None = None,
    keep_norm: bool = False,
    top_k: int | None = None,
) -> NormOutput:
    """All-reduce, residual add and RMSNorm; the same on every rank.

    xs: partial sums `[..., H]` of each rank; weight `[H]`; residual `[..., H]` of any float dtype, or None. With top_k,
    each rank's partial sum is `sum_of_experts` of its `[..., top_k, H]`.
    With `s` the ROUNDED sum: `r = s + residual` in fp32, `residual_out = round(r)`, and the norm is taken of the
    UNROUNDED r. quant: a format, that quantises the ROUNDED norm.
    """
    r = all_reduce(xs if top_k is None else [sum_of_experts(x) for x in xs]).float()
    if residual is not None:
        r = r + residual.float()
    inverse = inverse_rms(sum_of_squares(r), r.shape[-1], eps)
    norm = apply_norm(r, inverse, weight, weight_bias).to(xs[0].dtype)
    new = None if residual is None else r.to(residual.dtype)
    if quant is None:
        return NormOutput(norm, new, None, None)
    return NormOutput(norm if keep_norm else None, new, *quant.encode(norm))


def shard_rows(x: Tensor, world: int) -> list[Tensor]:
    """Rank r's rows r, r + W, r + 2W and so on of `[..., H]`: what a row-sharded residual is."""
    return [x.reshape(-1, x.shape[-1])[rank::world] for rank in range(world)]


def gather_rows(shards: Sequence[Tensor], rows: int) -> Tensor:
    """The inverse of `shard_rows`. With a row-sharded residual the operations are those of the gathered one."""
    whole = shards[0].new_empty(rows, shards[0].shape[-1])
    for rank, shard in enumerate(shards):
        whole[rank :: len(shards)] = shard
    return whole
