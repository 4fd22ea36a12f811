"""The model families that tpfuse knows. A new one is a file here and a line below."""

from __future__ import annotations

from tpfuse.integrations.transformers.architecture import Architecture
from tpfuse.integrations.transformers.architectures import llama, minimax, nemotron_h

ARCHITECTURES: dict[str, Architecture] = {
    known.base: known
    for known in (llama.LLAMA, llama.QWEN3, minimax.MINIMAX_M2, minimax.MINIMAX_M3, nemotron_h.NEMOTRON_H)
}


def register(architecture: Architecture) -> None:
    """Make a family known, or known differently, from the next model that is loaded on."""
    ARCHITECTURES[architecture.base] = architecture
