"""Every architecture, divided over ranks, is the model that it was: its logits, its greedy tokens, its checkpoint; and
each layer takes exactly the collectives that it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tpfuse[transformers]'")
from safetensors.torch import load_file

MODES = ("off", "control", "fused")
models = pytest.mark.parametrize("name", tiny.CONFIGS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Name of a tiny model -> the folder of its checkpoint."""
    made: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in made:
            made[name] = tiny.make(name, tmp_path_factory.mktemp("model"))
        return made[name]

    return path


@pytest.fixture(scope="session")
def whole(checkpoint, on_ranks):
    """Name -> logits and greedy tokens of the model on one rank, undivided."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def run(name: str) -> tuple[Tensor, Tensor]:
        if name not in found:
            logits = on_ranks(1, tiny.logits, checkpoint(name), "whole")[0]["logits"]
            found[name] = logits, on_ranks(1, tiny.greedy, checkpoint(name), "whole")[0]
        return found[name]

    return run


@models
def test_the_tiny_models_have_something_to_say(name, whole):
    logits, tokens = whole(name)
    assert logits.abs().max() > 1
    assert len(set(tokens[0].tolist())) > 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [2, 4])
@models
def test_logits_and_collectives(name, world, mode, checkpoint, whole, on_ranks):
    for rank in on_ranks(world, tiny.logits, checkpoint(name), mode):
        assert (rank["logits"] - whole(name)[0]).abs().max() <= 1e-5
        assert rank["calls"] == tiny.expected_calls(name, mode)


@pytest.mark.parametrize(("world", "mode"), [(2, "off"), (2, "control"), (4, "fused")])
@models
def test_greedy_tokens(name, world, mode, checkpoint, whole, on_ranks):
    for tokens in on_ranks(world, tiny.greedy, checkpoint(name), mode):
        assert torch.equal(tokens, whole(name)[1])


@pytest.mark.parametrize("world", [2, 4])
@models
def test_what_is_saved_is_the_checkpoint(name, world, checkpoint, on_ranks, tmp_path):
    on_ranks(world, tiny.saved, checkpoint(name), tmp_path, "fused")
    given, saved = (load_file(folder / "model.safetensors") for folder in (checkpoint(name), tmp_path))
    assert given.keys() == saved.keys()
    assert [key for key in given if not torch.equal(given[key].view(torch.uint8), saved[key].view(torch.uint8))] == []
