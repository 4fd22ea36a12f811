"""The model families that tpfuse knows. A new one is a file here and a line below."""

from __future__ import annotations

from tpfuse.integrations.transformers.architecture import Architecture
from tpfuse.integrations.transformers.architectures import llama, minimax, nemotron_h

ARCHITECTURES: dict[str, Architecture] = {
    known.base: known
    for known in (llama.LLAMA, llama.QWEN3, minimax.MINIMAX_M2, minimax.MINIMAX_M3, nemotron_h.NEMOTRON_H)
}
