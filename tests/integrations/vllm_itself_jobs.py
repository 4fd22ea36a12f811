"""What test_vllm_itself.py runs on ranks, where vLLM itself is installed: its groups, operators, pass manager."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
        from tpfuse.integrations.vllm import experts, passes, qk_norm

        self.context.__enter__()
        self.parallel_state.init_distributed_environment(self.ranks, self.rank.rank % self.ranks, "env://", 0, "gloo")
        self.parallel_state.ensure_model_parallel_initialized(self.ranks // self.stages, self.stages)
        assert state.current is not None
        self.found = str(state.current)
        if self.effective is not None:
            state.current.effective = self.effective
            state.current.comm = Communicator(state.current.group.device_group)
            passes.install()
            experts.install()
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


def steps_that_ask(rank: Rank) -> list[str]:
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.worker.gpu_worker import Worker

    from tpfuse.integrations.vllm import failures

    failures.install()
    return [
        name
        for owner, names in ((Worker, failures.STEPS), (WorkerProc, ("enqueue_output",)))
        for name in names
        if hasattr(getattr(owner, name), "tpfuse_stock")
    ]


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


def experts(rank: Rank, functionalised: str, add_up: str) -> dict[str, Any]:
    """Two layers of experts in vLLM's own parts, each behind a boundary and before one, compiled as above.

    functionalised: v1, as vLLM asks Inductor to, or v2. add_up: how the layers do it, ops.moe_sum or by themselves."""
    import vllm.ir
    from torch._inductor import config as inductor
    from vllm.forward_context import set_forward_context
    from vllm.utils.torch_utils import LayerName

    from tpfuse.integrations.vllm import experts as ours

    def model(x: Tensor, residual: Tensor, gammas: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = vllm.ir.ops.fused_add_rms_norm(reduced(x, group), residual, gammas[0], 1e-6)
        for layer in range(2):
            z = torch.ops.vllm.moe_forward(y, logits, None, None, LayerName(f"layer.{layer}"), 0)
            z = torch.ops.vllm.all_reduce(z, group_name=group)
            y, residual = vllm.ir.ops.fused_add_rms_norm(z, residual, gammas[1 + layer], 1e-6)
        return y, residual

    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank.rank)
    gammas, residual = torch.randn(3, WIDTH, generator=shared), torch.randn(TOKENS, WIDTH, generator=shared)
    given = (
        torch.randn(TOKENS, WIDTH, generator=own).bfloat16(),
        residual.bfloat16(),
        gammas.bfloat16(),
        torch.randn(TOKENS, 8, generator=own).bfloat16(),
    )
    seen: list[int | None] = []
    with Worker(rank, "fused") as worker, torch.no_grad():
        note_terms(worker.engaged.comm, seen)
        layers = worker.config.compilation_config.static_forward_context
        with experts_for_cpus(add_up) as sums:
            layers |= {f"layer.{n}": layer_of_experts(n) for n in range(2)}
            group = worker.engaged.group.unique_name
            with set_forward_context(None, worker.config):
                expected = [y.float() for y in model(*given)]
                stock = len(sums)
                with inductor.patch(enable_auto_functionalized_v2=functionalised == "v2"):
                    found, *_ = compiled(worker, model, *given)
        unknown = {ours.unknown(layer) for layer in layers.values()}
        return {
            "found": [y.float() for y in found], "expected": expected, "summary": worker.engaged.summary("left"),
            "top_k": seen, "sums": (stock, len(sums) - stock), "unknown": unknown,
        }  # fmt: skip


def note_terms(comm: Any, seen: list[int | None]) -> None:
    """Notes each top_k."""
    stock = comm.all_reduce_rms_norm

    def all_reduce_rms_norm(*args: Any, top_k: int | None = None, **kwargs: Any) -> Any:
        seen.append(top_k)
        return stock(*args, top_k=top_k, **kwargs)

    comm.all_reduce_rms_norm = all_reduce_rms_norm


@contextmanager
def experts_for_cpus(add_up: str) -> Iterator[list[int]]:
    """vLLM's TritonExperts with arithmetic for CPUs in the place of its kernels, and moe_sum's. Counts those sums."""
    from types import SimpleNamespace

    import vllm._custom_ops as custom_ops
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.v1.worker import workspace

    def apply(self: Any, output: Tensor, hidden_states: Tensor, w1: Tensor, *_: Any, **given: Any) -> None:
        weights, ids, y = given["topk_weights"], given["topk_ids"], given["workspace2"]
        y = y.view(-1)[: ids.numel() * WIDTH].view(*ids.shape, WIDTH)
        y.copy_((hidden_states.unsqueeze(1) * w1[ids, 0]) * weights.unsqueeze(-1))
        if add_up == "moe_sum":
            self.moe_sum(y, output)
        else:
            output.copy_(y.float().sum(1))

    sums: list[int] = []

    def moe_sum(input: Tensor, output: Tensor, *_: Any) -> None:
        sums.append(input.shape[1])
        output.copy_(input.float().sum(1))

    stock = TritonExperts.apply, torch.ops._moe_C, torch.accelerator.empty_cache
    TritonExperts.apply = apply
    torch.ops._moe_C = SimpleNamespace(moe_sum=moe_sum)  # what custom_ops.moe_sum calls
    torch.accelerator.empty_cache = lambda: None
    workspace.init_workspace_manager(torch.device("cpu"))
    assert hasattr(custom_ops.moe_sum, "tpfuse_stock")
    try:
        yield sums
    finally:
        TritonExperts.apply, torch.ops._moe_C, torch.accelerator.empty_cache = stock


def layer_of_experts(seed: int) -> Any:
    """A layer of vLLM's own classes, with no more in them than a forward takes: 8 experts, 4 for each token."""
    from types import SimpleNamespace

    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize import no_dp_ep
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    def bare(kind: Any, **attributes: Any) -> Any:
        made = kind.__new__(kind)
        if isinstance(made, torch.nn.Module):
            torch.nn.Module.__init__(made)
        for name, value in attributes.items():
            setattr(made, name, value)
        return made

    def select_experts(*, router_logits: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.float().softmax(-1).topk(4)
        return weights, ids

    config = SimpleNamespace(
        dp_size=1, pcp_size=1, sp_size=1, tp_size=2, ep_size=1, is_sequence_parallel=False, use_ep=False,
        moe_parallel_config=SimpleNamespace(use_all2all_kernels=False, dp_size=1, use_ep=False),
    )  # fmt: skip
    chosen = bare(TritonExperts, moe_config=config, quant_config=FUSED_MOE_UNQUANTIZED_CONFIG, _lora_context=None)
    kernel = modular_kernel.FusedMoEKernel(no_dp_ep.MoEPrepareAndFinalizeNoDPEPModular(), chosen)
    method = bare(
        UnquantizedFusedMoEMethod, moe_kernel=kernel, moe_quant_config=FUSED_MOE_UNQUANTIZED_CONFIG,
        unquantized_backend=None,
    )  # fmt: skip
    method.forward = method.forward_native  # forward_cuda calls it
    w = torch.randn(8, 2, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()
    routed = bare(
        RoutedExperts, quant_method=method, w13_weight=w, w2_weight=w, activation=MoEActivation.SILU,
        apply_router_weight_on_input=False, global_num_experts=8, _expert_map=None,
        rocm_aiter_fmoe_enabled=False,
    )  # fmt: skip
    router = SimpleNamespace(select_experts=select_experts)
    return bare(
        MoERunner, routed_experts=routed, moe_config=config, router=router, gate=None, _shared_experts=None,
        layer_name=f"layer.{seed}",
    )  # fmt: skip


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
    with suppress(ImportError):  # vLLM's compiler does it: Inductor of torch 2.11 takes no names of layers
        from vllm.env_override import _apply_constrain_to_fx_strides_patch

        _apply_constrain_to_fx_strides_patch()
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
