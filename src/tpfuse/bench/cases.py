"""What is measured: one op at one number of tokens is a case, and a case knows its inputs and the right results.

Inputs are random, never zeros (a GPU runs zeros faster, and they hide unwritten outputs). They come from a seed for
each tensor, so any rank can make any rank's inputs, and the reference needs no communication that could itself be
wrong. Ranks and rows have very different scales: a result without the sum over ranks, or with eps in the wrong place,
is wrong by far more than rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpfuse import reference
from tpfuse.backends.collective import short
from tpfuse.presets import Preset
from tpfuse.rope import Rope

Inputs = Mapping[str, Tensor]  # by name, see the makers below
Outputs = tuple[Tensor, ...]

ROW_SCALES = (1.0, 1e-3, 4.0)  # row t has scale t % 3; 1e-3 squared is the usual eps
EVERY_RANK = -1  # the seed's rank for tensors that are the same on all ranks
POSITIONS = 4096  # rows of the rotation's tables
QK = ("qk_rms_norm", "qk_rms_norm_rope")  # the norm over a sharded width, alone and with its rotation


@dataclass(frozen=True)
class Case:
    """One op at one size. Widths are of whole rows, before sharding."""

    op: str
    tokens: int
    widths: tuple[int, ...]  # (H,) or (q, k)
    world: int
    eps: float
    weight_bias: float
    dtype: torch.dtype
    residual_dtype: torch.dtype
    layout: str
    rope: tuple[int, int] | None = None  # head_dim and rotary_dim

    @property
    def width(self) -> str:
        return "+".join(map(str, self.widths))

    @property
    def called(self) -> str:
        """The communicator's operation that serves this."""
        return self.op.removesuffix("_rope")

    @property
    def local(self) -> tuple[int, ...]:
        """Widths of one rank's tensors: only the norms over a sharded width are sharded."""
        return tuple(w // self.world for w in self.widths) if self.op in QK else self.widths

    @property
    def unsupported(self) -> str:
        """Why this case does not exist at this world size, or empty."""
        head = self.rope[0] if self.rope else 1
        odd = self.op in QK and any(w % (self.world * head) for w in self.widths)
        return f"{self.op}: widths {self.width} can't be sharded over {self.world} ranks" if odd else ""

    def __str__(self) -> str:
        return f"{self.op} {self.tokens} x {self.width} {short(self.dtype)}"


def cases_of(preset: Preset, world: int, tokens: Sequence[int]) -> list[Case]:
    """Every op of the preset at every number of tokens."""
    return [
        Case(
            op,
            count,
            preset.qk if op in QK and preset.qk else (preset.hidden,),
            world,
            preset.eps,
            preset.weight_bias,
            preset.dtype,
            preset.residual_dtype,
            "views of qkv" if op in QK else "contiguous",
            preset.rope if op == "qk_rms_norm_rope" else None,
        )
        for op in preset.ops
        for count in tokens
    ]


class InputSet:
    """One rank's inputs of one case. Baselines that reduce in place spoil `x`; `restore()` brings it back."""

    def __init__(self, case: Case, rank: int, number: int, device: torch.device) -> None:
        self.tensors = make_inputs(case, rank, number, device)
        x = self.tensors.get("x")
        self._pristine = None if x is None else x.clone()

    def restore(self) -> None:
        if self._pristine is not None:
            self.tensors["x"].copy_(self._pristine)


def make_inputs(case: Case, rank: int, number: int, device: torch.device) -> Inputs:
    """Rank `rank`'s inputs in set `number`, the same wherever they are made.

    qk_rms_norm: q, k, views of one qkv tensor, and q_weight, k_weight, this rank's shards of gamma.
    qk_rms_norm_rope: also cos, sin and positions.
    all_reduce: x, this rank's partial sum. all_reduce_rms_norm: also residual, weight, and gamma = weight +
    weight_bias, which models can compute ahead.
    """
    return _MAKERS[case.op](case, rank, number, device)


def _qk_inputs(case: Case, rank: int, number: int, device: torch.device) -> Inputs:
    n, m = case.local
    qkv = (_random(case, (case.tokens, n + 2 * m), "qkv", rank, number, device) * (1 + rank)).to(case.dtype)
    return {
        "q": qkv[:, :n],
        "k": qkv[:, n : n + m],
        "q_weight": _weight(case, n, "q_weight", rank, number, device),
        "k_weight": _weight(case, m, "k_weight", rank, number, device),
    }


def _qk_rope_inputs(case: Case, rank: int, number: int, device: torch.device) -> Inputs:
    assert case.rope is not None
    generator = _generator(case, "angles", EVERY_RANK, number, device)
    angles = torch.rand((POSITIONS, case.rope[1] // 2), generator=generator, device=device) * 100
    positions = torch.randint(POSITIONS, (case.tokens,), generator=generator, device=device)
    return {
        **_qk_inputs(case, rank, number, device),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": positions,
    }


def rope_of(case: Case, inputs: Inputs) -> Rope | None:
    """The rotation that a case's inputs have, if any."""
    return Rope(inputs["cos"], inputs["sin"], inputs["positions"], *case.rope) if case.rope else None


def _all_reduce_inputs(case: Case, rank: int, number: int, device: torch.device) -> Inputs:
    x = _random(case, (case.tokens, *case.local), "x", rank, number, device) * (1 + rank)
    return {"x": x.to(case.dtype)}


def _all_reduce_rms_norm_inputs(case: Case, rank: int, number: int, device: torch.device) -> Inputs:
    weight = _weight(case, case.widths[0], "weight", EVERY_RANK, number, device)
    residual = _random(case, (case.tokens, *case.local), "residual", EVERY_RANK, number, device)
    return {
        **_all_reduce_inputs(case, rank, number, device),
        "residual": residual.to(case.residual_dtype),
        "weight": weight,
        "gamma": (weight.float() + case.weight_bias).to(case.dtype),
    }


_MAKERS: Mapping[str, Callable[[Case, int, int, torch.device], Inputs]] = {
    "qk_rms_norm": _qk_inputs,
    "qk_rms_norm_rope": _qk_rope_inputs,
    "all_reduce": _all_reduce_inputs,
    "all_reduce_rms_norm": _all_reduce_rms_norm_inputs,
}


def _random(case: Case, shape: tuple[int, ...], name: str, rank: int, number: int, device: torch.device) -> Tensor:
    """fp32 `[T, n]`, normal, each row with its scale."""
    values = torch.randn(shape, generator=_generator(case, name, rank, number, device), device=device)
    scales = torch.tensor(ROW_SCALES, device=device)
    return values.mul_(scales[torch.arange(shape[0], device=device) % len(ROW_SCALES)].unsqueeze(-1))


def _weight(case: Case, n: int, name: str, rank: int, number: int, device: torch.device) -> Tensor:
    """A gamma around 1, weight_bias included, so around 0 for Gemma's norm."""
    values = torch.randn(n, generator=_generator(case, name, rank, number, device), device=device)
    return (values * 0.1 + (1.0 - case.weight_bias)).to(case.dtype)


def _generator(case: Case, name: str, rank: int, number: int, device: torch.device) -> torch.Generator:
    seed = zlib.crc32(f"{case} {name} {rank} {number}".encode())
    return torch.Generator(device).manual_seed(seed)


def expected(case: Case, rank: int, number: int, device: torch.device) -> Outputs:
    """The right results of set `number` on rank `rank`, by tpfuse.reference on every rank's inputs."""
    every = [make_inputs(case, r, number, device) for r in range(case.world)]
    return _REFERENCES[case.op](case, every, rank)


def _qk_reference(case: Case, every: Sequence[Inputs], rank: int) -> Outputs:
    q, k, q_weight, k_weight = ([i[name] for i in every] for name in ("q", "k", "q_weight", "k_weight"))
    bias, rope = case.weight_bias, rope_of(case, every[rank])
    return reference.qk_rms_norm(q, k, q_weight, k_weight, eps=case.eps, weight_bias=bias, rope=rope)[rank]


def _all_reduce_reference(case: Case, every: Sequence[Inputs], rank: int) -> Outputs:
    return (reference.all_reduce([i["x"] for i in every]),)


def _all_reduce_rms_norm_reference(case: Case, every: Sequence[Inputs], rank: int) -> Outputs:
    y = reference.all_reduce_rms_norm(
        [i["x"] for i in every],
        every[rank]["weight"],
        residual=every[rank]["residual"],
        eps=case.eps,
        weight_bias=case.weight_bias,
    )
    assert y.norm is not None
    assert y.residual is not None
    return y.norm, y.residual


_REFERENCES: Mapping[str, Callable[[Case, Sequence[Inputs], int], Outputs]] = {
    "qk_rms_norm": _qk_reference,
    "qk_rms_norm_rope": _qk_reference,
    "all_reduce": _all_reduce_reference,
    "all_reduce_rms_norm": _all_reduce_rms_norm_reference,
}


def difference(case: Case, got: Outputs, want: Outputs) -> str:
    """What is wrong with a result, or empty.

    Every element must be within `2 W` units of rounding of its own size plus its row's rms. That is what sums in the
    native dtype cost, rounded after each hop; a missing addend or a wrong row is far outside. Not a test of the
    contract: the tests do that, in ulps.
    """
    if len(got) != len(want):
        return f"wrong result: {len(got)} tensors, {len(want)} expected"
    tolerance = 2 * case.world * torch.finfo(case.dtype).eps
    for number, (y, right) in enumerate(zip(got, want, strict=True)):
        if y.shape != right.shape:
            return f"wrong result: output {number} has shape {list(y.shape)}, {list(right.shape)} expected"
        exact = right.float()
        bound = tolerance * (exact.abs() + exact.square().mean(-1, keepdim=True).sqrt())
        bad = ~((y.float() - exact).abs() <= bound)  # written so that NaN is bad
        if bad.any():
            row, column = (int(i) for i in bad.nonzero()[0])
            return (
                f"wrong result: {int(bad.sum())} of {bad.numel()} elements of output {number}, first at "
                f"[{row}, {column}]: {float(y[row, column]):g}, {float(right[row, column]):g} expected"
            )
    return ""
