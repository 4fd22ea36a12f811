"""`torch.ops.tpfuse.*`: the ops as functional operators with fake implementations, so that
`torch.compile(fullgraph=True)` traces through a model that uses a Communicator.

The communicator travels as its name, a string constant that is the same on every rank. Eager calls of Communicator
methods don't come here; compiled code does, and pays for the dispatcher only there. docs/structure.md has the figures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpfuse.communicator import boundary_outputs, by_name, empty, present, whole
from tpfuse.quant import named
from tpfuse.rope import Rope

_LIBRARY = torch.library.Library("tpfuse", "DEF")  # lives as long as the process


def rms_norm(x: Tensor, weight: Tensor, comm: str, eps: float = 1e-6, weight_bias: float = 0.0) -> Tensor:
    return by_name(comm).rms_norm(x, weight, eps=eps, weight_bias=weight_bias)


def qk_rms_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    comm: str,
    q_eps: float = 1e-6,
    k_eps: float = 1e-6,
    weight_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return by_name(comm).qk_rms_norm(q, k, q_weight, k_weight, eps=(q_eps, k_eps), weight_bias=weight_bias)


def qk_rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    comm: str,
    q_eps: float,
    k_eps: float,
    weight_bias: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    rope = Rope(cos, sin, positions, head_dim, rotary_dim, interleaved)
    return by_name(comm).qk_rms_norm(q, k, q_weight, k_weight, eps=(q_eps, k_eps), weight_bias=weight_bias, rope=rope)


def all_reduce(x: Tensor, comm: str) -> Tensor:
    return by_name(comm).all_reduce(x)


def all_reduce_rms_norm(x: Tensor, weight: Tensor, comm: str, eps: float = 1e-6, weight_bias: float = 0.0) -> Tensor:
    norm = by_name(comm).all_reduce_rms_norm(x, weight, eps=eps, weight_bias=weight_bias).norm
    assert norm is not None
    return norm


def all_reduce_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor, comm: str, eps: float = 1e-6, weight_bias: float = 0.0
) -> tuple[Tensor, Tensor]:
    y = by_name(comm).all_reduce_rms_norm(x, weight, residual=residual, eps=eps, weight_bias=weight_bias)
    assert y.norm is not None
    assert y.residual is not None
    return y.norm, y.residual


def layer_boundary(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    comm: str,
    eps: float,
    weight_bias: float,
    quant: str,
    given: Tensor | None,
    keep_norm: bool,
    row_sharded: bool,
    top_k: int | None = None,
) -> list[Tensor]:
    """`all_reduce_rms_norm` with everything that it can do. Returns what there is of norm, residual, quant and scale;
    the scale of fp8_static, which is `given`, is not among them. quant: a key of FORMATS, or empty."""
    y = by_name(comm).all_reduce_rms_norm(
        x,
        weight,
        residual=residual,
        eps=eps,
        weight_bias=weight_bias,
        quant=named(quant, given),
        keep_norm=keep_norm,
        residual_layout="row_sharded" if row_sharded else "replicated",
        top_k=top_k,
    )
    return present(y, given)


def _fake_layer_boundary(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    comm: str,
    eps: float,
    weight_bias: float,
    quant: str,
    given: Tensor | None,
    keep_norm: bool,
    row_sharded: bool,
    top_k: int | None = None,
) -> list[Tensor]:
    y = boundary_outputs(whole(x, top_k), residual, named(quant, given), keep_norm)
    return present(y, given)


def gather_rows(shard: Tensor, rows: int, comm: str) -> Tensor:
    return by_name(comm).gather_rows(shard, rows)


# schema, implementation, shapes of the results
_OPERATORS = (
    (
        "rms_norm(Tensor x, Tensor weight, str comm, float eps=1e-06, float weight_bias=0.0) -> Tensor",
        rms_norm,
        lambda x, *_, **__: empty(x),
    ),
    (
        "qk_rms_norm(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, str comm, float q_eps=1e-06, "
        "float k_eps=1e-06, float weight_bias=0.0) -> (Tensor, Tensor)",
        qk_rms_norm,
        lambda q, k, *_, **__: (empty(q), empty(k)),
    ),
    (
        "qk_rms_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, str comm, float q_eps, float k_eps, "
        "float weight_bias, Tensor cos, Tensor sin, Tensor positions, int head_dim, int rotary_dim, bool interleaved) "
        "-> (Tensor, Tensor)",
        qk_rms_norm_rope,
        lambda q, k, *_, **__: (empty(q), empty(k)),
    ),
    ("all_reduce(Tensor x, str comm) -> Tensor", all_reduce, lambda x, *_, **__: empty(x)),
    (
        "all_reduce_rms_norm(Tensor x, Tensor weight, str comm, float eps=1e-06, float weight_bias=0.0) -> Tensor",
        all_reduce_rms_norm,
        lambda x, *_, **__: empty(x),
    ),
    (
        "all_reduce_add_rms_norm(Tensor x, Tensor weight, Tensor residual, str comm, float eps=1e-06, "
        "float weight_bias=0.0) -> (Tensor, Tensor)",
        all_reduce_add_rms_norm,
        lambda x, weight, residual, *_, **__: (empty(x), empty(residual)),
    ),
    (
        "layer_boundary(Tensor x, Tensor weight, Tensor? residual, str comm, float eps, float weight_bias, str quant, "
        "Tensor? given, bool keep_norm, bool row_sharded, int? top_k=None) -> Tensor[]",
        layer_boundary,
        _fake_layer_boundary,
    ),
    (
        "gather_rows(Tensor shard, SymInt rows, str comm) -> Tensor",
        gather_rows,
        lambda shard, rows, *_, **__: torch.empty((rows, shard.shape[1]), dtype=shard.dtype, device=shard.device),
    ),
)

for _schema, _implementation, _fake in _OPERATORS:
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpfuse::{_name}", _fake, lib=_LIBRARY)
