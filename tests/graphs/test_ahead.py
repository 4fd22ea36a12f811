"""Replays ahead of torch's checks: whatever changes between calls, results and errors are those of a call without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import stand_in as s
import torch
from stand_in import Model, Recorded, batch, equal, fresh, make  # noqa: F401
from torch import Tensor, nn

from tpfuse.graphs import StaleGraph
from tpfuse.graphs.ahead import Ahead


class Doubled(nn.Module):
    """In training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class Watched:
    """A model behind `Ahead`, and what each call did, in order: replays, and the call of compiled code."""

    def __init__(self, model: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, (self.backend, _), self.done = model, make(), []
        compiled, replay = s.compiled(model, self.backend), Recorded.replay

        def called(*inputs: Tensor) -> Any:
            self.done.append("call")
            return compiled(*inputs)

        def replayed(graph: Recorded) -> None:
            self.done.append("replay")
            replay(graph)

        monkeypatch.setattr(Recorded, "replay", replayed)
        self.ahead = Ahead(called)

    def __call__(self, tokens: int, seed: int = 0) -> list[str]:
        """A right result, and what was done."""
        given = batch(tokens, seed)
        self.done.clear()
        result = self.ahead(*given)
        equal(result, self.model(*given))
        return list(self.done)

    def learn(self, tokens: int = 5) -> None:
        for _ in range(3):
            self(tokens)
        assert self(tokens) == AHEAD


AHEAD, AS_EVER = ["replay"] * 4 + ["call"], ["call"] + ["replay"] * 4


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(Model(), monkeypatch)


def test_calls_are_replayed_before_they_are_made_once_two_were_alike(watched):
    watched(5)
    assert watched(6, seed=1) == AS_EVER
    for tokens in (6, 5, 8, 7):
        assert watched(tokens, seed=tokens) == AHEAD
    assert watched(3) == AS_EVER  # captures
    assert watched(3) == AHEAD
    assert watched(17) == ["call"]  # more than the largest size
    assert watched(8) == AHEAD


def test_what_is_cleared_is_captured_again(watched):
    watched.learn()
    watched.ahead.forget()
    watched.backend.clear()
    assert watched(5) == AS_EVER
    assert watched(5) == AS_EVER
    assert watched(5) == AHEAD


def test_weights_in_place(watched):
    watched.learn()
    watched.model.load_state_dict(Model().state_dict())
    assert watched(5) == AHEAD


@pytest.mark.parametrize("how", ["assign", "data", "parameter"])
def test_weights_that_moved_are_an_error_before_anything_is_replayed_or_at_the_call(watched, how):
    watched.learn()
    linear, other = watched.model.layers[1].out, Model()
    kept = list(watched.model.parameters())  # whose addresses still hold
    if how == "assign":
        watched.model.load_state_dict(other.state_dict(), assign=True)
    elif how == "data":
        linear.weight.data = torch.randn(16, 16)
    else:
        linear.weight = nn.Parameter(torch.randn(16, 16))
    for _ in range(3):
        with pytest.raises(StaleGraph, match="moved since 8 tokens"):
            watched(5)
    assert watched.done == ["call"]
    watched.backend.clear()
    watched.learn()
    del kept


@pytest.mark.parametrize("what", ["forward", "training", "module", "attribute", "instance"])
def test_a_changed_model_is_compiled_again_and_what_was_replayed_is_thrown_away(watched, what):
    watched.model.layers[0].out = nn.Sequential(watched.model.layers[0].out, Doubled())
    watched.learn()
    layer = watched.model.layers[1]
    if what == "forward":
        layer.out.forward = lambda x: x * 2
    elif what == "training":
        watched.model.eval()
    elif what == "module":
        layer.out = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    elif what == "attribute":
        layer.heads = 4
    else:
        watched.kept, watched.model.layers[2] = watched.model.layers[2], watched.model.layers[0]
    first = watched(5)
    assert first[:4] == ["replay"] * 4
    assert "call" in first
    assert len(first) > 5  # it ran again
    watched(5)
    watched(5)
    assert watched(5)[-1] == "call"


def test_inputs_that_are_new_each_time_are_not_guessed(monkeypatch):
    model = Model()

    def scaled(ids: Tensor, positions: Tensor) -> Tensor:
        return model(ids, positions) * holder[0]

    holder = [torch.ones(16)]
    watched = Watched(scaled, monkeypatch)
    watched(5)
    for scale in (2.0, 3.0):
        holder[0] = torch.full((16,), scale)
        watched.backend.clear()
        assert watched(5)[0] == "call"
    watched(5)
    assert watched(5)[-1] == "call"
    holder[0] = torch.zeros(16)
    with pytest.raises(StaleGraph):
        watched(5)


def test_inference_mode_has_graphs_of_its_own(watched):
    """Its tensors are not written to outside of it, which would be an error of replays ahead alone."""
    watched.learn()
    for _ in range(3):
        with torch.inference_mode():
            assert watched(5)[0] == "call"
            watched(5)
            assert watched(5) == AHEAD
        assert watched(5)[0] == "call"
        watched(5)
        assert watched(5) == AHEAD


def test_an_error_is_that_of_the_call(watched):
    watched.learn()
    with pytest.raises(TypeError):
        watched.ahead(torch.zeros(5, dtype=torch.int64))
    assert watched(5) == AS_EVER
    for other in (torch.int32, torch.float32):
        given = batch(5)[0], batch(5)[1].to(other)
        equal(watched.ahead(*given), watched.model(*given))
