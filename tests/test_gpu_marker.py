"""What `-m gpu` means: a test that needs GPUs is left out by default where there are none, and never passes unrun."""

from __future__ import annotations

from pathlib import Path

import conftest
import pytest
import torch

TESTS = """
    import pytest
    def test_plain(): pass
    @pytest.mark.gpu
    def test_one(): pass
    @pytest.mark.gpu(4)
    def test_four(): pass
"""


@pytest.fixture
def with_gpus(pytester, monkeypatch):
    """Run these tests in a pytest of their own that sees so many GPUs."""
    pytester.makeconftest(Path(conftest.__file__).read_text().replace('pytest_plugins = ("pytester",)', ""))
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = gpu: needs GPUs")

    def run(count, *options):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)

    return run


def test_without_gpus_they_are_deselected(with_gpus):
    with_gpus(0).assert_outcomes(passed=1, deselected=2)


@pytest.mark.parametrize("asked", ["gpu", "gpu or not gpu"])
def test_without_gpus_asking_for_them_fails(with_gpus, asked):
    result = with_gpus(0, "-m", asked)
    assert result.parseoutcomes()["errors" if "errors" in result.parseoutcomes() else "failed"] == 2
    result.stdout.fnmatch_lines(["*needs 4 GPU(s), torch sees 0*"])
    assert result.ret != 0


def test_with_enough_gpus_they_run(with_gpus):
    with_gpus(4).assert_outcomes(passed=3)
    with_gpus(8, "-m", "gpu").assert_outcomes(passed=2, deselected=1)


def test_with_too_few_gpus_they_fail_and_are_not_skipped(with_gpus):
    result = with_gpus(2)
    assert result.parseoutcomes().get("skipped", 0) == 0
    assert result.parseoutcomes()["passed"] == 2
    result.stdout.fnmatch_lines(["*this test needs 4 GPU(s), torch sees 2; leave it out with -m 'not gpu'*"])
    assert result.ret != 0
