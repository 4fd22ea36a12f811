"""Who is measured: tpfuse, and the baselines, a registry of data.

A baseline is what a user has without tpfuse, in its best usual form: it reduces in place where models do, it may have
its inputs where it wants them ahead of time, and whatever it must copy is inside the timed call and in its description.
To add one: write `make(site)`, returning a step for each op, and add a row to BASELINES.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import rms_norm

from tpfuse.bench.cases import BOUNDARIES, OPS, QK, Case, Inputs, Outputs, format_of, made, own_rows, rope_of
from tpfuse.bench.records import TPFUSE
from tpfuse.communicator import Communicator
from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.plan import Route, combined_mode
from tpfuse.quant import E4M3_MAX, TOKEN_FLOOR
from tpfuse.rope import rotate

Step = Callable[[Case, Inputs], Outputs]


@dataclass(frozen=True)
class Site:
    """Where an implementation runs."""

    rank: int
    world: int
    device: torch.device
    transport: str  # torch.distributed's backend for the device: "gloo", "nccl"
    max_bytes: int  # of the largest payload that will be reduced


class Ran(NamedTuple):
    """What served a case."""

    backend: str
    algorithm: str
    requested_mode: str
    effective_mode: str
    reason: str


class Implementation(Protocol):
    """`step` runs a case, `ran` says what served the case since it was asked last."""

    @property
    def name(self) -> str: ...
    @property
    def in_place(self) -> bool: ...  # the step spoils its inputs
    def serves(self, op: str) -> bool: ...
    def step(self, case: Case, inputs: Inputs) -> Outputs: ...
    def ran(self, case: Case) -> Ran: ...


class Tpfuse:
    """tpfuse itself. What ran is read from the communicator's counters, not from what was asked for."""

    name = TPFUSE
    in_place = False

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._seen: dict[Route, int] = {}

    def serves(self, op: str) -> bool:
        return True

    def step(self, case: Case, inputs: Inputs) -> Outputs:
        return _TPFUSE[case.called](self._comm, case, inputs)

    def ran(self, case: Case) -> Ran:
        calls = {c.route: c.calls for c in self._comm.report().counters if c.route.op == case.called}
        used = [route for route, count in calls.items() if count > self._seen.get(route, 0)]
        self._seen.update(calls)
        requested = self._comm.plan.requested_mode
        if not used:  # the case can't run, or failed before it was served
            return Ran("", "", requested, "none", "")
        return Ran(
            " + ".join(dict.fromkeys(r.backend for r in used)),
            " + ".join(dict.fromkeys(r.algorithm for r in used)),
            requested,
            combined_mode(r.mode for r in used),
            "; ".join(dict.fromkeys(r.reason for r in used if r.reason)),
        )


def _tpfuse_qk(comm: Communicator, case: Case, i: Inputs) -> Outputs:
    tensors, rope = (i["q"], i["k"], i["q_weight"], i["k_weight"]), rope_of(case, i)
    return comm.qk_rms_norm(*tensors, eps=case.eps, weight_bias=case.weight_bias, rope=rope)


def _tpfuse_all_reduce(comm: Communicator, case: Case, i: Inputs) -> Outputs:
    return (comm.all_reduce(i["x"]),)


def _tpfuse_all_reduce_rms_norm(comm: Communicator, case: Case, i: Inputs) -> Outputs:
    y = comm.all_reduce_rms_norm(
        i["x"],
        i["weight"],
        residual=i["shard"] if case.row_sharded else i["residual"],
        eps=case.eps,
        weight_bias=case.weight_bias,
        quant=format_of(case, i),
        residual_layout="row_sharded" if case.row_sharded else "replicated",
        top_k=case.top_k,
    )
    return made(case, y)


_TPFUSE: Mapping[str, Callable[[Communicator, Case, Inputs], Outputs]] = {
    "qk_rms_norm": _tpfuse_qk,
    "all_reduce": _tpfuse_all_reduce,
    "all_reduce_rms_norm": _tpfuse_all_reduce_rms_norm,
}


@dataclass(frozen=True)
class Baseline:
    """One row of the registry. `make` is collective and raises Unsupported where the baseline can't run."""

    name: str
    backend: str
    algorithms: Mapping[str, str]  # by op: what a call does; other ops it does not know
    make: Callable[[Site], Mapping[str, Step]]
    in_place: bool = False
    steps: Mapping[str, Step] | None = None  # what `make` returned

    def made(self, site: Site) -> Baseline:
        return replace(self, steps=self.make(site))

    def serves(self, op: str) -> bool:
        return op in self.algorithms

    def step(self, case: Case, inputs: Inputs) -> Outputs:
        assert self.steps is not None
        return self.steps[case.op](case, inputs)

    def ran(self, case: Case) -> Ran:
        return Ran(self.backend, self.algorithms[case.op], "", "", "")


# torch.distributed's own all-reduce, in the tensor's dtype and in place, and torch's norm.


def _make_gloo(site: Site) -> Mapping[str, Step]:
    return _distributed_steps(site, "gloo")


def _make_nccl(site: Site) -> Mapping[str, Step]:
    return _distributed_steps(site, "nccl")


def _distributed_steps(site: Site, name: str) -> Mapping[str, Step]:
    if site.transport != name:
        raise Unsupported(f"{name}: the group has {site.transport} for {site.device.type}")

    def reduce(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    return _steps(site, reduce, reduce)


def _steps(site: Site, reduce: Callable[[Tensor], Tensor], reduce_kept: Callable[[Tensor], Tensor]) -> dict[str, Step]:
    """The ops over some all-reduce. reduce: its result is consumed at once; reduce_kept: it is the op's result."""

    def qk(case: Case, i: Inputs) -> Outputs:
        q, k = i["q"], i["k"]
        sums = reduce(torch.stack((q.float().square().sum(-1), k.float().square().sum(-1)), -1))
        q_inverse = torch.rsqrt(sums[:, :1] * (1 / case.widths[0]) + case.eps)
        k_inverse = torch.rsqrt(sums[:, 1:] * (1 / case.widths[1]) + case.eps)
        return _rotated(case, i, q * q_inverse * i["q_weight"], k * k_inverse * i["k_weight"])

    def all_reduce(case: Case, i: Inputs) -> Outputs:
        return (reduce_kept(i["x"]),)

    def all_reduce_rms_norm(case: Case, i: Inputs) -> Outputs:
        partial = i["x"] if case.top_k is None else i["x"].sum(1)
        residual = reduce(partial) + i["residual"]
        norm = rms_norm(residual.to(case.dtype), case.widths, i["gamma"], case.eps)
        return (*_CASTS[case.quant](norm, i), own_rows(case, residual, site.rank))

    steps = {"qk_rms_norm": qk, "all_reduce": all_reduce, "all_reduce_rms_norm": all_reduce_rms_norm}
    return {name: steps[op.called] for name, op in OPS.items()}


def _static(norm: Tensor, i: Inputs) -> Outputs:
    return ((norm * (1 / i["scale"])).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn),)


def _per_token(norm: Tensor, i: Inputs) -> Outputs:
    scale = norm.abs().amax(-1, keepdim=True).float().mul(1 / E4M3_MAX).clamp(min=TOKEN_FLOOR)
    return (norm / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


_CASTS: Mapping[str, Callable[[Tensor, Inputs], Outputs]] = {
    "none": lambda norm, i: (norm,),
    "fp8_static": _static,
    "fp8_per_token": _per_token,
}


def _rotated(case: Case, inputs: Inputs, *norms: Tensor) -> Outputs:
    """The norms of q and k in the case's dtype, rotated before that where the case has a rotation."""
    rope = rope_of(case, inputs)
    return tuple((rotate(x.float(), rope) if rope else x).to(case.dtype) for x in norms)


# Where MiniMax-M2 started from: gather whole rows, norm them, keep the own slice.


def _make_gather(site: Site) -> Mapping[str, Step]:
    def qk(case: Case, i: Inputs) -> Outputs:
        own = torch.cat((i["q"], i["k"]), -1)
        every = torch.empty((site.world * case.tokens, own.shape[1]), dtype=own.dtype, device=own.device)
        all_gather(every, own)
        every = every.view(site.world, *own.shape)
        n = i["q"].shape[-1]
        return _rotated(
            case,
            i,
            _own_norm(every[:, :, :n], i["q_weight"], case.eps, site.rank),
            _own_norm(every[:, :, n:], i["k_weight"], case.eps, site.rank),
        )

    return dict.fromkeys(QK, qk)


def all_gather(every: Tensor, own: Tensor) -> None:
    """Every rank's `[n, ..]` as `[W n, ..]`, under the name that this torch has for it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in 2.13
    gather(every, own)


def _own_norm(every: Tensor, weight: Tensor, eps: float, rank: int) -> Tensor:
    """Norm whole rows given as `[W, T, n]` and keep `[T, n]` of one rank, times its shard of gamma."""
    world, tokens, n = every.shape
    whole = every.transpose(0, 1).reshape(tokens, world * n)
    return rms_norm(whole, (world * n,), None, eps)[:, rank * n : (rank + 1) * n] * weight


# torch's symmetric memory, with loads and stores to peers. Never with NVLink multicast.


def _make_one_shot(site: Site) -> Mapping[str, Step]:
    memory = _symmetric(site)

    def reduce(x: Tensor) -> Tensor:
        buffer = memory.like(x)
        y: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x, "sum", memory.group)
        return y

    return _steps(site, reduce, reduce)


def _make_two_shot(site: Site) -> Mapping[str, Step]:
    memory = _symmetric(site)

    def reduce(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.symm_mem.two_shot_all_reduce_(memory.like(x).copy_(x), "sum", memory.group)
        return y

    return _steps(site, reduce, lambda x: reduce(x).clone())


@dataclass(frozen=True)
class Symmetric:
    """One symmetric buffer on every rank, as large as the largest payload, viewed as what a call needs."""

    data: Tensor  # uint8
    group: str

    def like(self, x: Tensor) -> Tensor:
        return self.data[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)


def _symmetric(site: Site) -> Symmetric:
    if site.device.type != "cuda" or site.transport != "nccl":
        raise Unsupported("symm_mem: torch's symmetric memory needs GPUs")
    if site.world == 1:
        raise Unsupported("symm_mem: one rank has no peers")
    # Without this, rendezvous makes a multicast object although none of the ops used here needs one.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    try:
        import torch.distributed._symmetric_memory as symm_mem
    except ImportError as error:
        raise Unsupported(f"symm_mem: this torch has no symmetric memory: {error}") from error
    world = dist.group.WORLD
    assert world is not None
    data = symm_mem.empty(site.max_bytes, dtype=torch.uint8, device=site.device)
    symm_mem.rendezvous(data, world.group_name)
    return Symmetric(data, world.group_name)


def _with_variants(algorithms: Mapping[str, str]) -> Mapping[str, str]:
    """The same with the variants of a boundary: every rank keeps the whole residual, and casts the whole norm."""
    plain = algorithms["all_reduce_rms_norm"]
    variants = {op: plain + (", cast" if OPS[op].quant != "none" else "") for op in BOUNDARIES}
    return variants | {"all_reduce_rms_norm_experts": f"sum, {plain}"} | dict(algorithms)


_TORCH = {
    "qk_rms_norm": "local sums, all-reduce of [T, 2], norm",
    "qk_rms_norm_rope": "local sums, all-reduce of [T, 2], norm, rotation",
    "all_reduce": "all-reduce, in place",
    "all_reduce_rms_norm": "all-reduce in place, add, norm",
}
_GATHER = {"qk_rms_norm": "all-gather, norm, slice", "qk_rms_norm_rope": "all-gather, norm, slice, rotation"}
_ONE_SHOT = {
    "qk_rms_norm": "local sums, one-shot of [T, 2] copied in, norm",
    "qk_rms_norm_rope": "local sums, one-shot of [T, 2] copied in, norm, rotation",
    "all_reduce": "one-shot, copied in",
    "all_reduce_rms_norm": "one-shot copied in, add, norm",
}
_TWO_SHOT = {
    "all_reduce": "two-shot, copied in and out",
    "all_reduce_rms_norm": "two-shot copied in, add, norm",
}

BASELINES: Mapping[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("nccl", "torch.distributed", _with_variants(_TORCH), _make_nccl, in_place=True),
        Baseline("gloo", "torch.distributed", _with_variants(_TORCH), _make_gloo, in_place=True),
        Baseline("gather", "torch.distributed", _GATHER, _make_gather),
        Baseline("symm_mem_one_shot", "torch.symm_mem", _with_variants(_ONE_SHOT), _make_one_shot),
        Baseline("symm_mem_two_shot", "torch.symm_mem", _with_variants(_TWO_SHOT), _make_two_shot),
    )
}

# What runs when nobody asks for something else. symm_mem is here on a CPU too, where it is a row that says why not.
DEFAULT_BASELINES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("gloo", "gather", "symm_mem"),
    "cuda": ("nccl", "gather", "symm_mem"),
}


def find_baselines(names: Sequence[str]) -> list[Baseline]:
    """Baselines by name; `symm_mem` means both of its kinds. Raises InvalidArgument with the names there are."""
    found: dict[str, Baseline] = {}
    for name in names:
        matching = {n: b for n, b in BASELINES.items() if n == name or n.startswith(f"{name}_")}
        if not matching:
            raise InvalidArgument(f"baseline {name!r}; there are: {', '.join(BASELINES)}.")
        found |= matching
    return list(found.values())
