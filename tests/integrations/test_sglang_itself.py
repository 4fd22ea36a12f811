"""SGLang itself, without a model and on CPUs: our plugin found by its loader and hooked by its registry, in its groups,
its norms served by ours. Left out where SGLang is not installed; `pytest -m sglang` fails there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import sglang_itself_jobs as jobs
import torch

from tpfuse.launch import Ranks

pytestmark = pytest.mark.sglang

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module", autouse=True)
def installed(request):
    if find_spec("sglang") is None:
        asked = "sglang" in request.config.option.markexpr
        (pytest.fail if asked else pytest.skip)("SGLang is not installed")


@pytest.fixture
def fresh() -> Iterator[Run]:
    """Ranks of one test: SGLang loads plugins once a process, with the mode of that moment."""
    with Ranks(2) as ranks:
        yield ranks.run


@pytest.fixture(scope="module")
def serving() -> Iterator[Run]:
    """Ranks of all tests in which tpfuse serves."""
    with Ranks(2) as ranks:
        yield ranks.run


def close(found: dict[str, Any], expected: dict[str, Any], near: float) -> None:
    assert found.keys() == expected.keys()
    for name, both in expected.items():
        for y, other in zip(found[name], both, strict=True):
            torch.testing.assert_close(y, other, rtol=near, atol=near, msg=lambda text, name=name: f"{name}: {text}")


def test_without_kernels_it_stays_out_of_sglang(fresh):
    for result in fresh(jobs.stays_out):
        (line,) = result["log"]
        assert "requested fused, effective off, SGLang's own path: backend cuda needs GPUs" in line
        assert result["loaded"] == []
        assert result["hooks"] == [0, 0]


def test_control_hooks_and_serves_nothing(fresh):
    for result in fresh(jobs.control):
        start, report = result["log"]  # and no probe has found anything else than what it knows
        assert "requested control, effective control" in start
        assert "0 of 1 QK norms fused, 0 of 2 all-reduce + norms fused" in report
        assert "1x QK norm: mode control; 2x all-reduce + norm: mode control" in report
        close(result["found"], result["expected"], 0.0)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_norms_are_served_eagerly_and_compiled(serving, dtype, near):
    for result in serving(jobs.served, dtype):
        close(result["found"], result["expected"], near)
        close(result["compiled"], result["found"], 0.0)
        close(result["experts"], {name: result["found"][name] for name in ("norm", "gemma")}, 0.0)
        assert result["operators"] == {"qk": 1, "norm": 1, "gemma": 1}
        start, report = result["log"]
        assert "effective fused" in start
        assert "1 of 1 QK norms fused, 2 of 2 all-reduce + norms fused; left to SGLang: none seen" in report


def test_sglangs_own_callers_are_served(serving):
    for result in serving(jobs.callers):
        assert "1 of 1 QK norms fused, 1 of 1 all-reduce + norms fused; left: none seen" in result["summary"]
        close(result["found"], result["expected"], 1e-5)


def test_a_draft_model_with_a_group_of_its_own_is_left_to_sglang(serving):
    for result in serving(jobs.draft):
        assert "0 of 1 all-reduce + norms fused; left: 1x all-reduce + norm: another group" in result["summary"]
        for _, residual in result["found"]:
            assert torch.equal(residual, result["total"])


def test_a_second_engine_in_a_process_has_its_own_communicator(serving):
    for result in serving(jobs.engines):
        first, second = result["found"]
        assert all(torch.equal(y, other) for y, other in zip(first, second, strict=True))
        assert result["hooks"] == [1] * 4
        assert len(set(result["communicators"])) == 2
        assert all("closed" in found for found in result["communicators"])
        assert result["left"] is None
