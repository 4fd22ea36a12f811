"""Stand-ins for what the integration needs of SGLang: the names, arguments and attributes of the release that
docs/sglang.md names, and a registry of hooks. Written for these tests; SGLang itself is in test_sglang_itself.py.
"""

from __future__ import annotations

import functools
import pkgutil
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpfuse import Communicator, reference
from tpfuse.integrations.serving import state
from tpfuse.integrations.sglang import boundary, qk_norm
from tpfuse.launch import Rank

PARALLEL = "sglang.srt.distributed.parallel_state"
WIDTH, Q, K = 64, 32, 16


class HookType(Enum):
    AROUND = "around"


class Registry:
    """Hooks are kept, and each target gets its hooks once, when they are applied. A hook that can't be placed is lost
    without a word to who registered it."""

    def __init__(self) -> None:
        self.hooks: dict[str, list[Any]] = {}
        self.applied: set[str] = set()

    def register(self, target: str, hook: Any, hook_type: HookType) -> None:
        assert hook_type is HookType.AROUND
        self.hooks.setdefault(target, []).append(hook)

    def apply_hooks(self) -> None:
        for target in set(self.hooks) - self.applied:
            owner, _, name = target.rpartition(".")
            try:
                found = pkgutil.resolve_name(owner)
                function = getattr(found, name)
            except (AttributeError, ImportError):
                continue
            for hook in self.hooks[target]:
                function = around(function, hook)
            setattr(found, name, function)
            self.applied.add(target)


def around(stock: Any, hook: Any) -> Any:
    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(stock, *args, **kwargs)

    return wrapper


def group_of(ranks: list[int], rank: int = 0, device_group: Any = None) -> SimpleNamespace:
    """A GroupCoordinator."""
    return SimpleNamespace(ranks=ranks, world_size=len(ranks), rank_in_group=rank, device_group=device_group)


class RMSNorm(nn.Module):
    """Its fused method really sums over the ranks, in torch operations."""

    bias, first = 0.0, 1.0

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.full((width,), self.first), False), eps
        self.has_weight, self.variance_size_override, self.cast_x_before_out_mul = True, None, False

    def forward_with_allreduce_fusion(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        use_attn_tp_group: bool = True,
    ) -> Any:
        if residual is None:
            return norm_of(x.float(), self.weight.float() + self.bias, self.variance_epsilon).to(x.dtype)
        total = x.float().clone()
        dist.all_reduce(total)
        total += residual.float() + (0 if post_residual_addition is None else post_residual_addition.float())
        y = norm_of(total, self.weight.float() + self.bias, self.variance_epsilon)
        return y.to(x.dtype), total.to(residual.dtype)


class GemmaRMSNorm(RMSNorm):
    """With a method of its own, as SGLang's: what is replaced in one class is not replaced in the other."""

    bias, first = 1.0, 0.0

    def forward_with_allreduce_fusion(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        use_attn_tp_group: bool = True,
    ) -> Any:
        return super().forward_with_allreduce_fusion(x, residual, post_residual_addition, use_attn_tp_group)


def norm_of(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gamma


class MiniMaxM2QKRMSNorm:
    """Over the whole rows of q and of k, of which each rank has its part."""

    def __init__(self, q_norm: Any, k_norm: Any) -> None:
        self._q_norm, self._k_norm = q_norm, k_norm
        self._world_size = q_norm.attn_tp_size
        self._eps = q_norm.variance_epsilon

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.stack([x.float().pow(2).mean(-1) for x in (q, k)])
        dist.all_reduce(sums)
        scales = torch.rsqrt(sums / self._world_size + self._eps)[..., None]
        norms = (self._q_norm, self._k_norm)
        y = [x.float() * s * n.weight.float() for x, s, n in zip((q, k), scales, norms, strict=True)]
        return y[0].to(q.dtype), y[1].to(k.dtype)


def qk_norm_of(world: int, generator: torch.Generator | None = None) -> MiniMaxM2QKRMSNorm:
    parts = [
        SimpleNamespace(attn_tp_size=world, variance_epsilon=1e-6, weight=torch.rand(width, generator=generator))
        for width in (Q, K)
    ]
    return MiniMaxM2QKRMSNorm(*parts)


class Scheduler:
    def run_event_loop(self) -> str:
        return "SGLang's own"


def modules(group: SimpleNamespace, calls: list[Any]) -> dict[str, ModuleType]:
    """The modules that are imported, with classes of their own, for they are changed."""

    def initialize_model_parallel(
        backend: str | None = None,
        duplicate_tp_group: bool = False,
        recovered_rank: bool = False,
    ) -> None:
        calls.append("initialize")

    contents: dict[str, dict[str, Any]] = {
        "sglang.srt.plugins.hook_registry": {"HookRegistry": Registry(), "HookType": HookType},
        PARALLEL: {
            "initialize_model_parallel": initialize_model_parallel,
            "destroy_model_parallel": lambda: calls.append("destroy"),
            "get_attn_tp_group": lambda: group,
        },
        "sglang.srt.models.minimax_m2": {"MiniMaxM2QKRMSNorm": fresh(MiniMaxM2QKRMSNorm)},
        "sglang.srt.layers.layernorm": {"RMSNorm": fresh(RMSNorm), "GemmaRMSNorm": fresh(GemmaRMSNorm)},
        "sglang.srt.layers.flashinfer_comm_fusion": {
            "resolve_fusion_group": lambda *, use_attn_tp_group: (group.world_size, group.rank_in_group, group)
        },
        "sglang.srt.managers.scheduler": {"Scheduler": fresh(Scheduler)},
    }
    made: dict[str, ModuleType] = {}
    for path, names in contents.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in made:
                made[name] = ModuleType(name)
                made[name].__path__ = []
                if end > 1:
                    setattr(made[".".join(parts[: end - 1])], parts[end - 1], made[name])
        vars(made[path]).update(names)
    return made


def fresh(kind: type) -> type:
    return type(kind.__name__, (kind,), {})


def engaged(comm: Communicator | None, group: Any, effective: str = "fused") -> state.Engaged:
    """What a worker would have, had it found GPUs: here, any Communicator."""
    return state.Engaged("SGLang", "fused", effective, "", group, comm)


def hooked(group: Any, experts: Any = None) -> dict[str, Any]:
    """The methods as SGLang has them once the hooks are applied."""
    rest = (lambda: group, None if experts is None else lambda: experts)
    return {
        "qk": around(MiniMaxM2QKRMSNorm.forward, qk_norm.forward_for(rest[0])),
        "norm": around(RMSNorm.forward_with_allreduce_fusion, boundary.forward_for(*rest, 0.0)),
        "gemma": around(GemmaRMSNorm.forward_with_allreduce_fusion, boundary.forward_for(*rest, 1.0)),
    }


def run_sites(rank: Rank, dtype: torch.dtype) -> dict[str, Any]:
    """Each kind of site on this rank: SGLang's own, through the hook, and the reference's boundary."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank.rank)
    gamma = torch.randn(WIDTH, generator=shared).to(dtype)
    residual = torch.randn(3, WIDTH, generator=shared).to(dtype)
    x = (torch.randn(3, WIDTH, generator=own) * 10.0**rank.rank).to(dtype)
    qkv = torch.randn(3, Q + 2 * K, generator=own).to(dtype)
    q, k, _ = qkv.split([Q, K, K], dim=-1)
    qk = qk_norm_of(rank.world, own)
    norm, gemma = RMSNorm(WIDTH), GemmaRMSNorm(WIDTH)
    norm.weight.data = gemma.weight.data = gamma
    given = {"qk": (qk, q, k), "norm": (norm, x, residual), "gemma": (gemma, x, residual)}
    group = group_of(list(range(rank.world)), rank.rank)
    methods = hooked(group, group)
    stock = {name: methods[name].__wrapped__(*given[name]) for name in methods}
    with Communicator() as comm:
        state.current = engaged(comm, group)
        try:
            found = {name: methods[name](*given[name]) for name in methods}
            summary = state.current.summary("left")
        finally:
            state.current = None
    partial = [torch.empty_like(x) for _ in range(rank.world)]
    dist.all_gather(partial, x)
    exact = {
        name: reference.all_reduce_rms_norm(partial, gamma, residual=residual, weight_bias=bias)[:2]
        for name, bias in (("norm", 0.0), ("gemma", 1.0))
    }
    return {"stock": stock, "found": found, "exact": exact, "summary": summary}
