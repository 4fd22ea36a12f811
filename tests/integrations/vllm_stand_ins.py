"""Stand-ins for what the integration needs of vLLM: operators with its names and arguments, a TP group, graphs of both.
Written for these tests; vLLM itself is in test_vllm_itself.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from tpfuse import Communicator
from tpfuse.integrations.serving import state
from tpfuse.integrations.vllm.graph import Targets
from tpfuse.launch import Rank

WIDTH = 64
_LIBRARY = torch.library.Library("vllm_stand_in", "DEF")


def _all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    total = tensor.float().clone()
    dist.all_reduce(total)
    return total.to(tensor.dtype).clone()


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * scale * (1.0 if weight is None else weight.float())).to(x.dtype)


def _add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    total = x.float() + x_residual.float()
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + epsilon)
    return (total * scale * (1.0 if weight is None else weight.float())).to(x.dtype), total.to(x.dtype)


for _schema, _function in (
    ("all_reduce(Tensor tensor, str group_name) -> Tensor", _all_reduce),
    ("rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor", _rms_norm),
    (
        "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None) "
        "-> (Tensor, Tensor)",
        _add_rms_norm,
    ),
):
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_stand_in::all_reduce", lambda tensor, _: torch.empty_like(tensor), lib=_LIBRARY)

ops = torch.ops.vllm_stand_in
TARGETS = Targets(ops.all_reduce.default, "tp:0", ops.rms_norm.default, ops.fused_add_rms_norm.default, 16384)


def all_reduce(x: Tensor, group: str = "tp:0") -> Tensor:
    return ops.all_reduce(x, group_name=group)


def traced(function: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    """The graph of a function, decomposed and with fake values, as Inductor's passes see it."""
    with torch.no_grad():
        return make_fx(function, select_decomp_table(), tracing_mode="fake")(*inputs)


def count(graph: fx.Graph) -> dict[str, int]:
    """Calls in a graph, by the operator's name."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
            found[name] = found.get(name, 0) + 1
    return found


def engaged(comm: Communicator | None, effective: str = "fused") -> state.Engaged:
    """What a worker would have, had it found GPUs: here, any Communicator."""
    group = SimpleNamespace(unique_name="tp:0", rank_in_group=0, world_size=1 if comm is None else comm.world)
    return state.Engaged("vLLM", "fused", effective, "", group, comm)


@contextmanager
def serving(comm: Communicator) -> Iterator[state.Engaged]:
    """`comm` in the place of a worker's."""
    state.current = engaged(comm)
    try:
        yield state.current
    finally:
        state.current = None


def model(first: Tensor, gammas: Tensor, gemma: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The boundaries of two layers of a model of vLLM: no residual yet, plain, behind a view, Gemma's, last."""
    residual = all_reduce(first)
    x = ops.rms_norm(residual, gammas[0], 1e-6)
    x, residual = ops.fused_add_rms_norm(all_reduce(x @ a), residual, gammas[1], 1e-6)
    x, residual = ops.fused_add_rms_norm(all_reduce(x @ b).view(-1, WIDTH), residual, gammas[2], 1e-6)
    x, residual = ops.fused_add_rms_norm(all_reduce(x @ a), residual, gemma.float() + 1.0, 1e-5)
    return ops.fused_add_rms_norm(all_reduce(x @ b), residual, gammas[3], 1e-6)


SITES = 5


def inputs(rank: int, dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, ...]:
    """Partial sums of very different size on every rank; gammas that are the same."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    first = torch.randn(rows, WIDTH, generator=own) * 10.0**rank
    gammas = torch.randn(4, WIDTH, generator=shared)
    gemma = torch.randn(WIDTH, generator=shared) / 4
    a, b = (torch.randn(WIDTH, WIDTH, generator=own) / 8 for _ in range(2))
    return tuple(tensor.to(dtype) for tensor in (first, gammas, gemma, a, b))


def run_model(rank: Rank, dtype: torch.dtype) -> dict[str, object]:
    """The model on this rank as it is, and rewritten."""
    from tpfuse.integrations.vllm.graph import fuse

    given = inputs(rank.rank, dtype)
    module = traced(model, *given)
    expected = module(*given)
    with Communicator() as comm:
        with serving(comm):
            fused = fuse(module.graph, TARGETS).fused
            module.recompile()
            found = module(*given)
        calls = {c.route.op: c.calls for c in comm.report().counters}
    return {"expected": expected, "found": found, "fused": fused, "calls": calls}
