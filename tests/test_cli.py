"""The command line as its users have it: processes, their output and their exit codes.

`tpfuse check` in full takes two minutes; here a script runs the same command with a few of its cases.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import pytest
from commands import python
from conftest import Refused

import tpfuse
from tpfuse import presets

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# Ranks that this script starts import it again, so they have the same cases.
FEW_CASES = """
import os
from tpfuse import check, cli, reference
from tpfuse.backends.collective import Collective
every, right = check.cases, reference.rms_norm
check.cases = lambda: [case for case in every() if case.width in (24, 72) and not case.variants]
if os.environ.get("BREAK"):
    reference.rms_norm = lambda *args, **settings: [y + 1 for y in right(*args, **settings)]
if os.environ.get("BREAK_RANK") == os.environ.get("RANK", "none"):
    scale = Collective._scale
    Collective._scale = lambda *args: 2 * scale(*args)
if __name__ == "__main__":
    cli.main()
"""

# Ranks wait in their job until they are interrupted.
WAITING = """
import os, time
from tpfuse import check, cli

def waits():
    os.write(1, b"waiting\\n")
    time.sleep(100)

check.cases = waits
if __name__ == "__main__":
    cli.main()
"""

WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
from tpfuse import cli
if __name__ == "__main__":
    cli.main()
"""


@pytest.fixture(scope="module")
def few_cases(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("cli") / "few_cases.py"
    script.write_text(FEW_CASES, encoding="utf-8")
    return str(script)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ("info", "check", "bench", "--version")),
        (("bench",), ("ops",)),
        (("check", "--help"), ("--world", "--device", "--backend", "--mode")),
        (("bench", "ops", "--help"), ("--preset", "--tokens", "--baseline", "--json", "--plot")),
    ],
)
def test_help(arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    done = commands.tpfuse(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for word in says:
        assert word in done.stdout


def test_version() -> None:
    done = commands.tpfuse("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tpfuse {tpfuse.__version__}\n", "")


def test_the_package_is_a_command_too() -> None:
    command = [sys.executable, "-m", "tpfuse", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"tpfuse {tpfuse.__version__}\n")


def test_the_command_is_installed() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "tpfuse", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"tpfuse {tpfuse.__version__}\n")


def test_help_does_not_wait_for_torch() -> None:
    done = python("-c", "import sys, tpfuse.cli; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0


def test_info_for_people() -> None:
    done = commands.tpfuse("info")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (tpfuse.__version__, "cpu", "gpus none", "backends", "collective", "gloo"):
        assert word in done.stdout


def test_info_as_json() -> None:
    done = commands.tpfuse("info", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["versions"]["tpfuse"] == tpfuse.__version__
    assert found["gpus"] == []
    assert {b["name"]: b["available"] for b in found["backends"]} == {"cuda": False, "collective": True}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fly",), "'fly'"),
        (("--fly",), "--fly. See `tpfuse --help`."),
        (("info", "--fly"), "--fly"),
        (("check", "--world"), "--world"),
        (("check", "--world", "two"), "--world"),
        (("check", "--world", "0"), "--world 0: at least 1 rank"),
        (("check", "--world", "-1"), "--world -1: at least 1 rank"),
        (("check", "--device", "cuda"), "--device cuda: torch sees no GPU"),
        (("check", "--device", "abacus"), "--device abacus: supported: cpu, cuda"),
        (("bench", "ops", "--device", "cuda"), "--device cuda: torch sees no GPU"),
        (("bench", "ops", "--world", "0"), "--world 0: at least 1 rank"),
        (("bench", "ops", "--preset", "m2"), f"there are: {', '.join(presets.PRESETS)}"),
        (("bench", "ops", "--tokens", "1,many"), "'1,many'"),
        (("bench", "ops", "--tokens", "0"), "--tokens '0'"),
        (("bench", "ops", "--tokens", ""), "--tokens ''"),
        (("bench", "model", "--concurrency", "0"), "--concurrency '0'; needed: whole numbers of at least 1"),
        (("bench", "model", "--chunks", "0"), "--chunks '0'; needed: whole numbers of at least 1"),
        (("bench", "ops", "--baseline", "abacus"), "'abacus'"),
        (("bench", "ops", "--json", "no/such/folder/x.jsonl"), "no/such/folder"),
        (("bench", "ops", "--plot", "no/such/folder/x.png"), "no/such/folder"),
        (("bench", "ops", "--json", os.curdir), "this is a folder; needed: the name of a file"),
        (("bench", "ops", "--plot", "x.doc"), "x.doc; supported endings: .png, .pdf, .svg."),
        (("bench", "ops", "--plot", "x"), "supported endings: .png, .pdf, .svg."),
        (("bench", "ops", "--json", "/proc/x.jsonl"), "/proc/x.jsonl: can't be written: "),  # for root, too
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], says: str, refused: Refused) -> None:
    assert says in refused(*arguments)


@pytest.mark.parametrize("setting", ["--mode", "--backend"])
def test_what_only_the_ranks_can_refuse_is_one_line_too(setting: str) -> None:
    done = commands.tpfuse("check", "--device", "cpu", "--world", "1", setting, "abacus")
    assert done.returncode == 2
    assert re.fullmatch(r"tpfuse: error: [^\n]*'abacus'; supported: [^\n]+\n", done.stderr), done.stderr


def test_a_check_that_passes(few_cases: str) -> None:
    done = python(few_cases, "check", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 cpu ranks: requested fused, effective control" in done.stdout
    assert "12 of 12 cases passed" in done.stdout
    assert "failed" not in done.stdout


def test_a_check_that_fails(few_cases: str) -> None:
    done = python(few_cases, "check", "--device", "cpu", "--world", "1", BREAK="1")
    assert (done.returncode, done.stderr) == (1, "")
    assert "6 of 12 cases passed" in done.stdout
    assert "failed rms_norm 24 bfloat16 on rank 0: " in done.stdout
    assert "failed all_reduce" not in done.stdout


def test_check_under_torchrun(few_cases: str) -> None:
    done = python(*TORCHRUN, few_cases, "check", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 of 12 cases passed") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", ["0", "1"])
def test_a_rank_that_is_wrong_fails_the_check_under_torchrun(few_cases: str, wrong: str) -> None:
    done = python(*TORCHRUN, few_cases, "check", "--device", "cpu", BREAK_RANK=wrong)
    assert done.returncode == 1
    assert done.stdout.count("6 of 12 cases passed") == 1
    assert f"failed rms_norm 24 bfloat16 on rank {wrong}: " in done.stdout
    assert done.stdout.count("failed qk_rms_norm 72+40") == 3


def test_world_under_torchrun_is_torchruns(few_cases: str) -> None:
    done = python(*TORCHRUN, few_cases, "check", "--device", "cpu", "--world", "3")
    assert done.returncode != 0
    assert "tpfuse: error: --world 3, but torchrun started 2 ranks. Leave --world out.\n" in done.stderr


def test_a_plot_without_matplotlib_is_one_line_before_the_run() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from tpfuse import cli; cli.main()"
    done = python("-c", code, "bench", "ops", "--device", "cpu", "--plot", "x.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"tpfuse: error: plot: matplotlib is missing[^\n]+\n", done.stderr), done.stderr


def test_looking_at_a_path_leaves_nothing_there(tmp_path: Path) -> None:
    figures = tmp_path / "m2.jsonl"
    for content in (None, "before"):
        if content is not None:
            figures.write_text(content, encoding="utf-8")
        done = commands.tpfuse("bench", "ops", "--json", str(figures), "--tokens", "no")
        assert done.returncode == 2
        assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ([content] if content else [])


def test_a_benchmark_writes_its_files(tmp_path: Path) -> None:
    figures, picture = tmp_path / "m2.jsonl", tmp_path / "m2.png"
    paths = ("--json", str(figures), "--plot", str(picture))
    done = commands.tpfuse("bench", "ops", "--device", "cpu", "--tokens", "1", "--baseline", "gloo", *paths)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
    assert {row["impl"] for row in rows} == {"tpfuse", "gloo"}
    assert all(row["ok"] for row in rows)
    assert {row["effective_mode"] for row in rows if row["impl"] == "tpfuse"} == {"control"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(figures) in done.stdout.replace("\n", "")
    assert str(picture) in done.stdout.replace("\n", "")


def test_an_interrupted_check_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING, encoding="utf-8")
    command = [sys.executable, str(script), "check", "--device", "cpu", "--world", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # whoever started this may ignore it
    with subprocess.Popen(command, env=commands.environment(), start_new_session=True, **heard, **pipes) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2
        os.killpg(parent.pid, signal.SIGINT)
        out, said = parent.communicate(timeout=60)
    assert (parent.returncode, out, said.strip()) == (130, "", "tpfuse: interrupted")


def test_a_model_that_fails_in_every_mode_is_exit_code_1(tmp_path: Path) -> None:
    script, figures = tmp_path / "without.py", tmp_path / "figures.jsonl"
    script.write_text(WITHOUT_TRANSFORMERS, encoding="utf-8")
    arguments = ("--preset", "tiny-llama", "--tp", "1", "--concurrency", "1", "--modes", "off,fused")
    files = ("--json", str(figures), "--plot", str(tmp_path / "picture.png"))
    done = python(str(script), "bench", "model", "--device", "cpu", *arguments, *files)
    assert done.returncode == 1, done.stderr
    assert [line[:32] for line in done.stderr.splitlines()] == [
        f"tpfuse: failed: {mode}, 1 request: "[:32] for mode in ("off", "fused")
    ]
    assert all("transformers" in line for line in done.stderr.splitlines())
    assert "failed" in done.stdout
    assert [json.loads(line)["ok"] for line in figures.read_text(encoding="utf-8").splitlines()] == [False, False]
    assert not (tmp_path / "picture.png").exists()
