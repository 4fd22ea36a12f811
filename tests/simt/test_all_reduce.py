"""The real kernels of all_reduce.h in the emulated machine: every bit right, whatever interleaving a seed draws.

reduce_driver.cpp has an oracle of its own in C++, and here that oracle is anchored: what the driver dumps is compared
with tpfuse.reference and tpfuse.quant. The tests themselves are tested by mutation: each line that the protocol depends
on is taken out of the kernels, and a bounded number of seeds has to notice.
"""

from __future__ import annotations

import re
import struct
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tpfuse import reference
from tpfuse.quant import MXFP8, NVFP4, Format, FP8PerGroup, FP8PerToken, FP8Static

from .build import KERNELS, build, compiler, kept, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host C++ compiler")

HEADER = (KERNELS / "all_reduce.h").read_text()
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the driver's `Type`
PATHS = ("sum", "norm", "early")
KINDS = ("none", "fp8_static", "fp8_per_token", "fp8_per_group", "mxfp8", "nvfp4")
LAYOUTS = ("row_major", "column_major", "swizzled")

# Kernel, types of x, residual and gamma, path, format, layout, keep, blocks of a row, vectors of a thread, aligned,
# threads, and the terms of a row if there are several.
CORE = """
    one bf16 -    bf16 sum   none          row_major    keep 1 1 aligned   64
    one bf16 bf16 bf16 norm  fp8_per_token row_major    keep 2 1 aligned   64
    two bf16 f32  bf16 norm  none          row_major    keep 2 1 aligned   32
    two f32  -    f32  sum   none          row_major    keep 1 2 unaligned 32
    two bf16 bf16 f16  early fp8_per_token row_major    drop 2 1 aligned   32
    two bf16 -    bf16 early nvfp4         swizzled     drop 1 1 aligned   32
    one bf16 bf16 bf16 norm  none          row_major    keep 2 1 aligned   32 3
"""
FURTHER = {
    2: """
    two f16  f16  f32  norm  mxfp8         swizzled     keep 1 2 unaligned 32
    two f32  f32  f32  early none          row_major    keep 1 1 aligned   64
    two f32  f32  f32  norm  none          row_major    keep 1 1 unaligned 32 5
    two bf16 bf16 bf16 early fp8_static    row_major    drop 1 2 unaligned 32
    one bf16 f32  f32  norm  fp8_per_token row_major    drop 1 3 aligned   384
    """,
    3: """
    two bf16 f32  bf16 early fp8_per_group column_major drop 1 1 aligned   32
    two f16  -    f16  early fp8_per_token row_major    keep 2 1 aligned   32
    one f32  bf16 bf16 norm  none          row_major    keep 1 1 unaligned 64
    """,
    4: """
    two bf16 bf16 bf16 early mxfp8         swizzled     drop 2 1 aligned   32
    two bf16 -    f32  norm  nvfp4         swizzled     drop 1 1 aligned   32
    one f16  -    bf16 norm  nvfp4         row_major    keep 3 1 aligned   32
    two f16  f16  bf16 early mxfp8         row_major    keep 1 2 unaligned 32
    two bf16 bf16 bf16 norm  fp8_per_token row_major    drop 1 2 aligned   32 8
    one f16  -    f16  norm  none          row_major    keep 1 1 unaligned 32 10
    """,
    8: """
    two bf16 -    bf16 sum   none          row_major    keep 3 1 aligned   32
    """,
}
CPP = {"f32": "float", "-": "Nothing", "keep": "true", "drop": "false", "aligned": "true", "unaligned": "false"}


def variants(table: str, world: int) -> str:
    """Lines of REDUCE_VARIANTS."""
    lines = []
    for row in table.split("\n"):
        if not row.split():
            continue
        kernel, x, residual, gamma, path, kind, layout, *rest = (CPP.get(word, word) for word in row.split())
        terms = rest.pop() if len(rest) == 6 else "1"
        form = (terms, x, residual, gamma, str(world), f"Path::{path}", f"Kind::{kind}", f"Layout::{layout}", *rest)
        lines.append(f"{kernel.upper()}({', '.join(form)})")
    return " ".join(lines)


def driver(name: str, kernels: str, header: Path | None = None) -> Path:
    # A mutant has little to run: most of it is the compiler.
    other = "" if header is None else f'#define REDUCE_HEADER "{header}"\n#pragma GCC optimize("O0")\n'
    return kept(name, ".cpp", f'{other}#define REDUCE_VARIANTS {kernels}\n#include "reduce_driver.cpp"\n')


# Small binaries: most of a first run is the compiler, and there are two of it.
ODD = driver("reduce_odd", " ".join(variants(CORE + FURTHER[world], world) for world in (2, 3)))
EVEN = driver("reduce_even", " ".join(variants(CORE + FURTHER[world], world) for world in (4, 8)))
SANITIZED = driver("reduce_sanitized", variants(CORE, 3))
BINARIES = {2: ODD, 3: ODD, 4: EVEN, 8: EVEN}


class Mutation(NamedTuple):
    replaced: dict[str, str]  # every occurrence of each text
    kernels: str = CORE
    arguments: tuple[str, ...] = ()


NORM_TRAVELS = "two bf16 bf16 bf16 early none row_major keep 1 1 aligned 32"
MUTATIONS = {
    "one_term": Mutation({"i * a.term_stride": "i % 1 * a.term_stride"}),
    "last_term": Mutation({"sum[e] = add_rn(sum[e], next[e])": "sum[e] = next[e]"}),
    "one_half": Mutation({">> kCallShift & 1) * a.half": ">> kCallShift & 0) * a.half"}),
    "call_ends_with_one_block": Mutation(
        {"block_index() == 0 ? (1u << kCallShift) - (grid_size() - 1) : 1": "block_index() == 0 ? 1u << kCallShift : 0"}
    ),
    "no_barrier_before_counter": Mutation({"barrier();\n    if (thread_index() == 0)\n": "if (thread_index() == 0)\n"}),
    "no_dependency_wait": Mutation({"dependency_wait();": ""}),
    "marks_not_put_back": Mutation(
        {"+ i, Vec16{{kMark, kMark, kMark, kMark}});": "+ i, load_global(reinterpret_cast<Vec16*>(slot) + i));"}
    ),
    "mark_is_sent": Mutation({"return w == kMark ? 0 : w;": "return w;"}),
    "mark_in_a_sum": Mutation({"x[v] = without_mark(x[v]);\n      if (F::kPath": "if (F::kPath"}),
    "mark_in_a_norm": Mutation({"x[v] = without_mark(x[v]);\n        if (good)": "if (good)"}, NORM_TRAVELS),
    "mark_in_fp8": Mutation({"return Vec8{{x.w[0] ^ ~kMark, x.w[1] ^ ~kMark}};": "return x;"}),
    "mark_in_a_scale": Mutation(
        {"Word{scale.stored}": "Word{scale.stored | kMark}", "stored.w)": "stored.w & ~kMark)"}
    ),
    "last_word_only": Mutation({"yes = yes && x.v[i].w[w] != kMark": "yes = yes && (w != 3 || x.v[i].w[w] != kMark)"}),
    "no_wait_for_slots": Mutation({"share.await_slots();": "", "share.free_slots();": ""}),
    "whole_ring": Mutation({"a.ring / 2": "a.ring"}),
    "ring_not_a_multiple": Mutation({"row % args.ring": "row % (args.ring - 1)"}),
    "marks_not_confirmed": Mutation({"confirm_marks();\n": "\n"}),
    "no_barrier_before_flag": Mutation(
        {"barrier();\n    if (thread_index() == 0) store_system": "if (thread_index() == 0) store_system"}
    ),
    "any_word_in_a_flag": Mutation({"return row + 1;": "return row - row + 1;"}),
    "flag_stays_up": Mutation({"store_system(flag(), 0u);": ""}),
    "no_meeting": Mutation({"    meet(0);": ""}),
    "sends_without_all": Mutation({"good = waits = false;": "waits = false;"}, arguments=("missing=1",)),
    "no_vote_after_giving_up": Mutation(
        {"!any(!came) && good;": "good && !any(!came);"},
        "one bf16 - bf16 norm none row_major keep 1 3 aligned 64",
        arguments=("loss=300",),
    ),
    "cluster_gives_up_first": Mutation({"kLocalPatience = 4": "kLocalPatience = 1"}, arguments=("missing=1",)),
}


def mutant(name: str) -> Path:
    text = '#pragma GCC diagnostic ignored "-Wunused-variable"\n' + HEADER
    for old, new in MUTATIONS[name].replaced.items():
        assert old in text, f"all_reduce.h has changed: mutation {name} looks for {old!r}"
        text = text.replace(old, new)
    return driver(f"reduce_{name}", variants(MUTATIONS[name].kernels, 3), kept(f"reduce_{name}", ".h", text))


def build_mutant(name: str) -> Path:
    return build(mutant(name))


@pytest.fixture(scope="module", autouse=True)
def binaries() -> None:
    """Compiles on two cores at once, what takes longest first."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(build, SANITIZED, sanitize=True)]
        jobs += [pool.submit(build, path) for path in (ODD, EVEN)]
        jobs += [pool.submit(build_mutant, name) for name in MUTATIONS]
        wait(jobs)  # the test that needs it reports what does not compile


def passes(path: Path, *arguments: str, sanitize: bool = False) -> None:
    result = run(path, *arguments, sanitize=sanitize)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("world", "seeds"), [(2, 60), (3, 40), (4, 20), (8, 6)])
def test_calls_of_all_kinds(world: int, seeds: int) -> None:
    passes(BINARIES[world], f"world={world}", f"seeds={seeds}")


@pytest.mark.parametrize("world", [2, 4])
def test_slow_rank(world: int) -> None:
    passes(BINARIES[world], f"world={world}", "slow=1", "seeds=8", "first=2000")


@pytest.mark.parametrize(("world", "missing", "seeds"), [(2, 0, 20), (3, 1, 20), (4, 3, 10), (8, 5, 3)])
def test_missing_rank_is_named(world: int, missing: int, seeds: int) -> None:
    """It comes when the others have given up: no rank has a wrong row and does not say so."""
    passes(BINARIES[world], f"world={world}", f"missing={missing}", f"seeds={seeds}")


@pytest.mark.parametrize(("world", "loss", "seeds"), [(2, 1, 10), (2, 400, 20), (3, 300, 30), (4, 1000, 10)])
def test_lost_stores(world: int, loss: int, seeds: int) -> None:
    """Where a part of a row does not come, who gets something made from it gives up as well."""
    passes(BINARIES[world], f"world={world}", f"loss={loss}", f"seeds={seeds}", "first=3000")


def test_sanitizers() -> None:
    passes(SANITIZED, "world=3", "seeds=6", sanitize=True)
    passes(SANITIZED, "world=3", "seeds=3", "missing=2", sanitize=True)


class Record:
    """Reads what `dump` of the driver writes: one call."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def numbers(self, count: int, kind: str = "I") -> list[int]:
        self.at += 4 * count
        return list(struct.unpack_from(f"={count}{kind}", self.content, self.at - 4 * count))

    def rows(self, dtype: torch.dtype, *shape: int) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        self.at += size
        taken = bytearray(self.content[self.at - size : self.at])
        return torch.frombuffer(taken, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Every bit, but for the payload of a NaN and the sign of a zero."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours.float().isnan(), theirs.float().isnan())
    assert torch.equal(ours.float().nan_to_num(0.5), theirs.float().nan_to_num(0.5))


def format_of(kind: str, layout: str, rows: int, pitch: int, given: float) -> Format | None:
    columns, swizzled, tensor = layout == "column_major", layout == "swizzled", torch.tensor([given])
    made: dict[str, Format | None] = {
        "none": None,
        "fp8_static": FP8Static(tensor),
        "fp8_per_token": FP8PerToken(),
        "fp8_per_group": FP8PerGroup(column_major=columns, tma_aligned=columns and pitch != rows),
        "mxfp8": MXFP8(swizzled=swizzled),
        "nvfp4": NVFP4(tensor, swizzled=swizzled),
    }
    return made[kind]


def assert_quantised(norm: Tensor, fmt: Format, codes: Tensor, scale: Tensor, pitch: int) -> None:
    """codes and scale: bytes as they lie in memory."""
    quant, scales = fmt.encode(norm)
    if fmt.packed == 2:
        assert_same(fmt._widen(codes.view(quant.shape)), fmt._widen(quant))
    else:
        assert_same(codes.view(torch.float8_e4m3fn).view(quant.shape), quant)
    if fmt.kind == "fp8_static":
        assert not scale.numel()
    elif fmt.scale_dtype == torch.float32:
        floats = scale.view(torch.float32)
        columns = fmt.layout == "column_major"
        assert_same(floats.view(-1, pitch)[:, : len(norm)].t() if columns else floats.view(scales.shape), scales)
    else:
        assert torch.equal(scale, scales.contiguous().view(torch.uint8).flatten())


def compare_call(record: Record, world: int) -> None:
    path, kind, layout, keep, x_type, residual_type, gamma_type, rows, width, pitch, scale_bytes = record.numbers(11)
    terms, term_major = record.numbers(2)
    eps, bias, given = record.numbers(3, "f")
    early, dtype = PATHS[path] == "early", TYPES[x_type]
    stream = None if residual_type == 0xFFFFFFFF else TYPES[residual_type]
    fmt = format_of(KINDS[kind], LAYOUTS[layout], rows, pitch, given)
    own = [len(range(rank, rows, world)) if early else rows for rank in range(world)]
    xs, residuals, gamma, outputs = [], [], torch.empty(0), []
    for rank in range(world):
        lines = record.rows(dtype, rows * terms, width)
        experts = lines.view(terms, rows, width).transpose(0, 1) if term_major else lines.view(rows, terms, width)
        xs.append(reference.sum_of_experts(experts))
        gamma = record.rows(TYPES[gamma_type], width) if PATHS[path] != "sum" else gamma
        residuals += [record.rows(stream, own[rank], width)] if stream else []
        outputs.append(
            (
                record.rows(dtype, rows, width) if keep else None,
                record.rows(stream, own[rank], width) if stream else None,
                record.rows(torch.uint8, rows * width // fmt.packed if fmt else 0),
                record.rows(torch.uint8, scale_bytes),
            )
        )
    right, new = reference.all_reduce(xs), None
    if PATHS[path] != "sum":
        residual = reference.gather_rows(residuals, rows) if stream and early else residuals[0] if stream else None
        norm, new, *_ = reference.all_reduce_rms_norm(xs, gamma, residual=residual, eps=eps, weight_bias=bias)
        assert norm is not None
        right = norm
    for rank, (y, new_residual, codes, scale) in enumerate(outputs):
        if y is not None:
            assert_same(y, right)
        if new_residual is not None:
            assert new is not None
            assert_same(new_residual, new[rank::world] if early else new)
        if fmt is not None:
            assert_quantised(right, fmt, codes, scale, pitch)


@pytest.mark.parametrize("world", sorted(BINARIES))
def test_kernels_match_the_reference(world: int, tmp_path: Path) -> None:
    """Every compiled variant, its results compared with torch."""
    passes(BINARIES[world], f"world={world}", "seeds=4", f"dump={tmp_path / 'calls'}")
    record, calls = Record((tmp_path / "calls").read_bytes()), 0
    while record.at < len(record.content):
        compare_call(record, world)
        calls += 1
    assert calls >= 4 * 6


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name: str) -> None:
    mutation = MUTATIONS[name]
    result = run(mutant(name), "world=3", "calls=6", "seeds=200", *mutation.arguments)
    assert result.returncode != 0, result.stdout
    assert re.search(
        "timed out|wrong value|wrong error record|not clean|ended before|not there|different operations", result.stdout
    ), result.stdout
