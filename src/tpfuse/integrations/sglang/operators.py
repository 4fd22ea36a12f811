"""`torch.ops.tpfuse_sglang.*`: what the hooks call, eagerly and in code that SGLang compiles."""

from __future__ import annotations

from torch import Tensor

from tpfuse.communicator import empty
from tpfuse.integrations.serving.operators import ADD_RMS_NORM, define
from tpfuse.integrations.serving.state import QK_NORM, communicator


def qk_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return communicator(QK_NORM, q_weight).qk_rms_norm(q, k, q_weight, k_weight, eps=eps)


_OPERATORS = (
    ADD_RMS_NORM,
    (
        "qk_norm(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps) -> (Tensor, Tensor)",
        qk_norm,
        lambda q, k, *_: (empty(q), empty(k)),
    ),
)
_LIBRARY = define("tpfuse_sglang", _OPERATORS)
