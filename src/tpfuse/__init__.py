"""tpfuse: tensor-parallel communication fused with the normalisation beside it.

The names below are the public ones. They are imported on first use, so that `import tpfuse` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpfuse import deferred, errors, graphs, nn, ops, quant, reference
    from tpfuse.communicator import Communicator
    from tpfuse.errors import TpfuseError
    from tpfuse.plan import Plan
    from tpfuse.reference import NormOutput
    from tpfuse.rope import Rope

__version__ = "0.1.0"

__all__ = [
    "Communicator",
    "NormOutput",
    "Plan",
    "Rope",
    "TpfuseError",
    "__version__",
    "deferred",
    "errors",
    "graphs",
    "nn",
    "ops",
    "quant",
    "reference",
]

_HOME = {
    "Communicator": "tpfuse.communicator",
    "NormOutput": "tpfuse.reference",
    "Plan": "tpfuse.plan",
    "Rope": "tpfuse.rope",
    "TpfuseError": "tpfuse.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in __all__:
        return import_module(f"tpfuse.{name}")
    raise AttributeError(f"module 'tpfuse' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
