"""Whether vLLM's greedy tokens are the same with tpfuse: stock, control and fused in turn, on equal prompts.

    python benchmarks/vllm_tokens.py --bench PATH/bench_vllm.py --out tokens --layers 4 --tp 4

Each run is a process of its own with its own workers. A file OUT/RUN.json keeps its tokens and OUT/RUN.log what it
said; a run whose file is there is not repeated, so that a command that was cut short goes on. Delete OUT to start anew.

Runs: `stock`; `stock, NCCL`, where vLLM's all-reduce is NCCL's, not its own; `control`; `fused`. Sums of another order
round differently, and greedy tokens part where two are nearly as likely. So `stock` against `stock, NCCL` is the noise
floor that `stock` against `fused` is to be read beside. `control` has vLLM's kernels and should not differ at all.

bench_vllm.py, which is given by its path, brings the environment and the model: parse(), set_env(), engine_args() and
minimax_config(). The engine's core runs in the process of the run, which admits all requests before its first step:
otherwise batches, and so tokens, depend on when a request arrives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
# run: TPFUSE_VLLM, whether tpfuse is hooked in, what bench_vllm.py is told besides
RUNS = {
    "stock": ("off", False, ()),
    "stock, NCCL": ("off", False, ("--no-custom-ar",)),
    "control": ("control", True, ()),
    "fused": ("fused", True, ()),
}
COMPARISONS = (("stock", "stock, NCCL"), ("stock", "control"), ("stock", "fused"), ("control", "fused"))
Tokens = dict[str, list[list[int]]]  # by concurrency, of each request


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="bench_vllm.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of tokens and logs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--concurrency", default="1,10,64")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)  # the process of one run
    given = parser.parse_args()
    if given.run:
        generate(given)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    failed = [run for run in RUNS if not done(given, run)]
    print(table({run: load(given, run) for run in RUNS if run not in failed}))
    for run in failed:
        print(f"{run}: failed, see {path_of(given, run, 'log')}")
    return bool(failed)


def path_of(given: argparse.Namespace, run: str, suffix: str) -> Path:
    return Path(given.out, f"{run.replace(', ', '-')}.{suffix}")


def done(given: argparse.Namespace, run: str) -> bool:
    """Make sure that there are tokens of a run, made as it is called."""
    mode, hooked, _ = RUNS[run]
    log, tokens = path_of(given, run, "log"), path_of(given, run, "json")
    began = time.monotonic()
    if not tokens.exists():
        with log.open("w") as file:
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--run", run], stdout=file, stderr=file, check=False
            )
    said = [line for line in log.read_text(errors="replace").splitlines() if "tpfuse, rank 0 of" in line]
    what = said[-1].partition("tpfuse, ")[2] if said else "without tpfuse"
    print(f"{run}: {time.monotonic() - began:.0f} s; {what}", flush=True)
    return tokens.exists() and hooked == any(f"effective {mode}" in line for line in said)


def load(given: argparse.Namespace, run: str) -> Tokens:
    found: dict[str, Any] = json.loads(path_of(given, run, "json").read_text())
    if found["settings"] != settings(given):
        raise SystemExit(f"{path_of(given, run, 'json')} is of {found['settings']}, not {settings(given)}; delete it.")
    tokens: Tokens = found["tokens"]
    return tokens


def settings(given: argparse.Namespace) -> list[Any]:
    return [given.layers, given.tp, given.concurrency, given.input_len, given.output_len]


def table(runs: dict[str, Tokens]) -> str:
    """Of each comparison and concurrency: how many requests have equal tokens, and where the others part."""
    rows = [("", "requests at once", "equal", "first difference", "median")]
    for one, other in COMPARISONS:
        if one in runs and other in runs:
            for concurrency, ours in runs[one].items():
                parted = [at for a, b in zip(ours, runs[other][concurrency], strict=True) if (at := parting(a, b))]
                equal = f"{len(ours) - len(parted)} of {len(ours)}"
                where = (str(min(parted)), f"{median(parted):g}") if parted else ("-", "-")
                rows.append((f"{one} / {other}", concurrency, equal, *where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not n else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def parting(a: list[int], b: list[int]) -> int:
    """The first token that differs, counted from 1; 0: none does."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True), 1) if x != y), 0)


def generate(given: argparse.Namespace) -> None:
    """The process of one run: makes the engine, and writes the tokens of all requests."""
    mode, hooked, more = RUNS[given.run]
    bench = load_bench(given.bench)
    os.environ["TPFUSE_VLLM"] = mode
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sources = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sources))
    shape = ("--layers", str(given.layers), "--tp", str(given.tp), "--concurrency", given.concurrency)
    sys.argv = [str(given.bench), *shape, *(("--hook", str(HERE / "vllm_hook.py")) if hooked else ()), *more]
    asked = bench.parse()
    bench.set_env(asked)
    sys.path.insert(0, str(HERE.parent / "src"))
    config = bench.minimax_config(given.layers)
    concurrency = [int(n) for n in given.concurrency.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        from vllm import LLM, SamplingParams

        llm = LLM(**bench.engine_args(asked, folder, concurrency))
        greedy = SamplingParams(temperature=0.0, max_tokens=given.output_len, ignore_eos=True, detokenize=False)
        tokens: Tokens = {}
        for n in concurrency:
            generator = random.Random(n)
            lengths = range(given.input_len)
            prompts = [
                {"prompt_token_ids": [generator.randrange(10, config["vocab_size"] - 100) for _ in lengths]}
                for _ in range(n)
            ]
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
            tokens[str(n)] = [list(output.outputs[0].token_ids) for output in outputs]
        llm.llm_engine.engine_core.shutdown()  # the next run needs the memory of the GPUs
        written = json.dumps({"settings": settings(given), "tokens": tokens})
        path_of(given, given.run, "json").write_text(written)


def load_bench(path: Path) -> Any:
    spec = spec_from_file_location("bench_vllm", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"--bench {path}: no Python file there")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
