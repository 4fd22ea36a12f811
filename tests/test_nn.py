"""Modules that own a shard of gamma: loading it from full checkpoints, and what they compute."""

from __future__ import annotations

import copy
import pickle

import failing
import jobs
import pytest
import torch
from ulps import assert_within, same_bits, worst

from tpfuse import Communicator, nn, reference
from tpfuse.errors import InvalidArgument, Unsupported

worlds = pytest.mark.parametrize("world", [1, 2, 3, 4])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Cutting a full tensor


@pytest.mark.parametrize(
    ("heads", "world", "parts"),
    [
        (None, 4, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        (6, 2, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
        (3, 3, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (2, 4, [[0, 1, 2, 3, 4, 5]] * 2 + [[6, 7, 8, 9, 10, 11]] * 2),
        (1, 3, [list(range(12))] * 3),
        (4, 1, [list(range(12))]),
    ],
    ids=str,
)
def test_a_shard_is_whole_heads_and_too_few_heads_are_replicated(heads, world, parts):
    full = torch.arange(12)
    assert [nn.shard(full, rank, world, heads).tolist() for rank in range(world)] == parts


def test_a_shard_is_a_view_along_the_first_dimension():
    full = randn(8, 5)
    part = nn.shard(full, 1, 4)
    assert part.shape == (2, 5)
    assert part.data_ptr() == full[2:].data_ptr()


@pytest.mark.parametrize(
    ("size", "heads", "world", "text"),
    [
        (12, 6, 4, "6 heads don't divide over 4 ranks; one must be a multiple of the other"),
        (12, 3, 4, "3 heads don't divide over 4 ranks"),
        (12, 5, 1, "12 elements don't make 5 equal heads"),
        (10, None, 4, "10 elements don't divide over 4 ranks"),
    ],
)
def test_what_does_not_come_out_even_is_refused(size, heads, world, text):
    with pytest.raises(InvalidArgument, match=text):
        nn.shard(torch.arange(size), 0, world, heads)


# Loading


@worlds
def test_a_full_gamma_is_cut_and_a_shard_is_taken_as_it_is(on_ranks, world):
    full = randn(24)
    shards = on_ranks(world, jobs.shards_of, "ShardedRMSNorm", {"width": 24}, {"weight": full})
    assert torch.equal(torch.cat([s["weight"] for s in shards]), full)
    own = randn(24 // world)
    for state in on_ranks(world, jobs.shards_of, "ShardedRMSNorm", {"width": 24}, {"weight": own}):
        assert torch.equal(state["weight"], own)


def test_full_gammas_of_q_and_k_are_cut_by_heads(on_ranks):
    q, k = randn(8 * 4), randn(2 * 4, seed=1)
    sizes = {"q_heads": 8, "kv_heads": 2, "head_dim": 4}
    shards = on_ranks(4, jobs.shards_of, "ShardedQKNorm", sizes, {"q_weight": q, "k_weight": k})
    assert torch.equal(torch.cat([s["q_weight"] for s in shards]), q)
    assert [s["k_weight"].tolist() for s in shards] == [k[:4].tolist()] * 2 + [k[4:].tolist()] * 2


def test_the_gamma_of_a_layer_boundary_is_whole_on_every_rank(on_ranks):
    full = randn(24)
    for state in on_ranks(2, jobs.shards_of, "AllReduceRMSNorm", {"width": 24}, {"weight": full}):
        assert torch.equal(state["weight"], full)


def test_loading_does_not_change_the_checkpoint(alone):
    state = {"q_weight": randn(32), "k_weight": randn(8)}
    before = dict(state)
    nn.ShardedQKNorm(4, 1, 8, alone).load_state_dict(state)
    assert state.keys() == before.keys()
    assert all(state[name] is before[name] for name in state)


def test_a_gamma_of_another_size_is_an_error_of_torch(alone):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.ShardedRMSNorm(24, alone).load_state_dict({"weight": randn(23)})


def test_a_missing_gamma_is_an_error_of_torch(alone):
    with pytest.raises(RuntimeError, match=r"Missing key.*k_weight"):
        nn.ShardedQKNorm(4, 1, 8, alone).load_state_dict({"q_weight": randn(32)})


def test_a_saved_state_loads_again(alone):
    one, other = nn.ShardedRMSNorm(24, alone), nn.ShardedRMSNorm(24, alone)
    one.load_state_dict({"weight": randn(24)})
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(("q_heads", "kv_heads", "text"), [(6, 2, "6 heads"), (8, 3, "3 heads")])
def test_uneven_heads_are_refused_when_the_module_is_made(on_ranks, q_heads, kv_heads, text):
    sizes = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": 4}
    for seen in on_ranks(4, failing.outcome_of, jobs.shards_of, "ShardedQKNorm", sizes, {}):
        assert seen.error == "InvalidArgument"
        assert f"{text} don't divide over 4 ranks" in seen.message


# Before anything is loaded


@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_new_module_scales_by_one(alone, dtype, weight_bias):
    x = randn(3, 16, dtype=dtype)
    (plain,) = reference.rms_norm([x], [torch.ones(16)])
    settings = {"weight_bias": weight_bias, "dtype": dtype}
    for y in (
        nn.ShardedRMSNorm(16, alone, **settings)(x),
        nn.ShardedQKNorm(2, 2, 8, alone, **settings)(x, x)[1],
        nn.AllReduceRMSNorm(16, alone, **settings)(x).norm,
    ):
        assert y.dtype == dtype
        assert worst(y, plain) <= (1 if dtype == torch.bfloat16 else 4)


def test_weights_are_parameters_without_gradient_in_the_asked_dtype(alone):
    norm = nn.ShardedQKNorm(4, 1, 8, alone, dtype=torch.bfloat16)
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in norm.named_parameters()} == {
        "q_weight": ((32,), torch.bfloat16, False),
        "k_weight": ((8,), torch.bfloat16, False),
    }
    assert norm.float().k_weight.dtype == torch.float32


# What they compute: the norm of the unsharded row


@worlds
@pytest.mark.parametrize("settings", [{}, {"eps": 1.0}, {"weight_bias": 1.0}], ids=str)
def test_a_sharded_norm_is_the_norm_of_the_whole_row(on_ranks, settings, world):
    x, gamma = randn(5, 48, dtype=torch.bfloat16), randn(48, seed=1)
    whole = torch.cat(on_ranks(world, jobs.sharded_norm, x, gamma, settings), dim=-1)
    scale = gamma + settings.get("weight_bias", 0.0)
    exact = torch.nn.functional.rms_norm(x.double(), (48,), scale.double(), settings.get("eps", 1e-6))
    assert_within(whole, exact.to(x.dtype), ulps=1)


@pytest.mark.parametrize(("world", "q_heads", "kv_heads"), [(4, 8, 2), (4, 4, 1), (4, 8, 4), (2, 6, 2), (3, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_qk_norm_with_replicated_kv_heads_is_the_norm_of_the_whole_rows(on_ranks, dtype, world, q_heads, kv_heads):
    """A head that several ranks hold counts as often in the sum as in the width."""
    head, eps = 16, 1e-2
    q, k = randn(5, q_heads, head, dtype=dtype), randn(5, kv_heads, head, seed=1, dtype=dtype)
    k[:, 0] *= 20  # so that a head that is counted too often, or not at all, is seen
    gammas = randn(q_heads * head, seed=2), randn(kv_heads * head, seed=3)
    parts = on_ranks(world, jobs.qk_norm_of_heads, q, k, *gammas, head, eps)

    def whole(x, gamma):
        return torch.nn.functional.rms_norm(x.flatten(1).double(), gamma.shape, gamma.double(), eps).to(dtype)

    ulps = 1 if dtype == torch.bfloat16 else 5
    assert_within(torch.cat([q for q, _ in parts], dim=-1), whole(q, gammas[0]), ulps)
    copies = max(1, world // kv_heads)
    assert_within(torch.cat([k for _, k in parts[::copies]], dim=-1), whole(k, gammas[1]), ulps)
    for rank, (_, k) in enumerate(parts):
        assert same_bits(k, parts[rank // copies * copies][1])


@worlds
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_layer_boundary_is_the_op(on_ranks, with_residual, world):
    partials = [randn(5, 48, seed=r, dtype=torch.bfloat16) * 4**r for r in range(world)]
    residual, gamma = randn(5, 48, seed=9) if with_residual else None, randn(48, seed=8)
    exact = reference.all_reduce_rms_norm(partials, gamma, residual=residual, weight_bias=1.0)
    for norm, new, quant, scale in on_ranks(world, jobs.layer_boundary, partials, residual, gamma):
        assert worst(norm, exact.norm) <= (1 if world <= 2 else 2)
        if with_residual:
            assert new.dtype == torch.float32
            assert worst(new.bfloat16(), exact.residual.bfloat16()) <= (0 if world <= 2 else 1)
        else:
            assert new is None
        assert quant is None
        assert scale is None


def test_a_layer_boundary_sums_the_outputs_of_experts(alone: Communicator):
    x, residual, module = randn(5, 3, 48, dtype=torch.bfloat16), randn(5, 48), nn.AllReduceRMSNorm(48, alone)
    assert same_bits(module(x, residual, top_k=3).norm, module(reference.sum_of_experts(x), residual).norm)


def test_modules_print(alone: Communicator):
    assert "ShardedRMSNorm" in repr(torch.nn.Sequential(nn.ShardedRMSNorm(8, alone)))


def test_a_copy_of_a_module_has_weights_of_its_own_and_the_same_communicator(alone: Communicator):
    made = torch.nn.Sequential(nn.AllReduceRMSNorm(8, alone), nn.ShardedRMSNorm(8, alone))
    copied = copy.deepcopy(made)
    copied[1].weight.fill_(3.0)
    assert copied[0].comm is copied[1].comm is alone
    assert torch.equal(made[1].weight, torch.ones(8))
    torch.testing.assert_close(copied[1](randn(2, 8)), 3 * made[1](randn(2, 8)))


def test_a_module_with_a_communicator_is_not_pickled(alone: Communicator):
    with pytest.raises(Unsupported, match=r"can't be pickled.*state_dict\(\)"):
        pickle.dumps(nn.AllReduceRMSNorm(8, alone))
