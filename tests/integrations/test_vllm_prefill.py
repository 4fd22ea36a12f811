"""benchmarks/vllm_prefill.py with stand-ins for vLLM and for the script that brings its environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_prefill.py"
BENCH = """
import argparse, sys
from pathlib import Path

def parse():
    known = argparse.ArgumentParser()
    for name in ("hook", "nemotron", "engine", "gpu-mem"):
        known.add_argument(f"--{name}", default="")
    return known.parse_known_args()[0]

def set_env(asked):
    sys.path.insert(0, str(Path(__file__).parent / "site"))

def minimax_config(layers):
    return {"vocab_size": 1000}

def engine_args(asked, folder, concurrency):
    assert concurrency == [1, 10] and "kv_cache_memory_bytes" in asked.engine
    return {"hooked": "vllm_hook.py" in asked.hook}
"""
VLLM = """
import os, sys, time
from types import SimpleNamespace as SamplingParams

class LLM:
    def __init__(self, hooked):
        self.mode = os.environ["TPFUSE_VLLM"]
        if self.mode == FAILS:
            sys.exit("no GPU")
        if hooked:
            print(f"INFO tpfuse, rank 0 of 4: requested {self.mode}, effective EFFECTIVE", flush=True)

    def generate(self, prompts, sampling, use_tqdm):
        assert sampling.max_tokens == 1
        time.sleep(0.02 * len(prompts) * (2 if self.mode == "fused" else 1))
"""


@pytest.fixture
def prefill(tmp_path):
    def run(effective: str = "{self.mode}", fails: str = "none") -> subprocess.CompletedProcess[str]:
        (tmp_path / "site").mkdir()
        (tmp_path / "bench_vllm.py").write_text(BENCH)
        stand_in = VLLM.replace("EFFECTIVE", effective).replace("FAILS", repr(fails))
        (tmp_path / "site" / "vllm.py").write_text(stand_in)
        command = [sys.executable, SCRIPT, "--bench", tmp_path / "bench_vllm.py", "--out", tmp_path / "out"]
        settings = ["--lengths", "8", "--rounds", "4", "--limit", "60"]
        return subprocess.run([*command, *settings], capture_output=True, text=True, timeout=120, check=False)

    return run


def test_each_run_is_compared_with_stock_in_the_same_round(prefill, tmp_path):
    done = prefill()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "prefill.jsonl").read_text().splitlines()]
    assert [(row["run"], row["prompts"], len(row["seconds"])) for row in rows] == [
        (run, prompts, 4) for prompts in (1, 10) for run in ("stock", "control", "fused")
    ]
    fused = next(line.split() for line in done.stdout.splitlines() if line.split()[:3] == ["10", "8", "fused"])
    assert 0.4 < float(fused[5].rstrip("x")) < 0.7  # twice the time


def test_an_engine_that_did_not_come_to_its_mode_is_no_result(prefill):
    done = prefill(effective="off")
    assert done.returncode == 1
    assert "control did not come to its mode: rank 0 of 4: requested control, effective off" in done.stderr


def test_an_engine_that_ends_is_told(prefill):
    done = prefill(fails="fused")
    assert done.returncode == 1
    assert "fused ended, see" in done.stderr
