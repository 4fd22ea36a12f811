"""vLLM itself, without a model and on CPUs: our plugin in its groups, our pass in its pass manager and under Inductor,
its operator served by ours. Left out where vLLM is not installed; `pytest -m vllm` fails there."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import vllm_itself_jobs as jobs

from tpfuse.integrations.vllm import qk_norm

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def installed(request):
    if find_spec("vllm") is None:
        asked = "vllm" in request.config.option.markexpr
        (pytest.fail if asked else pytest.skip)("vLLM is not installed")


def test_without_kernels_it_stays_out_of_vllm(on_ranks):
    for found in on_ranks(2, jobs.stays_out):
        assert "requested fused, effective off, vLLM's own path: backend cuda needs GPUs" in found["found"]
        assert found["key"].startswith("off ")
        assert "TpfusePass" not in found["passes"]


@pytest.mark.parametrize("what", ["stages", "replicas"])
def test_pipeline_stages_and_replicas_have_tp_groups_of_their_own(on_ranks, what):
    for rank, result in enumerate(on_ranks(4, jobs.two_groups, what)):
        first = rank // 2 * 2
        assert result["ranks"] == [first, first + 1]
        assert f"rank {rank % 2} of 2" in result["found"]
        assert (result["total"] == 2 * first + 3).all()


def test_the_qk_norm_is_served(on_ranks):
    for result in on_ranks(2, jobs.qk_norm):
        assert "1 of 1 QK norms fused" in result["summary"]
        for y, stock in zip(result["found"], result["stock"], strict=True):
            torch.testing.assert_close(y, stock)


def test_the_attention_of_minimax_m2_is_the_known_one(on_ranks):
    """Else its RoPE is left to vLLM."""
    (found,) = on_ranks(1, jobs.attention_names)
    assert found == qk_norm.FORWARD


def test_steps_of_workers_ask_whether_a_kernel_gave_up(on_ranks):
    (asking,) = on_ranks(1, jobs.steps_that_ask)
    assert asking == ["execute_model", "sample_tokens", "execute_dummy_batch", "enqueue_output"]


def test_functions_that_models_call_are_served(on_ranks):
    for results in on_ranks(2, jobs.boundary_functions):
        assert "fused_allreduce_gemma_rms_norm" in [result["name"] for result in results]
        for result in results:
            assert "1 of 1 all-reduce + norms fused" in result["summary"]
            for y, expected in zip(result["found"], result["expected"], strict=True):
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_boundaries_are_fused_under_inductor(on_ranks):
    for result in on_ranks(2, jobs.boundaries, "fused"):
        assert result["calls"] == {"all_reduce_rms_norm": 4}
        assert "4 of 4 all-reduce + norms fused; left: none seen" in result["summary"]
        for y, expected in zip(result["found"], result["expected"], strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_quantisations_go_in_as_vllm_spells_them(on_ranks):
    for result in on_ranks(2, jobs.quantisations):
        assert result["counts"] == [(2, 2)]  # in the one graph, as Inductor runs passes once for each
        *quantised, scales, residual = zip(result["found"], result["expected"], strict=True)
        for y, expected in quantised:
            torch.testing.assert_close(y, expected, rtol=2**-3, atol=1e-5)  # neighbours in E4M3
        for y, expected in (scales, residual):
            torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-5)  # neighbours in bfloat16


@pytest.mark.parametrize("functionalised", ["v1", "v2"])
def test_sums_over_experts_go_in(functionalised, on_ranks):
    for result in on_ranks(2, jobs.experts, functionalised, "moe_sum"):
        assert result["unknown"] == {""}
        assert result["top_k"] == [None, 4, 4]
        assert result["sums"] == (2, 0)
        assert "3 of 3 all-reduce + norms fused, 2 of 2 with their sum over experts" in result["summary"]
        for y, expected in zip(result["found"], result["expected"], strict=True):
            torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)  # rows rounded to bfloat16 twice


def test_experts_that_add_up_by_themselves_are_reduced_as_they_are(on_ranks):
    for result in on_ranks(2, jobs.experts, "v1", "in their own way"):
        assert result["top_k"] == [None] * 3
        assert "3 of 3 all-reduce + norms fused, 0 of 2 with their sum over experts" in result["summary"]
        for y, expected in zip(result["found"], result["expected"], strict=True):
            torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)


def test_control_only_looks_and_has_a_key_of_its_own(on_ranks):
    keys = set()
    for result in on_ranks(2, jobs.boundaries, "control"):
        keys.add(result["key"])
        assert "TpfusePass" in result["passes"]
        assert result["calls"] == {}
    (fused,) = {result["key"] for result in on_ranks(2, jobs.boundaries, "fused")}
    assert fused not in keys
    assert len(keys) == 1
