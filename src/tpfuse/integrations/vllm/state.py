"""What a worker process has of tpfuse: one Communicator for its TP group, and a record of the sites that are served.

A site is told by its gamma: each norm of a model has one of its own. So the addresses of gammas count sites, however
often a forward runs, and also where compiled graphs come from a cache and no pass sees them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tpfuse.communicator import Communicator
from tpfuse.errors import CommunicatorClosed

# Ranks may be minutes apart at their first forward, where one of them compiles and another finds its graphs in a cache.
TIMEOUT = 300.0

QK_NORM, BOUNDARY = "QK norm", "all-reduce + norm"


@dataclass
class Engaged:
    """This process's part. effective: fused, control, or off where `reason` says why tpfuse stays out."""

    requested: str
    effective: str
    reason: str
    group: Any  # vLLM's GroupCoordinator
    comm: Communicator | None = None
    fused: dict[str, set[int]] = field(default_factory=lambda: {QK_NORM: set(), BOUNDARY: set()})
    stock: dict[str, set[int]] = field(default_factory=lambda: {QK_NORM: set(), BOUNDARY: set()})
    left: Counter[str] = field(default_factory=Counter)  # all-reduces that graphs keep, with the reasons

    def __str__(self) -> str:
        where = f"rank {self.group.rank_in_group} of {self.group.world_size}"
        backend = "vLLM's own path" if self.comm is None else "backend cuda"
        because = f": {self.reason}" if self.reason else ""
        return f"tpfuse, {where}: requested {self.requested}, effective {self.effective}, {backend}{because}"

    def summary(self) -> str:
        """What is served, for the log."""
        parts = []
        for kind, gammas in self.fused.items():
            total = len(gammas | self.stock[kind])
            parts.append(f"{len(gammas)} of {total} {kind}s fused")
        left = "; ".join(f"{count}x {what}" for what, count in self.left.items())
        return f"{self}; {', '.join(parts)}; all-reduces left in compiled graphs: {left or 'none seen'}"


current: Engaged | None = None


def engage(mode: str, group: Any, against: str = "") -> Engaged:
    """Make this worker's Communicator, if its mode needs one. Collective over the TP group, which vLLM has as `group`.
    It is not prepared: all calls are the kernels', so torch.distributed needs no NCCL communicator, which takes memory.

    against: why tpfuse stays out, the same on every rank."""
    global current
    if against:
        current = Engaged(mode, "off", against, group)
        return current
    if mode == "control":
        current = Engaged(mode, "control", "", group)
        return current
    try:
        comm = Communicator(group.device_group, mode="fused", timeout=TIMEOUT)
    except Exception as error:
        current = Engaged(mode, "off", f"{type(error).__name__}: {error}", group)
        return current
    plan = comm.plan
    if plan.effective_mode == "fused":
        current = Engaged(mode, "fused", "", group, comm)
    else:
        reasons = sorted({route.reason for route in plan.routes if route.reason})
        comm.close()
        current = Engaged(mode, "off", "; ".join(reasons), group)
    return current


def disengage() -> None:
    """Give back what this worker has. Collective, like engage()."""
    global current
    engaged, current = current, None
    if engaged is not None and engaged.comm is not None:
        engaged.comm.close()


def communicator(kind: str, gamma: Tensor) -> Communicator:
    """The Communicator that serves a site, which is recorded."""
    if current is None or current.comm is None:
        raise CommunicatorClosed("tpfuse: a graph that was compiled for it runs in a process where it stays out.")
    current.fused[kind].add(gamma.data_ptr())
    return current.comm
