"""benchmarks/vllm_lifecycle.py with stand-ins for vLLM and for the script that brings its environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_lifecycle.py"
BENCH = """
import argparse, sys
from pathlib import Path

def parse():
    known = argparse.ArgumentParser()
    for name in ("hook", "engine", "compilation", "nemotron"):
        known.add_argument(f"--{name}", default="")
    return known.parse_known_args()[0]

def set_env(asked):
    sys.path.insert(0, str(Path(__file__).parent / "site"))

def minimax_config(layers):
    return {"vocab_size": 1000}

nemotron_config = minimax_config

def engine_args(asked, folder, concurrency):
    weights, *hook = asked.hook.split(":")
    assert Path(weights).name == "vllm_weights.py"
    return {"asked": asked, "hook": Path(*hook).read_text() if hook else ""}
"""
VLLM = """
import os
from types import SimpleNamespace as S

SamplingParams = S

class LLM:
    llm_engine = S(engine_core=S(shutdown=lambda: None))

    def __init__(self, asked, hook):
        self.asked, self.slept = asked, 0
        if hook:
            print("INFO tpfuse, rank 0 of 4: effective", "off" if "mocked out" in hook else "EFFECTIVE")
        if BROKEN in asked.nemotron:
            raise RuntimeError("no such model")

    def sleep(self, level):
        self.slept = level

    def wake_up(self):
        pass

    def collective_rpc(self, what):
        assert what.__name__ == "fill" and self.slept == 2
        self.slept = 0

    def generate(self, prompts, sampling, use_tqdm):
        found = [[sum(p["prompt_token_ids"]) + i for i in range(sampling.max_tokens)] for p in prompts]
        if self.slept:
            found[3][7] = 0
        if os.environ["VLLM_BATCH_INVARIANT"] != "1":
            for tokens in found:
                tokens[0] = len(prompts)
        return [S(outputs=[S(token_ids=tokens)]) for tokens in found]
"""


@pytest.fixture
def lifecycle(tmp_path):
    def run(broken: str, *more: str, effective: str = "fused") -> subprocess.CompletedProcess[str]:
        groups = tmp_path / "site" / "vllm" / "distributed" / "parallel_state.py"
        groups.parent.mkdir(parents=True)
        groups.write_text("cleanup_dist_env_and_memory = int")
        (tmp_path / "bench_vllm.py").write_text(BENCH)
        stand_in = VLLM.replace("BROKEN", repr(broken)).replace("EFFECTIVE", effective)
        (tmp_path / "site" / "vllm" / "__init__.py").write_text(stand_in)
        command = [sys.executable, SCRIPT, "--bench", tmp_path / "bench_vllm.py", "--out", tmp_path / "out"]
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, check=False)

    return run


def test_what_stays_the_same_and_what_does_not(lifecycle):
    done = lifecycle("none")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "stock: without tpfuse" in lines
    assert "tpfuse raises: rank 0 of 4: effective off" in lines
    assert "sleep: rank 0 of 4: effective fused" in lines
    assert "served: 10 of 10 requests as stock" in lines
    assert "after sleep of level 1: 9 of 10 requests as served, the others part at token 8 or later" in lines
    assert "after sleep of level 2: 10 of 10 requests as served" in lines
    assert "the next engine: 10 of 10 requests as served" in lines
    assert lines.count("one by one: 10 of 10 requests as served") == 3


def test_a_run_that_did_not_come_to_its_mode_is_no_result(lifecycle):
    done = lifecycle("none", effective="off")
    assert done.returncode == 1
    assert "sleep: rank 0 of 4: effective off\n    no answers" in done.stdout
    assert "tpfuse raises: rank 0 of 4: effective off\n    served: 10 of 10 requests as stock" in done.stdout


def test_a_run_without_what_it_is_compared_with_says_so(lifecycle):
    done = lifecycle("none", "--only", "sleep")
    assert "    not compared: there are no answers of stock\n" in done.stdout


def test_a_run_that_fails_is_told(lifecycle):
    done = lifecycle("MEM*", "--only", "Nemotron-H, stock", "Nemotron-H")
    assert done.returncode == 1
    assert "Nemotron-H: rank 0 of 4: effective fused\n    no answers" in done.stdout
