"""All-reduce + norm in compiled graphs: a pass among vLLM's post-grad passes.

It stands behind those that remove no-ops, shard sequences, and make one operator of add and norm (for models of
transformers), and before all that fuse a norm: vLLM's own all-reduce fusion, which then finds only what was kept for
it, and its norm + quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tpfuse.integrations.serving import state
from tpfuse.integrations.vllm import experts, graph, settings
from tpfuse.integrations.vllm.plugin import guarded, replace
from tpfuse.integrations.vllm.settings import LOG

WHAT = "all-reduce + norm"
EARLIER = ("NoOpEliminationPass", "SequenceParallelismPass", "AsyncTPPass", "AddRMSNormFusionPass")
REDUCES = "AllReduceFusionPass"  # vLLM's own, where its conditions hold
KNOWN = {
    "rms_norm": ("x", "weight", "epsilon", "variance_size"),
    "fused_add_rms_norm": ("x", "x_residual", "weight", "epsilon", "variance_size"),
}


def install() -> None:
    """Put the pass into every pass manager that is configured from now on. Raises LookupError."""
    import vllm.ir.ops  # noqa: F401  defines torch.ops.vllm_ir
    from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    for name, parameters in KNOWN.items():
        found = tuple(argument.name for argument in getattr(torch.ops.vllm_ir, name).default._schema.arguments)
        if found != parameters:
            raise LookupError(f"vllm_ir.{name} has the parameters {found}; known: {parameters}")

    class TpfusePass(InductorPass):  # type: ignore[misc]
        """Fuses all-reduces into the norms behind them."""

        def __init__(self, engaged: state.Engaged, reduces: Any) -> None:
            self._engaged, self._reduces = engaged, reduces

        def __call__(self, found: fx.Graph) -> None:
            if not guarded(WHAT, lambda: apply(found, self._engaged, self._nvfp4())):
                self._engaged.left["a graph where tpfuse raised"] += 1

        def _nvfp4(self) -> bool:
            """Whether vLLM's own fusion comes behind this pass, for as many tokens as this graph is for."""
            reduces = self._reduces
            return reduces is not None and reduces.is_applicable_for_range(get_pass_context().compile_range)

        def uuid(self) -> str:
            return f"{settings.fingerprint(self._engaged.effective)}, experts {experts.targets() is not None}"

    def configure(stock: Callable[..., Any], manager: Any, config: Any) -> Any:
        result = stock(manager, config)
        guarded(WHAT, lambda: place(manager))
        return result

    def place(manager: Any) -> None:
        engaged = state.current
        if engaged is not None and engaged.effective != "off" and is_ours(engaged):
            names = [type(pass_).__name__ for pass_ in manager.passes]
            at = next((i for i, name in enumerate(names) if name not in EARLIER), len(names))
            reduces = manager.passes[names.index(REDUCES)] if REDUCES in names else None
            manager.passes.insert(at, TpfusePass(engaged, reduces))
            LOG.debug("passes: %s", [type(pass_).__name__ for pass_ in manager.passes])

    replace(PostGradPassManager, "configure", configure)


def is_ours(engaged: state.Engaged) -> bool:
    """Whether vLLM's TP group is the one of our Communicator."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group() is engaged.group


def apply(found: fx.Graph, engaged: state.Engaged, nvfp4: bool) -> None:
    """Fuse in one graph, and record what was left. nvfp4: whether norms that become NVFP4 are kept for vLLM's pass."""
    targets = graph.Targets(
        torch.ops.vllm.all_reduce.default,
        engaged.group.unique_name,
        torch.ops.vllm_ir.rms_norm.default,
        torch.ops.vllm_ir.fused_add_rms_norm.default,
        16384 if engaged.comm is None else engaged.comm.max_hidden,
        experts.targets(),
    )
    keep = becomes_nvfp4 if nvfp4 else lambda norm: ""
    findings = graph.fuse(found, targets, keep=keep, rewrite=engaged.effective == "fused")
    engaged.left.update(findings.left)
    engaged.left.update(f"{state.EXPERTS}: {reason}" for reason in findings.summed)
    if engaged.effective == "control" and findings.fused:
        engaged.left["all-reduce + norm, left in this mode"] += findings.fused
    LOG.debug(
        "a graph with %d all-reduce + norm, %d of them quantised, %d with experts; left: %s; experts left before a "
        "fused one: %s",
        findings.fused,
        findings.quantised,
        findings.experts,
        findings.left or "none",
        findings.summed or "none",
    )


def becomes_nvfp4(norm: fx.Node) -> str:
    """Whether a norm is quantised to NVFP4, which vLLM's pass does in one kernel."""
    users = [user for getitem in norm.users for user in (getitem, *getitem.users)]
    quantised = any("scaled_fp4_quant" in str((user.target, user.args[:1])) for user in users)
    return "left to vLLM's fusion with NVFP4" if quantised else ""
