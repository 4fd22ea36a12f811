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
from tpfuse.errors import InvalidArgument
from tpfuse.presets import Preset
from tpfuse.quant import FORMATS, Format
from tpfuse.reference import NormOutput
from tpfuse.rope import Rope

Inputs = Mapping[str, Tensor]  # by name, see the makers below
Outputs = tuple[Tensor, ...]

ROW_SCALES = (1.0, 1e-3, 4.0)  # row t has scale t % 3; 1e-3 squared is the usual eps
EVERY_RANK = -1  # the seed's rank for tensors that are the same on all ranks
POSITIONS = 4096  # rows of the rotation's tables
SCALE = 2.0**-6  # of fp8_static: norms reach to about 5, and this to 7
E4M3_STEP = 2.0**-3  # the largest distance of two neighbours, relative to them


@dataclass(frozen=True)
class Op:
    """One op of the benchmark: a communicator's operation in one of its variants."""

    called: str
    layout: str = "contiguous"
    quant: str = "none"  # or a key of FORMATS
    rope: bool = False


OPS: Mapping[str, Op] = {
    "qk_rms_norm": Op("qk_rms_norm", "views of qkv"),
    "qk_rms_norm_rope": Op("qk_rms_norm", "views of qkv", rope=True),
    "all_reduce": Op("all_reduce"),
    "all_reduce_rms_norm": Op("all_reduce_rms_norm"),
    "all_reduce_rms_norm_experts": Op("all_reduce_rms_norm", "experts"),
    "all_reduce_rms_norm_fp8_static": Op("all_reduce_rms_norm", quant="fp8_static"),
    "all_reduce_rms_norm_fp8_per_token": Op("all_reduce_rms_norm", quant="fp8_per_token"),
    "all_reduce_rms_norm_rows": Op("all_reduce_rms_norm", "row_sharded"),
    "all_reduce_rms_norm_rows_fp8_per_token": Op("all_reduce_rms_norm", "row_sharded", "fp8_per_token"),
}
QK = tuple(name for name, op in OPS.items() if op.called == "qk_rms_norm")
BOUNDARIES = tuple(name for name, op in OPS.items() if op.called == "all_reduce_rms_norm" and op.layout != "experts")


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
    rope: tuple[int, int] | None = None  # head_dim and rotary_dim
    top_k: int | None = None  # of x [T, top_k, H], outputs of experts

    @property
    def width(self) -> str:
        return "+".join(map(str, self.widths))

    @property
    def called(self) -> str:
        """The communicator's operation that serves this."""
        return OPS[self.op].called

    @property
    def layout(self) -> str:
        return OPS[self.op].layout

    @property
    def quant(self) -> str:
        return OPS[self.op].quant

    @property
    def row_sharded(self) -> bool:
        """Each rank has its own rows of the residual: row t belongs to rank t % W."""
        return self.layout == "row_sharded"

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


def ops_of(preset: Preset, variants: bool = True) -> tuple[str, ...]:
    """The ops of a preset's layers. variants: with those of its boundaries."""
    return (*preset.ops, *(op for op in BOUNDARIES if variants and op not in preset.ops))


def check_ops(preset: Preset, ops: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidArgument for what is no op of the preset."""
    for op in ops:
        if op not in ops_of(preset):
            raise InvalidArgument(f"op {op!r}; {preset.name} has: {', '.join(ops_of(preset))}.")
    return tuple(dict.fromkeys(ops))


def cases_of(preset: Preset, world: int, tokens: Sequence[int], ops: Sequence[str] | None = None) -> list[Case]:
    """Every op of the preset without variants, or those given, at every number of tokens."""
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
            preset.rope if OPS[op].rope else None,
            preset.top_k if OPS[op].layout == "experts" else None,
        )
        for op in (preset.ops if ops is None else ops)
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
    weight_bias, which models can compute ahead; scale, which a format may need; and where the residual is sharded by
    rows, shard, this rank's rows of it. x may be the outputs of experts, [T, top_k, H].
    """
    maker = _MAKERS[case.called] if case.rope is None else _qk_rope_inputs
    return maker(case, rank, number, device)


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
    terms = () if case.top_k is None else (case.top_k,)
    x = _random(case, (case.tokens, *terms, *case.local), "x", rank, number, device) * (1 + rank)
    return {"x": x.to(case.dtype)}


def _all_reduce_rms_norm_inputs(case: Case, rank: int, number: int, device: torch.device) -> Inputs:
    weight = _weight(case, case.widths[0], "weight", EVERY_RANK, number, device)
    residual = _random(case, (case.tokens, *case.local), "residual", EVERY_RANK, number, device)
    residual = residual.to(case.residual_dtype)
    inputs = {
        **_all_reduce_inputs(case, rank, number, device),
        "residual": residual,
        "weight": weight,
        "gamma": (weight.float() + case.weight_bias).to(case.dtype),
        "scale": torch.full((1,), SCALE, device=device),
    }
    return inputs | {"shard": own_rows(case, residual, rank).contiguous()} if case.row_sharded else inputs


def own_rows(case: Case, residual: Tensor, rank: int) -> Tensor:
    """What a rank has of a residual: all of it, or its rows."""
    return residual[rank :: case.world] if case.row_sharded else residual


def format_of(case: Case, inputs: Inputs) -> Format | None:
    """The format that a case's norm is wanted in, if any."""
    return None if case.quant == "none" else FORMATS[case.quant](inputs["scale"])


def made(case: Case, y: NormOutput) -> Outputs:
    """The results of a boundary that are not inputs: norm, or quant and its scales; residual."""
    scale = None if case.quant == "fp8_static" else y.scale
    return tuple(t for t in (y.norm, y.quant, scale, y.residual) if t is not None)


_MAKERS: Mapping[str, Callable[[Case, int, int, torch.device], Inputs]] = {
    "qk_rms_norm": _qk_inputs,
    "all_reduce": _all_reduce_inputs,
    "all_reduce_rms_norm": _all_reduce_rms_norm_inputs,
}


def _random(case: Case, shape: tuple[int, ...], name: str, rank: int, number: int, device: torch.device) -> Tensor:
    """fp32 `[T, ..., n]`, normal, each row with its scale."""
    values = torch.randn(shape, generator=_generator(case, name, rank, number, device), device=device)
    scales = torch.tensor(ROW_SCALES, device=device)
    scales = scales[torch.arange(shape[0], device=device) % len(ROW_SCALES)]
    return values.mul_(scales.view(-1, *[1] * (len(shape) - 1)))


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
    return _REFERENCES[case.called](case, every, rank)


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
        quant=format_of(case, every[rank]),
        top_k=case.top_k,
    )
    assert y.residual is not None
    return made(case, y._replace(residual=own_rows(case, y.residual, rank)))


_REFERENCES: Mapping[str, Callable[[Case, Sequence[Inputs], int], Outputs]] = {
    "qk_rms_norm": _qk_reference,
    "all_reduce": _all_reduce_reference,
    "all_reduce_rms_norm": _all_reduce_rms_norm_reference,
}


def difference(case: Case, got: Outputs, want: Outputs) -> str:
    """What is wrong with a result, or empty.

    Every element must be within `2 W` units of rounding of its own size plus its row's rms. That is what sums in the
    native dtype cost, rounded after each hop; a missing addend or a wrong row is far outside. Not a test of the
    contract: the tests do that, in ulps. A quantised norm is compared as what it stands for, and may be one step of
    its format further off.
    """
    if len(got) != len(want):
        return f"wrong result: {len(got)} tensors, {len(want)} expected"
    tolerance = 2 * case.world * torch.finfo(case.dtype).eps
    for number, (y, right) in enumerate(zip(got, want, strict=True)):
        if y.shape != right.shape:
            return f"wrong result: output {number} has shape {list(y.shape)}, {list(right.shape)} expected"
    for number, (y, right) in enumerate(zip(decoded(case, got), decoded(case, want), strict=True)):
        exact = right.float()
        bound = tolerance * (exact.abs() + exact.square().mean(-1, keepdim=True).sqrt())
        bound += E4M3_STEP * exact.abs() if number == 0 and case.quant != "none" else 0.0
        bad = ~((y.float() - exact).abs() <= bound)  # written so that NaN is bad
        if bad.any():
            row, column = (int(i) for i in bad.nonzero()[0])
            return (
                f"wrong result: {int(bad.sum())} of {bad.numel()} elements of output {number}, first at "
                f"[{row}, {column}]: {float(y[row, column]):g}, {float(right[row, column]):g} expected"
            )
    return ""


def decoded(case: Case, outputs: Outputs) -> Outputs:
    """Outputs with the quantised norm and its scales as what they stand for."""
    if case.quant == "none":
        return outputs
    quant, *scales, residual = outputs
    scale = scales[0] if scales else torch.full((1,), SCALE, device=quant.device)
    return FORMATS[case.quant](scale).decode(quant, scale), residual
