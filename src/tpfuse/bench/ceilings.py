"""What the hardware allows: the bytes that a call must move, over rates measured in the same run.

`ceiling_us = max(memory bytes / copy rate, link bytes / link rate)`, all of one rank. It leaves out every latency, so
it means something for many tokens only. Bytes over the links are those of the algorithm that tpfuse ran. The link's
rate is that of a large all-gather in the same run, or what is known of the GPU's links if that is more: LINKS.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tpfuse.backends.cuda.backend import EARLY
from tpfuse.bench.cases import QK, Case
from tpfuse.bench.implementations import all_gather
from tpfuse.bench.machine import device_name

# Large enough that latency is nothing, and on a GPU several times its L2.
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
GATHER_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
REPEATS = 7
# The most that kernels push to all peers at once, in bytes a µs, on 4x H200 (NVLink, no multicast): a figure from
# outside. Kernels here have reached 348 GB/s (benchmarks/results/all-reduce-experiments-h200x4.txt, table 7).
LINKS = {"NVIDIA H200": 353e3}


@dataclass(frozen=True)
class Rates:
    """Bytes a µs, of the slowest rank. link is None where there is one rank."""

    copy: float
    link: float | None


def memory_bytes(case: Case) -> int:
    """Bytes through one rank's memory: each input read once, each output written once, nothing in between.

    With b bytes an element, c a residual's, T rows, and n = (q + k) / W or H columns:
    qk_rms_norm          T n b read, T n b written, n b gamma; with a rotation of d elements 4 T d + 8 T more: d / 2
                         cosines and sines in fp32 and a position for each row
    all_reduce           T H b read, T H b written
    all_reduce_rms_norm  T H b read, of each expert; T H b written, or T H quantised and 4 T scales; H b gamma; 2 T H c
                         residual, of own rows only where it is sharded by rows
    """
    b, c = case.dtype.itemsize, case.residual_dtype.itemsize
    columns = sum(case.local)
    elements = case.tokens * columns
    streamed = -(-case.tokens // case.world) * columns if case.row_sharded else elements
    written = (
        elements * b if case.quant == "none" else elements + (4 * case.tokens if case.quant != "fp8_static" else 4)
    )
    return {
        "qk_rms_norm": 2 * elements * b + columns * b + (4 * case.rope[1] + 8 if case.rope else 0) * case.tokens,
        "all_reduce": 2 * elements * b,
        "all_reduce_rms_norm": (case.top_k or 1) * elements * b + written + 2 * streamed * c + columns * b,
    }[case.called]


def link_bytes(case: Case, algorithm: str = "") -> float:
    """Bytes that one rank must receive (and send). algorithm: as the cuda backend's routes have it.

    qk_rms_norm          two fp32 sums from each peer: 8 (W - 1) T
    all_reduce and all_reduce_rms_norm
                         one-shot: every peer's row, (W - 1) T H b; else (W - 1) / W of the payload T H b to its owners,
                         and as much back, or T H bytes where owners have quantised
    """
    peers = case.world - 1
    if case.op in QK:
        return 8 * peers * case.tokens
    row = case.widths[0] * case.dtype.itemsize
    if algorithm.startswith("one-shot"):
        return peers * case.tokens * row
    quantised = algorithm == EARLY.algorithm and case.quant != "none"
    return peers / case.world * case.tokens * (row + (case.widths[0] if quantised else row))


def ceiling_us(case: Case, rates: Rates, algorithm: str = "") -> float:
    link = link_bytes(case, algorithm) / rates.link if rates.link else 0.0
    return max(memory_bytes(case) / rates.copy, link)


def measure_rates(device: torch.device, world: int) -> Rates:
    """Collective. All ranks at once, as in the ops: on a CPU they share the memory."""
    link = _link_rate(device, world) if world > 1 else None
    return Rates(_copy_rate(device), link and max(link, LINKS.get(device_name(device), 0.0)))


def _copy_rate(device: torch.device) -> float:
    """A large copy on the device; bytes read plus bytes written."""
    source = torch.rand(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / _slowest(_median_us(lambda: target.copy_(source), device))


def _link_rate(device: torch.device, world: int) -> float:
    """A large all-gather; bytes that one rank receives."""
    own = torch.rand(GATHER_BYTES[device.type] // 4, device=device)
    every = torch.empty(world * own.numel(), device=device)
    return (world - 1) * GATHER_BYTES[device.type] / _slowest(_median_us(lambda: all_gather(every, own), device))


def _median_us(call: Callable[[], object], device: torch.device) -> float:
    """µs of a call that runs so long that its launch is nothing."""
    call()
    return statistics.median(_TIMERS[device.type](call) for _ in range(REPEATS))


def _cpu_us(call: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _cuda_us(call: Callable[[], object]) -> float:
    calls = 4
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed * 1e3 / calls


_TIMERS: Mapping[str, Callable[[Callable[[], object]], float]] = {"cpu": _cpu_us, "cuda": _cuda_us}


def _slowest(us: float) -> float:
    """The maximum over ranks, by way of the CPU's group."""
    value = torch.tensor(us, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)
