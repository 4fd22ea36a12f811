"""What an eager call costs the HOST, in µs: checks, dispatch, counting, allocation of the results, launch.

    python benchmarks/host_cost.py                      one rank a GPU, or 2 ranks on a CPU
    python benchmarks/host_cost.py --tokens 64 --json out/host.jsonl

Calls are issued in a row and timed by the host's clock; the device is waited for between such batches, not in them. In
a CUDA graph none of this is paid. Backends:

    cuda, collective   as they are; collective over Gloo computes on the host, so that is in its figure
    nothing            a backend that does nothing: the share of tpfuse's Python, with the results of qk_rms_norm
                       allocated, as for the cuda backend
    torch, driver      to compare with: torch.add, and the launch of an empty kernel by the same launcher as ours

`call` is "method" (comm.qk_rms_norm) or "operator" (torch.ops.tpfuse.qk_rms_norm), which is what compiled code pays.
The shapes are MiniMax-M2's. One JSON object a line, an entry each; `us` is the maximum over ranks of their medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tpfuse import Communicator
from tpfuse.backends.cuda.compile import arch_of, compile_kernel, load
from tpfuse.backends.cuda.launch import Launcher
from tpfuse.bench.cases import Case, Inputs, cases_of, make_inputs, rope_of
from tpfuse.bench.machine import describe
from tpfuse.bench.method import gathered
from tpfuse.bench.records import short_gpu
from tpfuse.launch import Rank, default_device, resolve_world, run_ranks, speaks
from tpfuse.presets import find_preset

RESULTS = Path(__file__).parent / "results"
EMPTY = """
#include "platform.h"
namespace tpfuse {
struct Nothing {
  u32 word;
};
TPF_KERNEL(32, 1) void empty(TPF_GRID_CONSTANT const Nothing) {}
}
"""

Calls = dict[tuple[str, str], Callable[[], object]]  # by operation and way of calling


class Nothing:
    """Takes the place of a communicator's backend, and does nothing."""

    def begin(self, *_: object) -> None:
        pass

    qk_rms_norm = all_reduce = all_reduce_rms_norm = close = begin


def calls_of(comm: Communicator, case: Case, i: Inputs) -> Calls:
    """One case's calls."""
    ops, name, eps = torch.ops.tpfuse, comm.name, case.eps
    if case.op == "all_reduce":
        x = i["x"]
        return {
            (case.op, "method"): lambda: comm.all_reduce(x),
            (case.op, "operator"): lambda: ops.all_reduce(x, name),
        }
    if case.op == "all_reduce_rms_norm":
        x, weight, residual = i["x"], i["weight"], i["residual"]
        return {
            (case.op, "method"): lambda: comm.all_reduce_rms_norm(x, weight, residual=residual, eps=eps),
            (case.op, "operator"): lambda: ops.all_reduce_add_rms_norm(x, weight, residual, name, eps),
        }
    if case.top_k is not None:
        x, weight, residual = i["x"], i["weight"], i["residual"]
        summing = {"residual": residual, "eps": eps, "top_k": case.top_k}
        return {(case.op, "method"): lambda: comm.all_reduce_rms_norm(x, weight, **summing)}
    qk, rope = (i["q"], i["k"], i["q_weight"], i["k_weight"]), rope_of(case, i)
    if rope is not None:
        return {(case.op, "method"): lambda: comm.qk_rms_norm(*qk, eps=eps, rope=rope)}
    return {
        (case.op, "method"): lambda: comm.qk_rms_norm(*qk, eps=eps),
        (case.op, "operator"): lambda: ops.qk_rms_norm(*qk, name, eps, eps),
    }


def floor(x: torch.Tensor) -> Iterator[tuple[str, str, str, Callable[[], object]]]:
    """What a call costs that does as little as possible."""
    out = torch.empty_like(x)
    yield "torch", "torch.add", "", lambda: torch.add(x, x)
    yield "torch", "torch.add, out=", "", lambda: torch.add(x, x, out=out)
    if x.device.type == "cuda":
        made = compile_kernel(EMPTY, "tpfuse::empty", arch=arch_of(x.device.index))
        start, stream = Launcher(load(made, x.device.index), "I", block=32), torch.cuda.current_stream().cuda_stream
        yield "driver", "empty kernel", "", lambda: start(1, stream, 0)


def job(rank: Rank, tokens: int, calls: int, repeats: int) -> list[dict[str, Any]]:
    """What each rank runs."""
    cuda = rank.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    machine, records = describe(device)._asdict(), []

    def settle() -> None:
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def record(backend: str, op: str, way: str, call: Callable[[], object]) -> None:
        for _ in range(3):
            call()
        samples = []
        for _ in range(repeats):
            settle()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            samples.append((time.perf_counter() - start) / calls * 1e6)
        settle()
        us = [round(median, 3) for median in gathered(statistics.median(samples))]
        row = {"op": op, "call": way, "backend": backend, "world": rank.world, "tokens": tokens}
        records.append({**row, "us": max(us), "us_ranks": us, **machine})

    cases = cases_of(find_preset("minimax-m2"), rank.world, [tokens])
    inputs = [make_inputs(case, rank.rank, 0, device) for case in cases]
    with torch.no_grad():
        sums = next(i["x"] for case, i in zip(cases, inputs, strict=True) if case.op == "all_reduce")
        for entry in floor(sums):
            record(*entry)
        for backend in ("nothing", "collective", "auto"):
            with Communicator(device=device, backend="collective" if backend == "nothing" else backend) as comm:
                comm.prepare()
                if backend == "nothing":
                    comm._collective.close()
                    comm._collective = Nothing()  # type: ignore[assignment]
                for case, i in zip(cases, inputs, strict=True):
                    served = comm.plan.of(case.called)[0].backend
                    if backend == "auto" and served == "collective":  # measured before
                        continue
                    for (op, way), call in calls_of(comm, case, i).items():
                        record(backend if backend == "nothing" else served, op, way, call)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="Host cost of eager calls, in µs.")
    parser.add_argument("--world", type=int, help="ranks to start; default: one a GPU, or 2 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--tokens", type=int, default=1, help="rows of each call; default: 1")
    parser.add_argument("--calls", type=int, default=50, help="calls in a batch; default: 50")
    parser.add_argument("--repeats", type=int, default=40, help="batches; default: 40")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/host-cost-<machine>.jsonl")
    chosen = parser.parse_args()
    world = resolve_world(chosen.world, chosen.device)
    work = (chosen.tokens, chosen.calls, chosen.repeats)
    records = run_ranks(job, *work, world=world, device_type=chosen.device)[0]
    if not speaks():
        return
    path = chosen.json or RESULTS / f"host-cost-{short_gpu(records[0]['gpu'])}x{world}.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    for r in records:
        print(f"{r['backend']:12}{r['op']:22}{r['call']:10}{r['us']:9.2f} µs")
    print(f"figures: {path}")


if __name__ == "__main__":
    main()
