"""The plan: which backend and algorithm serve which op at which size, and why, as data.

A plan is a function of facts that are the same on every rank; the communicator checks that once, across ranks.
Counters and the report say what really ran under it.

A size is that of the rows which one rank brings, as they cross the links: `slot_bytes` a row. Plans and the kernels'
launches compare it by the same function, `within`, so a counter names the algorithm that ran.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

OPS = ("rms_norm", "qk_rms_norm", "all_reduce", "all_reduce_rms_norm")
MODES = ("off", "control", "fused")
ANY = "any"  # the mode of what is the same in all of them


def slot_bytes(width: int, itemsize: int) -> int:
    """What a row of so many elements takes, in bytes: whole vectors of 8 elements, and 32 at least, for one that is
    quantised, and its scale."""
    return max(32, -(-width // 8) * 8 * itemsize)


def within(size_in_bytes: int, kib: int) -> bool:
    """Whether rows of that size are still served the way that a bound, in KiB, ends."""
    return size_in_bytes <= kib << 10


@dataclass(frozen=True)
class Facts:
    """What a plan depends on: the same on every rank, or the communicator refuses to start."""

    world: int
    device_type: str  # "cpu", "cuda"
    transport: str  # torch.distributed's backend for that device: "gloo", "nccl", ...
    mode: str  # requested
    backend: str  # requested, "auto" included
    max_hidden: int


@dataclass(frozen=True)
class Route:
    """One row of the plan: how `op` is served where a rank's rows take at most `max_kib` KiB (None: any size)."""

    op: str
    max_kib: int | None
    backend: str
    algorithm: str
    mode: str  # effective
    reason: str  # why the effective mode is not the requested one; empty where it is


@dataclass(frozen=True)
class Plan:
    """The routes of every op. Inspect it with `route()`, print it with rich or `as_dict()`."""

    requested_mode: str
    requested_backend: str
    world: int
    routes: tuple[Route, ...]

    def __post_init__(self) -> None:
        for op in OPS:
            bounds = [route.max_kib for route in self.routes if route.op == op]
            finite = [bound for bound in bounds[:-1] if bound is not None]
            if not bounds or bounds[-1] is not None or finite != sorted(set(finite)) or len(finite) != len(bounds) - 1:
                raise ValueError(f"plan: routes of {op} need rising bounds that end with None; given {bounds}")

    def of(self, op: str) -> tuple[Route, ...]:
        """The routes of one op, by rising bound."""
        return tuple(route for route in self.routes if route.op == op)

    def route(self, op: str, size_in_bytes: int) -> Route:
        """The route that serves `op` where a rank's rows take so many bytes: of `slot_bytes` each."""
        return next(r for r in self.routes if r.op == op and (r.max_kib is None or within(size_in_bytes, r.max_kib)))

    @property
    def effective_mode(self) -> str:
        return combined_mode(route.mode for route in self.routes)

    @property
    def fingerprint(self) -> list[str]:
        """The routes as text, for the comparison between ranks."""
        return [" | ".join(map(str, vars(route).values())) for route in self.routes]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"effective_mode": self.effective_mode}

    def __rich__(self) -> Table:
        modes = f"requested {self.requested_mode}, effective {self.effective_mode}"
        table = Table(title=f"plan: {self.world} ranks, {modes}")
        for name in ("op", "rows of a rank", "backend", "algorithm", "mode", "reason"):
            table.add_column(name, overflow="fold")
        for r in self.routes:
            size = "any" if r.max_kib is None else f"<= {r.max_kib} KiB"
            table.add_row(r.op, size, r.backend, r.algorithm, r.mode, r.reason)
        return table


def combined_mode(modes: Iterable[str]) -> str:
    """The one mode of all parts, `mixed` where they differ, `none` where there are none. What is the same in every
    mode is ANY, and does not count."""
    found = set(modes) - {ANY}
    return found.pop() if len(found) == 1 else "mixed" if found else "none"


@dataclass
class Counter:
    """What one route has served. `captured` counts the calls that were recorded into a CUDA graph: a replay runs
    them again without the host, so replays are not counted. `bytes`: what this rank handed to the exchange."""

    route: Route
    calls: int = 0
    captured: int = 0
    rows: int = 0
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.route) | {
            "calls": self.calls, "captured": self.captured, "rows": self.rows, "bytes": self.bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What really ran. `effective_mode` is of the calls made, or of the plan where none was made yet."""

    requested_mode: str
    effective_mode: str
    rank: int
    world: int
    device: str
    transport: str
    plan: Plan
    counters: tuple[Counter, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return {
            "requested_mode": self.requested_mode,
            "effective_mode": self.effective_mode,
            "reasons": sorted({c.route.reason for c in self.counters if c.route.reason}),
            "rank": self.rank,
            "world": self.world,
            "device": self.device,
            "transport": self.transport,
            "plan": self.plan.as_dict(),
            "counters": [counter.as_dict() for counter in self.counters],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = (
            f"rank {self.rank} of {self.world} on {self.device} ({self.transport}): "
            f"requested {self.requested_mode}, effective {self.effective_mode}"
        )
        table = Table(title=title)
        for name in ("op", "backend", "algorithm", "mode"):
            table.add_column(name, overflow="fold")
        for name in ("calls", "captured", "rows", "bytes"):
            table.add_column(name, justify="right")
        for c in self.counters:
            r = c.route
            numbers = (f"{n:,}" for n in (c.calls, c.captured, c.rows, c.bytes))
            table.add_row(r.op, r.backend, r.algorithm, r.mode, *numbers)
        yield table
        for reason in sorted({c.route.reason for c in self.counters if c.route.reason}):
            yield f"[yellow]not as requested:[/] {reason}"
