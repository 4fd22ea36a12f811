"""What test_sglang_itself.py runs on ranks, where SGLang itself is installed: its loader of plugins, groups, norms."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tpfuse.launch import Rank

WIDTH, HEADS, KV_HEADS, HEAD = 64, 4, 2, 16
KEPT: list[torch.library.Library] = []  # operators last as long as their library
LOADED = ("sglang.srt.models.minimax_m2", "sglang.srt.managers.scheduler")


class Log(logging.Handler):
    """What tpfuse has logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logger = logging.getLogger("tpfuse.sglang")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Worker:
    """A worker of SGLang on this rank of the CPU: plugins by SGLang's own loader, then its groups. There are no kernels
    here, so where tpfuse is to serve, the Communicator is put in by hand."""

    def __init__(self, rank: Rank, mode: str = "fused", served: bool = False) -> None:
        os.environ["TPFUSE_SGLANG"] = mode
        torch.compiler.set_stance("force_eager")  # SGLang compiles a norm of its own; what we compile says so
        declare_operators_of_torchvision()
        self.rank, self.log = rank, Log()
        from sglang.srt.plugins import load_plugins

        load_plugins()
        if served:
            serve()

    def __enter__(self) -> Worker:
        from sglang.srt.distributed import parallel_state
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import ServerArgs

        from tpfuse.integrations.serving import state

        rank, world = self.rank.rank, self.rank.world
        arguments = ServerArgs(model_path="dummy", tp_size=world, device="cpu")
        publish(arguments, role="test", ranks=SpawnRanks(world_rank=rank))
        parallel_state.init_distributed_environment(world, rank, "env://", rank, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
        self.parallel_state, self.engaged = parallel_state, state.current
        return self

    def __exit__(self, *error: object) -> None:
        self.parallel_state.destroy_model_parallel()
        logging.getLogger("tpfuse.sglang").removeHandler(self.log)


def declare_operators_of_torchvision() -> None:
    """SGLang imports torchvision, whose wheel for GPUs can't load its operators beside a torch for CPUs, and then fails
    for want of their schemas. None is called here."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


def serve() -> None:
    """A Communicator on this CPU, for the rest of this process: what GPUs would give."""
    from tpfuse import Communicator
    from tpfuse.integrations.serving import state

    def engaged(engine: str, mode: str, group: Any, against: str) -> state.Engaged:
        return state.Engaged(engine, mode, "fused", against, group, Communicator(group.device_group))

    state._engaged = engaged


def layers() -> Any:
    """SGLang's norms. FlashInfer's operator is there for GPUs only; here it declines, as it may there, and SGLang goes
    on with an all-reduce and its norm."""
    from sglang.srt.layers import flashinfer_comm_fusion, layernorm

    flashinfer_comm_fusion.flashinfer_allreduce_residual_rmsnorm = lambda **given: (None, None)
    return layernorm


def qk_norm() -> Any:
    """MiniMax-M2's QK norm as its attention makes it. SGLang's own ways need its kernels, so its own is what it has in
    torch operations: RMSNormTP's forward, of q and of k."""
    from sglang.srt.models.minimax_m2 import MiniMaxM2QKRMSNorm, MiniMaxM2RMSNormTP

    shared = torch.Generator().manual_seed(0)
    norms = []
    for heads in (HEADS, KV_HEADS):
        norm = MiniMaxM2RMSNormTP(heads * HEAD, heads)
        norm.weight_loader(norm.weight, torch.rand(heads * HEAD, generator=shared))
        norms.append(norm)
    both = MiniMaxM2QKRMSNorm(*norms)
    both._forward_impl = lambda q, k: (norms[0](q), norms[1](k))
    return both


def inputs(rank: Rank, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of each kind of site; ranks bring rows of very different size."""
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2 + rank.rank)
    with set_default_torch_dtype(dtype):
        norm, gemma, qk = layers().RMSNorm(WIDTH), layers().GemmaRMSNorm(WIDTH), qk_norm()
    norm.weight.data.copy_(torch.rand(WIDTH, generator=shared))
    gemma.weight.weight_loader(gemma.weight, torch.randn(WIDTH, generator=shared) / 4)
    x = (torch.randn(5, WIDTH, generator=own) * 10.0**rank.rank).to(dtype)
    residual = torch.randn(5, WIDTH, generator=shared).to(dtype)
    sizes = [HEADS // rank.world * HEAD, *[KV_HEADS // rank.world * HEAD] * 2]
    q, k, _ = (torch.randn(5, sum(sizes), generator=own) * 10.0**rank.rank).to(dtype).split(sizes, dim=-1)
    return {"qk": (qk, q, k), "norm": (norm, x, residual), "gemma": (gemma, x, residual)}


def method(name: str, norm: Any) -> Any:
    return norm.forward if name == "qk" else norm.forward_with_allreduce_fusion


def stock(name: str, norm: Any) -> Any:
    """SGLang's own method, under the hook."""
    return method(name, norm).__wrapped__.__get__(norm)


def depth(function: Any) -> int:
    """How many hooks stand before a function of SGLang."""
    found = 0
    while hasattr(function, "__wrapped__"):
        function, found = function.__wrapped__, found + 1
    return found


def stays_out(rank: Rank) -> dict[str, Any]:
    """Where there are no kernels."""
    with Worker(rank) as worker:
        return {
            "log": worker.log.lines,
            "loaded": [name for name in LOADED if name in sys.modules],
            "hooks": [depth(method("norm", norm)) for norm in (layers().RMSNorm, layers().GemmaRMSNorm)],
        }


def control(rank: Rank) -> dict[str, Any]:
    """Each kind of site once, and the report."""
    with Worker(rank, "control") as worker, torch.no_grad():
        given = inputs(rank, torch.float32)
        found = {name: method(name, norm)(x.clone(), y.clone()) for name, (norm, x, y) in given.items()}
        expected = {name: stock(name, norm)(x.clone(), y.clone()) for name, (norm, x, y) in given.items()}
        report()
        return {"found": found, "expected": expected, "log": worker.log.lines}


def report() -> None:
    """Have the event loop begin, which logs; SGLang's own ends at once, for it is no scheduler that it gets."""
    from sglang.srt.managers.scheduler import Scheduler

    with suppress(AttributeError):
        Scheduler.run_event_loop(SimpleNamespace())


def served(rank: Rank, dtype: torch.dtype) -> dict[str, Any]:
    """Each kind of site through tpfuse, eagerly and compiled, beside SGLang's own."""
    with Worker(rank, served=True) as worker, torch.no_grad():
        given = inputs(rank, dtype)
        result: dict[str, Any] = {"expected": {}, "found": {}, "experts": {}, "compiled": {}, "operators": {}}
        for name, (norm, *both) in given.items():
            result["expected"][name] = stock(name, norm)(*(x.clone() for x in both))
            result["found"][name] = method(name, norm)(*both)
            result["compiled"][name], result["operators"][name] = compiled(method(name, norm), *both)
            if name != "qk":
                result["experts"][name] = method(name, norm)(*both, use_attn_tp_group=False)
        report()
        return {**result, "log": worker.log.lines}


def compiled(function: Any, *given: Tensor) -> tuple[Any, int]:
    """What a function gives as one graph, and how many of our operators are in that."""
    found: list[torch.fx.Node] = []

    def backend(module: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        found.extend(node for node in module.graph.nodes if str(node.target).startswith("tpfuse_sglang."))
        return module.forward

    torch._dynamo.reset()
    with torch.compiler.set_stance("default"):
        return torch.compile(function, backend=backend, fullgraph=True)(*given), len(found)


def callers(rank: Rank) -> dict[str, Any]:
    """SGLang's own callers: MiniMax-M2's attention up to its rotary embedding, and what its layers fuse their sums
    with, which asks for GPUs first."""
    with Worker(rank, served=True) as worker, torch.no_grad():
        from sglang.srt.layers.layer_boundary.fusions import allreduce
        from sglang.srt.layers.layer_boundary.output import UnreducedOutput
        from sglang.srt.layers.moe import post_experts_reduction_group

        allreduce.flashinfer_ar_fusion_applies = lambda rows: True
        norm, x, residual = inputs(rank, torch.float32)["norm"]
        plan, owed = SimpleNamespace(norm=norm), UnreducedOutput(x, post_experts_reduction_group())
        attention, hidden = attention_of(rank), torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))

        def run() -> dict[str, Any]:
            _, _, (q, k, _, _) = attention.forward_prepare(torch.arange(5), hidden, None)
            return {
                "attention": (q, k),
                "before the FFN": allreduce.fused_ffn_input(plan, x.clone(), residual.clone(), None),
                "before attention": allreduce.fused_attn_input(
                    plan, owed, residual.clone(), None, None, fuses_quant=False, keep_bf16=False
                ),
            }

        found = run()
        summary = worker.engaged.summary("left")
        worker.engaged.effective = "control"
        return {"found": found, "expected": run(), "summary": summary}


def attention_of(rank: Rank) -> Any:
    """MiniMax-M2's attention with weights that differ between ranks. Its rotary embedding would need kernels."""
    from sglang.srt.models import minimax_m2
    from transformers import PretrainedConfig

    minimax_m2.get_rope = lambda *sizes, **settings: lambda positions, q, k: (q, k)

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
    rope = {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    config = PretrainedConfig(**sizes, **rope, rms_norm_eps=1e-6, use_qk_norm=True)
    attention = minimax_m2.MiniMaxM2Attention(config)
    torch.nn.init.normal_(attention.qkv_proj.weight, generator=torch.Generator().manual_seed(rank.rank))
    attention.qk_norm_impl._forward_impl = lambda q, k: (attention.q_norm(q), attention.k_norm(k))
    return attention


def draft(rank: Rank) -> dict[str, Any]:
    """A draft model, whose attention has a group of this rank alone: nothing is summed there."""
    with Worker(rank, served=True) as worker, torch.no_grad():
        state = worker.parallel_state
        alone = state.init_model_parallel_group([[0], [1]], rank.rank, "gloo", group_name="draft")
        norm, x, residual = inputs(rank, torch.float32)["norm"]
        with state.patch_tensor_parallel_group(alone, owns_attention=True):
            found = [norm.forward_with_allreduce_fusion(x, residual, None, attention) for attention in (True, False)]
        summary = worker.engaged.summary("left")
        alone.destroy()
        return {"found": found, "total": x + residual, "summary": summary}


def engines(rank: Rank) -> dict[str, Any]:
    """Two engines, one after the other, in one process."""
    from tpfuse.integrations.serving import state

    result: dict[str, Any] = {"found": [], "hooks": [], "communicators": []}
    for _ in range(2):
        with Worker(rank, served=True) as worker, torch.no_grad():
            norm, x, residual = inputs(rank, torch.float32)["norm"]
            result["found"].append(norm.forward_with_allreduce_fusion(x, residual))
            result["hooks"].append(depth(worker.parallel_state.initialize_model_parallel))
            result["hooks"].append(depth(type(norm).forward_with_allreduce_fusion))
        result["communicators"].append(repr(worker.engaged.comm))
    return {**result, "left": state.current}
