"""The documentation says what is so: its links lead somewhere, its Python runs, its tables name what exists."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import tpfuse.errors
from tpfuse import launch
from tpfuse.bench.implementations import BASELINES
from tpfuse.bench.records import Record
from tpfuse.cli import app
from tpfuse.plan import OPS
from tpfuse.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]

pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"docs/{page.name}"
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The names that headings get: lower case, spaces as dashes, other signs left out."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), target


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:src|tests|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pages
def test_lines_of_prose_are_no_longer_than_those_of_code(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    "))] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", re.findall(r"make ([\w-]+)  ", read("Makefile")))
def test_the_makefile_knows_what_its_help_names(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["test_sharded_norm", "test_all_reduce"])
def test_every_mutation_is_told(name: str) -> None:
    told = set(re.findall(r"`(\w+)`", read("docs/emulator.md")))
    assert set(importlib.import_module(f"simt.{name}").MUTATIONS) - told == set()


def test_files_of_the_structure_page_exist() -> None:
    table = read("docs/structure.md").partition("## Before the first call")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) > 10
    for name in names:
        assert (ROOT / "src" / "tpfuse" / name).exists(), name


def test_the_example_of_the_readme_is_the_one_that_runs() -> None:
    (block,) = python_blocks(read("README.md"))
    _, _, code = read("examples/hello.py").split('"""', 2)
    assert block.strip() == code.strip()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in DOCS if "```python" in page.read_text()], ids=lambda page: page.name)
@pytest.mark.usefixtures("group_of_one")
def test_python_runs(page: Path) -> None:
    names = {"torch": torch, "dist": dist}
    for block in python_blocks(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)


def test_every_error_is_explained() -> None:
    text = read("docs/errors.md")
    for name, value in (vars(tpfuse.errors) | vars(launch)).items():
        if isinstance(value, type) and issubclass(value, tpfuse.errors.TpfuseError):
            assert name in text, name


def test_every_field_of_a_figure_is_explained() -> None:
    named = set(re.findall(r"`(\w+)`", read("docs/method.md").partition("## The file")[2]))
    assert set(Record.__dataclass_fields__) <= named
    for baseline in BASELINES:
        assert f"`{baseline}`" in read("docs/method.md"), baseline


@pytest.mark.parametrize("op", OPS)
def test_every_operation_is_in_the_pages_that_list_them(op: str) -> None:
    assert f"`comm.{op}(" in read("README.md")
    assert f"`{op}`" in read("docs/modes.md")
    assert op in read("docs/contract.md")


@pytest.mark.parametrize("command", ["info", "check", "bench ops"])
def test_the_readme_lists_the_options_of_every_command(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    summary = read("README.md").partition("## Command line")[2].partition("They start")[0]
    start = summary.index(f"tpfuse {command}")
    end = summary.find("\ntpfuse ", start)
    listed = summary[start : end if end > 0 else None]
    assert set(re.findall(r"--\w+", shown)) - {"--help"} == set(re.findall(r"--\w+", listed))


def test_the_readme_lists_the_presets() -> None:
    assert f"--preset {'|'.join(PRESETS)}" in read("README.md")
