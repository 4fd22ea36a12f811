"""`tpfuse bench model`: a whole model of real dimensions and random weights, prompt and decode, in one mode after the
other in one process, so that figures of one run can be compared.

Method. Each rank makes its shards on its device. A run is a prefill of all requests at once, then output_len - 1 decode
steps with a static cache, greedy. On GPUs a decode step is one CUDA graph: forward, argmax, and the step to the next
position. Before the timed runs the step runs eagerly, is captured, and one whole run is thrown away. Of each run the
ranks start together; a figure is the maximum over ranks of the median of their runs. TTFT is the prefill up to the
first token; there is no server, so no queueing is in it.

"stock" is transformers with its own TP plan, measured in the same way.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpfuse.backends.collective import first_line, short
from tpfuse.bench.machine import describe
from tpfuse.bench.method import first_error
from tpfuse.bench.model_records import STOCK, ModelRecord
from tpfuse.errors import InvalidArgument
from tpfuse.launch import Progress, Rank, default_device, resolve_world, run_ranks
from tpfuse.plan import MODES
from tpfuse.presets import ModelPreset, find_model

RUNS = 3
SPARE = 8  # positions of the cache beyond the workload: for the steps before the timed runs


@dataclass(frozen=True)
class Workload:
    """What each mode is measured on."""

    concurrency: tuple[int, ...] = (1, 10, 64)
    input_len: int = 2048
    output_len: int = 256
    graphs: bool = True
    experts: str = ""  # transformers' implementation of the experts; empty: its default
    profile: str = ""  # a file to which rank 0 appends where the time of a decode step goes, a JSON line a kernel

    def check(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1 or self.input_len < 1 or self.output_len < 2:
            raise InvalidArgument(
                f"bench model: {list(self.concurrency)} requests of {self.input_len} in, {self.output_len} out; "
                "needed: at least one request, one token in and two out."
            )


def run(
    preset: str = "minimax-m2",
    *,
    layers: int | None = None,
    world: int | None = None,
    device_type: str | None = None,
    modes: Sequence[str] = (STOCK, *MODES),
    workload: Workload | None = None,
    progress: Progress | None = None,
) -> list[ModelRecord]:
    """Measure a model in each mode. layers: the first so many, None for all. Raises InvalidArgument, Unsupported."""
    model, workload = find_model(preset), workload or Workload()
    model.with_layers(layers)
    workload.check()
    unknown = [mode for mode in modes if mode not in (STOCK, *MODES)]
    if unknown or not modes:
        raise InvalidArgument(f"modes {list(modes)}; supported: {', '.join((STOCK, *MODES))}.")
    device_type = device_type or default_device()
    ranks = resolve_world(world, device_type)
    arguments = (model, layers, tuple(modes), workload)
    results: list[list[ModelRecord]] = run_ranks(
        job, *arguments, world=ranks, device_type=device_type, progress=progress
    )
    return results[0]


def job(
    rank: Rank, preset: ModelPreset, layers: int | None, modes: Sequence[str], workload: Workload
) -> list[ModelRecord]:
    """What each rank runs. Collective throughout."""
    device = torch.device("cuda", torch.cuda.current_device()) if rank.device_type == "cuda" else torch.device("cpu")
    workload = replace(workload, graphs=workload.graphs and device.type == "cuda")
    blank = _blank(preset, layers, rank.world, workload, device)
    records: list[ModelRecord] = []
    for mode in modes:
        error, model = "", None
        try:
            model = make_model(preset, layers, mode, rank.world, workload.experts)
        except Exception as raised:
            error = first_line(raised)
        error = first_error(error)
        for concurrency in workload.concurrency:
            rank.progress(len(records), len(modes) * len(workload.concurrency), f"{mode}, {concurrency} requests")
            asked = replace(
                blank,
                concurrency=concurrency,
                impl=STOCK if mode == STOCK else "tpfuse",
                requested_mode="" if mode == STOCK else mode,
            )
            records.append(asked if error else _measured(asked, model, workload, device))
            if error:
                records[-1] = replace(asked, error=error)
        if model is not None and hasattr(model, "_tpfuse"):
            model._tpfuse.comm.close()
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return records


def make_model(preset: ModelPreset, layers: int | None, mode: str, world: int, experts: str = "") -> Any:
    """The model on this rank, with random weights."""
    from tpfuse.integrations.transformers import load

    config = load.config_of(preset, layers)
    if experts:
        config._experts_implementation = experts
    return load.random(config, None if mode == STOCK else mode, world, preset.dtype)


def _measured(asked: ModelRecord, model: Any, workload: Workload, device: torch.device) -> ModelRecord:
    """The record of one workload, or of what went wrong with it on any rank."""
    error, found = "", asked
    try:
        with torch.inference_mode():
            found = _measure(asked, model, workload, device)
    except Exception as raised:
        error = first_line(raised)
    error = first_error(error)
    return replace(asked, error=error) if error else found


def _measure(asked: ModelRecord, model: Any, workload: Workload, device: torch.device) -> ModelRecord:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    session = Session(model, asked.concurrency, workload, device)
    session.start()
    collectives = session.collectives() / asked.layers
    if workload.graphs:
        session.capture()
    runs = [session.timed() for _ in range(RUNS + 1)][1:]
    if workload.profile:
        write_profile(asked, session.profiled(), workload.profile)
    ttft, latency = slowest([median(run[0] for run in runs), median(run[1] for run in runs)], device)
    output = asked.concurrency * asked.output_len
    applied = getattr(model, "_tpfuse", None)
    told: dict[str, Any] = applied.report().as_dict() if applied else {"effective_mode": "", "reasons": []}
    if applied is None and asked.impl != STOCK:
        told = {
            "effective_mode": "none",
            "reasons": ["one rank: nothing is divided, so the model is transformers' own"],
        }
    return replace(
        asked,
        effective_mode=told["effective_mode"],
        reason="; ".join(told["reasons"]),
        ttft_s=ttft,
        tpot_s=(latency - ttft) / (asked.output_len - 1),
        total_tok_s=(output + asked.concurrency * asked.input_len) / latency,
        output_tok_s=output / latency,
        tok_s_per_gpu=output / latency / asked.world,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        collectives_per_layer=collectives,
        ok=True,
    )


class Session:
    """Requests of one length that are served together: a static cache, and tensors that a CUDA graph can keep."""

    def __init__(self, model: Any, batch: int, workload: Workload, device: torch.device) -> None:
        from transformers import StaticCache

        self.model, self.workload, self.device = model, workload, device
        self.length = workload.input_len + workload.output_len + SPARE
        config = model.config.get_text_config(decoder=True)
        self.hybrid = "linear_attention" in (getattr(config, "layer_types", None) or ())
        self.cache = StaticCache(config=config, max_cache_len=self.length)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(config.vocab_size, (batch, workload.input_len), generator=generator)
        self.prompt = prompt.to(device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.places = torch.arange(self.length, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self) -> None:
        """The prompt: fills the cache and gives the first token."""
        self.cache.reset()
        self.position.fill_(self.workload.input_len)
        positions = self.places[: self.workload.input_len].unsqueeze(0)
        output = self.model(
            input_ids=self.prompt, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self._take(output.logits)

    def step(self) -> None:
        """One token for every request."""
        output = self.model(**self._inputs(), logits_to_keep=1)
        self._take(output.logits)
        self.position.add_(1)

    def _inputs(self) -> dict[str, Any]:
        visible: Any = (self.places <= self.position)[:, None, None, :]
        if self.hybrid:
            visible = {"full_attention": visible, "linear_attention": None}
        return {
            "input_ids": self.tokens,
            "attention_mask": visible,
            "position_ids": self.position,
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def _take(self, logits: Tensor) -> None:
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def collectives(self) -> int:
        """Collectives in the layers during one decode step."""
        applied = getattr(self.model, "_tpfuse", None)
        before = _served(applied)
        with CountCollectives() as counted:
            self.model.base_model(**self._inputs())
        self.position.add_(1)
        return _served(applied) - before if applied else counted.found

    def capture(self) -> None:
        """A decode step as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL's watchdog queries events
            self.step()

    def timed(self) -> tuple[float, float]:
        """Seconds to the first token, and to the last."""
        advance = self.graph.replay if self.graph else self.step
        self._together()
        began = time.perf_counter()
        self.start()
        self._wait()
        first = time.perf_counter()
        for _ in range(self.workload.output_len - 1):
            advance()
        self._wait()
        return first - began, time.perf_counter() - began

    def profiled(self) -> list[dict[str, Any]]:
        """Time on the device by kernel (on a CPU by operator), a decode step, longest first."""
        advance = self.graph.replay if self.graph else self.step
        cuda, steps = self.device.type == "cuda", min(10, self.workload.output_len - 1)
        self.start()
        self._together()
        kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind]) as found:
            for _ in range(steps):
                advance()
            self._wait()
        rows = []
        for event in found.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            rows.append({"kernel": event.key, "calls": event.count / steps, "us": us / steps})
        return sorted((row for row in rows if row["us"]), key=lambda row: -row["us"])

    def _together(self) -> None:
        self._wait()
        if dist.get_world_size() > 1:
            slowest([0.0], self.device)
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class CountCollectives(TorchDispatchMode):
    """Counts what goes through torch.distributed, DTensors' included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func.name()).partition("::")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_")):
            self.found += 1
        return func(*args, **(kwargs or {}))


def slowest(seconds: Sequence[float], device: torch.device) -> list[float]:
    """The maximum over ranks of each figure."""
    figures = torch.tensor(seconds, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    return [float(figure) for figure in figures]


def write_profile(asked: ModelRecord, rows: Sequence[dict[str, Any]], path: str) -> None:
    """Append the rows of one workload, on rank 0."""
    if dist.get_rank() == 0:
        names = ("preset", "impl", "requested_mode", "layers", "world", "concurrency", "gpu", "commit")
        about = {name: getattr(asked, name) for name in names}
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(about | row) + "\n" for row in rows)


def _served(applied: Any) -> int:
    return sum(counter.calls for counter in applied.report().counters) if applied else 0


def _blank(
    preset: ModelPreset, layers: int | None, world: int, workload: Workload, device: torch.device
) -> ModelRecord:
    return ModelRecord(
        preset=preset.name, impl="", requested_mode="", effective_mode="", reason="", layers=layers or preset.layers,
        world=world, concurrency=0, input_len=workload.input_len, output_len=workload.output_len,
        dtype=short(preset.dtype), graphs=workload.graphs, experts=workload.experts, ttft_s=None, tpot_s=None,
        total_tok_s=None, output_tok_s=None, tok_s_per_gpu=None, memory_gib=None, collectives_per_layer=None, ok=False,
        error="", **describe(device)._asdict(),
    )  # fmt: skip
