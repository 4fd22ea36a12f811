"""`import tpfuse`: the public names, and what it does not cost."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import tpfuse

PUBLIC = {
    "Communicator", "NormOutput", "Plan", "Rope", "TpfuseError", "__version__",
    "deferred",
    "errors",
    "graphs", "nn", "ops", "quant", "reference",
}  # fmt: skip


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_public_names_are_these():
    assert set(tpfuse.__all__) == set(dir(tpfuse)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there(name):
    assert getattr(tpfuse, name) is not None


def test_names_come_from_where_they_are_defined():
    from tpfuse import communicator, plan

    assert tpfuse.Communicator is communicator.Communicator
    assert tpfuse.Plan is plan.Plan


def test_another_name_is_an_attribute_error_that_lists_them():
    with pytest.raises(AttributeError, match="has no attribute 'Comunicator'; it has Communicator, "):
        _ = tpfuse.Comunicator


def test_the_version_is_that_of_the_installed_package():
    assert version("tpfuse") == tpfuse.__version__


def test_importing_loads_nothing_heavy():
    loaded = in_a_fresh_process("import sys, tpfuse; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    heavy = {"torch", "cuda", "matplotlib", "numpy", "rich", "typer", "triton", "transformers"}
    assert not heavy & set(loaded.split())


def test_importing_is_fast():
    code = "import time; t = time.perf_counter(); import tpfuse; print(time.perf_counter() - t)"
    assert min(float(in_a_fresh_process(code)) for _ in range(3)) < 0.05


def test_using_it_does_not_load_plotting():
    loaded = in_a_fresh_process("import sys, tpfuse; tpfuse.Communicator; print('matplotlib' in sys.modules)")
    assert loaded.strip() == "False"
