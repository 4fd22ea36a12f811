"""What backends/cuda/all_reduce.py decides, without a GPU: algorithm, spread, slots, arguments, bytes.

The kernels themselves run in tests/simt, and on GPUs in tests/gpu.
"""

from __future__ import annotations

import re
import struct
from itertools import product
from pathlib import Path

import pytest
import torch

from tpfuse.backends.collective import Call
from tpfuse.backends.cuda import all_reduce, backend, sharded_norm
from tpfuse.backends.cuda.all_reduce import (
    DEFAULTS,
    FIXED,
    FLAGS,
    GROUP,
    HEADER,
    LAYOUT,
    MAX_BLOCKS,
    MAX_GROUPS,
    MAX_SPLIT_ROWS,
    MAX_WIDTH,
    SHAPE,
    SPLIT,
    Thresholds,
    algorithm_for,
    goes_early,
    half_bytes,
    limits,
    ring_rows,
    spread,
    variants,
    why_not,
)
from tpfuse.backends.cuda.compile import KERNELS, compile_kernel
from tpfuse.backends.cuda.workspace import GRANULE
from tpfuse.plan import Route, slot_bytes
from tpfuse.quant import FORMATS

SIXTEEN = Thresholds(16, 128)
SIZES = (1, 16 << 10, (16 << 10) + 1, 1 << 30)
WIDTHS = (1, 7, 100, *range(8, MAX_WIDTH + 1, 8))
HEADER_FILE = Path(KERNELS / "all_reduce.h").read_text(encoding="utf-8")


def constant(name: str) -> int:
    found = re.search(rf"constexpr u32 {name} = ([^;]+);", HEADER_FILE)
    assert found is not None
    return int(eval(found[1].rstrip("u")))


# Which kernel


def test_one_shot_up_to_its_threshold_and_never_before_a_gather() -> None:
    for path in ("sum", "norm"):
        assert [algorithm_for(size, path, SIXTEEN) for size in SIZES] == [
            "one_shot", "one_shot", "two_shot", "two_shot",
        ]  # fmt: skip
    assert {algorithm_for(size, "early", SIXTEEN) for size in SIZES} == {"two_shot"}


@pytest.mark.parametrize(
    ("row_sharded", "residual", "quant", "keep_norm", "few", "many"),
    [
        (False, False, False, False, False, False),
        (False, True, False, False, False, False),
        (False, False, True, False, False, True),  # the quantised row is all that anybody needs
        (False, False, True, True, False, False),
        (False, True, True, False, False, False),  # everybody needs the new residual
        (True, True, False, False, True, True),  # only owners have the residual
        (True, True, True, False, True, True),
        (True, True, True, True, True, True),
    ],
)
def test_norm_before_gather(
    row_sharded: bool, residual: bool, quant: bool, keep_norm: bool, few: bool, many: bool
) -> None:
    found = [goes_early(size, SIXTEEN, row_sharded, residual, quant, keep_norm) for size in SIZES]
    assert found == [few, few, many, many]


@pytest.mark.parametrize("algorithm", SPLIT)
@pytest.mark.parametrize("split", [True, False])
def test_a_spread_covers_the_row_once_with_blocks_that_exist(algorithm: str, split: bool) -> None:
    for width, held in product(WIDTHS, (4, 8, 16, 32)):
        parts, vectors, threads = spread(algorithm, width, held, split)
        groups, warps = -(-width // GROUP), threads // 32
        assert threads % 32 == 0
        assert 32 <= threads <= 1024
        assert parts * vectors * warps >= groups  # all of the row
        assert (parts - 1) * warps < groups  # no block without a part of it
        assert 1 <= parts <= SPLIT[algorithm] <= 8  # a portable cluster
        assert parts == 1 or vectors == 1  # as the kernels assert
        assert vectors & (vectors - 1) == 0
        assert split or parts == 1
        assert parts == 1 or groups >= 4


def test_spreads_of_known_widths() -> None:
    assert spread("one_shot", 3072, 8, True) == (6, 1, 64)
    assert spread("two_shot", 6144, 8, True) == (6, 1, 128)
    assert spread("one_shot", 6144, 8, True) == (8, 1, 96)
    assert spread("two_shot", 3072, 8, False) == (1, 1, 384)
    assert spread("two_shot", 8192, 8, False) == (1, 2, 512)
    assert spread("two_shot", 16384, 32, False) == (1, 4, 512)
    assert spread("one_shot", 768, 8, True) == (1, 1, 96)


def test_too_wide_is_a_reason() -> None:
    assert why_not(MAX_WIDTH) == ""
    assert "up to 16384 elements; given 16392" in why_not(MAX_WIDTH + 8)


def test_variants_are_distinct_and_have_registers() -> None:
    found = list(variants())
    assert len(found) == len(set(found)) > 100
    assert {v.path for v in found} == {"sum", "norm", "early"}
    for v in found:
        assert v.threads * v.resident <= 2048
        assert v.resident >= 1
        assert 32 <= v.register_budget <= 255
        assert v.algorithm == "two_shot" or v.path != "early"


# Slots


@pytest.mark.parametrize("world", DEFAULTS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_with_slots_stay_inside_of_the_workspace(world: int, itemsize: int) -> None:
    assert all_reduce.WORKSPACE_BYTES < 2**32  # offsets in it are 32 bits
    assert HEADER + 2 * half_bytes() <= all_reduce.WORKSPACE_BYTES
    assert constant("kReduceFlags") + 4 * FLAGS <= HEADER
    for width, parts in product(WIDTHS, range(1, max(SPLIT.values()) + 1)):
        ring, slot = ring_rows(width, itemsize, world, parts), slot_bytes(width, itemsize)
        assert slot % 16 == 0
        assert ring % (2 * world) == 0
        assert ring > 0
        # Partial rows and results of two-shot; a flag for each part of half a ring.
        assert 2 * ring * slot <= half_bytes()
        assert ring // 2 * parts <= FLAGS


@pytest.mark.parametrize("world", DEFAULTS)
def test_one_shot_has_slots_for_all_rows_of_a_call(world: int) -> None:
    """It has no word about slots that become free, so the thresholds are bounded. As kernels/all_reduce.h has it: row t
    has the slots t * W to t * W + W - 1, if it lies within the ring, which is as long as the row's parts allow."""
    assert DEFAULTS[world].one_shot_kib <= limits(world).one_shot_kib
    assert DEFAULTS[world].split_rows <= limits(world).split_rows == MAX_SPLIT_ROWS
    for width, itemsize in product(WIDTHS, (2, 4)):
        slot = slot_bytes(width, itemsize)
        rows = (limits(world).one_shot_kib << 10) // slot  # the most that one-shot is given
        assert rows * world * slot <= half_bytes()
        for split in (False, True):
            count = min(rows, MAX_SPLIT_ROWS) if split else rows
            parts, _, _ = spread("one_shot", width, itemsize * world, split)
            assert count <= ring_rows(width, itemsize, world, parts)
            assert count * parts <= MAX_BLOCKS  # in one launch


@pytest.mark.parametrize("world", DEFAULTS)
def test_the_limit_of_one_shot_is_the_largest(world: int) -> None:
    """With one KiB more, there would be rows without a slot."""
    beyond = (limits(world).one_shot_kib + 1) << 10
    assert any(
        beyond // slot_bytes(width, itemsize) > ring_rows(width, itemsize, world, 1)
        for width, itemsize in product(WIDTHS, (2, 4))
    )


def test_edges_stand_for_all_row_counts() -> None:
    for thresholds, row_bytes in product(
        (Thresholds(16, 128), Thresholds(128, 16), Thresholds(5, 5), Thresholds(1, 0)), (32, 208, 1024, 6144, 65536)
    ):
        edges = thresholds.edges(row_bytes)

        def way(rows: int, thresholds: Thresholds = thresholds, row_bytes: int = row_bytes) -> tuple[str, bool]:
            return algorithm_for(rows * row_bytes, "sum", thresholds), rows <= thresholds.split_rows

        assert {way(rows) for rows in edges} == {way(rows) for rows in range(1, 5000)}
        assert min(edges) == 1
    assert Thresholds(48, 128).edges(6144) == (1, 8, 9, 128, 129)
    assert Thresholds(48, 128).edges(65536) == (1, 128, 129)  # no row is as small


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_row_and_its_scales_fit_the_slot(name: str) -> None:
    """As kernels/all_reduce.h lays them out: the bytes, and from the next multiple of 16 on a word for each scale."""
    fmt = FORMATS[name](torch.ones(1))
    for width in WIDTHS:
        if width % (fmt.group or fmt.packed) == 0:
            lane = 8 // fmt.packed
            scales = 0 if name == "fp8_static" else fmt.groups(width)
            scale_offset = -(-(-(-width // 8) * lane) // 16) * 16
            assert scale_offset + 4 * scales <= slot_bytes(width, 2)


def test_all_workspaces_together_are_at_most_64_mib() -> None:
    sizes = (sharded_norm.workspace_bytes(), all_reduce.WORKSPACE_BYTES)
    assert sum(sizes) == backend.WORKSPACE_BYTES
    assert sum(-(-size // GRANULE) * GRANULE for size in sizes) <= 64 << 20  # as they are allocated


def test_new_halves_hold_marks_and_the_header_zeros() -> None:
    (fill,) = all_reduce.fills()
    assert fill.word == constant("kMark") == 0x80000000
    assert (fill.offset, fill.offset + fill.size) == (HEADER, all_reduce.WORKSPACE_BYTES)


# What host and device must agree about


def fields() -> list[tuple[str, str]]:
    """Name and struct code of each field of ReduceArgs; an array is one field."""
    body = re.search(r"struct ReduceArgs \{(.*?)\n\};", HEADER_FILE, re.DOTALL)
    assert body is not None
    codes = {"u64": "Q", "i64": "q", "u32": "I", "float": "f"}
    found = []
    for kind, names in re.findall(r"^  (\w+) ([^;]+);", body[1], re.MULTILINE):
        for name in names.split(","):
            plain, _, count = name.strip().rstrip("]").partition("[")
            found.append((plain, (str(constant_of_norm(count)) if count else "") + codes[kind]))
    return found


def constant_of_norm(name: str) -> int:
    assert name == "kMaxWorld"
    return 8


def test_the_arguments_are_the_struct_of_the_kernels() -> None:
    found = fields()
    first = [name for name, _ in found].index("x")
    whole = LAYOUT.replace(f"{SHAPE.size}s", SHAPE.format)
    assert struct.calcsize(whole) == struct.calcsize(LAYOUT)

    def expanded(layout: str) -> str:
        return "".join(code * int(count or 1) for count, code in re.findall(r"(\d*)(\w)", layout) if count != "0")

    assert expanded("".join(code for _, code in found[:first])) == expanded(FIXED.format)
    assert expanded("".join(code for _, code in found[first:])) == expanded(whole)
    assert FIXED.size % 8 == 0


def test_the_compiler_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, places and constants, by static_assert; and that it is source() which checks the constants."""
    pytest.importorskip("cuda.core", reason="needs cuda-core: pip install tpfuse[cuda]")
    monkeypatch.setenv("TPFUSE_CACHE_DIR", str(tmp_path / "cache"))
    size = FIXED.size + struct.calcsize(LAYOUT)
    asserts = f"static_assert(sizeof(tpfuse::ReduceArgs) == {size});"  # NVRTC 13.0 has no offsetof
    variant = next(v for v in variants() if v.path == "sum" and v.parts == 1)
    text = all_reduce.source()
    compile_kernel(text + asserts, variant.name_expression, arch="sm_90a")
    for name, value in (("kMark", 1), ("kReduceHeader", 1), ("kReduceGroups", 1)):
        wrong = re.sub(rf"tpfuse::{name} == \d+", f"tpfuse::{name} == {value}", text)
        assert wrong != text
        with pytest.raises(Exception, match="static assert"):
            compile_kernel(wrong, variant.name_expression, arch="sm_90a")


def test_groups_are_those_of_the_kernels() -> None:
    assert constant("kReduceGroups") == MAX_GROUPS
    assert constant("kReduceHeader") == HEADER


# Bytes over the links


ONE, TWO = (Route("all_reduce_rms_norm", None, "cuda", f"{name}-shot push", "fused", "") for name in ("one", "two"))
EARLY = backend.EARLY


def call(op: str = "all_reduce_rms_norm", quant: str = "", keep_norm: bool = False, **other: object) -> Call:
    given = {"rows": 40, "width": 3072, "width2": 0, "dtype": torch.bfloat16} | other
    return Call(op, *given.values(), torch.bfloat16, 1e-6, 1e-6, 0.0, quant, keep_norm)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "route", "world", "elements"),
    [
        (call(), ONE, 4, 3 * 40 * 3072 * 2),
        (call(dtype=torch.float32), ONE, 2, 40 * 3072 * 4),
        (call(), TWO, 4, 3 * 40 * (3072 * 2 + 3072 * 2) / 4),
        (call(), TWO, 8, 7 * 40 * (3072 * 2 + 3072 * 2) / 8),
        (call(quant="fp8_static"), TWO, 4, 3 * 40 * 3072 * 4 / 4),  # sums travel, every rank quantises
        (call(), EARLY, 4, 3 * 40 * 3072 * 4 / 4),
        (call(quant="fp8_static"), EARLY, 4, 3 * 40 * 3072 * 3 / 4),  # back in one byte
        (call(quant="fp8_per_token"), EARLY, 4, 3 * 40 * (3072 * 3 + 4) / 4),  # and a scale
        (call(quant="fp8_per_token", keep_norm=True), EARLY, 4, 3 * 40 * 3072 * 4 / 4),
        (call(quant="mxfp8_swizzled"), EARLY, 4, 3 * 40 * (3072 * 3 + 4 * 96) / 4),
        (call(quant="nvfp4_swizzled"), EARLY, 4, 3 * 40 * (3072 * 2.5 + 4 * 192) / 4),
        (call("rms_norm"), ONE, 4, 3 * 40 * 16),
    ],
)
def test_bytes_over_the_links(made: Call, route: Route, world: int, elements: float) -> None:
    assert backend.link_bytes(made, route, world) == elements
