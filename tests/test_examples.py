"""The examples run, each as a user starts it, on two ranks of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import python

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SAYS = {
    "hello.py": "rank {rank} of 2: torch.bfloat16 [4, 3072], control",
    "qk_norm.py": "rank {rank}: right. It sent 8 bytes a token; to gather whole rows it would send 7168",
    "compile.py": "rank {rank}: compiled with aot_eager as one graph, same results as eager",
    "layer.py": "rank {rank}: same results; 2 layers, as many calls of tpfuse",
}


def run(*arguments: str) -> str:
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_no_others() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str) -> None:
    start = TORCHRUN if name == "hello.py" else ()
    arguments = ["aot_eager"] if name == "compile.py" else []
    said = run(*start, str(EXAMPLES / name), *arguments)
    for rank in range(2):
        assert SAYS[name].format(rank=rank) in said


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name
