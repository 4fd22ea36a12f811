"""A picture of a benchmark: for each op, time over tokens beside the ratio of each baseline to tpfuse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpfuse.bench.records import TPFUSE, Record, modes, short_commit
from tpfuse.bench.report import by_op, on_cpu, times
from tpfuse.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by everyone; a marker of its own backs each of them.
STYLES: Mapping[str, tuple[str, str]] = {
    TPFUSE: ("#D55E00", "o"),
    "nccl": ("#0072B2", "s"),
    "gloo": ("#0072B2", "s"),
    "gather": ("#009E73", "^"),
    "symm_mem_one_shot": ("#CC79A7", "D"),
    "symm_mem_two_shot": ("#56B4E9", "v"),
}
LABELS = {"symm_mem_one_shot": "symm_mem one-shot", "symm_mem_two_shot": "symm_mem two-shot"}
LEFT = 0.025  # of the figure's width, where the title begins
SPARE = (("#E69F00", "P"), ("#555555", "X"))  # for baselines that are not ours
INK, QUIET, GRID = "#1A1A1A", "#6B6B6B", "#E4E4E4"
WIDTH, PANEL, GAP, HEAD, FOOT = 11.5, 2.5, 0.95, 1.45, 0.95  # inches; GAP is between rows of panels

RC: Any = {  # Any: matplotlib types the keys as one long Literal
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Source Sans 3", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": "#B0B0B0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}

FORMATS = (".png", ".pdf", ".svg")

Series = dict[str, dict[int, float]]  # by implementation, then tokens
Ends = dict[str, tuple[float, float, str]]  # by label: where its line ends, and its colour


def plot(records: Sequence[Record], path: Path | str, name: str = "") -> None:
    """Write the picture; the ending of path says the format. name: of the preset, for the title.

    Cold rows where there are any, else hot ones. Raises what check_plot does, and InvalidArgument where no row has a
    time.
    """
    check_plot(path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cache = "cold" if any(r.ok and r.cache == "cold" for r in records) else "hot"
    shown = {op: rows for op, rows in by_op(r for r in records if r.cache == cache).items() if _series(rows)}
    if not shown:
        raise InvalidArgument("plot: no row has a time, so there is nothing to draw.")
    with mpl.rc_context(RC):
        height = HEAD + PANEL * len(shown) + GAP * (len(shown) - 1) + FOOT
        figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        _title(figure, records, name, cache, height)
        grid = figure.add_gridspec(
            len(shown), 2, left=0.06, right=0.855, wspace=0.56, hspace=GAP / PANEL,
            top=1 - HEAD / height, bottom=FOOT / height,
        )  # fmt: skip
        for row, (op, rows) in enumerate(shown.items()):
            last = row == len(shown) - 1
            _time_panel(figure.add_subplot(grid[row, 0]), op, rows, last)
            _ratio_panel(figure.add_subplot(grid[row, 1]), rows, last)
        figure.savefig(path)


def check_plot(path: Path | str) -> None:
    """Raises InvalidArgument for an ending that is not of FORMATS, Unsupported without matplotlib."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InvalidArgument(f"plot: {path}; supported endings: {', '.join(FORMATS)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise Unsupported("plot: matplotlib is missing. Install it with: pip install tpfuse[plot]") from error


def _series(rows: Sequence[Record]) -> Series:
    """The lines of a panel, tpfuse first."""
    found: Series = {}
    for key, case in times(rows).items():
        for impl, us in case.items():
            found.setdefault(impl, {})[key.tokens] = us
    return dict(sorted(found.items(), key=lambda item: item[0] != TPFUSE))


def _title(figure: Figure, records: Sequence[Record], name: str, cache: str, height: float) -> None:
    first = records[0]
    requested, effective = modes(records)
    mode = effective if effective == requested else f"{effective} ({requested} requested)"
    title = f"{name}: tpfuse {mode}" if name else f"tpfuse {mode}"
    figure.text(LEFT, 1 - 0.36 / height, title, fontsize=15, fontweight="bold", va="center")
    facts = [f"{first.world} × {first.gpu}" if not on_cpu(records) else f"{first.world} ranks on {first.gpu}"]
    facts += [first.dtype, f"{cache} cache"]
    figure.text(LEFT, 1 - 0.66 / height, "   ·   ".join(facts), fontsize=10, color=QUIET, va="center")
    versions = ", ".join(
        f"{name} {first.versions[name]}" for name in ("torch", "cuda", "nccl") if name in first.versions
    )
    note = "; on a CPU only ratios within one run mean anything" if on_cpu(records) else ""
    foot = f"maximum over ranks of their median; {versions}; commit {short_commit(first.commit)}{note}"
    figure.text(LEFT, 0.22 / height, foot, fontsize=7.5, color=QUIET, va="center")


def _time_panel(axes: Axes, op: str, rows: Sequence[Record], last: bool) -> None:
    series = _series(rows)
    _frame(axes, rows, last)
    axes.set_yscale("log")
    axes.set_title(op, loc="left", fontsize=11, fontweight="bold", pad=22)
    _caption(axes, f"µs a call, width {rows[0].width}")
    ends: Ends = {impl: _line(axes, impl, line, series) for impl, line in series.items()}
    ceiling = {} if on_cpu(rows) else {r.tokens: r.ceiling_us for r in rows if r.ceiling_us}
    if ceiling:
        tokens = sorted(ceiling)
        lowest = min(us for line in series.values() for us in line.values())
        floor = 10 ** math.floor(math.log10(lowest) - 0.35)
        axes.plot(tokens, [ceiling[t] for t in tokens], color=QUIET, lw=1.1, ls=(0, (4, 3)), zorder=1)
        axes.set_ylim(bottom=max(floor, min(ceiling.values()) / 1.5))
        ends["ceiling"] = (tokens[-1], ceiling[tokens[-1]], QUIET)
    _plain_log_ticks(axes)
    _label_ends(axes, ends)


def _ratio_panel(axes: Axes, rows: Sequence[Record], last: bool) -> None:
    series = _series(rows)
    ours = series.get(TPFUSE, {})
    _frame(axes, rows, last)
    axes.set_yscale("log", base=2)
    _caption(axes, "time over tpfuse's; above 1×, tpfuse is faster")
    color = STYLES[TPFUSE][0]
    axes.axhline(1, color=color, lw=2.4, zorder=2)
    ends: Ends = {TPFUSE: (max(ours), 1.0, color)} if ours else {}
    for impl, line in series.items():
        ratios = {tokens: us / ours[tokens] for tokens, us in line.items() if tokens in ours}
        if impl != TPFUSE and ratios:
            ends[impl] = _line(axes, impl, ratios, series)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1 / 1.5), max(high, 1.5))
    _ratio_ticks(axes)
    axes.axhspan(1, axes.get_ylim()[1], color=color, alpha=0.055, lw=0, zorder=0)
    _label_ends(axes, ends)


def _caption(axes: Axes, text: str) -> None:
    axes.annotate(
        text, xy=(0, 1), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=QUIET
    )


def _frame(axes: Axes, rows: Sequence[Record], last: bool) -> None:
    tokens = sorted({key.tokens for key in times(rows)})
    axes.set_xscale("log", base=2)
    shown = tokens if len(tokens) <= 8 else tokens[::2]
    axes.set_xticks(shown, [f"{t}" if t < 1024 or t % 1024 else f"{t // 1024}k" for t in shown])
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    if last:
        axes.set_xlabel("tokens", labelpad=4)


def _style(impl: str, series: Series) -> tuple[str, str]:
    if impl in STYLES:
        return STYLES[impl]
    unknown = [name for name in series if name not in STYLES]
    return SPARE[unknown.index(impl) % len(SPARE)]


def _line(axes: Axes, impl: str, line: dict[int, float], series: Series) -> tuple[float, float, str]:
    """Draw one implementation; returns where it ends, and its colour."""
    color, marker = _style(impl, series)
    ours = impl == TPFUSE
    tokens = sorted(line)
    axes.plot(
        tokens, [line[t] for t in tokens], color=color, marker=marker, lw=2.4 if ours else 1.5,
        ms=5.5 if ours else 4.5, mec="white", mew=0.7, zorder=4 if ours else 3,
    )  # fmt: skip
    return tokens[-1], line[tokens[-1]], color


def _label_ends(axes: Axes, ends: Ends) -> None:
    """Write each line's name to the right, pushed apart where they would overlap, with a thin line to its end."""
    if not ends:
        return
    figure = axes.figure
    axes_height = axes.get_window_extent().height
    step = 11.5 / 72 * figure.dpi / axes_height  # a line of text, in parts of the axes' height
    to_axes = axes.transScale + axes.transLimits
    places = sorted((float(to_axes.transform((x, y))[1]), name) for name, (x, y, _) in ends.items())
    heights = spread([place for place, _ in places], step)
    overhang = max(0.0, heights[-1] - 1.0)
    for (_, name), height in zip(places, heights, strict=True):
        x, y, color = ends[name]
        axes.annotate(
            LABELS.get(name, name), xy=(x, y), xytext=(1.05, height - overhang), textcoords="axes fraction",
            color=color, fontsize=8.5, fontweight="bold" if name == TPFUSE else "normal", va="center", ha="left",
            annotation_clip=False, zorder=1,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "alpha": 0.55, "shrinkA": 2, "shrinkB": 4},
        )  # fmt: skip


def spread(places: Sequence[float], step: float) -> list[float]:
    """Rising places, moved as little as needed to be at least `step` apart: groups that collide share their middle."""
    groups: list[list[float]] = []  # each: the true places of labels that touch
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _top(groups[-2], step) + step > _bottom(groups[-1], step):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, step) + step * n for group in groups for n in range(len(group))]


def _bottom(group: Sequence[float], step: float) -> float:
    return sum(group) / len(group) - step * (len(group) - 1) / 2


def _top(group: Sequence[float], step: float) -> float:
    return _bottom(group, step) + step * (len(group) - 1)


def _plain_log_ticks(axes: Axes) -> None:
    """1, 10, 100, and 2 and 5 between them where the axis is short."""
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.6 else (1,)
    ticks = [
        step * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for step in steps
        if low <= step * 10.0**power <= high
    ]
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


def _ratio_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    ticks = [2.0**n for n in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    if len(ticks) < 4:
        ticks = sorted({*ticks, *(t for t in (0.67, 0.8, 1.25, 1.5, 3.0) if low <= t <= high)})
    axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)
