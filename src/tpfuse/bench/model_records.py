"""The rows of a model's benchmark, what is told from them, and their table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tpfuse.bench.plot import INK, QUIET, RC, check_plot
from tpfuse.bench.records import short_commit, short_gpu
from tpfuse.bench.report import CPU_NOTE
from tpfuse.errors import InvalidArgument
from tpfuse.plan import combined_mode

STOCK = "stock"
COLOURS: Mapping[str, str] = {
    STOCK: "#999999", "off": "#56B4E9", "control": "#0072B2", "fused": "#D55E00",
    "eager": "#999999", "compiled": "#0072B2", "piecewise": "#D55E00",
}  # fmt: skip
PANELS = (("output tokens a second", "output_tok_s", 1.0), ("ms a token", "tpot_s", 1e3))  # title, field, factor


@dataclass(frozen=True)
class ModelRecord:
    """One workload of one model in one mode. "stock" is transformers' own TP plan: it has no modes, so the mode fields
    are empty. Times are the maximum over ranks of their medians."""

    preset: str
    impl: str  # "tpfuse", or "stock"
    requested_mode: str
    effective_mode: str
    reason: str  # why the effective mode is not the requested one
    layers: int
    world: int
    concurrency: int
    input_len: int
    output_len: int
    dtype: str
    requested_graphs: str  # none, full (decode steps in one CUDA graph each) or piecewise (prompt and decode in pieces)
    graphs: str  # which there were: on a CPU none
    compiler: str  # of decode steps, or of pieces: inductor, or empty, where they ran as the model has them
    experts: str  # transformers' implementation of the experts; empty for its default
    captured: list[dict[str, Any]]  # for each captured number of tokens: tokens, graphs, seconds, bytes of their pool
    chunk_s: dict[str, dict[str, float]]  # time of a prefill chunk: eager, compiled, piecewise, then by tokens
    ttft_s: float | None  # prompt to first token
    tpot_s: float | None  # (latency - ttft) / (output_len - 1)
    total_tok_s: float | None  # input and output tokens
    output_tok_s: float | None
    tok_s_per_gpu: float | None  # of output_tok_s
    memory_gib: float | None  # the most that torch had allocated on one GPU
    collectives_per_layer: float | None  # of one decode step
    ok: bool
    error: str
    gpu: str
    driver: str
    versions: dict[str, str]
    commit: str

    @property
    def name(self) -> str:
        """The mode that was asked for, as it is called in tables."""
        return self.requested_mode or STOCK


def effective_mode(records: Sequence[ModelRecord]) -> str:
    """Of the rows of tpfuse that ran: what file names carry."""
    found = sorted({record.effective_mode for record in records if record.ok and record.impl != STOCK})
    return "+".join(found) if found else (STOCK if any(r.ok for r in records) else combined_mode(()))


def result_name(records: Sequence[ModelRecord]) -> str:
    """`model-minimax-m2-h200x4-control+fused-full.jsonl`, or `-full-inductor.jsonl`: modes and graphs are the EFFECTIVE
    ones."""
    if not records:
        raise InvalidArgument("result_name: no records, so there is no machine and no mode to name.")
    first = records[0]
    graphs = "-".join(name for name in (first.graphs, first.compiler) if name)
    return f"model-{first.preset}-{short_gpu(first.gpu)}x{first.world}-{effective_mode(records)}-{graphs}.jsonl"


def report(records: Sequence[ModelRecord]) -> RenderableType:
    """A table, one row for each workload and mode, and every failure with its reason."""
    if not records:
        return Text("nothing was measured", style="yellow")
    first = records[0]
    graphs = f"CUDA graphs {first.graphs}"
    graphs += "" if first.graphs == first.requested_graphs else f" ({first.requested_graphs} requested)"
    graphs += f", compiled by {first.compiler}" if first.compiler else ""
    shape = f"{first.layers} layers, {first.input_len} in, {first.output_len} out, {first.dtype}, {graphs}"
    parts: list[RenderableType] = [
        escape(f"{first.world} ranks on {first.gpu}, commit {short_commit(first.commit)}"),
        f"{first.preset}: {shape}",
    ]
    table = Table()
    for name in ("requests", "mode", "effective"):
        table.add_column(name)
    for name in ("TTFT ms", "TPOT ms", "tok/s", "a GPU", f"vs {baseline_of(records)}", "GiB", "coll./layer"):
        table.add_column(name, justify="right")
    for r in records:
        numbers = (_ms(r.ttft_s), _ms(r.tpot_s), _number(r.output_tok_s), _number(r.tok_s_per_gpu))
        more = (ratio(r, records), _number(r.memory_gib), _number(r.collectives_per_layer))
        table.add_row(str(r.concurrency), r.name, r.effective_mode if r.ok else "failed", *numbers, *more)
    parts.append(table)
    if any(r.captured for r in records):
        parts.append(_captured(records))
    parts += [_chunks(r) for r in records if r.chunk_s]
    parts += [Text(line, style="red") for line in failures(records)]
    parts += [
        Text(f"not as requested: {reason}", style="yellow") for reason in sorted({r.reason for r in records} - {""})
    ]
    if first.gpu.startswith("CPU"):
        parts.append(Text(CPU_NOTE, style="yellow"))
    return Group(*parts)


def failures(records: Sequence[ModelRecord]) -> list[str]:
    """What failed, and why: a line for each row."""
    return [f"{r.name}, {_requests(r.concurrency)}: {r.error}" for r in records if not r.ok]


def _captured(records: Sequence[ModelRecord]) -> Table:
    """What capturing took, a row for each number of tokens."""
    table = Table(title="captured")
    for name in ("mode", "requests"):
        table.add_column(name)
    for name in ("tokens", "graphs", "seconds", "MiB"):
        table.add_column(name, justify="right")
    for record in records:
        for size in record.captured:
            numbers = f"{size['seconds']:.2f}", _number(size["bytes"] / 2**20)
            about = record.name, str(record.concurrency), str(size["tokens"]), str(size["graphs"])
            table.add_row(*about, *numbers)
    return table


def _chunks(record: ModelRecord) -> Table:
    """Time of a prefill chunk, and how many times as fast as compiled code without graphs piecewise is."""
    table = Table(title=f"ms a prefill chunk, {record.name}, the last of {record.input_len} tokens")
    for name in ("tokens", *record.chunk_s, "compiled / piecewise"):
        table.add_column(name, justify="right")
    for tokens, seconds in record.chunk_s["piecewise"].items():
        times = (_ms(way[tokens]) for way in record.chunk_s.values())
        table.add_row(tokens, *times, f"{record.chunk_s['compiled'][tokens] / seconds:.2f}x")
    return table


def baseline_of(records: Sequence[ModelRecord]) -> str:
    """What the others are compared with: stock, or control where stock did not run."""
    return STOCK if any(record.name == STOCK for record in records) else "control"


def ratio(record: ModelRecord, records: Sequence[ModelRecord]) -> str:
    """Output tokens a second over the baseline's at the same workload."""
    baseline = baseline_of(records)
    for other in records:
        same = other.concurrency == record.concurrency and other.name == baseline != record.name
        if same and other.output_tok_s and record.output_tok_s:
            return f"{record.output_tok_s / other.output_tok_s:.2f}x"
    return ""


def plot(records: Sequence[ModelRecord], path: Path) -> None:
    """Bars of output tokens a second and of the time a token, for each number of requests; and of the time of a prefill
    chunk, where there is one. Raises InvalidArgument."""
    check_plot(path)
    ran = [record for record in records if record.ok]
    if not ran:
        raise InvalidArgument("plot: no row has a time, so there is nothing to draw.")
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = ran[0]
    chunked = next((record for record in ran if record.chunk_s), None)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(13.0 if chunked else 9.5, 3.6), dpi=160, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"{first.preset}, {first.layers} layers, TP{first.world} on {first.gpu}: "
            f"effective {effective_mode(ran)}, CUDA graphs {first.graphs}"
            + (f", {first.compiler}" if first.compiler else ""),
            color=INK,
            fontsize=11,
        )
        panels = figure.subplots(1, 3 if chunked else 2)
        counts = sorted({record.concurrency for record in ran})
        for axes, (title, field, factor) in zip(panels, PANELS, strict=False):
            series = {r.name: dict.fromkeys(counts, 0.0) for r in ran}
            for r in ran:
                series[r.name][r.concurrency] = (getattr(r, field) or 0.0) * factor
            _bars(axes, title, [_requests(count) for count in counts], series)
        if chunked:
            ms = {way: {n: s * 1e3 for n, s in times.items()} for way, times in chunked.chunk_s.items()}
            title = f"ms a prefill chunk, {chunked.name}"
            _bars(panels[2], title, [f"{tokens} tokens" for tokens in chunked.chunk_s["piecewise"]], ms)
        figure.savefig(path)


def _bars(axes: Any, title: str, groups: Sequence[str], series: Mapping[str, Mapping[Any, float]]) -> None:
    """A group of bars for each workload, in it a bar for each series."""
    width = 0.8 / max(2, len(series))
    for at, (name, values) in enumerate(series.items()):
        places = [index + (at - (len(series) - 1) / 2) * width for index in range(len(groups))]
        axes.bar(places, list(values.values()), width * 0.94, label=name, color=COLOURS.get(name, QUIET))
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(series))


def _requests(count: int) -> str:
    return f"{count} request{'s' if count > 1 else ''}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
