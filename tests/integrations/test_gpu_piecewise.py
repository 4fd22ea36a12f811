"""Packed batches through piecewise CUDA graphs on GPUs give what the undivided model gives on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import packed as jobs
import pytest
import tiny_models as tiny
import torch

from tpfuse.launch import Ranks

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tpfuse[transformers]'")
pytestmark = pytest.mark.gpu(2)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, "cuda") as running:
        yield running


@pytest.mark.parametrize("mode", ["off", "control", "fused"])
@pytest.mark.parametrize("name", ["minimax-m2", "minimax-m3", "llama"])
def test_packed_batches_are_the_plain_model(name, mode, ranks, on_ranks, tmp_path):
    path = tiny.make(name, tmp_path)
    expected = on_ranks(1, jobs.plain, path)[0]
    for found in ranks.run(jobs.packed_batches, path, mode, False):
        jobs.check(found, expected)
        assert found["report"]["eager"] == {}
        assert found["report"]["mechanism"] == "CUDA graphs"


def test_pieces_through_inductor(ranks, on_ranks, tmp_path):
    path = tiny.make("minimax-m3", tmp_path)
    expected = on_ranks(1, jobs.plain, path)[0]
    for found in ranks.run(jobs.packed_batches, path, "fused", False, True):
        jobs.check(found, expected)


@pytest.mark.parametrize("name", ["minimax-m2, all experts", "minimax-m3, all experts"])
def test_bfloat16_experts_are_captured(name, ranks, tmp_path):
    """grouped_mm in graphs gives what it gives eagerly. Without a choice of experts: another rounding, of a padded
    batch, could choose others."""
    path = tiny.make(name, tmp_path)
    for differences in ranks.run(jobs.against_eager, path, torch.bfloat16):
        assert max(differences) <= 3e-2
