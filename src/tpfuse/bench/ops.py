"""`run`: the ops of a preset, tpfuse and the baselines, on W ranks of this machine or under torchrun.
`finish`: its rows saved, printed and drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from tpfuse.backends.collective import short
from tpfuse.bench.cases import QK, Case, cases_of, check_ops, ops_of
from tpfuse.bench.ceilings import Rates, ceiling_us, measure_rates
from tpfuse.bench.implementations import (
    DEFAULT_BASELINES,
    Baseline,
    Implementation,
    Ran,
    Site,
    Tpfuse,
    find_baselines,
)
from tpfuse.bench.machine import Machine, describe
from tpfuse.bench.method import METHODS, Figure, Method, State, first_error, measure
from tpfuse.bench.plot import plot as draw
from tpfuse.bench.records import Record, write
from tpfuse.bench.report import report
from tpfuse.communicator import Communicator
from tpfuse.errors import InvalidArgument, first_line
from tpfuse.launch import Progress, Rank, default_device, resolve_world, run_ranks
from tpfuse.presets import Preset, find_preset

DEFAULT_TOKENS: Mapping[str, tuple[int, ...]] = {
    "cpu": (1, 8, 64, 256),
    "cuda": tuple(2**n for n in range(15)),  # 1 to 16384
}


def parse_tokens(text: str, option: str = "--tokens") -> tuple[int, ...]:
    """`1,8,64` as numbers. option: what the message calls it. Raises InvalidArgument."""
    try:
        return _checked_tokens([int(part) for part in text.split(",")])
    except ValueError as error:
        raise InvalidArgument(f"{option} {text!r}; needed: whole numbers of at least 1, as in 1,8,64.") from error


def run(
    preset: str = "minimax-m2",
    *,
    world: int | None = None,
    device_type: str | None = None,
    mode: str = "fused",
    tokens: Sequence[int] | None = None,
    ops: Sequence[str] | None = None,
    baselines: Sequence[str | Baseline] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Measure the ops of a preset.

    world, device_type: None for all GPUs, or 2 ranks on a CPU. mode: the one to request. tokens: None for
    DEFAULT_TOKENS. ops: names from cases.OPS; None for all on GPUs, and on a CPU for those without quantised outputs
    and sharded residuals, which take another path on GPUs only. baselines: names from implementations.BASELINES, or
    Baselines of your own (their `make` a module-level function); None for the usual ones, an empty list for none.
    Every rank gets all records; under torchrun only rank 0 should write them.
    Raises InvalidArgument, Unsupported, and what the communicator or a rank raises.
    """
    shapes = find_preset(preset)
    device_type = device_type or default_device()
    if device_type not in METHODS:
        raise InvalidArgument(f"device {device_type!r}; there are: {', '.join(METHODS)}.")
    chosen: list[Baseline] = []
    for given in DEFAULT_BASELINES[device_type] if baselines is None else baselines:
        chosen += [given] if isinstance(given, Baseline) else find_baselines([given])
    counts = _checked_tokens(DEFAULT_TOKENS[device_type] if tokens is None else tokens)
    wanted = ops_of(shapes, variants=device_type == "cuda") if ops is None else check_ops(shapes, ops)
    ranks = resolve_world(world, device_type)
    results: list[list[Record]] = run_ranks(
        job, shapes, mode, counts, tuple(chosen), wanted, world=ranks, device_type=device_type, progress=progress
    )
    return results[0]


def finish(console: Console, records: Sequence[Record], json: Path | None, plot: Path | None, preset: str = "") -> None:
    """Save, print and draw a run, in this order: a picture that fails costs no figures. preset: for its title."""
    if json is not None:
        write(records, json)
    console.print(report(records))
    if json is not None:
        console.print(f"figures: {escape(str(json))}", soft_wrap=True, highlight=False)
    if plot is not None:
        draw(records, plot, preset)
        console.print(f"picture: {escape(str(plot))}", soft_wrap=True, highlight=False)


def _checked_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    if not tokens or min(tokens) < 1:
        raise InvalidArgument(f"tokens {list(tokens)}; needed: whole numbers of at least 1.")
    return tuple(sorted(set(tokens)))


def job(
    rank: Rank,
    preset: Preset,
    mode: str,
    tokens: Sequence[int],
    baselines: Sequence[Baseline],
    ops: Sequence[str] | None = None,
) -> list[Record]:
    """What each rank runs. Collective throughout: every decision on it is the same on all ranks."""
    cuda = rank.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    cases = cases_of(preset, rank.world, tokens, ops)
    with torch.no_grad(), Communicator(device=device, mode=mode, max_hidden=_max_hidden(cases)) as comm:
        comm.prepare()
        site = Site(rank.rank, rank.world, device, comm.transport, _max_bytes(cases))
        method, rates = METHODS[rank.device_type](device), measure_rates(device, rank.world)
        bench = Bench(rank, device, method, rates, describe(device))
        return bench.run(cases, Tpfuse(comm), baselines, site)


@dataclass
class Bench:
    """One rank's run."""

    rank: Rank
    device: torch.device
    method: Method
    rates: Rates
    machine: Machine

    def run(self, cases: Sequence[Case], ours: Tpfuse, baselines: Sequence[Baseline], site: Site) -> list[Record]:
        made, broken = make_baselines(baselines, site)
        implementations: list[Implementation] = [ours, *made]
        steps = [(case, state) for case in cases for state in self.method.states(case)]
        records: list[Record] = []
        for done, (case, state) in enumerate(steps):
            self._progress(done, len(steps), f"{case}, {state.cache}")
            able = [i for i in implementations if i.serves(case.op)]
            figures = list(zip(able, self._figures(case, state, able), strict=True))
            figures += [(b, Figure(None, (), error)) for b, error in broken if b.serves(case.op)]
            rans = [implementation.ran(case) for implementation, _ in figures]
            ceiling = None if case.unsupported else round(ceiling_us(case, self.rates, rans[0].algorithm), 3)
            records += [
                self._record(case, state, implementation.name, ran, figure, ceiling)
                for (implementation, figure), ran in zip(figures, rans, strict=True)
            ]
        self._progress(len(steps), len(steps), "done")
        return records

    def _figures(self, case: Case, state: State, able: Sequence[Implementation]) -> list[Figure]:
        if case.unsupported:
            return [Figure(None, (), case.unsupported)] * len(able)
        return measure(case, state, able, self.method, self.rank.rank, self.device)

    def _record(self, case: Case, state: State, name: str, ran: Ran, figure: Figure, ceiling: float | None) -> Record:
        return Record(
            op=case.op,
            impl=name,
            **ran._asdict(),
            world=case.world,
            tokens=case.tokens,
            width=case.width,
            dtype=short(case.dtype),
            layout=case.layout,
            quant=case.quant,
            cache=state.cache,
            us=figure.us,
            us_ranks=figure.us_ranks,
            ceiling_us=ceiling,
            ok=not figure.error,
            error=figure.error,
            **self.machine._asdict(),
        )

    def _progress(self, done: int, total: int, what: str) -> None:
        if self.rank.rank == 0:
            self.rank.progress(done, total, what)


def make_baselines(baselines: Sequence[Baseline], site: Site) -> tuple[list[Baseline], list[tuple[Baseline, str]]]:
    """Those that run here, and those that don't with the reason. Collective."""
    made: list[Baseline] = []
    broken: list[tuple[Baseline, str]] = []
    for baseline in baselines:
        ready, error = baseline, ""
        try:
            ready = baseline.made(site)
        except Exception as raised:
            error = first_line(raised)
        error = first_error(error)
        if error:
            broken.append((baseline, error))
        else:
            made.append(ready)
    return made, broken


def _max_hidden(cases: Sequence[Case]) -> int:
    return max(width for case in cases for width in case.local)


def _max_bytes(cases: Sequence[Case]) -> int:
    """Of the largest payload: two fp32 sums a row, or partial sums."""
    return max(case.tokens * (8 if case.op in QK else case.widths[0] * case.dtype.itemsize) for case in cases)
