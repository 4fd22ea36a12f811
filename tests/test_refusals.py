"""Bad input gets one clear error: tensors that share memory, lie elsewhere or want a gradient, odd numbers, and what
compiled code is given."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import jobs
import pytest
import torch
import torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx

from tpfuse import Communicator, Rope, nn
from tpfuse.checks import share_memory
from tpfuse.errors import InvalidArgument, Unsupported

X, W = torch.randn(6, 8), torch.rand(8)
ROPE = Rope(torch.ones(32, 4), torch.zeros(32, 4), torch.arange(6), head_dim=8, rotary_dim=8)


def test_a_closed_communicator_holds_no_group(alone):
    """Gloo aborts a process that still holds one when the interpreter shuts down."""
    comm = Communicator()
    comm.close()
    held = [*vars(comm).values(), *vars(comm._collective).values()]
    assert not [value for value in held if isinstance(value, dist.ProcessGroup)]


def test_the_cpu_has_one_name(alone):
    with Communicator(device="cpu:0") as comm:
        assert torch.equal(comm.all_reduce(X), X)
    with pytest.raises(InvalidArgument, match=r"device=\[\]"):
        Communicator(device=[])


@pytest.mark.parametrize(
    ("eps", "said"),
    [(-1e-6, "eps from 0 up"), (10**400, "that float32 has"), (float("nan"), "that float32 has"),
     (Fraction(1, 10), "is a Fraction"), ("1e-6", "is a str")],
    ids=str,
)  # fmt: skip
def test_eps_that_is_none(alone, eps, said):
    with pytest.raises(InvalidArgument, match=f"rms_norm: eps is .*{said}|eps is a .*needed"):
        alone.rms_norm(X, W, eps=eps)


def test_eps_of_q_and_k_may_be_one_of_numpys(alone):
    numpy = pytest.importorskip("numpy")
    for y, wanted in zip(
        alone.qk_rms_norm(X, X.clone(), W, W, eps=numpy.float64(0.25)), alone.qk_rms_norm(X, X, W, W, eps=0.25),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(y, wanted)


def test_a_residual_that_wants_a_gradient_is_refused(alone):
    with pytest.raises(Unsupported, match="residual requires a gradient"):
        alone.all_reduce_rms_norm(X, W, residual=X.clone().requires_grad_())


def test_a_row_sharded_residual_elsewhere_is_refused(alone):
    with pytest.raises(InvalidArgument, match="residual is on meta; needed: cpu"):
        alone.all_reduce_rms_norm(X, W, residual=X.to("meta"), residual_layout="row_sharded")


def test_settings_of_the_wrong_kind_are_refused(alone):
    with pytest.raises(InvalidArgument, match="keep_norm='no'; needed: True or False"):
        alone.all_reduce_rms_norm(X, W, keep_norm="no")
    for count in (4.0, -1):
        with pytest.raises(InvalidArgument, match=f"rows={count}; needed: how many rows"):
            alone.gather_rows(X, count)


@pytest.mark.parametrize("out", [(X, X, X), (X,), X])
def test_outputs_for_q_and_k_are_two_tensors(alone, out):
    with pytest.raises(InvalidArgument, match=r"qk_rms_norm: out is .*; needed: a tuple of two tensors"):
        alone.qk_rms_norm(X, X.clone(), W, W, out=out)


def test_what_is_no_tensor_is_named(alone):
    numpy = pytest.importorskip("numpy")
    for call in (
        lambda: alone.all_reduce(numpy.ones((2, 8))),
        lambda: alone.rms_norm(X, None),
        lambda: alone.qk_rms_norm(X, [1.0], W, W),
        lambda: alone.all_reduce_rms_norm(X, W, residual=1),
        lambda: alone.qk_rms_norm(X, X.clone(), W, W, out=(torch.empty(6, 8), None)),
    ):
        with pytest.raises(InvalidArgument, match=r"^a (ndarray|NoneType|list|int) was given where"):
            call()


@pytest.mark.parametrize(("full", "heads"), [(torch.ones(8), 0), (torch.ones(0), None)])
def test_a_shard_of_nothing_is_refused(full, heads):
    with pytest.raises(InvalidArgument, match="don't make 0 equal"):
        nn.shard(full, 0, 2, heads)


@pytest.mark.parametrize("heads", [0, -1])
def test_a_module_of_no_heads_is_refused(alone, heads):
    with pytest.raises(InvalidArgument, match=f"ShardedRMSNorm: 8 elements in {heads} heads"):
        nn.ShardedRMSNorm(8, alone, heads=heads)


class TestRope:
    def test_positions_lie_as_the_rows_do(self, alone):
        q = X.view(2, 3, 8)
        for shape in ((6,), (2, 3), (1, 2, 3)):
            alone.qk_rms_norm(q, q.clone(), W, W, rope=replace(ROPE, positions=torch.arange(6).view(shape)))
        with pytest.raises(InvalidArgument, match=r"one a row, as \[6\] or \[2, 3\]"):
            alone.qk_rms_norm(q, q.clone(), W, W, rope=replace(ROPE, positions=torch.arange(6).view(3, 2)))

    def test_cosines_and_sines_are_of_the_same_positions(self, alone):
        with pytest.raises(InvalidArgument, match=r"cos has 32 positions, rope\.sin 16"):
            alone.qk_rms_norm(X, X.clone(), W, W, rope=replace(ROPE, sin=torch.zeros(16, 4)))

    def test_k_has_whole_heads_too(self, alone):
        with pytest.raises(InvalidArgument, match="q is 8 wide, k 4"):
            alone.qk_rms_norm(X, X[:, :4], W, W[:4], rope=ROPE)


class TestSharedMemory:
    @pytest.mark.parametrize(
        ("a", "b", "shared"),
        [
            (lambda x: x[:, :4], lambda x: x[:, 4:], False),
            (lambda x: x[:, :5], lambda x: x[:, 4:], True),
            (lambda x: x[:3], lambda x: x[3:], False),
            (lambda x: x[:4], lambda x: x[3:], True),
            (lambda x: x.view(2, 3, 8)[..., :4], lambda x: x.view(2, 3, 8)[..., 4:], False),
            (lambda x: x.view(2, 3, 8)[:, :2], lambda x: x.view(2, 3, 8)[:, 1:], True),
            (lambda x: x.view(2, 3, 8)[:, :1], lambda x: x.view(2, 3, 8)[:, 1:], False),
            (lambda x: x[:0], lambda x: x, False),
            (lambda x: x, lambda x: x.clone(), False),
        ],
    )  # fmt: skip
    def test_columns_and_rows_of_one_tensor(self, a, b, shared):
        x = torch.zeros(6, 8)
        assert share_memory(a(x), b(x)) == share_memory(b(x), a(x)) == shared
        a(x).fill_(1)  # what share_memory says is so
        b(x).fill_(2)
        assert bool((a(x) == 2).any()) == shared

    def test_dtypes_of_other_sizes(self):
        x = torch.zeros(16, dtype=torch.uint8)
        assert share_memory(x.view(torch.float32)[:3], x[4:12])
        assert not share_memory(x.view(torch.float32)[:1], x[4:12])

    def test_two_storages_of_one_memory(self):
        pytest.importorskip("numpy")
        assert share_memory(X[:4], torch.from_numpy(X.numpy())[3:])

    def test_an_output_is_the_input_or_apart_from_it(self, alone):
        """A kernel's block writes a row while others still read theirs."""
        seven = torch.randn(7, 8)
        x, moved = seven[:6], seven[1:]
        for call in (lambda out: alone.all_reduce(x, out=out), lambda out: alone.rms_norm(x, W, out=out)):
            for out in (torch.empty(6, 8), x, seven[:6]):
                assert call(out) is out
            with pytest.raises(InvalidArgument, match="out shares memory with an input that it is not"):
                call(moved)
        one = torch.randn(1, 24)[:, :8]
        for out in (one, one.view(1, 8)):  # the stride of one row is any
            assert alone.all_reduce(one, out=out) is out

    @pytest.mark.parametrize("shift", [1, 8])
    def test_an_output_that_is_refused_is_so_behind_any_that_is_not(self, alone, shift):
        numpy = pytest.importorskip("numpy")
        flat = torch.randn(60)
        x, moved = flat[:48].view(6, 8), flat[shift : 48 + shift].view(6, 8)
        other = torch.from_numpy(numpy.frombuffer(flat.numpy(), numpy.float32)[shift : 48 + shift].copy()).view(6, 8)
        elsewhere = torch.from_numpy(flat.numpy()[shift : 48 + shift]).view(6, 8)  # another storage of that memory
        for out in (x, flat[:48].view(6, 8), other):
            alone.all_reduce(x, out=out)
            for refused in (moved, elsewhere):
                with pytest.raises(InvalidArgument, match="out shares memory with an input that it is not"):
                    alone.all_reduce(x, out=refused)

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_calls_with_outputs_can_be_traced(self, alone, mode):
        for call in (lambda x: alone.all_reduce(x, out=x), lambda x: alone.rms_norm(x, W, out=torch.empty_like(x))):
            with torch.no_grad():
                assert make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(X.clone()).graph

    def test_neither_output_of_two_is_on_the_other_input(self, alone):
        both = torch.randn(6, 16)
        q, k = both[:, :8], both[:, 8:]
        alone.qk_rms_norm(q, k, W, W, out=(q, k))
        for out in ((k, q), (torch.empty(6, 8), q)):
            with pytest.raises(InvalidArgument, match="out shares memory with an input that it is not"):
                alone.qk_rms_norm(q, k, W, W, out=out)

    def test_two_outputs_that_overlap_are_refused(self, alone):
        both = torch.empty(12, 8)
        alone.qk_rms_norm(X, X.clone(), W, W, out=(both[:6], both[6:]))  # which is remembered
        with pytest.raises(InvalidArgument, match="the two tensors of out share memory"):
            alone.qk_rms_norm(X, X.clone(), W, W, out=(both[:6], both[1:7]))


class TestCompiled:
    @pytest.mark.parametrize(
        "out", [torch.empty(6, 8, dtype=torch.float64), torch.empty(6, 8, dtype=torch.int32), torch.empty(2, 6, 8)],
        ids=["another dtype", "integers", "another shape"],
    )  # fmt: skip
    @pytest.mark.parametrize("op", ["rms_norm", "qk_rms_norm", "all_reduce"])
    def test_an_output_that_does_not_fit_is_refused(self, alone, op, out):
        call = {
            "rms_norm": lambda: alone.rms_norm(X, W, out=out),
            "qk_rms_norm": lambda: alone.qk_rms_norm(X, X, W, W, out=(torch.empty(6, 8), out)),
            "all_reduce": lambda: alone.all_reduce(X, out=out),
        }[op]
        torch._dynamo.reset()
        with pytest.raises(InvalidArgument, match=f"{op}: out"), torch.no_grad():
            torch.compile(call, backend="aot_eager")()

    def test_a_gradient_is_refused(self, alone):
        torch._dynamo.reset()
        with pytest.raises(Unsupported, match="x requires a gradient"):
            torch.compile(lambda x: alone.all_reduce(x * 2), backend="aot_eager")(X.clone().requires_grad_())


def test_without_fusion_a_rotated_row_has_its_eps(on_ranks):
    for y, exact in on_ranks(2, jobs.rotated_in_mode_off):
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-6)
