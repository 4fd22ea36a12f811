"""benchmarks/vllm_tokens.py with stand-ins for vLLM and for the script that brings its environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_tokens.py"
BENCH = """
import argparse, sys
from pathlib import Path

def parse():
    known = argparse.ArgumentParser()
    for name in ("hook", "nemotron", "engine", "attn"):
        known.add_argument(f"--{name}", default="")
    known.add_argument("--no-custom-ar", action="store_true")
    return known.parse_known_args()[0]

def set_env(asked):
    sys.path.insert(0, str(Path(__file__).parent / "site"))

def minimax_config(layers):
    return {"vocab_size": 1000}

def engine_args(asked, folder, concurrency):
    return {"asked": asked}
"""
VLLM = """
import os
import subprocess
import time
from types import SimpleNamespace as S

mode = os.environ["TPFUSE_VLLM"]
SamplingParams = S

class LLM:
    llm_engine = S(engine_core=S(shutdown=lambda: None))

    def __init__(self, asked):
        assert "vllm_weights.py" in asked.hook and os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"
        print("NCCL" if asked.no_custom_ar else "", asked.attn, asked.engine, os.environ.get("TRITON_F32_DEFAULT"))
        if HANGS and mode == "control":
            child = subprocess.Popen(["sleep", "100"])
            open("CHILD", "w").write(str(child.pid))
            time.sleep(100)
        if "vllm_hook.py" in asked.hook or STOCK_HAS_IT:
            print(f"INFO tpfuse, rank 0 of 4: requested {mode}, effective EFFECTIVE")

    def generate(self, prompts, sampling, use_tqdm):
        found = []
        for n, prompt in enumerate(prompts):
            tokens = [sum(prompt["prompt_token_ids"]) + i for i in range(sampling.max_tokens)]
            if mode == "fused" and n % 3 == 1:
                tokens[n + 4] = 0
            log_p = [{token: S(logprob=-0.25 if mode == "fused" else -0.5), -1: None} for token in tokens]
            found.append(S(outputs=[S(token_ids=tokens, logprobs=log_p)]))
        return found
"""


@pytest.fixture
def tokens(tmp_path):
    """What `effective` is -> the script's result."""

    def run(
        effective: str, *more: str, hangs: bool = False, stock_has_it: bool = False
    ) -> subprocess.CompletedProcess[str]:
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "bench_vllm.py").write_text(BENCH)
        stand_in = VLLM.replace("EFFECTIVE", effective).replace("HANGS", str(hangs))
        stand_in = stand_in.replace("STOCK_HAS_IT", str(stock_has_it)).replace("CHILD", str(tmp_path / "child"))
        (tmp_path / "site" / "vllm.py").write_text(stand_in)
        command = [sys.executable, SCRIPT, "--bench", tmp_path / "bench_vllm.py", "--out", tmp_path / "out"]
        settings = [
            "--limit",
            "3" if hangs else "60",
            "--concurrency",
            "1,10",
            "--output-len",
            "16",
            "--input-len",
            "8",
        ]
        return subprocess.run([*command, *settings, *more], capture_output=True, text=True, timeout=60, check=False)

    return run


def test_where_tokens_part(tokens, tmp_path):
    done = tokens("{mode}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if " / " in line]
    assert ["stock", "/", "stock,", "again", "10", "10", "of", "10", "-", "-", "0", "0"] in rows
    assert ["stock", "/", "stock,", "NCCL", "10", "10", "of", "10", "-", "-", "0", "0"] in rows
    assert ["stock", "/", "control", "1", "1", "of", "1", "-", "-", "0", "0"] in rows
    fused = "10", "7", "of", "10", "6", "9", "0.25", "0.25"  # they part at the 6th, 9th and 12th token
    assert ["stock", "/", "fused", *fused] in rows
    before = (tmp_path / "out" / "fused.json").stat().st_mtime_ns
    assert tokens("{mode}").returncode == 0
    assert (tmp_path / "out" / "fused.json").stat().st_mtime_ns == before  # not run again


def test_a_run_that_was_not_what_it_is_called_is_no_result(tokens):
    done = tokens("off")
    assert done.returncode == 1
    assert "fused: failed" in done.stdout
    assert "stock / fused" not in done.stdout


def test_a_run_that_hangs_is_killed_with_its_workers(tokens, tmp_path):
    done = tokens("{mode}", hangs=True)
    assert done.returncode == 1
    assert "control: failed" in done.stdout
    assert "stock / fused" in done.stdout
    assert not alive(int((tmp_path / "child").read_text()))


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and that nobody has asked about does not."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_stock_with_tpfuse_in_it_is_no_result(tokens):
    done = tokens("{mode}", stock_has_it=True)
    assert done.returncode == 1
    assert "stock: failed" in done.stdout
    assert "stock / fused" not in done.stdout


def test_tokens_of_other_settings_are_an_error(tokens):
    assert tokens("{mode}").returncode == 0
    done = tokens("{mode}", "--fp32")
    assert done.returncode == 1
    assert "stock.json is of ['deterministic'" in done.stderr
    assert done.stderr.strip().endswith("delete it.")


def test_what_vllm_is_told(tokens, tmp_path):
    assert tokens("{mode}").returncode == 0
    assert (tmp_path / "out" / "stock-NCCL.log").read_text().startswith("NCCL   None\n")
    assert (tmp_path / "out" / "fused.log").read_text().startswith("   None\n")


def test_fp32_is_fp32_everywhere(tokens, tmp_path):
    assert tokens("{mode}", "--fp32").returncode == 0
    assert (tmp_path / "out" / "fused.log").read_text().startswith(' TRITON_ATTN {"dtype": "float32"} ieee\n')


def test_a_bench_that_is_not_there_is_one_error(tmp_path):
    command = [sys.executable, SCRIPT, "--bench", tmp_path / "nowhere.py", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("nowhere.py: no file there")
