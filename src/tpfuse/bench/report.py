"""The rows of a benchmark as rich tables: for each op a headline, a table, and every row that failed with its reason.

Only rows that are ok take part in a ratio. `vs best` is the best baseline's time over tpfuse's: above 1, tpfuse is
faster. `of ceiling` is the ceiling over tpfuse's time, see ceilings.py. `vs without RoPE` is what the rotation adds to
tpfuse's time of the same op without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import geometric_mean
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tpfuse.bench.records import TPFUSE, Record, modes, short_commit

CPU_NOTE = "On a CPU only ratios within this run mean anything: cores are shared and their clock changes."


class Key(NamedTuple):
    """What a row of a table is about."""

    tokens: int
    cache: str


def report(records: Sequence[Record]) -> RenderableType:
    """All of it, to be printed with rich."""
    parts: list[RenderableType] = []
    if records:
        parts += [escape(f"{records[0].world} ranks on {records[0].gpu}, commit {short_commit(records[0].commit)}"), ""]
    ops = by_op(records)
    for op, rows in ops.items():
        alone = times(ops.get(op.removesuffix("_rope"), ())) if op.endswith("_rope") else {}
        parts += [_headline(rows), _title(rows), _table(rows, alone), *_reasons(rows), *_failures(rows), ""]
    if on_cpu(records):
        parts.append(Text(CPU_NOTE, style="yellow"))
    return Group(*parts)


def by_op(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The rows of each op, in the order of the run."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.op, []).append(record)
    return found


def on_cpu(records: Sequence[Record]) -> bool:
    """There the ceilings mean nothing either: Gloo's all-gather is no bound on its all-reduce."""
    return any(record.gpu.startswith("CPU") for record in records)


def times(records: Iterable[Record]) -> dict[Key, dict[str, float]]:
    """µs by case and implementation, of the rows that are ok."""
    found: dict[Key, dict[str, float]] = {}
    for r in records:
        case = found.setdefault(Key(r.tokens, r.cache), {})
        if r.ok and r.us:
            case[r.impl] = r.us
    return found


def ratio(case: dict[str, float]) -> float | None:
    """The best baseline's time over tpfuse's, where there are both."""
    others = [us for impl, us in case.items() if impl != TPFUSE]
    return min(others) / case[TPFUSE] if others and TPFUSE in case else None


def _headline(rows: Sequence[Record]) -> Text:
    """One line on an op: how tpfuse stands against the best baseline."""
    op, cases = rows[0].op, times(rows)
    ratios = {key: found for key, case in cases.items() if (found := ratio(case)) is not None}
    if not ratios:
        return Text(f"{op}: nothing to compare, see below", style="bold yellow")
    low, high = min(ratios.values()), max(ratios.values())
    ahead = sum(r > 1 for r in ratios.values())
    text = Text(f"{op}: ", style="bold")
    text.append(f"{geometric_mean(ratios.values()):.2f}x", style="bold green" if low > 1 else "bold yellow")
    text.append(f" the best baseline's speed ({low:.2f}x to {high:.2f}x), ahead in {ahead} of {len(ratios)} rows")
    return text


def _title(rows: Sequence[Record]) -> str:
    """The table's title, as a line of its own: rich would fold it to the table's width."""
    first, (requested, effective) = rows[0], modes(rows)
    same = "" if requested == effective else "bold yellow"
    mode = f"requested {requested}, effective " + (f"[{same}]{effective}[/]" if same else effective)
    return f"{first.width} {first.dtype}, {mode}"


def _table(rows: Sequence[Record], alone: dict[Key, dict[str, float]]) -> Table:
    """alone: the times of the same op without its rotation, where the rows are of one with."""
    cpu, cases = on_cpu(rows), times(rows)
    ran = dict.fromkeys(impl for case in cases.values() for impl in case)  # those with a time, in order
    baselines = [impl for impl in ran if impl != TPFUSE]
    ceilings = {Key(r.tokens, r.cache): r.ceiling_us for r in rows}
    table = Table()
    table.add_column("tokens", justify="right")
    table.add_column("cache")
    table.add_column("tpfuse µs", justify="right", style="bold")
    for impl in baselines:
        table.add_column(f"{impl} µs", justify="right")
    table.add_column("vs best", justify="right")
    if alone:
        table.add_column("vs without RoPE", justify="right")
    if not cpu:
        table.add_column("of ceiling", justify="right")
    for key, case in cases.items():
        cells = [_us(case.get(impl)) for impl in (TPFUSE, *baselines)]
        added = [_added(case.get(TPFUSE), alone.get(key, {}).get(TPFUSE))] if alone else []
        shares = [] if cpu else [_share(ceilings[key], case.get(TPFUSE))]
        table.add_row(f"{key.tokens:,}", key.cache, *cells, _ratio(ratio(case)), *added, *shares)
    return table


def _us(us: float | None) -> str:
    if us is None:
        return "failed"
    return f"{us:.2f}" if us < 100 else f"{us:,.0f}"


def _ratio(found: float | None) -> str:
    if found is None:
        return "-"
    return f"[green]{found:.2f}x[/]" if found > 1 else f"[yellow]{found:.2f}x[/]"


def _added(us: float | None, alone: float | None) -> str:
    return f"{us / alone - 1:+.0%}" if us and alone else "-"


def _share(ceiling: float | None, us: float | None) -> str:
    return f"{ceiling / us:.0%}" if ceiling and us else "-"


def _reasons(rows: Sequence[Record]) -> list[str]:
    """What tpfuse really ran, and why not as requested."""
    ours = [r for r in rows if r.impl == TPFUSE and r.ok]
    ran: dict[tuple[str, str, str, str], list[int]] = {}
    for r in ours:
        ran.setdefault((r.effective_mode, r.backend, r.algorithm, r.reason), []).append(r.tokens)
    return [
        escape(f"tpfuse ran {mode} at {_span(tokens)} tokens: {backend}, {algorithm}")
        + (f" [yellow]({escape(reason)})[/]" if reason else "")
        for (mode, backend, algorithm, reason), tokens in ran.items()
    ]


def _span(tokens: Sequence[int]) -> str:
    low, high = min(tokens), max(tokens)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _failures(rows: Sequence[Record]) -> list[str]:
    """One line for each implementation and reason, so that forty rows of one cause are one line."""
    found: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        if not row.ok:
            found.setdefault((row.impl, row.error), []).append(row)
    everywhere = len({Key(r.tokens, r.cache) for r in rows})
    return [
        f"[red]failed:[/] {impl}, {_where(failed, everywhere)}: {escape(error)}"
        for (impl, error), failed in found.items()
    ]


def _where(failed: Sequence[Record], everywhere: int) -> str:
    if len(failed) == everywhere:
        return "all rows"
    return "tokens " + ", ".join(f"{r.tokens} {r.cache}" for r in failed)
