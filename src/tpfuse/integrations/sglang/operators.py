"""`torch.ops.tpfuse_sglang.*`: what the hooks call, eagerly and in code that SGLang compiles.

They name no communicator: a worker has one, and its sites are counted as they run, also in compiled code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpfuse.integrations.serving.state import BOUNDARY, QK_NORM, communicator

_LIBRARY = torch.library.Library("tpfuse_sglang", "DEF")  # lives as long as the process


def qk_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return communicator(QK_NORM, q_weight).qk_rms_norm(q, k, q_weight, k_weight, eps=eps)


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    comm = communicator(BOUNDARY, weight)
    y = comm.all_reduce_rms_norm(x, weight, residual=residual, eps=eps, weight_bias=weight_bias)
    assert y.norm is not None
    assert y.residual is not None
    return y.norm, y.residual


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# schema, implementation, shapes of the results
_OPERATORS = (
    (
        "qk_norm(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps) -> (Tensor, Tensor)",
        qk_norm,
        lambda q, k, *_: (_like(q), _like(k)),
    ),
    (
        "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_bias) "
        "-> (Tensor, Tensor)",
        all_reduce_add_rms_norm,
        lambda x, residual, *_: (_like(x), _like(residual)),
    ),
)

for _schema, _implementation, _fake in _OPERATORS:
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpfuse_sglang::{_name}", _fake, lib=_LIBRARY)
