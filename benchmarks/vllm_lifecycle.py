"""What an engine of vLLM goes through with tpfuse in it, on GPUs, and whether its greedy tokens stay the same.

    python benchmarks/vllm_lifecycle.py --bench PATH/bench_vllm.py --out lifecycle --layers 2 --tp 4

RUNS says what there is, --only names some of them. Each is a process of its own; OUT/RUN.json keeps its tokens and
OUT/RUN.log what it said, and a run whose tokens are there is not repeated. Tokens that differ are told, and no error.
`engines` are two in turn in the same worker processes. `tpfuse raises` has a Communicator that can't be made.
bench_vllm.py is what vllm_tokens.py takes.

The weights are random, so there is no file to load after sleep of level 2: workers fill them as they did at the start.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_tokens import (
    HOOK,
    WEIGHTS,
    arguments,
    came_to,
    execute,
    keep,
    kept,
    options,
    parting,
    prepare,
    random_prompts,
    said_in,
)

REQUESTS, INPUT, OUTPUT = 10, 256, 64
Answers = list[list[int]]  # the tokens of all requests
RAISES = """
from tpfuse.communicator import Communicator
from tpfuse.integrations.vllm import register

def raises(*_, **__):
    raise RuntimeError("mocked out")

Communicator.__init__ = raises
"""


class Engine:
    """One of vLLM, and its prompts."""

    def __init__(self, arguments: dict[str, Any], vocabulary: int) -> None:
        self.arguments = arguments
        self.prompts = random_prompts(0, REQUESTS, INPUT, vocabulary)
        self.begin()

    def begin(self) -> None:
        from vllm import LLM

        self.llm = LLM(**self.arguments)

    def end(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def ask(self, prompts: list[Any]) -> Answers:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate(prompts, greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


# Jobs yield what was done, and the answers then.


def serve(engine: Engine) -> Iterator[tuple[str, Answers]]:
    yield "served", engine.ask(engine.prompts)


def sleep(engine: Engine) -> Iterator[tuple[str, Answers]]:
    yield from serve(engine)
    for level in (1, 2):
        engine.llm.sleep(level)
        engine.llm.wake_up()
        if level == 2:
            engine.llm.collective_rpc(fill)
        yield f"after sleep of level {level}", engine.ask(engine.prompts)


def engines(engine: Engine) -> Iterator[tuple[str, Answers]]:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    yield from serve(engine)
    engine.end()
    cleanup_dist_env_and_memory()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    engine.begin()
    yield "the next engine", engine.ask(engine.prompts)


def alone(engine: Engine) -> Iterator[tuple[str, Answers]]:
    yield from serve(engine)
    yield "one by one", [engine.ask([prompt])[0] for prompt in engine.prompts]


def fill(worker: Any) -> None:
    """In a worker: random weights, the same as at the start."""
    from vllm.model_executor.model_loader import get_model_loader

    runner = worker.model_runner
    get_model_loader(runner.load_config).load_weights(runner.model, runner.model_config)


class Run(NamedTuple):
    """mode: of tpfuse; "" where it is not even there. more: what bench_vllm.py is told besides. like: whose answers to
    compare with. effective: the mode that it must come to, or the run has failed."""

    mode: str
    job: Callable[[Engine], Iterator[tuple[str, Answers]]] = serve
    more: tuple[str, ...] = ()
    like: str = ""
    invariant: bool = False
    effective: str = "fused"

    def came_out(self, said: Sequence[str]) -> bool:
        return came_to(self.mode and self.effective, said)


HYBRID = ("--nemotron", "MEM*EMEM")
RUNS = {
    "stock": Run(""),
    "tpfuse raises": Run("fused", like="stock", effective="off"),
    "sleep": Run("fused", sleep, ("--engine", '{"enable_sleep_mode": true}'), "stock"),
    "engines": Run("fused", engines, ("--engine", '{"distributed_executor_backend": "external_launcher"}'), "sleep"),
    "batch-invariant, stock": Run("", alone, invariant=True),
    "batch-invariant": Run("fused", alone, invariant=True),
    "batch-invariant, +rms_norm": Run("fused", alone, ("--compilation", '{"custom_ops": ["+rms_norm"]}'), "", True),
    "TP2 x PP2": Run("fused", more=("--tp", "2", "--engine", '{"pipeline_parallel_size": 2}')),
    "Nemotron-H, stock": Run("", more=HYBRID),
    "Nemotron-H": Run("fused", more=HYBRID, like="Nemotron-H, stock"),
}


def main() -> int:
    parser = options(__doc__, RUNS, layers=2)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="the runs; default: all")
    given = arguments(parser)
    if given.run:
        go_through(given, given.run, RUNS[given.run])
        return 0
    done: dict[str, dict[str, Answers]] = {}
    for name in given.only:
        done[name] = outcome(given, name)
        print("\n".join(report(given, name, done)), flush=True)
    return not all(done.values())


def outcome(given: argparse.Namespace, name: str) -> dict[str, Answers]:
    """What a run brought; nothing if it failed."""
    file, log = given.out / f"{name}.json", given.out / f"{name}.log"
    if not file.exists():
        ranks = [{"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(given.tp)] if name == "engines" else [{}]
        execute(name, log, given.limit, ranks)
    came_out = file.exists() and RUNS[name].came_out(said_in(log))
    return kept(file, settings(given)) if came_out else {}


def settings(given: argparse.Namespace) -> list[Any]:
    return [WEIGHTS.name, given.layers, given.tp]


def report(given: argparse.Namespace, name: str, done: dict[str, dict[str, Answers]]) -> Iterator[str]:
    said = said_in(given.out / f"{name}.log")
    yield f"{name}: {said[-1] if said else 'without tpfuse'}"
    base = RUNS[name].like
    tokens = done.get(base, {}).get("served")
    if base and done[name] and not tokens:
        yield f"    not compared: there are no answers of {base}"
    for what, found in done[name].items():
        if tokens:
            parted = [at for ours, theirs in zip(found, tokens, strict=True) if (at := parting(ours, theirs))]
            where = f", the others part at token {min(parted)} or later" if parted else ""
            yield f"    {what}: {len(found) - len(parted)} of {len(found)} requests as {base}{where}"
        base, tokens = "served", done[name]["served"]
    if not done[name]:
        yield "    no answers: it failed, was cut short, or did not come to its mode"


def go_through(given: argparse.Namespace, name: str, run: Run) -> None:
    """The process of a run, or one of its ranks."""
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(run.invariant))
    if run.job is engines:
        os.environ |= {"WORLD_SIZE": str(given.tp), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    with tempfile.TemporaryDirectory() as folder:
        hook = HOOK
        if name == "tpfuse raises":
            hook = Path(folder, "raises.py")
            hook.write_text(RAISES)
        hooks = (hook,) if run.mode else ()
        engine = Engine(*prepare(given, folder, run.mode, hooks, (1, REQUESTS), run.more))
        answers = dict(run.job(engine))
        engine.end()
        if os.environ.get("RANK", "0") == "0":
            keep(Path(given.out, f"{name}.json"), settings(given), answers)


if __name__ == "__main__":
    sys.exit(main())
