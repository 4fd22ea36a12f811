"""What prefill takes in vLLM: stock, control and fused engines at the same time, asked in turn.

    python benchmarks/vllm_prefill.py --bench PATH/bench_vllm.py --out prefill --layers 10 --tp 2

Engines that run one after the other differ by what the host does meanwhile, which a prefill of few tokens feels most.
So all three stay in the memory of the same GPUs, each a process with workers of its own, and every round asks each of
them for the first token of the same new prompts, in an order that changes from round to round. The others wait without
a kernel on the GPUs. `over stock` is how many times as fast as stock in the same round, the median over the rounds;
`control` is vLLM's own path, so what the method can't tell from 1 is what it shows there.

OUT/prefill.jsonl keeps the seconds of all rounds, OUT/RUN.log what an engine said. A run that is not there after
--limit seconds, or did not come to its mode, ends the command. bench_vllm.py is what vllm_tokens.py takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from vllm_tokens import HOOK, options, prepare, random_prompts, said_in

RUNS = {"stock": False, "control": True, "fused": True}  # whether tpfuse is hooked in
KV_CACHE_BYTES = 4 << 30  # of each engine, told in advance: what is free is not known while others are being made


def main() -> int:
    parser = options(__doc__, (), layers=10)
    parser.add_argument("--prompts", default="1,10", help="at once; default: 1,10")
    parser.add_argument("--lengths", default="256,2048", help="tokens of each; default: 256,2048")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    sizes = [(int(n), int(length)) for n in given.prompts.split(",") for length in given.lengths.split(",")]
    with engines(given, max(n for n, _ in sizes)) as asked:
        for run, engine in asked.items():
            answer(engine, run, given)
            said = (said_in(given.out / f"{run}.log") or ["without tpfuse"])[-1]
            if RUNS[run] != (f"effective {run}" in said):
                raise SystemExit(f"{run} did not come to its mode: {said}")
            print(f"{run}: {said}", flush=True)
        rows = [row for size in sizes for row in in_turn(asked, *size, given)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (given.out / "prefill.jsonl").write_text(text)
    print(table(rows))
    return 0


@contextmanager
def engines(given: argparse.Namespace, most: int) -> Iterator[dict[str, Any]]:
    """A connection to each. All are killed in the end, with their workers."""
    spawn = multiprocessing.get_context("spawn")
    asked, processes = {}, []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for run in RUNS:
                asked[run], theirs = spawn.Pipe()
                processes.append(spawn.Process(target=serve, args=(theirs, given, run, most, Path(folder, run))))
                processes[-1].start()
                theirs.close()
            yield asked
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join(60)


def serve(connection: Any, given: argparse.Namespace, run: str, most: int, folder: Path) -> None:
    """The process of an engine: says that it is there, then answers (seed, prompts, length) with seconds. folder: for
    its files, also for what vLLM compiles, so that none waits for another's."""
    os.setsid()
    folder.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    with (given.out / f"{run}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    memory = json.dumps({"kv_cache_memory_bytes": KV_CACHE_BYTES})
    mode, hooks = (run, (HOOK,)) if RUNS[run] else ("off", ())
    more = ("--gpu-mem", "0.02", "--engine", memory)
    arguments, vocabulary = prepare(given, str(folder), mode, hooks, (1, most), more)
    from vllm import LLM, SamplingParams

    llm, first = LLM(**arguments), SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    connection.send("ready")
    while True:
        seed, count, length = connection.recv()
        prompts = random_prompts(seed, count, length, vocabulary)
        began = time.perf_counter()
        llm.generate(prompts, first, use_tqdm=False)
        connection.send(time.perf_counter() - began)


def answer(engine: Any, run: str, given: argparse.Namespace) -> Any:
    try:
        if engine.poll(given.limit):
            return engine.recv()
    except EOFError:
        raise SystemExit(f"{run} ended, see {given.out / run}.log") from None
    raise SystemExit(f"{run} did not answer in {given.limit:g} s, see {given.out / run}.log")


def in_turn(asked: dict[str, Any], prompts: int, length: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of all rounds of a size, by run. Two rounds before them are not counted."""
    seconds: dict[str, list[float]] = {run: [] for run in asked}
    for turn in range(-2, given.rounds):
        first = turn % len(asked)
        for run in [*asked][first:] + [*asked][:first]:
            asked[run].send((turn, prompts, length))
            took = answer(asked[run], run, given)
            if turn >= 0:
                seconds[run].append(round(took, 6))
    settings = {"layers": given.layers, "tp": given.tp, "prompts": prompts, "length": length}
    return [{**settings, "run": run, "seconds": taken} for run, taken in seconds.items()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds, and ratios to stock in the same round."""
    lines = [f"{'prompts':>7} {'tokens':>6}  {'run':7} {'median ms':>9} {'least':>8}  {'over stock':>10}  quartiles"]
    stock = {(row["prompts"], row["length"]): row["seconds"] for row in rows if row["run"] == "stock"}
    for row in rows:
        ratios = [
            theirs / ours for ours, theirs in zip(row["seconds"], stock[row["prompts"], row["length"]], strict=True)
        ]
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        taken = [1e3 * second for second in row["seconds"]]
        lines.append(
            f"{row['prompts']:7} {row['length']:6}  {row['run']:7} {median(taken):9.2f} {min(taken):8.2f}  "
            f"{middle:9.3f}x  {low:.3f} to {high:.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
