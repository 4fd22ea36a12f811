"""Whether vLLM's greedy tokens are the same with tpfuse: stock, control and fused in turn, on equal prompts.

    python benchmarks/vllm_tokens.py --bench PATH/bench_vllm.py --out tokens --layers 4 --tp 4

Each run is a process of its own with its own workers, killed after --limit seconds. A file OUT/RUN.json keeps its
tokens and OUT/RUN.log what it said; a run whose file is there is not repeated, so that a command that was cut short
goes on. Delete OUT to start anew.

Runs: `stock`; `stock, again`; `stock, NCCL`, where vLLM's all-reduce is NCCL's, not its own; `control`; `fused`. Sums
of another order round differently, and greedy tokens part where two are nearly as likely. So `stock` against
`stock, NCCL` is the noise floor that `stock` against `fused` is to be read beside. `control` has vLLM's kernels and
should differ no more than `stock, again`.
In bf16 that is after some ten tokens. With --fp32 they round 2^-16 as coarsely, so that only ties within that, or a
defect, make tokens part.
|log p| is how far apart two runs are in the log probability of the most likely token, up to where any run parts from
`stock` in this request: so all rows are about the same tokens.
vllm_weights.py gives each rank weights of its own: with equal ones every order of a sum is exact.
Inductor must not choose kernels by their speed, or two runs of one mode add up in different orders.

bench_vllm.py, which is given by its path, brings the environment and the model: parse(), set_env(), engine_args(),
minimax_config() and nemotron_config(). parse() must know --layers, --tp, --concurrency, --hook, --engine, --attn,
--gpu-mem, --no-custom-ar, --compilation and --nemotron. The engine's core runs in the process of the run, which admits
all requests before its first step: otherwise batches, and so tokens, depend on when a request arrives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
WEIGHTS, HOOK = HERE / "vllm_weights.py", HERE / "vllm_hook.py"
# run: the mode of tpfuse, "" where it is not even there; what bench_vllm.py is told besides
RUNS = {
    "stock": ("", ()),
    "stock, again": ("", ()),
    "stock, NCCL": ("", ("--no-custom-ar",)),
    "control": ("control", ()),
    "fused": ("fused", ()),
}
FP32 = ("--attn", "TRITON_ATTN", "--engine", '{"dtype": "float32"}')
COMPARISONS = (*(("stock", run) for run in RUNS if run != "stock"), ("control", "fused"))


class Answer(NamedTuple):
    """Of a request: its tokens, and the log probability of each."""

    tokens: list[int]
    log_p: list[float]


Answers = dict[str, list[Answer]]  # by concurrency


def main() -> int:
    parser = options(__doc__, RUNS, layers=4)
    parser.add_argument("--concurrency", type=numbers, default=[1, 10, 64])
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--fp32", action="store_true", help="all in fp32, without TF32; attention by Triton")
    given = arguments(parser)
    if given.run:
        generate(given)
        return 0
    failed = [run for run in RUNS if not done(given, run)]
    print(table({run: load(given, run) for run in RUNS if run not in failed}))
    for run in failed:
        print(f"{run}: failed, see {path_of(given, run, 'log')}")
    return bool(failed)


def options(about: str | None, runs: Iterable[str], layers: int) -> argparse.ArgumentParser:
    """What the scripts that run vLLM are told alike."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="bench_vllm.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and logs")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument(
        "--limit", type=float, default=900.0, help="seconds to wait, then a run is killed; default: 900"
    )
    parser.add_argument("--run", choices=list(runs), help=argparse.SUPPRESS)  # a process of one run
    return parser


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command is told, and the folder for its results. SIGTERM ends it like an exception, so that it kills
    its runs."""
    given = parser.parse_args()
    if not given.bench.is_file():
        parser.error(f"--bench {given.bench}: no file there")
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return given


def numbers(text: str) -> list[int]:
    """The type of an option such as 1,10,64."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def execute(run: str, log: Path, limit: float, ranks: Sequence[dict[str, str]] = ({},)) -> None:
    """This script as the processes of a run, each with more environment. What is left after `limit` seconds is killed,
    and so are workers that outlive their engine."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--run", run]
    processes: list[subprocess.Popen[bytes]] = []
    with log.open("w") as file:
        try:
            for rank in ranks:
                processes.append(
                    subprocess.Popen(command, env=os.environ | rank, stdout=file, stderr=file, start_new_session=True)
                )
            end = time.monotonic() + limit
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)


def said_in(log: Path) -> list[str]:
    """What tpfuse's first rank has logged."""
    lines = log.read_text(errors="replace").splitlines()
    return [line.partition("tpfuse, ")[2] for line in lines if "tpfuse, rank 0 of" in line]


def came_to(mode: str, said: Sequence[str]) -> bool:
    """Whether a run was what it is called; "": without tpfuse. A fused one has fused something."""
    if not mode or not said:
        return not (mode or said)
    nothing = "0 of 0 QK norms fused, 0 of 0 all-reduce + norms fused" in said[-1]
    return f"effective {mode}" in said[-1] and not (mode == "fused" and nothing)


def path_of(given: argparse.Namespace, run: str, suffix: str) -> Path:
    return Path(given.out, f"{run.replace(', ', '-')}.{suffix}")


def done(given: argparse.Namespace, run: str) -> bool:
    """Make sure that there are tokens of a run, made as it is called."""
    log, tokens = path_of(given, run, "log"), path_of(given, run, "json")
    began = time.monotonic()
    if tokens.exists():
        load(given, run)  # of other settings: said before anything else runs
    else:
        execute(run, log, given.limit)
    said = said_in(log)
    print(f"{run}: {time.monotonic() - began:.0f} s; {(said or ['without tpfuse'])[-1]}", flush=True)
    return tokens.exists() and came_to(RUNS[run][0], said)


def load(given: argparse.Namespace, run: str) -> Answers:
    found = kept(path_of(given, run, "json"), settings(given))
    return {n: [Answer(*answer) for answer in answers] for n, answers in found.items()}


def keep(path: Path, settings: list[Any], answers: Any) -> None:
    """Write what a run has answered, beside what it was asked with."""
    path.write_text(json.dumps({"settings": settings, "answers": answers}))


def kept(path: Path, settings: list[Any]) -> Any:
    """What a run has answered. Of other settings is an error."""
    found = json.loads(path.read_text())
    if found.get("settings") != settings:
        raise SystemExit(f"{path} is of {found.get('settings')}, not {settings}; delete it.")
    return found["answers"]


def settings(given: argparse.Namespace) -> list[Any]:
    asked = ",".join(map(str, given.concurrency))
    made = ["deterministic", WEIGHTS.name, given.layers, given.tp, asked, given.input_len, given.output_len]
    return [*made, "fp32"] if given.fp32 else made


def table(runs: dict[str, Answers]) -> str:
    """Of each comparison and concurrency: how many requests have equal tokens, where the others part, and how far apart
    they are up to there, or to where any run parts."""
    rows = [("", "requests at once", "equal", "first difference", "median", "|log p| median", "largest")]
    concurrencies = next(iter(runs.values()), {})
    ends = {n: list(map(in_common, zip(*(run[n] for run in runs.values()), strict=True))) for n in concurrencies}
    for one, other in COMPARISONS:
        if one in runs and other in runs:
            for concurrency, ours in runs[one].items():
                pairs = list(zip(ours, runs[other][concurrency], strict=True))
                parted = [at for a, b in pairs if (at := parting(a.tokens, b.tokens))]
                equal = f"{len(ours) - len(parted)} of {len(ours)}"
                where = (str(min(parted)), f"{median(parted):g}") if parted else ("-", "-")
                far = [d for (a, b), end in zip(pairs, ends[concurrency], strict=True) for d in apart(a, b, end)]
                rows.append((f"{one} / {other}", concurrency, equal, *where, f"{median(far):.2g}", f"{max(far):.2g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not n else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def in_common(answers: Sequence[Answer]) -> int:
    """Up to which token log probabilities of a request compare in all runs: the first that differs in any of them,
    which still follows the same text, or the last."""
    first, *others = (answer.tokens for answer in answers)
    return min([at for tokens in others if (at := parting(first, tokens))], default=len(first))


def apart(a: Answer, b: Answer, end: int) -> list[float]:
    """What two answers are apart in log p in their first tokens."""
    return [abs(x - y) for x, y in zip(a.log_p[:end], b.log_p[:end], strict=True)]


def parting(a: list[int], b: list[int]) -> int:
    """The first token that differs, counted from 1; 0: none does."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True), 1) if x != y), 0)


def generate(given: argparse.Namespace) -> None:
    """The process of one run: makes the engine, and writes the tokens of all requests."""
    mode, more = RUNS[given.run]
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    if given.fp32:
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
        more = (*more, *FP32)
    with tempfile.TemporaryDirectory() as folder:
        made_with, vocabulary = prepare(given, folder, mode, (HOOK,) if mode else (), given.concurrency, more)
        from vllm import LLM, SamplingParams

        llm = LLM(**made_with)
        greedy = SamplingParams(
            temperature=0.0, max_tokens=given.output_len, ignore_eos=True, detokenize=False, logprobs=1
        )
        answers: Answers = {}
        for n in given.concurrency:
            prompts = random_prompts(n, n, given.input_len, vocabulary)
            outputs = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
            answers[str(n)] = [answer_of(list(output.token_ids), output.logprobs) for output in outputs]
        llm.llm_engine.engine_core.shutdown()  # the next run needs the memory of the GPUs
        keep(path_of(given, given.run, "json"), settings(given), answers)


def answer_of(tokens: list[int], log_p: list[Any]) -> Answer:
    return Answer(tokens, [likely[token].logprob for token, likely in zip(tokens, log_p, strict=True)])


def prepare(
    given: argparse.Namespace,
    folder: str,
    mode: str,
    hooks: Sequence[Path],
    concurrency: Sequence[int],
    more: Sequence[str] = (),
) -> tuple[dict[str, Any], int]:
    """What vllm.LLM is to be made with, and how many tokens its model knows. Sets this process's environment for it, so
    vllm must not have been imported. mode: "" is TPFUSE_VLLM=off. hooks: besides that for weights.
    folder: for the model."""
    bench = load_bench(given.bench)
    sources = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"TPFUSE_VLLM": mode or "off", "PYTHONPATH": os.pathsep.join(filter(None, sources))}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    sys.path.insert(0, sources[0])
    shape = ("--layers", str(given.layers), "--tp", str(given.tp), "--concurrency", ",".join(map(str, concurrency)))
    sys.argv = [str(given.bench), *shape, "--hook", ":".join(map(str, (WEIGHTS, *hooks))), *more]
    asked = bench.parse()
    bench.set_env(asked)
    config = bench.nemotron_config(asked.nemotron) if asked.nemotron else bench.minimax_config(given.layers)
    Path(folder, "config.json").write_text(json.dumps(config))
    return bench.engine_args(asked, folder, list(concurrency)), config["vocab_size"]


def random_prompts(seed: int, count: int, length: int, vocabulary: int) -> list[Any]:
    """Equal ones in all runs."""
    tokens = random.Random(seed)
    rows = [[tokens.randrange(10, vocabulary - 100) for _ in range(length)] for _ in range(count)]
    return [{"prompt_token_ids": row} for row in rows]


def load_bench(path: Path) -> Any:
    spec = spec_from_file_location("bench_vllm", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--bench {path}: no Python file")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
