"""`tpfuse info`: what this machine has, how its GPUs are linked, and what each backend can do here and why not."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from tpfuse import __version__
from tpfuse.backends.cuda import missing, tuning
from tpfuse.backends.cuda.all_reduce import DEFAULTS, Thresholds
from tpfuse.backends.cuda.backend import WORKSPACE_BYTES
from tpfuse.backends.cuda.workspace import MAX_WORLD, place
from tpfuse.errors import InvalidArgument, Unsupported

SMI_SECONDS = 30.0  # nvidia-smi may have to start the driver


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    memory_gib: float
    capability: str


@dataclass(frozen=True)
class Link:
    """How two GPUs reach each other: `kind` as nvidia-smi says it (NV18, PIX, SYS, ...), empty if it can't be asked."""

    a: int
    b: int
    p2p: bool
    kind: str


@dataclass(frozen=True)
class BackendState:
    name: str
    available: bool
    detail: str


@dataclass(frozen=True)
class Tuned:
    """What a new communicator of so many of these GPUs goes by, and where it is from."""

    world: int
    thresholds: Thresholds
    source: str


@dataclass(frozen=True)
class Info:
    versions: dict[str, str]
    cpu: str
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...]
    backends: tuple[BackendState, ...]
    tuned: tuple[Tuned, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def collect() -> Info:
    gpus = tuple(_gpu(i) for i in range(torch.cuda.device_count()))
    links = _links(len(gpus))
    backends = _backends(links)
    tuned = thresholds_of(place(0).model, len(gpus)) if backends[0].available else ()
    return Info(_versions(), cpu_name(), gpus, links, backends, tuned)


def _gpu(index: int) -> Gpu:
    p = torch.cuda.get_device_properties(index)
    return Gpu(index, p.name, round(p.total_memory / 2**30, 1), f"{p.major}.{p.minor}")


def cpu_name() -> str:
    """The processor's model name, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"tpfuse": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        if dist.is_nccl_available():
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = _driver()
    return versions | ({"driver": driver} if driver else {})


def _driver() -> str:
    """Its version, or why there is none to tell; empty where there is no nvidia-smi."""
    try:
        return _first_line(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"))
    except Unsupported as error:
        return f"not available ({error})"


def _links(count: int) -> tuple[Link, ...]:
    kinds = _kinds() if count > 1 else {}
    return tuple(
        Link(a, b, torch.cuda.can_device_access_peer(a, b), kinds.get((a, b), ""))
        for a in range(count)
        for b in range(a + 1, count)
    )


def _kinds() -> dict[tuple[int, int], str]:
    try:
        return topology(_nvidia_smi("topo", "-m"))
    except Unsupported:  # why is told as the driver's version
        return {}


def topology(matrix: str) -> dict[tuple[int, int], str]:
    """The cells of nvidia-smi's topology matrix: (0, 1) -> "NV18"."""
    rows = [line.split() for line in matrix.splitlines() if line.startswith("GPU")]
    return {
        (int(row[0][3:]), column): cell
        for row in rows
        for column, cell in enumerate(row[1 : len(rows) + 1])
        if cell != "X"
    }


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints, or nothing where there is none. Raises Unsupported where it is of no use."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unsupported(f"{tool} did not answer within {SMI_SECONDS:g} s") from error
    except OSError as error:
        raise Unsupported(f"{tool} can't be run: {error.strerror}") from error
    if done.returncode:
        said = _first_line(done.stderr or done.stdout)
        raise Unsupported(f"{tool} ended with code {done.returncode}{': ' if said else ''}{said}")
    return done.stdout


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _backends(links: Sequence[Link]) -> tuple[BackendState, ...]:
    transports = [name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", _nccl())) if there]
    detail = f"through {' and '.join(transports)}: all ops, any number of ranks, across nodes"
    reason = _why_not_cuda(links)
    served = f"all ops in own kernels, for 2 to {MAX_WORLD} of these GPUs"
    held = f"{WORKSPACE_BYTES / 2**20:.1f} MiB of workspace a group and GPU"
    return (
        BackendState("cuda", reason is None, reason or f"{served}; {held}"),
        BackendState("collective", bool(transports), detail),
    )


def thresholds_of(model: str, gpus: int) -> tuple[Tuned, ...]:
    """For each number of ranks that so many GPUs of this model allow."""
    try:
        file = tuning.tuning_file()
        path, found, other = str(file), tuning.read(file).get(model, {}), "default"
    except InvalidArgument as error:
        path, found, other = "", {}, f"default: {error}"
    return tuple(
        Tuned(world, found.get(world, default), path if world in found else other)
        for world, default in DEFAULTS.items()
        if world <= gpus
    )


def _why_not_cuda(links: Sequence[Link]) -> str | None:
    """Why the cuda backend can't work between the GPUs of this machine. Ranks judge again, together, for theirs."""
    count = torch.cuda.device_count()
    if count < 2:
        return f"needs at least 2 GPUs that reach each other; torch sees {count}"
    apart = next((f"{link.a} and {link.b}" for link in links if not link.p2p), None)
    return missing() or (f"no peer access between GPUs {apart}" if apart else None)


def _nccl() -> bool:
    return dist.is_nccl_available() and torch.cuda.is_available()


def show(console: Console, info: Info) -> None:
    console.print("  ".join(f"[bold]{name}[/] {version}" for name, version in info.versions.items()))
    console.print(f"[bold]cpu[/] {info.cpu}")
    if info.gpus:
        table = Table("gpu", "name", "memory", "compute capability")
        for g in info.gpus:
            table.add_row(str(g.index), g.name, f"{g.memory_gib:g} GiB", g.capability)
        console.print(table)
    else:
        console.print("[bold]gpus[/] none that torch can use; everything runs on the CPU through gloo")
    if info.links:
        table = Table("link", "kind", "peer to peer", title="links")
        for link in info.links:
            table.add_row(f"{link.a} - {link.b}", link.kind or "unknown", "yes" if link.p2p else "no")
        console.print(table)
    table = Table("backend", "here", "what it can do, or why not", title="backends")
    for b in info.backends:
        table.add_row(b.name, "[green]yes[/]" if b.available else "[red]no[/]", b.detail)
    console.print(table)
    if info.tuned:
        table = Table("ranks", "one-shot up to", "split up to", "from", title="thresholds of all-reduces")
        for t in info.tuned:
            one_shot, split = f"{t.thresholds.one_shot_kib} KiB of a rank", f"{t.thresholds.split_rows} rows"
            table.add_row(str(t.world), one_shot, split, t.source)
        console.print(table)
