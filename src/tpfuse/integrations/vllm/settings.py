"""The setting's name, the logger, and the key that compiled graphs are stored under. Needs neither torch nor vLLM."""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path

import tpfuse

NAME = "TPFUSE_VLLM"
LOG = logging.getLogger("vllm.tpfuse")  # vLLM configures the handlers of everything below "vllm"


@cache
def fingerprint(mode: str) -> str:
    """What decides how graphs are rewritten: another mode, version or source must not find graphs stored by this.

    All sources of tpfuse: what an operator returns is decided in its quant.py and communicator.py, too."""
    sources = hashlib.sha256()
    for path in sorted(Path(tpfuse.__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    return f"{mode} {tpfuse.__version__} {sources.hexdigest()[:16]}"
