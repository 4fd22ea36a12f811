"""Piecewise CUDA graphs: everything but attention captured, per number of tokens; see docs/graphs.md.

Reading order: `partition` cuts a traced graph into steps (`nodes`: what a graph calls; `specs`: what its values are;
`rowwise`: which steps can't be padded), `runner` runs them (records, replays, pads), `capture` is what a CUDA graph is
to them, `piecewise` is the backend that owns the runners and their life cycle, `report` counts, `boundary` is the
operator behind which attention stands, `ahead` replays before torch has checked a call.
"""

from __future__ import annotations

from tpfuse.graphs.boundary import Attention, attention, dense, sparse
from tpfuse.graphs.capture import CudaGraphs
from tpfuse.graphs.piecewise import Cleared, Estimate, Piecewise
from tpfuse.graphs.report import GraphReport
from tpfuse.graphs.runner import CaptureFailed, StaleGraph

__all__ = [
    "Attention",
    "CaptureFailed",
    "Cleared",
    "CudaGraphs",
    "Estimate",
    "GraphReport",
    "Piecewise",
    "StaleGraph",
    "attention",
    "dense",
    "sparse",
]
