"""What prefill takes in vLLM: stock, control and fused engines at the same time, asked in turn.

    python benchmarks/vllm_prefill.py --bench PATH/bench_vllm.py --out prefill --layers 7 --tp 2

Engines that run one after the other differ by what the host does meanwhile, which a prefill of few tokens feels most.
So all three stay in the memory of the same GPUs, each a process with workers of its own, and every round asks each of
them for the first token of the same new prompts, in a random order. The others wait without a kernel on the GPUs, but
their workers may poll on the host. `over stock` is how many times as fast as stock in the same round, the median over
the rounds; `control` is vLLM's own path, so what it shows there the method can't tell from 1.

OUT/prefill.jsonl keeps the seconds of all rounds, OUT/RUN.log what an engine said. A run that is not there after
--limit seconds, or did not come to its mode, ends the command. bench_vllm.py is what vllm_tokens.py takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from vllm_tokens import HOOK, arguments, came_to, numbers, options, prepare, random_prompts, said_in

RUNS = {"stock": "", "control": "control", "fused": "fused"}  # the mode of tpfuse; "": not even there
WARM_UP = 5  # rounds that do not count
KV_CACHE_BYTES = 4 << 30  # of each engine, told in advance: what is free is not known while others are being made


def main() -> int:
    parser = options(__doc__, (), layers=7)
    parser.add_argument("--prompts", type=numbers, default=[1, 10], help="at once; default: 1,10")
    parser.add_argument("--lengths", type=numbers, default=[256, 2048], help="tokens of each; default: 256,2048")
    parser.add_argument("--rounds", type=int, choices=range(2, 1001), default=20, metavar="2..1000")
    given = arguments(parser)
    file = given.out / "prefill.jsonl"
    file.unlink(missing_ok=True)
    with engines(given, max(given.prompts)) as asked:
        for run, engine in asked.items():
            answer(engine, run, given)
            said = said_in(given.out / f"{run}.log")
            last = (said or ["without tpfuse"])[-1]
            if not came_to(RUNS[run], said):
                raise SystemExit(f"{run} did not come to its mode: {last}")
            print(f"{run}: {last}", flush=True)
        rows = [row for size in product(given.prompts, given.lengths) for row in in_turn(asked, *size, given)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has no session of its own yet, or has ended
                    process.kill()
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
    more = ("--gpu-mem", "0.02", "--engine", memory)
    made_with, vocabulary = prepare(given, str(folder), RUNS[run], (HOOK,) if RUNS[run] else (), (1, most), more)
    from vllm import LLM, SamplingParams

    llm, first = LLM(**made_with), SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    connection.send("ready")
    while True:
        seed, count, length = connection.recv()
        prompts = random_prompts(seed, count, length, vocabulary)
        began = time.perf_counter()
        llm.generate(prompts, first, use_tqdm=False)
        connection.send(time.perf_counter() - began)


def answer(engine: Any, run: str, given: argparse.Namespace, question: Any = None) -> Any:
    """What an engine answers; without a question, that it is there."""
    try:
        if question is not None:
            engine.send(question)
        if engine.poll(given.limit):
            return engine.recv()
    except (EOFError, OSError):
        raise SystemExit(f"{run} ended, see {given.out / run}.log") from None
    raise SystemExit(f"{run} did not answer in {given.limit:g} s, see {given.out / run}.log")


def in_turn(asked: dict[str, Any], prompts: int, length: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of all rounds of a size, by run, without those of WARM_UP."""
    seconds: dict[str, list[float]] = {run: [] for run in asked}
    order = random.Random(0)
    for turn in range(WARM_UP + given.rounds):
        for run in order.sample([*asked], len(asked)):
            took = answer(asked[run], run, given, (turn, prompts, length))
            if turn >= WARM_UP:
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
        low, middle, high = quantiles(ratios, n=4)
        taken = [1e3 * second for second in row["seconds"]]
        lines.append(
            f"{row['prompts']:7} {row['length']:6}  {row['run']:7} {median(taken):9.2f} {min(taken):8.2f}  "
            f"{middle:9.3f}x  {low:.3f} to {high:.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
