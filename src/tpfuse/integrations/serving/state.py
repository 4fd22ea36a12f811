"""What a worker process has of tpfuse: one Communicator for its TP group, and a record of the sites that are served.

A site is told by its gamma: each norm of a model has one of its own. So the addresses of gammas count sites, however
often a forward runs, and also where compiled graphs come from a cache and nothing else of ours sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpfuse import reference
from tpfuse.backends.cuda import all_reduce, sharded_norm
from tpfuse.backends.cuda.workspace import agree_on
from tpfuse.checks import DTYPES
from tpfuse.communicator import Communicator
from tpfuse.errors import CommunicatorClosed, first_line

# Ranks may be minutes apart at their first forward, where one of them compiles and another finds its graphs in a cache.
TIMEOUT = 300.0
# The same calls on all ranks before anything relies on them: rows of one-shot and of two-shot, and seconds for each,
# in which a slower rank loads what it needs.
TRIAL_ROWS, TRIAL_WIDTH, TRIAL_TIMEOUT = (4, 1600), 1024, 60.0

QK_NORM, BOUNDARY = "QK norm", "all-reduce + norm"
EXPERTS = "sum over experts"  # in the latter


@dataclass
class Engaged:
    """This process's part. effective: fused, control, or off where `reason` says why tpfuse stays out."""

    engine: str  # its name
    requested: str
    effective: str
    reason: str
    group: Any  # the engine's GroupCoordinator
    comm: Communicator | None = None
    fused: dict[str, set[int]] = field(default_factory=lambda: {QK_NORM: set(), BOUNDARY: set(), EXPERTS: set()})
    stock: dict[str, set[int]] = field(default_factory=lambda: {QK_NORM: set(), BOUNDARY: set(), EXPERTS: set()})
    looked_at: set[int] = field(default_factory=set)  # sites whose sum over experts came back as it had been filled
    left: Counter[str] = field(default_factory=Counter)  # what stays with the engine, with the reasons

    def __str__(self) -> str:
        where = f"rank {self.group.rank_in_group} of {self.group.world_size}"
        backend = f"{self.engine}'s own path" if self.comm is None else "backend cuda"
        because = f": {self.reason}" if self.reason else ""
        return f"tpfuse, {where}: requested {self.requested}, effective {self.effective}, {backend}{because}"

    def summary(self, left_where: str) -> str:
        """What is served, for the log. left_where: what `left` counts."""
        parts = []
        for kind, gammas in self.fused.items():
            total = len(gammas | self.stock[kind])
            if kind == EXPERTS:
                parts += [f"{len(gammas)} of {total} with their sum over experts"] if total else []
            else:
                parts.append(f"{len(gammas)} of {total} {kind}s fused")
        left = "; ".join(f"{count}x {what}" for what, count in self.left.items())
        return f"{self}; {', '.join(parts)}; {left_where}: {left or 'none seen'}"

    def why_not_boundary(self, x: Tensor, residual: Tensor, gamma: Tensor) -> str:
        """Why the all-reduce of x with its residual and norm is left to the engine; empty if it is served.

        This and why_not_qk_norm() go by what is the same on every rank, so that all decide alike."""
        comm = self.comm
        if comm is None or self.effective != "fused":
            return f"mode {self.effective}"
        if x.dtype not in DTYPES or residual.dtype != x.dtype or residual.shape != x.shape:
            return "another dtype or shape of the residual"
        if x.stride(-1) != 1 or residual.stride(-1) != 1:
            return "elements of a row are not contiguous"
        if x.shape[-1] > comm.max_hidden or all_reduce.why_not(x.shape[-1]):
            return "rows are too wide"
        return odd(gamma, x)

    def why_not_qk_norm(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, world: int) -> str:
        """Why the norm of this rank's parts of q and k is left to the engine."""
        comm = self.comm
        if comm is None or self.effective != "fused":
            return f"mode {self.effective}"
        if world != comm.world:
            return "another group"
        if q.dtype not in DTYPES or k.dtype != q.dtype or q.shape[:-1] != k.shape[:-1]:
            return "another dtype or shape"
        if q.stride(-1) != 1 or k.stride(-1) != 1:
            return "elements of a row are not contiguous"
        widths = (q.shape[-1], k.shape[-1])
        if max(widths) > comm.max_hidden or sharded_norm.why_not(widths):
            return "rows are too wide"
        return odd(q_weight, q) or odd(k_weight, k)

    def leave(self, kind: str, gamma: Tensor, reason: str = "") -> None:
        """Record a site that the engine serves itself."""
        site = gamma.data_ptr()
        if reason and site not in self.stock[kind]:
            self.left[f"{kind}: {reason}"] += 1
        self.stock[kind].add(site)


def odd(gamma: Tensor, x: Tensor) -> str:
    """Why a gamma does not go with rows of x; empty if it does."""
    if gamma.dtype not in DTYPES or gamma.device != x.device:
        return "gamma has another dtype or device"
    if gamma.shape != x.shape[-1:] or gamma.stride(-1) != 1:
        return "gamma has another shape or layout"
    return ""


current: Engaged | None = None


def engage(engine: str, mode: str, group: Any, against: str = "") -> Engaged:
    """Make this worker's Communicator, if its mode needs one. Collective over the TP group, which the engine has as
    `group`. It is not prepared: all calls are the kernels', so torch.distributed needs no NCCL communicator, which
    takes memory.

    against: why tpfuse stays out, the same on every rank."""
    global current
    current = _engaged(engine, mode, group, against)
    return current


def _engaged(engine: str, mode: str, group: Any, against: str) -> Engaged:
    if against:
        return Engaged(engine, mode, "off", against, group)
    if mode == "control":
        return Engaged(engine, mode, "control", "", group)
    try:
        reason = _tried(group.device_group)
        if not reason:
            comm = Communicator(group.device_group, mode="fused", timeout=TIMEOUT)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return Engaged(engine, mode, "off", reason, group) if reason else Engaged(engine, mode, "fused", "", group, comm)


def _tried(group: Any) -> str:
    """Why the kernels can't be relied on, the same on every rank; empty if they can. Collective.

    That ranks can map each other's memory does not say that what they write arrives: with an IOMMU between them it may
    not. Here that is found in seconds, and while the engine's own path is still there."""
    with Communicator(group, mode="fused", timeout=TRIAL_TIMEOUT) as comm:
        if comm.plan.effective_mode != "fused":
            return "; ".join(sorted({route.reason for route in comm.plan.routes if route.reason}))
        try:
            wrong = trial(comm)
        except Exception as error:
            wrong = f"{type(error).__name__}: {first_line(error)}"
        # A rank that is right waits for one whose kernels wait, each for its time.
        return agree_on(comm._board, "trial", wrong, 4 * TRIAL_TIMEOUT) or ""


def trial(comm: Communicator) -> str:
    """What is not the contract's in a few small calls; empty if all is."""
    for rows in TRIAL_ROWS:
        for op, found, wanted in _calls(comm, rows):
            right = all(torch.equal(*both) for both in zip(found, wanted, strict=True))
            comm.check()  # the kernel is done: if it has given up, that says more
            if not right:
                return f"{op} of {rows} rows is wrong on these GPUs; `tpfuse check --device cuda` says more"
    return ""


def _calls(comm: Communicator, rows: int) -> Iterator[tuple[str, Sequence[Any], Sequence[Any]]]:
    """One call after the other: op, results, and what they must be."""
    generator = torch.Generator().manual_seed(rows)

    def random(count: int) -> Tensor:
        drawn = torch.randn(count, TRIAL_WIDTH, generator=generator, device="cpu", dtype=torch.float32)
        return drawn.to(comm.device, torch.bfloat16)

    xs, residual, weight = [random(rows) for _ in range(comm.world)], random(rows), random(1)[0]
    x = xs[comm.rank]
    summed = reference.all_reduce_rms_norm(xs, weight, residual=residual)
    yield "all_reduce_rms_norm", comm.all_reduce_rms_norm(x, weight, residual=residual)[:2], summed[:2]
    norms = reference.rms_norm(xs, [weight] * comm.world)
    yield "rms_norm", [comm.rms_norm(x, weight)], [norms[comm.rank]]


def check() -> None:
    """Raise if a kernel of this worker has given up. For engines that replay graphs: replays raise nothing by
    themselves."""
    if current is not None and current.comm is not None:
        current.comm.check()


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
