"""Packed batches through piecewise graphs give what the plain model gives, on one rank and two. On a CPU, with the
recording stand-in of tests/graphs for CUDA graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import packed as jobs
import pytest
import tiny_models as tiny
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tpfuse[transformers]'")

sys.path.append(str(Path(__file__).parent.parent / "graphs"))  # ranks import the stand-in

from stand_in import StandIn

from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.integrations import transformers as integration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Name -> a tiny model on this rank alone."""
    return lambda name, **settings: tiny.load(tiny.make(name, tmp_path_factory.mktemp("model")), "whole", 1, **settings)


@pytest.mark.parametrize("name", ["minimax-m2", "minimax-m3", "llama"])
def test_packed_batches_are_the_plain_model(name, on_ranks, tmp_path):
    path = tiny.make(name, tmp_path)
    steps, tokens = on_ranks(1, jobs.plain, path)[0]
    for world, mode in ((1, "whole"), (2, "fused"), (2, "off")):
        for found in on_ranks(world, jobs.packed_batches, path, mode, True, {}):
            for given in (found["lazily"], found["captured"]):
                for logits, expected in zip(given, steps, strict=True):
                    assert (logits - expected).abs().max() <= 1e-5, (world, mode)
            assert torch.equal(found["tokens"], tokens), (world, mode)
            assert found["untouched"]
