"""Checks of what a call is given. They run on every eager call, so the good path is a few comparisons; the
messages are built only when something is wrong."""

from __future__ import annotations

from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.quant import Format

RESIDUAL_LAYOUTS = ("replicated", "row_sharded")
LARGEST = torch.finfo(torch.float32).max
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = "float32, bfloat16 or float16"


def activation(op: str, name: str, x: Tensor, device: torch.device, max_hidden: int) -> None:
    """x: `[..., n]` on the communicator's device, n contiguous, a supported dtype, no gradient."""
    if x.dtype not in DTYPES:
        raise InvalidArgument(f"{op}: {name} has dtype {x.dtype}; supported: {_NAMES}. Cast it before the call.")
    if x.device != device:
        raise InvalidArgument(
            f"{op}: {name} is on {x.device}, the communicator on {device}. Move it, or make a communicator there."
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InvalidArgument(f"{op}: {name} has shape {list(x.shape)}; needed: [..., width] with width > 0.")
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise InvalidArgument(
            f"{op}: the last dimension of {name} has stride {x.stride(-1)}; rows may be strided, their elements must "
            "be contiguous. Call .contiguous() first."
        )
    if x.shape[-1] > max_hidden:
        raise InvalidArgument(
            f"{op}: {name} is {x.shape[-1]} wide, the communicator was made for max_hidden={max_hidden}. "
            "Make it with a larger max_hidden."
        )
    no_gradient(op, **{name: x})


def no_gradient(op: str, **given: Tensor | None) -> None:
    """Activations only: parameters require gradients by default, also where nobody wants them."""
    for name, x in given.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise Unsupported(f"{op}: {name} requires a gradient; tpfuse is for inference. Use torch.no_grad().")


def weight(op: str, name: str, w: Tensor, x: Tensor) -> None:
    """w: gamma for x, `[n]`, any supported dtype."""
    if w.dtype not in DTYPES:
        raise InvalidArgument(f"{op}: {name} has dtype {w.dtype}; supported: {_NAMES}.")
    if w.shape != x.shape[-1:]:
        raise InvalidArgument(
            f"{op}: {name} has shape {list(w.shape)}; needed: [{x.shape[-1]}], this rank's part of gamma."
        )
    if w.device != x.device or not w.is_contiguous():
        raise InvalidArgument(
            f"{op}: {name} must be contiguous and on {x.device}; it is on {w.device}, stride {w.stride()}."
        )


def numbers(op: str, **given: Any) -> None:
    """Numbers of Python, or what counts as one: they go to kernels by value, and calls are remembered by them."""
    for name, number in given.items():
        shown = name.replace("_of_", " of ")
        numpy = isinstance(number, Real) and hasattr(number, "dtype")
        if not isinstance(number, (int, float)) and not numpy:
            raise InvalidArgument(f"{op}: {shown} is a {type(number).__name__}; needed: a number.")
        if not -LARGEST <= number <= LARGEST or (name.startswith("eps") and number < 0):
            raise InvalidArgument(f"{op}: {shown} is {number}; needed: a number that float32 has, eps from 0 up.")


def same_shape(op: str, name: str, y: Tensor, x: Tensor) -> None:
    """y goes with x row by row: the same shape and device, elements of a row contiguous, no memory shared by rows."""
    if y.shape != x.shape or y.device != x.device:
        raise InvalidArgument(
            f"{op}: {name} has shape {list(y.shape)} on {y.device}; needed: {list(x.shape)} on {x.device}."
        )
    if y.dtype not in DTYPES:
        raise InvalidArgument(f"{op}: {name} has dtype {y.dtype}; supported: {_NAMES}.")
    if y.stride(-1) != 1 and y.shape[-1] != 1:
        raise InvalidArgument(f"{op}: the last dimension of {name} has stride {y.stride(-1)}; needed: 1.")


def like(op: str, out: Tensor, y: Tensor) -> Tensor:
    """`out`, which compiled code copies y to. The kernels' own demands on it are not made: they don't write to it."""
    if out.shape != y.shape or out.dtype != y.dtype or out.device != y.device:
        raise InvalidArgument(f"{op}: out is {out.dtype} {list(out.shape)}; needed: {y.dtype} {list(y.shape)}.")
    return out


def apart(op: str, first: Tensor, second: Tensor) -> None:
    """Two outputs of one call: no memory in common."""
    if share_memory(first, second):
        raise InvalidArgument(f"{op}: the two tensors of out share memory; needed: two that don't.")


def itself_or_apart(op: str, out: Tensor, x: Tensor, *others: Tensor) -> None:
    """out: the memory of x in its order, or none of the inputs'."""
    if (share_memory(out, x) and not _same_place(out, x)) or any(share_memory(out, other) for other in others):
        raise InvalidArgument(
            f"{op}: out shares memory with an input that it is not; needed: the input itself, or memory of its own."
        )


def _same_place(a: Tensor, b: Tensor) -> bool:
    """Whether elements of equal index are one; both of one shape. A dimension of one has any stride."""
    steps = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a is b or (a.data_ptr() == b.data_ptr() and all(one == other for size, one, other in steps if size > 1))


def pair_of_outputs(op: str, out: object) -> None:
    """out: two tensors, as tuple or list."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise InvalidArgument(f"{op}: out is {_told(out)}; needed: a tuple of two tensors, for q and for k.")


def _told(given: object) -> str:
    if isinstance(given, (tuple, list)):
        return f"a {type(given).__name__} of {len(given)}"
    return f"a {type(given).__name__}"


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have memory in common. Of views with other strides than each other's, what lies between their
    ends counts as theirs."""
    if a is b:
        return a.numel() > 0
    if not a.numel() or not b.numel() or a.device != b.device:
        return False
    step = a.element_size()
    try:
        distance = b.data_ptr() - a.data_ptr()  # bytes: the dtypes, and even the storages of one memory, may be two
    except RuntimeError:  # tensors that stand for others while a graph is traced have no memory
        return False
    if distance >= _span(a) * step or -distance >= _span(b) * b.element_size():
        return False
    alike = a.stride() == b.stride() and step == b.element_size() and distance % step == 0
    return not (alike and any(_beside(a, b, distance // step, int(pitch)) for pitch in a.stride()))


def _beside(a: Tensor, b: Tensor, distance: int, pitch: int) -> bool:
    """Whether two tensors of the same strides are other columns of one matrix, whose rows lie `pitch` apart."""
    if pitch < 1 or any(stride % pitch for stride in a.stride() if stride > pitch):
        return False
    column = distance % pitch
    return column >= _span(a, pitch) and column + _span(b, pitch) <= pitch


def _span(x: Tensor, pitch: int | None = None) -> int:
    """Elements from the first to the last of x, or of a part of it that lies within a pitch."""
    inner = [(n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True) if pitch is None or step < pitch]
    return 1 + sum(inner)


def row_shard(
    op: str, name: str, y: Tensor, device: torch.device, rows: int, width: int, rank: int, world: int
) -> None:
    """y: this rank's rows, rank, rank + W, rank + 2W and so on, of `rows` rows, on the device of the others."""
    if y.device != device:
        raise InvalidArgument(f"{op}: {name} is on {y.device}; needed: {device}.")
    own = own_rows(rows, rank, world)
    if y.shape != (own, width):
        raise InvalidArgument(
            f"{op}: {name} has shape {list(y.shape)}; needed: [{own}, {width}], the rows that rank {rank} of {world} "
            f"has of {rows}. comm.shard_rows() makes them of whole rows."
        )


def own_rows(rows: int, rank: int, world: int) -> int:
    """How many of `rows` rows belong to a rank: row t belongs to rank t % W."""
    return (rows - rank + world - 1) // world


def quant_format(op: str, quant: object, x: Tensor) -> None:
    """quant: a format of tpfuse.quant that fits x."""
    if not isinstance(quant, Format):
        raise InvalidArgument(
            f"{op}: quant={quant!r}; needed: a format of tpfuse.quant, such as quant.FP8PerToken(), or None."
        )
    quant.check(op, x)


def layout(op: str, residual_layout: str, residual: Tensor | None) -> None:
    """How the residual is spread over the ranks."""
    if residual_layout not in RESIDUAL_LAYOUTS:
        raise InvalidArgument(f"{op}: residual_layout={residual_layout!r}; supported: {', '.join(RESIDUAL_LAYOUTS)}.")
    if residual_layout == "row_sharded" and residual is None:
        raise InvalidArgument(f"{op}: residual_layout='row_sharded' without a residual; leave it out, or give one.")


def experts(op: str, top_k: int, x: Tensor) -> None:
    """x: `[..., top_k, H]`."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise InvalidArgument(f"{op}: top_k={top_k!r}; needed: how many experts' outputs x has of a token, or None.")
    if x.dim() < 2 or x.shape[-2] != top_k:
        raise InvalidArgument(f"{op}: x has shape {list(x.shape)}; needed with top_k={top_k}: [..., {top_k}, width].")


def output(op: str, out: Tensor, x: Tensor) -> None:
    """out: like x, dtype included, its rows at one stride and apart."""
    same_shape(op, "out", out, x)
    if any(size > 1 and stride < out.shape[-1] for size, stride in zip(out.shape[:-1], out.stride()[:-1], strict=True)):
        raise InvalidArgument(f"{op}: out has shape {list(out.shape)} and strides {out.stride()}: its rows overlap.")
    if out.dim() > 2 and not viewable(out):
        raise InvalidArgument(
            f"{op}: out has shape {list(out.shape)} and strides {out.stride()}; needed: rows at one stride, "
            "so that the leading dimensions can be viewed as one."
        )
    if out.dtype != x.dtype:
        raise InvalidArgument(f"{op}: out has dtype {out.dtype}; needed: {x.dtype}, the dtype of the input.")


def same_rows(op: str, q: Tensor, k: Tensor) -> None:
    """q and k: the same leading dimensions and dtype."""
    if q.shape[:-1] != k.shape[:-1] or q.dtype != k.dtype:
        raise InvalidArgument(
            f"{op}: q is {list(q.shape)} {q.dtype}, k is {list(k.shape)} {k.dtype}; "
            "needed: the same leading dimensions and dtype."
        )


def viewable(x: Tensor) -> bool:
    """Whether the leading dimensions of x can be viewed as one."""
    leading = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    return x.numel() == 0 or all(outer == size * stride for (_, outer), (size, stride) in pairwise(leading))
