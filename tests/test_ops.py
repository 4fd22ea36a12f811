"""`torch.ops.tpfuse.*`: what torch checks of an operator, and torch.compile."""

from __future__ import annotations

import gc

import jobs
import pytest
import torch
from jobs import DTYPES, OPS, Case
from torch._subclasses.fake_tensor import FakeTensorMode
from ulps import same_bits

from tpfuse import Communicator, NormOutput
from tpfuse.backends.cuda.sharded_norm import row_stride
from tpfuse.errors import CommunicatorClosed, InvalidArgument

ops = torch.ops.tpfuse


def arguments(dtype=torch.bfloat16, *, layout="contiguous", rows=(5,)):
    """x, k, their gammas, and a residual. strided: x and k as views of one wider tensor; permuted: leading dimensions
    the other way round in memory."""
    generator = torch.Generator().manual_seed(0)
    wide, residual = torch.randn(*rows, 32, generator=generator).to(dtype), torch.randn(*rows, 16, generator=generator)
    x, k = wide[..., 3:19], wide[..., 19:27]
    if layout != "strided":
        x, k = x.contiguous(), k.contiguous()
    if layout == "permuted" and len(rows) > 1:
        x, k, residual = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, k, residual))
    return x, k, torch.ones(16), torch.ones(8, dtype=dtype), residual


def operator_calls(name, **kw):
    """Operator name -> (operator, arguments)."""
    x, k, gamma, k_gamma, residual = arguments(**kw)
    return {
        "rms_norm": (ops.rms_norm, (x, gamma, name, 1e-5, 1.0)),
        "qk_rms_norm": (ops.qk_rms_norm, (x, k, gamma, k_gamma, name, 1e-5, 1e-6)),
        "all_reduce": (ops.all_reduce, (x, name)),
        "all_reduce_rms_norm": (ops.all_reduce_rms_norm, (x, gamma, name)),
        "all_reduce_add_rms_norm": (ops.all_reduce_add_rms_norm, (x, gamma, residual, name)),
    }


OPERATORS = ("rms_norm", "qk_rms_norm", "all_reduce", "all_reduce_rms_norm", "all_reduce_add_rms_norm")
operators = pytest.mark.parametrize("operator", OPERATORS)


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


@operators
@pytest.mark.parametrize("layout", ["contiguous", "strided", "permuted"])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (0,)], ids=str)
def test_opcheck(alone, operator, layout, rows):
    function, given = operator_calls(alone.name, layout=layout, rows=rows)[operator]
    torch.library.opcheck(function.default, given)


@operators
@pytest.mark.parametrize("layout", ["contiguous", "strided", "permuted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(5,), (2, 3), (), (0,)], ids=str)
def test_a_fake_result_has_the_shape_strides_and_dtype_of_the_real_one(alone, operator, rows, dtype, layout):
    function, given = operator_calls(alone.name, dtype=dtype, layout=layout, rows=rows)[operator]
    real = as_tuple(function(*given))
    with FakeTensorMode() as mode:
        fake = as_tuple(function(*(mode.from_tensor(g) if isinstance(g, torch.Tensor) else g for g in given)))
    assert [(y.shape, y.stride(), y.dtype) for y in fake] == [(y.shape, y.stride(), y.dtype) for y in real]


@operators
def test_an_operator_is_the_method(alone, operator):
    x, k, gamma, k_gamma, residual = arguments()
    methods = {
        "rms_norm": lambda: alone.rms_norm(x, gamma, eps=1e-5, weight_bias=1.0),
        "qk_rms_norm": lambda: alone.qk_rms_norm(x, k, gamma, k_gamma, eps=(1e-5, 1e-6)),
        "all_reduce": lambda: alone.all_reduce(x),
        "all_reduce_rms_norm": lambda: alone.all_reduce_rms_norm(x, gamma).norm,
        "all_reduce_add_rms_norm": lambda: alone.all_reduce_rms_norm(x, gamma, residual=residual)[:2],
    }
    function, given = operator_calls(alone.name)[operator]
    results = zip(as_tuple(function(*given)), as_tuple(methods[operator]()), strict=True)
    assert all(same_bits(a, b) for a, b in results)


@operators
@pytest.mark.usefixtures("alone")
def test_the_name_of_a_dead_communicator_is_a_clear_error(operator):
    with Communicator() as comm:
        name = comm.name
    function, given = operator_calls(name)[operator]
    with pytest.raises(CommunicatorClosed, match=f"no communicator named '{name}' in this process; living: .*Keep"):
        function(*given)


@pytest.mark.usefixtures("alone")
def test_a_communicator_that_nobody_keeps_is_dead():
    name = Communicator().name
    gc.collect()
    with pytest.raises(CommunicatorClosed, match=name):
        ops.all_reduce(torch.ones(2, 4), name)


# torch.compile


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_a_compiled_call_is_the_eager_call(on_ranks, op, world):
    cases = [
        Case(op, (5,), residual=torch.float32),
        Case(op, (2, 3), dtype=torch.float32, strided=True),
        Case(op, (2, 3), permuted=True, residual=torch.bfloat16),
    ]
    for pairs in on_ranks(world, jobs.compiled_and_eager, cases):
        for compiled, eager in pairs:
            assert all(same_bits(a, b) for a, b in zip(compiled, eager, strict=True))
            assert all(a.stride() == b.stride() for a, b in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("op", ["rms_norm", "qk_rms_norm", "all_reduce"])
def test_a_compiled_call_in_place_is_the_eager_call(on_ranks, op):
    cases = [Case(op, (2, 3), strided=True, out="in place")]
    for ((compiled, eager),) in on_ranks(2, jobs.compiled_and_eager, cases):
        assert all(same_bits(a, b) for a, b in zip(compiled, eager, strict=True))


def test_a_layer_compiles_into_one_graph_that_calls_each_op_once(on_ranks):
    case = Case("all_reduce_rms_norm", (6,), width=128, residual=torch.float32)
    for compiled, eager, calls in on_ranks(2, jobs.compiled_layer, case):
        assert all(same_bits(a, b) for a, b in zip(compiled, eager, strict=True))
        assert calls == 2 * 2


def test_compiled_code_serves_any_number_of_rows_without_recompiling(alone):
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: alone.rms_norm(x, torch.ones(16)) * 2, backend=count, dynamic=True)
    for rows in (5, 7, 33):
        x = arguments(rows=(rows,))[0]
        assert same_bits(compiled(x), alone.rms_norm(x, torch.ones(16)) * 2)
    assert len(graphs) == 1


def test_compiled_code_checks_its_arguments_when_it_runs(alone):
    torch.compiler.reset()
    compiled = torch.compile(lambda x, w: alone.rms_norm(x, w), backend="eager", fullgraph=True)
    with pytest.raises(InvalidArgument, match="weight has shape"):
        compiled(torch.ones(3, 16), torch.ones(8))


def test_compiled_code_says_when_its_communicator_was_closed(alone):
    torch.compiler.reset()
    comm = Communicator()
    compiled = torch.compile(comm.all_reduce, backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(2, 4)).tolist() == [[1.0] * 4] * 2
    comm.close()
    with pytest.raises(CommunicatorClosed, match="no communicator named"):
        compiled(torch.ones(2, 4))


class Recorder:
    """Stands in for the backend of own kernels: keeps the tensors that it is given, but for gammas."""

    def __init__(self, *gammas: torch.Tensor) -> None:
        self.given: list[torch.Tensor] = []
        self._gammas = set(map(id, gammas))

    def __getattr__(self, op: str):
        def keep(*args: object) -> None:
            for arg in args:
                parts = (arg.norm,) if isinstance(arg, NormOutput) else arg if isinstance(arg, tuple) else (arg,)
                self.given += [
                    part for part in parts if isinstance(part, torch.Tensor) and id(part) not in self._gammas
                ]

        return keep


@pytest.mark.parametrize("layout", ["contiguous", "strided", "permuted"])
@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (1, 6), (2, 1, 3)], ids=str)
def test_own_kernels_are_given_rows_whatever_the_leading_dimensions(alone, monkeypatch, rows, layout):
    """Kernels go from row to row by one stride, of what they read and of what they write."""
    x, k, gamma, k_gamma, residual = arguments(rows=rows, layout=layout)
    backend = Recorder(gamma, k_gamma)
    monkeypatch.setattr(alone, "_begin", lambda *_, **__: backend)
    results = (
        alone.rms_norm(x, gamma),
        *alone.qk_rms_norm(x, k, gamma, k_gamma),
        alone.all_reduce(x),
        *alone.all_reduce_rms_norm(x, gamma, residual=residual)[:2],
    )
    assert [y.shape for y in results] == [x.shape, x.shape, k.shape, x.shape, x.shape, residual.shape]
    assert len(backend.given) == 2 + 4 + 2 + 3
    y, q_y, k_y, total, norm, _ = results
    wanted = (x, y, x, k, q_y, k_y, x, total, x, residual, norm)
    for tensor, want in zip(backend.given, wanted, strict=True):
        count, width = x.shape[:-1].numel(), want.shape[-1]
        assert same_bits(tensor.as_strided((count, width), (row_stride(tensor), 1)), want.reshape(count, width))
        assert (tensor.data_ptr() == want.data_ptr()) == (layout != "permuted" or want.is_contiguous())
