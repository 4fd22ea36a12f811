"""Deferral: a partial sum is reduced exactly once, by a norm or by `reduce()`, and anything else is said."""

from __future__ import annotations

import jobs_deferred as jobs
import pytest
import torch

from tpfuse import reference
from tpfuse.deferred import (
    Deferral,
    DeferralError,
    PendingReduction,
    Place,
    join,
    reduced,
    total,
    why_not_deferred,
    why_not_reduced,
)

WEIGHT = torch.linspace(0.5, 1.5, 16)
RESIDUAL = torch.linspace(-3, 3, 48).view(3, 16)


def partial() -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_norm_and_reduce_give_what_the_reference_gives(on_ranks, world):
    parts = jobs.partials(world)
    expected = reference.all_reduce_rms_norm(parts, jobs.WEIGHT, residual=jobs.RESIDUAL, eps=1e-5, weight_bias=1.0)
    for found in on_ranks(world, jobs.boundary):
        torch.testing.assert_close(found["norm"], expected.norm, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["total"], expected.residual, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["reduced"], expected.residual, rtol=1e-6, atol=1e-6)


def test_each_value_costs_one_collective(on_ranks):
    for found in on_ranks(2, jobs.boundary):
        assert found["calls"] == {"all_reduce_rms_norm": 1, "all_reduce": 1}


def test_without_a_residual(alone):
    deferral = Deferral(alone)
    with deferral.forward():
        made = deferral.pending(partial(), "mlp")
        y = made.norm(WEIGHT, eps=1e-6)
        with pytest.raises(DeferralError, match="mlp: no total, normed without a residual"):
            _ = made.total
    torch.testing.assert_close(y, reference.rms_norm([partial()], [WEIGHT], eps=1e-6)[0])


def test_a_boundary_gives_what_the_communicator_gives(on_ranks):
    for rank, (deferred, plain) in enumerate(on_ranks(2, jobs.quantised_boundary)):
        assert deferred.norm is plain.norm is None
        for ours, theirs in zip(deferred[1:], plain[1:], strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert len(deferred.residual) == 3 - rank  # its own rows of 5


def test_a_whole_value_needs_a_whole_residual(alone):
    deferral = Deferral(alone)
    with deferral.forward():
        pending = deferral.pending(partial(), "mlp").onto(RESIDUAL[:1])
        with pytest.raises(
            DeferralError, match=r"mlp: its residual has shape \[1, 16\], the sum \[3, 16\].*gather_rows"
        ):
            pending.reduce()
        deferral._pending.clear()


@pytest.mark.parametrize("first", ["norm", "reduce", "boundary"])
@pytest.mark.parametrize("second", ["norm", "reduce"])
def test_consuming_twice_is_an_error(alone, first, second):
    def consume(made: PendingReduction, how: str) -> None:
        made.reduce() if how == "reduce" else getattr(made, how)(WEIGHT, eps=1e-6)

    deferral = Deferral(alone)
    with deferral.forward():
        made = deferral.pending(partial(), "layers.3.mlp")
        consume(made, first)
        with pytest.raises(DeferralError, match=r"layers\.3\.mlp: consumed already"):
            consume(made, second)


def test_dropping_is_an_error_that_names_who_was_dropped(alone):
    deferral = Deferral(alone)

    def forward() -> None:
        with deferral.forward():
            for layer in range(2):
                deferral.pending(partial(), f"layers.{layer}.mlp")
            deferral.pending(partial(), "layers.2.mlp").reduce()

    for _ in range(2):  # the second forward starts afresh
        with pytest.raises(DeferralError, match=r"^layers\.0\.mlp, layers\.1\.mlp: partial sums that no norm"):
            forward()


def test_an_error_inside_a_forward_is_not_covered_up(alone):
    deferral = Deferral(alone)

    def forward() -> None:
        with deferral.forward():
            deferral.pending(partial(), "mlp")
            raise KeyError

    with pytest.raises(KeyError):
        forward()
    assert not deferral.open


def test_a_forward_within_a_forward_ends_with_the_outer_one(alone):
    deferral = Deferral(alone)
    with deferral.forward():
        with deferral.forward():
            made = deferral.pending(partial(), "mlp")
        assert deferral.open
        made.reduce()
    assert not deferral.open


def test_outside_of_a_forward_nothing_is_deferred(alone):
    with pytest.raises(DeferralError, match="deferred outside of a forward"):
        Deferral(alone).pending(partial(), "mlp")


def test_a_residual_is_added_once(alone):
    deferral = Deferral(alone)
    with deferral.forward():
        made = deferral.pending(partial(), "mlp").onto(RESIDUAL)
        with pytest.raises(DeferralError, match="has a residual already"):
            made.onto(RESIDUAL)
        made.reduce()


def test_a_residual_that_comes_too_late_is_an_error(alone):
    deferral = Deferral(alone)
    with deferral.forward():
        made = deferral.pending(partial(), "mlp")
        made.norm(WEIGHT, eps=1e-6)
        with pytest.raises(DeferralError, match="mlp: consumed already, so nothing adds this residual"):
            made.onto(RESIDUAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16])
def test_a_residual_keeps_its_dtype_however_it_is_consumed(alone, dtype, stream):
    deferral, residual = Deferral(alone), RESIDUAL.to(stream)
    with deferral.forward():
        normed, made = (deferral.pending(partial().to(dtype), "mlp").onto(residual) for _ in range(2))
        normed.norm(WEIGHT.to(dtype), eps=1e-6)
        assert made.reduce().dtype == stream
    assert torch.equal(made.total, normed.total)
    assert torch.equal(made.total, (residual.float() + partial().to(dtype).float()).to(stream))


def test_the_total_is_there_once_it_is_reduced(alone):
    deferral = Deferral(alone)
    with deferral.forward():
        made = deferral.pending(partial(), "mlp").onto(RESIDUAL)
        with pytest.raises(DeferralError, match="no total, not reduced yet"):
            _ = made.total
        assert made.reduce() is made.total
    torch.testing.assert_close(made.total, RESIDUAL + partial())


@pytest.mark.parametrize(
    "use",
    [lambda p: torch.add(p, 1), lambda p: p + RESIDUAL, lambda p: RESIDUAL + p, lambda p: torch.cat([RESIDUAL, p])],
    ids=["torch.add", "left", "right", "cat"],
)
def test_it_is_not_a_tensor(alone, use):
    deferral = Deferral(alone)
    with deferral.forward():
        made = deferral.pending(partial(), "layers.3.mlp")
        with pytest.raises((DeferralError, TypeError)):
            use(made)
        made.reduce()


def test_a_torch_function_says_what_to_do(alone):
    deferral = Deferral(alone)
    with deferral.forward():
        made = deferral.pending(partial(), "mlp")
        with pytest.raises(DeferralError, match=r"not a tensor until it is reduced\. Give it to the norm that follows"):
            torch.relu(made)
        made.reduce()


def test_streams_of_tensors_need_no_reduction():
    assert total(RESIDUAL) is RESIDUAL
    assert reduced(RESIDUAL) is RESIDUAL
    assert torch.equal(join(RESIDUAL, RESIDUAL), 2 * RESIDUAL)


@pytest.mark.parametrize(
    ("place", "no_reduction", "no_deferral"),
    [
        (Place(4), "", ""),
        (Place(1), "one rank", "one rank"),
        (Place(4, data_parallel=True), "attention data parallelism", "attention data parallelism"),
        (Place(4, norm_follows=False), "", "pipeline edge"),
        (Place(4, deferring=False), "", "the mode reduces at once"),
        (Place(1, norm_follows=False), "one rank", "one rank"),
        (Place(4, data_parallel=True, norm_follows=False), "attention data", "attention data"),
    ],
)
def test_the_two_questions(place, no_reduction, no_deferral):
    for reason, expected in ((why_not_reduced(place), no_reduction), (why_not_deferred(place), no_deferral)):
        assert reason.startswith(expected)
        assert bool(reason) == bool(expected)


# torch.compile


def layers(deferral: Deferral, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Three layers and a final norm."""
    with deferral.forward():
        stream: torch.Tensor | PendingReduction = x
        for layer in range(3):
            y = stream.norm(weight, eps=1e-6) if isinstance(stream, PendingReduction) else stream * 2
            stream = join(total(stream), deferral.pending(torch.tanh(y), f"layers.{layer}"))
        assert isinstance(stream, PendingReduction)
        return stream.norm(weight, eps=1e-6)


def twice(deferral: Deferral, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with deferral.forward():
        made = deferral.pending(x, "mlp")
        return made.reduce() + made.norm(weight, eps=1e-6)


def test_compiled_without_a_graph_break(alone):
    deferral = Deferral(alone)
    expected = layers(deferral, partial(), WEIGHT)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(deferral, partial(), WEIGHT), expected, rtol=0, atol=0)
    assert not deferral.open


def test_consuming_twice_is_found_while_compiling(alone):
    with pytest.raises(Exception, match=r"consumed already|DeferralError"):
        torch.compile(twice, fullgraph=True, backend="aot_eager")(Deferral(alone), partial(), WEIGHT)
