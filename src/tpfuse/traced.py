"""Mode `control` in compiled code: the exchange is torch's functional all-reduce and all else are torch operations, so
that a compiler fuses them with what stands around them, as it would in a model without tpfuse.

Everywhere else an operation is ONE operator, which no compiler looks into. For `fused` that is what it is. Control is
what fused is measured against: as an operator it would keep its casts, additions and norms as kernels of their own in a
model whose other ones are fused, and the comparison would flatter the kernels.

Design record
- The numbers are those of backends/collective.py: fp32 throughout, partial sums of 16 bits and more than two ranks
  travel as fp32 and are rounded once. Here the cast goes into the kernel before, if a compiler makes one.
- A compiler may leave out a rounding between two operations that it fuses, such as that of the sum before the residual.
- Large 16-bit sums travel in another way there, in two exchanges. They, and sizes that are not known while tracing, so
  that neither way can be chosen, stay the operator.
- Nobody checks, counts or watches what is traced: the report says what eager calls did, or the plan, and a rank that
  does not come is the transport's to find.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tpfuse.backends.collective import LARGE
from tpfuse.rope import Rope, rotate


def fits(x: Tensor) -> bool:
    """Whether the rows of x are so few that what is here serves them."""
    return bool(statically_known_true(x.numel() * x.element_size() < LARGE))


def all_reduce(x: Tensor, world: int, group: str) -> Tensor:
    """The sum of every rank's x, rounded to its dtype once."""
    if world == 1:
        return x
    ops = torch.ops._c10d_functional
    wide = x.float() if world > 2 else x
    summed: Tensor = ops.wait_tensor(ops.all_reduce(wide, "sum", group))
    return summed.to(x.dtype)


def all_reduce_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_bias: float, world: int, group: str
) -> tuple[Tensor, Tensor | None]:
    """Norm and new residual."""
    r = all_reduce(x, world, group).float()
    if residual is not None:
        r = r + residual
    inverse = torch.rsqrt(r.square().mean(-1, keepdim=True) + eps)
    norm = (r * inverse * _gamma(weight, weight_bias)).to(x.dtype).contiguous()
    return norm, None if residual is None else r.to(residual.dtype).contiguous()


def sharded_rms_norm(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    eps: Sequence[float],
    weight_bias: float,
    rope: Rope | None,
    world: int,
    group: str,
) -> list[Tensor]:
    """The norm of each x over its whole rows, whose sums of squares are exchanged at once."""
    sums = torch.stack([x.float().square().sum(-1) for x in xs], -1)
    totals = all_reduce(sums, world, group).unbind(-1)
    normed = []
    for x, weight, total, e in zip(xs, weights, totals, eps, strict=True):
        inverse = torch.rsqrt(total / (world * x.shape[-1]) + e).unsqueeze(-1)
        if rope is None:
            y = x.float() * inverse * _gamma(weight, weight_bias)
        else:
            turned = rotate((x.float() * _gamma(weight, weight_bias)).flatten(0, -2), rope)
            y = turned.view(x.shape) * inverse
        normed.append(y.to(x.dtype).contiguous())
    return normed


def _gamma(weight: Tensor, weight_bias: float) -> Tensor:
    return weight.float() + weight_bias
