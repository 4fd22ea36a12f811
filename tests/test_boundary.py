"""The variants of all_reduce_rms_norm on real groups: quantised outputs, and a residual that is sharded by rows.

The first is the norm, quantised; the second moves rows about. Neither may change a bit of what it is made of.
"""

from __future__ import annotations

import pytest
import quant_jobs as jobs
import torch
from jobs import DTYPES
from quant_jobs import boundary
from ulps import same_bits

import tpfuse
from tpfuse import Communicator, reference
from tpfuse.errors import InvalidArgument
from tpfuse.quant import FORMATS, FP8PerToken

worlds = pytest.mark.parametrize("world", [1, 2, 3])
modes = pytest.mark.parametrize("mode", ["off", "control", "fused"])
formats = pytest.mark.parametrize("name", FORMATS)
ROWS = (5, 0, 1, 2, 33)


def same(a, b):
    """Bit for bit; both may be None."""
    if a is None or b is None:
        return a is b
    if a.element_size() == 1:
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return a.dtype == b.dtype and a.stride() == b.stride() and same_bits(a, b)


def all_same(one, other):
    return len(one) == len(other) and all(map(same, one, other))


# Quantised outputs


@worlds
@formats
def test_what_is_quantised_is_the_rounded_norm(on_ranks, name, world):
    calls = [boundary(rows, quant=name, keep_norm=True, dtype=dtype) for rows in ROWS for dtype in DTYPES]
    plain = [boundary(rows, dtype=dtype) for rows in ROWS for dtype in DTYPES]
    for results, without in zip(on_ranks(world, jobs.run, calls), on_ranks(world, jobs.run, plain), strict=True):
        for (norm, residual, quant, scale), (wanted, stream, *nothing) in zip(results, without, strict=True):
            assert nothing == [None, None]
            assert same(norm, wanted)
            assert same(residual, stream)
            assert all_same((quant, scale), jobs.made(name).encode(norm))


@worlds
@formats
def test_the_norm_is_left_out_unless_it_is_kept(on_ranks, name, world):
    calls = [boundary(quant=name, keep_norm=True), boundary(quant=name, keep_norm=False)]
    for kept, left_out in on_ranks(world, jobs.run, calls):
        assert left_out[0] is None
        assert all_same(kept[1:], left_out[1:])


@pytest.mark.parametrize("world", [2, 3])
@formats
def test_every_rank_has_the_same_bits(on_ranks, name, world):
    first, *others = on_ranks(world, jobs.run, [boundary(33, quant=name), boundary(33, quant=name, row_sharded=True)])
    for other in others:
        assert all(map(all_same, first, other))


@formats
def test_without_a_residual(on_ranks, name):
    for ((norm, residual, quant, scale),) in on_ranks(2, jobs.run, [boundary(quant=name, residual=None)]):
        assert norm is residual is None
        assert quant is not None
        assert scale is not None


@formats
def test_leading_dimensions_are_rows(on_ranks, name):
    cube, flat = boundary((2, 3), quant=name), boundary(6, quant=name)
    for (_, _, quant, scale), (_, _, wanted, wanted_scale) in on_ranks(2, jobs.run, [cube, flat]):
        assert quant.shape[:-1] == (2, 3)
        assert same(quant.flatten(0, 1), wanted)
        assert scale.numel() == wanted_scale.numel()
        assert torch.equal(scale.float().flatten(), wanted_scale.float().flatten())


@formats
def test_the_reference_quantises_its_norm(name):
    xs, gamma, fmt = [torch.randn(3, 256).bfloat16() for _ in range(2)], torch.ones(256), jobs.made(name)
    y = reference.all_reduce_rms_norm(xs, gamma, quant=fmt, keep_norm=True)
    assert same(y.norm, reference.all_reduce_rms_norm(xs, gamma).norm)
    assert all_same(y[2:], fmt.encode(y.norm))
    assert reference.all_reduce_rms_norm(xs, gamma, quant=fmt).norm is None


# A residual that is sharded by rows


@worlds
@modes
@pytest.mark.parametrize("residual", DTYPES, ids=str)
def test_a_row_sharded_residual_changes_no_bit(on_ranks, residual, mode, world):
    calls = [boundary(rows, dtype=dtype, residual=residual) for rows in ROWS for dtype in DTYPES]
    for pairs in on_ranks(world, jobs.replicated_and_sharded, calls, mode):
        assert all(all_same(*pair) for pair in pairs)


@worlds
@formats
def test_quantised_rows_are_those_of_the_replicated_residual(on_ranks, name, world):
    calls = [boundary(rows, quant=name, keep_norm=keep) for rows in ROWS for keep in (False, True)]
    calls += [boundary((2, 3), quant=name)]
    for pairs in on_ranks(world, jobs.replicated_and_sharded, calls, "fused"):
        assert all(all_same(*pair) for pair in pairs)


@pytest.mark.parametrize("world", [3, 4])
def test_large_sums_with_a_row_sharded_residual(on_ranks, world):
    for ((replicated, sharded),) in on_ranks(world, jobs.replicated_and_sharded, [boundary(700, width=1501)], "fused"):
        assert all_same(replicated, sharded)


@worlds
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 33])
def test_rows_go_round_the_ranks_and_come_back_as_they_were(on_ranks, count, world):
    for dtype in DTYPES:
        x = torch.randn(count, 24).to(dtype)
        shards, gathered = zip(*on_ranks(world, jobs.there_and_back, x), strict=True)
        assert all(map(torch.equal, shards, reference.shard_rows(x, world)))
        assert all(shard.is_contiguous() for shard in shards)
        assert all(same(y, x) for y in (*gathered, reference.gather_rows(shards, count)))


def test_leading_dimensions_are_flattened_by_sharding(on_ranks):
    x = torch.randn(2, 3, 8)
    for shard, gathered in on_ranks(2, jobs.there_and_back, x):
        assert shard.shape == (3, 8)
        assert same(gathered, x.view(6, 8))


def test_the_sum_is_exchanged_once_and_the_normed_rows_once(on_ranks):
    for seen in on_ranks(2, jobs.exchanged, boundary(5, row_sharded=True)):
        (_, total, _), (_, norm, dtype), (_, residual, _) = seen  # the last is the test's, to compare
        assert total == (5, 256)
        assert (norm, dtype) == ((3, 256), torch.bfloat16)
        assert residual == (3, 256)
    for seen in on_ranks(2, jobs.exchanged, boundary(5, quant="mxfp8")):
        assert len(seen) == 1


def test_gathering_is_counted_and_has_the_mode_of_the_rest(on_ranks):
    for report in on_ranks(2, jobs.report, boundary(5, row_sharded=True)):
        found = {c["op"]: (c["calls"], c["rows"], c["mode"], c["bytes"]) for c in report["counters"]}
        assert found["gather_rows"] == (1, 5, "any", 3 * 256 * 4)
        assert found["all_reduce_rms_norm"][:3] == (1, 5, "control")
        assert report["effective_mode"] == "control"


# torch.compile


@pytest.mark.parametrize("world", [1, 2])
def test_compiled_calls_are_the_eager_calls(on_ranks, world):
    calls = [boundary(5, quant=name, keep_norm=i % 2 == 0) for i, name in enumerate(FORMATS)]
    calls += [boundary(5, row_sharded=True), boundary((2, 3), row_sharded=True, quant="nvfp4_swizzled")]
    for pairs in on_ranks(world, jobs.compiled_and_eager, calls):
        assert all(all_same(*pair) for pair in pairs)


@formats
@pytest.mark.parametrize("rows", [(5,), (2, 3), (0,)], ids=str)
@pytest.mark.usefixtures("alone")
def test_opcheck(name, rows):
    x, residual, gamma = torch.randn(*rows, 256).bfloat16(), torch.randn(*rows, 256), torch.ones(256)
    with Communicator() as comm:
        for stream, keep in ((residual, True), (None, False)):
            given = (comm.name, 1e-6, 0.0, name, jobs.made(name).given, keep, False)
            torch.library.opcheck(torch.ops.tpfuse.layer_boundary.default, (x, gamma, stream, *given))


def test_opcheck_of_rows(alone):
    x = torch.randn(5, 16)
    torch.library.opcheck(torch.ops.tpfuse.gather_rows.default, (x, 5, alone.name))
    call = (x, torch.ones(16), x, alone.name, 1e-6, 0.0, "", None, False, True)
    torch.library.opcheck(torch.ops.tpfuse.layer_boundary.default, call)


@pytest.mark.usefixtures("alone")
def test_compiled_code_quantises_any_number_of_rows_without_recompiling():
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with Communicator() as comm:
        gamma, fmt = torch.ones(256), FP8PerToken()

        def layer(x, residual):
            return comm.all_reduce_rms_norm(x * 2, gamma, residual=residual, quant=fmt)[1:]

        compiled = torch.compile(layer, backend=count, dynamic=True, fullgraph=True)
        for rows in (5, 7, 33):
            x, residual = torch.randn(rows, 256).bfloat16(), torch.randn(rows, 256)
            assert all_same(compiled(x, residual), layer(x, residual))
    assert len(graphs) == 1


# Modules and errors


@pytest.mark.usefixtures("alone")
def test_a_module_has_the_variants_as_settings():
    with Communicator() as comm:
        norm = tpfuse.nn.AllReduceRMSNorm(256, comm, quant=FP8PerToken(), residual_layout="row_sharded")
        x, residual = torch.randn(3, 256), torch.randn(3, 256)
        wanted = comm.all_reduce_rms_norm(x, norm.weight, residual=residual, quant=FP8PerToken())
        assert all_same(norm(x, residual), wanted)


@pytest.mark.parametrize("field", ["quant", "keep_norm", "row_sharded"])
def test_ranks_that_want_different_things_are_told(on_ranks, field):
    for message in on_ranks(2, jobs.different, field):
        assert f"rank 1 has {field}=" in message


def test_rows_of_another_rank_are_refused(on_ranks):
    first, second, third = on_ranks(3, jobs.shard_of_another)
    assert "residual has shape [4, 8]; needed: [2, 8], the rows that rank 0 of 3 has of 5" in first
    assert "residual has shape [1, 8]; needed: [2, 8], the rows that rank 1 of 3 has of 5" in second
    assert "residual has shape [2, 8]; needed: [1, 8], the rows that rank 2 of 3 has of 5" in third


X, GAMMA = torch.ones(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"residual_layout": "sharded"}, "residual_layout='sharded'; supported: replicated, row_sharded"),
        ({"residual_layout": "row_sharded"}, "residual_layout='row_sharded' without a residual"),
        ({"residual_layout": "row_sharded", "residual": X.int()}, "residual has dtype torch.int32"),
        ({"residual_layout": "row_sharded", "residual": X.unsqueeze(0)}, r"residual has shape \[1, 3, 8\]"),
        ({"quant": FP8PerToken}, "quant=.*FP8PerToken'>; needed: a format"),
        ({"quant": jobs.made("mxfp8")}, "x is 8 wide; needed: a multiple of 32"),
    ],
    ids=["name", "nothing to shard", "dtype", "shape", "class", "width"],
)
def test_what_can_not_be_is_refused(alone, settings, text):
    with pytest.raises(InvalidArgument, match=f"all_reduce_rms_norm: .*{text}"):
        alone.all_reduce_rms_norm(X, GAMMA, **settings)


@pytest.mark.parametrize("shard", [torch.ones(2, 8), torch.ones(1, 3, 8)], ids=["rows", "dims"])
def test_only_own_rows_are_gathered(alone, shard):
    with pytest.raises(InvalidArgument, match=r"gather_rows: shard has shape .*; needed: \[3, 8\]"):
        alone.gather_rows(shard, 3)
