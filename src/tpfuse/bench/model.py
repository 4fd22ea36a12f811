"""`tpfuse bench model`: a whole model of real dimensions and random weights, prompt and decode, in one mode after the
other in one process, so that figures of one run can be compared.

Method. Each rank makes its shards on its device. A run is a prefill of all requests at once, then output_len - 1 decode
steps with a static cache, greedy. On GPUs a decode step is one CUDA graph: forward, argmax, and the step to the next
position; with a compiler, that step goes through it first, in every mode alike. Or, graphs="piecewise", prompts run in
chunks and decode in steps through packed batches, everything but attention in graphs; or, "none", all is eager. Before
the timed runs the step runs eagerly, is captured, and one whole run is thrown away. Of each run the ranks start
together; a figure is the maximum over ranks of the median of their runs. TTFT is the prefill up to the first token;
there is no server, so no queueing is in it.

"stock" is transformers with its own TP plan, measured in the same way.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from tpfuse.backends.collective import short
from tpfuse.bench.machine import describe
from tpfuse.bench.method import first_error
from tpfuse.bench.model_records import STOCK, ModelRecord
from tpfuse.bench.session import PackedSession, Session, Workload, slowest
from tpfuse.errors import InvalidArgument, Unsupported, first_line
from tpfuse.integrations.transformers import load
from tpfuse.integrations.transformers.packed import check_layers
from tpfuse.launch import Progress, Rank, default_device, resolve_world, run_ranks
from tpfuse.plan import MODES
from tpfuse.presets import ModelPreset, find_model

RUNS = 3


def run(
    preset: str = "minimax-m2",
    *,
    layers: int | None = None,
    world: int | None = None,
    device_type: str | None = None,
    modes: Sequence[str] | None = None,
    workload: Workload | None = None,
    progress: Progress | None = None,
) -> list[ModelRecord]:
    """Measure a model in each mode. layers: the first so many, None for all. modes: None for all that there are.

    Raises InvalidArgument, Unsupported.
    """
    model, workload = find_model(preset), workload or Workload()
    packed = workload.graphs == "piecewise"
    modes = modes if modes is not None else MODES if packed else (STOCK, *MODES)
    model.with_layers(layers)
    workload.check()
    unknown = [mode for mode in modes if mode not in (STOCK, *MODES)]
    if unknown or not modes:
        raise InvalidArgument(f"modes {list(modes)}; supported: {', '.join((STOCK, *MODES))}.")
    if packed:
        if STOCK in modes:
            raise Unsupported("bench model: graphs=piecewise with stock; supported: the modes of tpfuse.")
        check_layers(load.config_of(model, layers), model.name)
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
    blank = _blank(preset, layers, rank.world, workload, device)
    records: list[ModelRecord] = []
    if workload.profile and rank.rank == 0:
        Path(workload.profile).write_text("", encoding="utf-8")
    for mode in modes:
        error, model = "", None
        try:
            model = make_model(preset, layers, mode, rank.world, workload.experts)
        except Exception as raised:
            error = first_line(raised)
        error = first_error(error)
        for concurrency in workload.concurrency:
            rank.progress(len(records), len(modes) * len(workload.concurrency), f"{mode}, {concurrency} at once")
            asked = replace(
                blank,
                concurrency=concurrency,
                impl=STOCK if mode == STOCK else "tpfuse",
                requested_mode="" if mode == STOCK else mode,
            )
            records.append(replace(asked, error=error) if error else _measured(asked, model, workload, device))
        if model is not None and hasattr(model, "_tpfuse"):
            model._tpfuse.comm.close()
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return records


def make_model(preset: ModelPreset, layers: int | None, mode: str, world: int, experts: str = "") -> Any:
    """The model on this rank, with random weights."""
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
    kind = PackedSession if workload.graphs == "piecewise" else Session
    session = kind(model, asked.concurrency, workload, device)
    session.start()
    collectives = session.collectives() / asked.layers
    if asked.graphs == "full":
        session.capture()
    runs = [session.timed() for _ in range(RUNS + 1)][1:]
    if workload.profile:
        write_profile(asked, session.profiled(), workload.profile)
    first = asked.concurrency == workload.concurrency[0]
    chunks = session.chunk_seconds() if first and isinstance(session, PackedSession) else {}
    session.close()
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
        captured=[asdict(captured) for captured in session.captured],
        chunk_s=chunks,
        ok=True,
    )


def write_profile(asked: ModelRecord, rows: Sequence[dict[str, Any]], path: str) -> None:
    """Append the rows of one workload, on rank 0."""
    if dist.get_rank() == 0:
        names = ("preset", "impl", "requested_mode", "layers", "world", "concurrency", "compiler", "gpu", "commit")
        about = {name: getattr(asked, name) for name in names}
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(about | row) + "\n" for row in rows)


def _blank(
    preset: ModelPreset, layers: int | None, world: int, workload: Workload, device: torch.device
) -> ModelRecord:
    return ModelRecord(
        preset=preset.name, impl="", requested_mode="", effective_mode="", reason="", layers=layers or preset.layers,
        world=world, concurrency=0, input_len=workload.input_len, output_len=workload.output_len,
        dtype=short(preset.dtype), requested_graphs=workload.graphs,
        compiler=workload.compiler, graphs=workload.graphs if device.type == "cuda" else "none",
        experts=workload.experts, captured=[], chunk_s={},
        ttft_s=None, tpot_s=None, total_tok_s=None, output_tok_s=None, tok_s_per_gpu=None, memory_gib=None,
        collectives_per_layer=None, ok=False, error="", **describe(device)._asdict(),
    )  # fmt: skip
