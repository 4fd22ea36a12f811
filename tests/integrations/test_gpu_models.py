"""Tiny models on GPUs: decode in CUDA graphs gives the tokens of the undivided model, with and without own kernels."""

from __future__ import annotations

from collections.abc import Iterator

import behaviour as jobs
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


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_decode_in_graphs(name, ranks, on_ranks, tmp_path):
    path = tiny.make(name, tmp_path)
    expected = on_ranks(1, tiny.greedy, path, "whole", 64)[0][:, len(tiny.PROMPT[0]) :]
    for mode in ("stock", "off", "control", "fused"):
        for tokens in ranks.run(jobs.decoded, path, mode, 64):
            assert torch.equal(tokens, expected), mode


@pytest.mark.parametrize("name", ["minimax-m2", "minimax-m3", "nemotron-h"])
def test_compiled_decode_in_graphs(name, ranks, on_ranks, tmp_path):
    path = tiny.make(name, tmp_path)
    expected = on_ranks(1, tiny.greedy, path, "whole", 24)[0][:, len(tiny.PROMPT[0]) :]
    for mode in ("control", "fused"):
        for tokens in ranks.run(jobs.decoded, path, mode, 24, "inductor"):
            assert torch.equal(tokens, expected), mode


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_logits(name, ranks, on_ranks, tmp_path):
    path = tiny.make(name, tmp_path)
    expected = on_ranks(1, tiny.logits, path, "whole")[0]["logits"]
    for mode in ("off", "control", "fused"):
        for found in ranks.run(jobs.logits_on_device, path, mode):
            assert (found - expected).abs().max() <= 1e-5, mode
