"""What the hardware allows: the bytes that a call must move, over rates measured in the same run.

`ceiling_us = max(memory bytes / copy rate, link bytes / link rate)`, all of one rank. It leaves out every latency, so
it means something for many tokens only. The link's rate is that of a large all-gather, not of the wire: a protocol that
is better than the library's can pass 100%.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tpfuse.bench.cases import QK, Case
from tpfuse.bench.implementations import all_gather

# Large enough that latency is nothing, and on a GPU several times its L2.
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
GATHER_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
REPEATS = 7


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
    all_reduce_rms_norm  T H (b + c) read, T H (b + c) written, H b gamma
    """
    b, c = case.dtype.itemsize, case.residual_dtype.itemsize
    columns = sum(case.local)
    elements = case.tokens * columns
    norm = 2 * elements * b + columns * b
    return {
        "qk_rms_norm": norm,
        "qk_rms_norm_rope": norm + (4 * case.rope[1] + 8 if case.rope else 0) * case.tokens,
        "all_reduce": 2 * elements * b,
        "all_reduce_rms_norm": 2 * elements * (b + c) + columns * b,
    }[case.op]


def link_bytes(case: Case) -> float:
    """Bytes that one rank must receive (and send).

    qk_rms_norm, _rope   two fp32 sums from each peer: 8 (W - 1) T
    all_reduce and all_reduce_rms_norm
                         2 (W - 1) / W of the payload T H b: reduce-scatter, then all-gather
    """
    peers = case.world - 1
    if case.op in QK:
        return 8 * peers * case.tokens
    return 2 * peers / case.world * case.tokens * case.widths[0] * case.dtype.itemsize


def ceiling_us(case: Case, rates: Rates) -> float:
    link = link_bytes(case) / rates.link if rates.link else 0.0
    return max(memory_bytes(case) / rates.copy, link)


def measure_rates(device: torch.device, world: int) -> Rates:
    """Collective. All ranks at once, as in the ops: on a CPU they share the memory."""
    return Rates(_copy_rate(device), _link_rate(device, world) if world > 1 else None)


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
