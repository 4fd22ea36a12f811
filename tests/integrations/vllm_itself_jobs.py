"""What test_vllm_itself.py runs on ranks, where vLLM itself is installed: its groups, operators, pass manager."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tpfuse.launch import Rank

WIDTH = 64
TOKENS = 6


class Worker:
    """A worker of vLLM on this rank of the CPU: its configuration, and its TP group through our plugin. There are no
    kernels here, so the Communicator of `effective` is put in by hand."""

    def __init__(self, rank: Rank, effective: str | None = None, stages: int = 1, replicas: int = 1) -> None:
        os.environ["TPFUSE_VLLM"] = "fused"
        from vllm.config import (
            CompilationConfig,
            DeviceConfig,
            ParallelConfig,
            VllmConfig,
            set_current_vllm_config,
        )
        from vllm.distributed import parallel_state

        from tpfuse.integrations.vllm import register

        register()
        self.ranks, self.stages = rank.world // replicas, stages  # of one replica
        self.config = VllmConfig(
            compilation_config=CompilationConfig(),
            device_config=DeviceConfig(device="cpu"),
            parallel_config=ParallelConfig(
                tensor_parallel_size=self.ranks // stages,
                pipeline_parallel_size=stages,
                data_parallel_size=replicas,
                data_parallel_rank=rank.rank // self.ranks,
            ),
        )
        self.context = set_current_vllm_config(self.config)
        self.parallel_state, self.rank, self.effective = parallel_state, rank, effective

    def __enter__(self) -> Worker:
        from tpfuse import Communicator
        from tpfuse.integrations.serving import state
        from tpfuse.integrations.vllm import passes, qk_norm

        self.context.__enter__()
        self.parallel_state.init_distributed_environment(self.ranks, self.rank.rank % self.ranks, "env://", 0, "gloo")
        self.parallel_state.ensure_model_parallel_initialized(self.ranks // self.stages, self.stages)
        assert state.current is not None
        self.found = str(state.current)
        if self.effective is not None:
            state.current.effective = self.effective
            state.current.comm = Communicator(state.current.group.device_group)
            passes.install()
            qk_norm.install()
        self.engaged = state.current
        return self

    def __exit__(self, *error: object) -> None:
        self.parallel_state.destroy_model_parallel()
        self.parallel_state._WORLD = None  # the process group is the pool's
        self.context.__exit__(None, None, None)


def stays_out(rank: Rank) -> dict[str, Any]:
    """Where there are no kernels."""
    from vllm import envs
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    with Worker(rank) as worker:
        manager = PostGradPassManager()
        manager.configure(worker.config)
        return {
            "found": worker.found,
            "key": envs.compile_factors()["TPFUSE_VLLM"],
            "passes": [type(pass_).__name__ for pass_ in manager.passes],
        }


def two_groups(rank: Rank, what: str) -> dict[str, Any]:
    """Two `what`, stages or replicas, each with a TP group of its own."""
    with Worker(rank, "fused", **{what: 2}) as worker:
        x, gamma = torch.full((2, WIDTH), 1.0 + rank.rank), torch.ones(WIDTH)
        _, total = torch.ops.tpfuse_vllm.all_reduce_sum_rms_norm(x, gamma, 1e-6, 0.0)
        return {"ranks": worker.engaged.group.ranks, "found": worker.found, "total": total}


def qk_norm(rank: Rank) -> dict[str, Any]:
    """vLLM's operator through tpfuse, and its own arithmetic; ranks bring rows of very different size."""
    from vllm.model_executor.layers.minimax_rms_norm import rms_norm_tp

    torch.manual_seed(rank.rank)
    qkv = (torch.randn(5, 96 + 2 * 32) * 10.0**rank.rank).bfloat16()
    weights = torch.rand(96).bfloat16(), torch.rand(32).bfloat16()
    with Worker(rank, "fused") as worker, torch.no_grad():
        y = torch.ops.vllm.minimax_qk_norm_fusion(qkv, *weights, 96, 32, rank.rank, rank.world, 1e-6, None)
        stock = rms_norm_tp._minimax_qk_norm_tp_eager(qkv, *weights, 96, 32, rank.world, 1e-6)
        return {"found": y, "stock": stock, "summary": worker.engaged.summary("left")}


def boundary_functions(rank: Rank) -> list[dict[str, Any]]:
    """What models call that are not compiled, through tpfuse; vLLM's own way beside it. Ranks bring rows of very
    different size."""
    from tpfuse.integrations.vllm import functions

    class Norm(torch.nn.Module):
        """Gemma's where bias is 1, as MiniMax-M3 has it on GPUs by FlashInfer."""

        weight, variance_epsilon = torch.rand(WIDTH, generator=torch.Generator().manual_seed(0)), 1e-6

        def __init__(self, bias: float) -> None:
            super().__init__()
            self.bias = bias

        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return total * scale * (self.weight + self.bias), total

    torch.manual_seed(1)
    residual = torch.randn(5, WIDTH)
    torch.manual_seed(2 + rank.rank)
    x = torch.randn(5, WIDTH) * 10.0**rank.rank
    results = []
    for name, home, bias in _functions_here():
        with Worker(rank, "fused") as worker, torch.no_grad():
            functions.install()
            ours = getattr(home, name)
            found, expected = ours(x, residual, Norm(bias)), ours.tpfuse_stock(x.clone(), residual, Norm(bias))
            summary = worker.engaged.summary("left")
            results.append({"name": name, "found": found, "expected": expected, "summary": summary})
    return results


def _functions_here() -> list[tuple[str, Any, float]]:
    """Those of functions.FUNCTIONS that this vLLM has: name, module, what the norm adds to its gamma."""
    import sys
    from importlib import import_module

    from tpfuse.integrations.vllm import functions

    found, flashinfer = [], "vllm.compilation.passes.fusion.allreduce_rms_fusion"
    sys.modules[flashinfer] = None  # type: ignore[assignment]  it needs kernels; the functions go on without it
    try:
        for path, name, bias in functions.FUNCTIONS:
            with suppress(ImportError):
                found.append((name, import_module(path), bias))
    finally:
        del sys.modules[flashinfer]
    return found


def boundaries(rank: Rank, effective: str) -> dict[str, Any]:
    """A model of vLLM's operators, compiled by Inductor with vLLM's pass manager."""
    import vllm.ir

    def all_reduce(x: Tensor) -> Tensor:
        return reduced(x, group)

    norm, add_norm = vllm.ir.ops.rms_norm, vllm.ir.ops.fused_add_rms_norm

    def model(first: Tensor, gammas: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        residual = all_reduce(first)
        x = norm(residual, gammas[0], 1e-6)
        x, residual = add_norm(all_reduce(x @ a), residual, gammas[1], 1e-6)
        x, residual = add_norm(all_reduce(x @ b).view(-1, WIDTH), residual, gammas[2].float() + 1.0, 1e-6)
        return add_norm(all_reduce(x @ a), residual, gammas[3], 1e-5)

    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank.rank)
    gammas = torch.randn(4, WIDTH, generator=shared)
    first, a, b = (torch.randn(n, WIDTH, generator=own) / 8 for n in (TOKENS, WIDTH, WIDTH))
    with Worker(rank, effective) as worker, torch.no_grad():
        group = worker.engaged.group.unique_name
        expected = model(first, gammas, a, b)
        found, passes, key = compiled(worker, model, first, gammas, a, b)
        calls = {c.route.op: c.calls for c in worker.engaged.comm.report().counters}
        return {
            "expected": expected,
            "found": found,
            "calls": calls,
            "summary": worker.engaged.summary("left"),
            "passes": passes,
            "key": key,
        }


def quantisations(rank: Rank) -> dict[str, Any]:
    """vLLM's FP8 quantisations as it spells them for Inductor, behind a boundary each, compiled as above."""
    import vllm.ir
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    from tpfuse.integrations.vllm import graph

    def model(x: Tensor, residual: Tensor, gamma: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        y, residual = vllm.ir.ops.fused_add_rms_norm(reduced(x, group), residual, gamma, 1e-6)
        given, _ = static.forward_native(y, scale)
        y, residual = vllm.ir.ops.fused_add_rms_norm(reduced(x * 2.0, group), residual, gamma, 1e-6)
        by_token, scales = per_token.forward_native(y)
        return given, by_token, scales, residual

    counts, fuse = [], graph.fuse

    def counted(*args: Any, **kwargs: Any) -> Any:
        findings = fuse(*args, **kwargs)
        counts.append((findings.fused, findings.quantised))
        return findings

    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank.rank)
    gamma, residual = (torch.randn(*shape, generator=shared).bfloat16() for shape in ((256,), (TOKENS, 256)))
    given = torch.randn(TOKENS, 256, generator=own).bfloat16(), residual, gamma, torch.tensor([0.02])
    with Worker(rank, "fused") as worker, torch.no_grad():
        group = worker.engaged.group.unique_name
        static, per_token = QuantFP8(True, GroupShape.PER_TENSOR), QuantFP8(False, GroupShape.PER_TOKEN)
        expected = model(*given)
        graph.fuse = counted
        try:
            found, *_ = compiled(worker, model, *given)
        finally:
            graph.fuse = fuse
        return {"counts": counts, "found": [y.float() for y in found], "expected": [y.float() for y in expected]}


def reduced(x: Tensor, group: str) -> Tensor:
    """An all-reduce as vLLM calls it on GPUs; its communicator for CPUs works in place."""
    y: Tensor = torch.ops.vllm.all_reduce(x.clone(), group_name=group)
    return y


def compiled(worker: Worker, model: Callable[..., Any], *given: Tensor) -> tuple[Any, list[str], str]:
    """What a model computes that Inductor compiled with vLLM's pass manager; that manager's passes, and its key."""
    from torch._inductor import config as inductor
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config.utils import Range

    manager = PostGradPassManager()
    manager.configure(worker.config)
    # About kernels that are not in this graph, and in no vLLM that is installed for CPUs.
    type(manager.fix_functionalization).__call__ = lambda self, graph: None
    torch._dynamo.reset()
    for rows in given:
        if rows.shape[0] == TOKENS:  # as vLLM does it: all else is static, floats too
            torch._dynamo.mark_dynamic(rows, 0)
    with pass_context(Range(1, 8192)), inductor.patch(post_grad_custom_post_pass=manager, fx_graph_cache=False):
        found = torch.compile(model, fullgraph=True, dynamic=False)(*given)
        return found, [type(pass_).__name__ for pass_ in manager.passes], manager.uuid()


def attention_names(rank: Rank) -> tuple[str, ...]:
    """What the forward of MiniMax-M2's attention calls."""
    from vllm.model_executor.models.minimax_m2 import MiniMaxM2Attention

    return MiniMaxM2Attention.forward.__code__.co_names
