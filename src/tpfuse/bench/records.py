"""The rows of a benchmark, as JSON lines: one figure of one implementation each. Failed cases are rows too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tpfuse.errors import InvalidArgument
from tpfuse.plan import combined_mode

TPFUSE = "tpfuse"  # `impl` of the rows that are not a baseline's


@dataclass(frozen=True)
class Record:
    """One row. The mode fields and `reason` are tpfuse's; on a baseline's row they are empty, it has no modes."""

    op: str
    impl: str  # "tpfuse" or the baseline's name
    backend: str
    algorithm: str  # what really ran; like backend empty where tpfuse ran nothing
    requested_mode: str
    effective_mode: str
    reason: str  # why the effective mode is not the requested one
    world: int
    tokens: int
    width: str  # whole rows: "3072", "6144+1024"
    dtype: str
    layout: str
    quant: str
    cache: str  # "cold" or "hot"
    us: float | None  # µs a call: the maximum over ranks of their medians; None where not ok
    us_ranks: tuple[float, ...]  # the median of each rank
    ceiling_us: float | None  # what bytes over measured rates allow; see ceilings.py
    ok: bool
    error: str
    gpu: str  # on a CPU: "CPU: " and its model name
    driver: str
    versions: dict[str, str]
    commit: str


def write(records: Iterable[Record], path: Path | str) -> None:
    """One JSON object a line, in the order of Record's fields."""
    lines = [json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    Path(path).write_text("".join(lines), encoding="utf-8")


def read(path: Path | str) -> list[Record]:
    """What `write` wrote. Raises InvalidArgument, with the line, for anything else."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, place: str) -> Record:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{place}: not a JSON line: {error}") from error
    names = {field.name for field in fields(Record)}
    if not isinstance(row, dict) or set(row) != names:
        odd = sorted(names ^ set(row)) if isinstance(row, dict) else sorted(names)
        raise InvalidArgument(f"{place}: not a row of `tpfuse bench ops`; missing or unknown: {', '.join(odd)}")
    return Record(**row | {"us_ranks": tuple(row["us_ranks"])})


def modes(records: Sequence[Record]) -> tuple[str, str]:
    """Requested and effective mode of a run. Effective is of the tpfuse rows that really ran: `mixed` where they
    differ, `none` where nothing ran."""
    ours = [record for record in records if record.impl == TPFUSE]
    return combined_mode(r.requested_mode for r in ours), combined_mode(r.effective_mode for r in ours if r.ok)


def short_gpu(gpu: str) -> str:
    """`NVIDIA H200` as `h200`, any CPU as `cpu`: for file names."""
    if gpu.startswith("CPU"):
        return "cpu"
    name = re.sub(r"^(NVIDIA|AMD|Instinct|GeForce|Tesla|\s)+", "", gpu, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def short_commit(commit: str) -> str:
    """Twelve digits, and still `+dirty`."""
    digits, plus, dirty = commit.partition("+")
    return digits[:12] + plus + dirty


def result_name(preset: str, records: Sequence[Record]) -> str:
    """The name of a result file. It carries the EFFECTIVE mode: `ops-minimax-m2-h200x4-control.jsonl`."""
    if not records:
        raise InvalidArgument("result_name: no records, so there is no machine and no mode to name.")
    machine = f"{short_gpu(records[0].gpu)}x{records[0].world}"
    return f"ops-{preset}-{machine}-{modes(records)[1]}.jsonl"
