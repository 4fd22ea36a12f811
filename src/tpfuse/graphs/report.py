"""What graphs were captured, what they hold, and what ran: as data and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table


@dataclass
class SizeCounter:
    """One captured size, over all runners; a call of a model is one of each of its traced graphs. `graphs` are alive;
    everything else was counted since the backend was made.

    `calls` were served by this size, of them `replays` by graphs that were there already, the others captured them.
    `tokens` were asked for, `padding` was computed with them. `seconds` and `bytes`: what it took to capture the graphs
    that are alive, or those that were at the last report.
    """

    size: int
    graphs: int = 0
    captures: int = 0
    calls: int = 0
    replays: int = 0
    tokens: int = 0
    padding: int = 0
    seconds: float = 0.0
    bytes: int = 0

    @property
    def waste(self) -> float:
        """The part of the computed rows that was padding."""
        return self.padding / (self.tokens + self.padding) if self.padding else 0.0


@dataclass
class Counts:
    """What a backend counts while it runs."""

    sizes: dict[int, SizeCounter]
    misses: Counter[int] = field(default_factory=Counter)  # by number of tokens
    eager: Counter[str] = field(default_factory=Counter)  # calls, by the reason why nothing was captured
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GraphReport:
    """What a Piecewise backend has done. `misses` had more tokens than the largest size, and ran eagerly; `eager`
    calls could not be captured at all, by reason; `unseen` operators of split_ops were in no graph; `bytes` is what
    pools and padded buffers hold now."""

    mechanism: str
    runners: int
    pieces: int
    split_calls: int
    sizes: tuple[SizeCounter, ...]
    misses: dict[int, int]
    eager: dict[str, int]
    failures: tuple[str, ...]
    unseen: tuple[str, ...]
    pool_bytes: int
    buffer_bytes: int

    @property
    def graphs(self) -> int:
        return sum(size.graphs for size in self.sizes)

    @property
    def replays(self) -> int:
        return sum(size.replays for size in self.sizes)

    @property
    def bytes(self) -> int:
        return self.pool_bytes + self.buffer_bytes

    @property
    def waste(self) -> float:
        """The part of all computed rows that was padding."""
        padding = sum(size.padding for size in self.sizes)
        return padding / (padding + sum(size.tokens for size in self.sizes)) if padding else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "sizes": [asdict(size) | {"waste": size.waste} for size in self.sizes],
            "graphs": self.graphs,
            "replays": self.replays,
            "bytes": self.bytes,
            "waste": self.waste,
        }

    def __rich__(self) -> Group:
        table = Table(
            title=f"{self.mechanism}: {self.graphs} graphs of {self.pieces} pieces in {self.runners} runners, "
            f"{self.split_calls} split operators, {self.bytes / 2**20:,.1f} MiB held, {self.waste:.1%} padding"
        )
        for name in ("size", "graphs", "captures", "calls", "replays", "tokens", "padding", "seconds", "MiB"):
            table.add_column(name, justify="right")
        for s in self.sizes:
            numbers = (f"{n:,}" for n in (s.size, s.graphs, s.captures, s.calls, s.replays, s.tokens))
            table.add_row(*numbers, f"{s.waste:.1%}", f"{s.seconds:.2f}", f"{s.bytes / 2**20:,.1f}")
        notes = [
            f"[yellow]miss:[/] {n:,} tokens, {calls:,} calls, run eagerly" for n, calls in sorted(self.misses.items())
        ]
        notes += [f"[yellow]not captured:[/] {calls:,} calls: {escape(reason)}" for reason, calls in self.eager.items()]
        notes += [f"[yellow]never seen:[/] {escape(op)}, of split_ops" for op in self.unseen]
        notes += [f"[red]failed:[/] {escape(failure)}" for failure in self.failures]
        return Group(table, *notes)
