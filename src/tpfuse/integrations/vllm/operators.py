"""`torch.ops.tpfuse_vllm.*`: what compiled graphs of vLLM call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse.communicator import boundary_outputs, empty, present
from tpfuse.integrations.serving.operators import ADD_RMS_NORM, all_reduce_add_rms_norm, define
from tpfuse.integrations.serving.state import BOUNDARY, QK_NORM, communicator
from tpfuse.quant import named
from tpfuse.reference import NormOutput
from tpfuse.rope import Rope


def all_reduce_rms_norm(x: Tensor, weight: Tensor, eps: float, weight_bias: float) -> Tensor:
    norm = communicator(BOUNDARY, weight).all_reduce_rms_norm(x, weight, eps=eps, weight_bias=weight_bias).norm
    assert norm is not None
    return norm


def all_reduce_sum_rms_norm(x: Tensor, weight: Tensor, eps: float, weight_bias: float) -> tuple[Tensor, Tensor]:
    """The norm, and the sum itself: what is added to a residual of zeros."""
    return all_reduce_add_rms_norm(x, torch.zeros_like(x), weight, eps, weight_bias)


def all_reduce_rms_norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, given: Tensor | None, *settings: Any
) -> list[Tensor]:
    """What there is of norm, residual, quant and scale, without a scale that is given. settings: as of boundary."""
    return present(boundary(x, residual, weight, given, *settings), given)


def boundary(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    given: Tensor | None,
    eps: float,
    weight_bias: float,
    quant: str,
    keep_norm: bool,
    top_k: int | None = None,
) -> NormOutput:
    """A boundary between layers. quant, given: see tpfuse.quant.named."""
    return communicator(BOUNDARY, weight).all_reduce_rms_norm(
        x,
        weight,
        residual=residual,
        eps=eps,
        weight_bias=weight_bias,
        quant=named(quant, given),
        keep_norm=keep_norm,
        top_k=top_k,
    )


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_size: int,
    kv_size: int,
    head_dim: int,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k = qkv[:, :q_size], qkv[:, q_size : q_size + kv_size]
    rope = Rope(cos, sin, positions, head_dim, 2 * cos.shape[1], interleaved)
    return communicator(QK_NORM, q_weight).qk_rms_norm(q, k, q_weight, k_weight, eps=eps, rope=rope)


def _fake_qk(
    qkv: Tensor,
    _qw: Tensor,
    _kw: Tensor,
    _cos: Tensor,
    _sin: Tensor,
    _at: Tensor,
    q_size: int,
    kv_size: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty((qkv.shape[0], q_size)), qkv.new_empty((qkv.shape[0], kv_size))


_NORM = "float eps, float weight_bias"
_OPERATORS = (
    ADD_RMS_NORM,
    (f"all_reduce_rms_norm(Tensor x, Tensor weight, {_NORM}) -> Tensor", all_reduce_rms_norm, lambda x, *_: empty(x)),
    (
        f"all_reduce_sum_rms_norm(Tensor x, Tensor weight, {_NORM}) -> (Tensor, Tensor)",
        all_reduce_sum_rms_norm,
        lambda x, *_: (empty(x), empty(x)),
    ),
    (
        f"all_reduce_rms_norm_quant(Tensor x, Tensor? residual, Tensor weight, Tensor? given, {_NORM}, str quant, "
        "bool keep_norm) -> Tensor[]",
        all_reduce_rms_norm_quant,
        lambda x, residual, _w, given, _eps, _bias, quant, keep_norm: present(
            boundary_outputs(x, residual, named(quant, given), keep_norm), given
        ),
    ),
    (
        "qk_norm_rope(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor positions, "
        "int q_size, int kv_size, int head_dim, bool interleaved, float eps) -> (Tensor, Tensor)",
        qk_norm_rope,
        _fake_qk,
    ),
)

_LIBRARY = define("tpfuse_vllm", _OPERATORS)
