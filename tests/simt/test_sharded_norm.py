"""The real kernels of sharded_norm.h in the emulated machine: every bit right, whatever interleaving a seed draws.

norm_driver.cpp has an oracle of its own in C++, and here that oracle is anchored: what the driver dumps is compared
with tpfuse.reference. The tests themselves are tested by mutation: each line that a race depends on is taken out of the
kernels, and a bounded number of seeds has to notice.
"""

from __future__ import annotations

import re
import signal
import struct
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tpfuse import reference
from tpfuse.rope import Rope

from .build import KERNELS, build, compiler, kept, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host C++ compiler")

HEADER = (KERNELS / "sharded_norm.h").read_text()
KINDS = ("row", "block")
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the driver's `Type`


def driver(name: str, **defines: str) -> Path:
    lines = [f"#define NORM_{key} {value}\n" for key, value in defines.items()]
    return kept(name, ".cpp", "".join([*lines, '#include "norm_driver.cpp"\n']))


# Small binaries: most of a first run is the compiler, and there are two of it.
ODD = driver("norm_odd", WORLDS="2, 3, 6")
EVEN = driver("norm_even", WORLDS="4, 8")
SANITIZED = driver("norm_sanitized", WORLDS="3", FEW="1")
BINARIES = {2: ODD, 3: ODD, 6: ODD, 4: EVEN, 8: EVEN}


class Mutation(NamedTuple):
    replaced: dict[str, str]  # every occurrence of each text
    kinds: tuple[str, ...] = KINDS  # of the kernels in which it must be noticed
    few: int = 2  # which kernels are compiled


TORN = """
TPF_DEVICE void torn_store(Vec16* p, const Vec16& x) {
  for (u32 i = 0; i < 4; ++i) store_system(reinterpret_cast<u32*>(p) + i, x.w[i]);
}
"""
MUTATIONS = {
    "one_slot": Mutation({f"{kind}Ring = 2;": f"{kind}Ring = 1;" for kind in ("kRow", "kBlock")}),
    "stride_of_the_grid": Mutation(
        {
            "u64(block_index()) * kBlockRing + step % kBlockRing": "step % kBlockRing * grid_size() + block_index()",
            "u64(place) * kRowRing * kMaxWorld": "u64(place) * kMaxWorld",
            "return step % kRowRing *": "return step % kRowRing * grid_size() * (block_size() / kWarp) *",
        }
    ),
    "no_dependency_wait": Mutation({"dependency_wait();": ""}),
    "any_packet": Mutation(
        {"packet.w[1] == step": "packet.w[1] != 0", "u32(packet >> 32) != step": "packet >> 32 == 0"}
    ),
    "one_flag_for_both_halves": Mutation(
        {"packet.w[1] == step && (!kBoth ||": "packet.w[3] == step && (true ||"}, ("block",)
    ),
    "torn_packet": Mutation(
        {
            "store_system(reinterpret_cast<": "torn_store(reinterpret_cast<",
            "namespace tpfuse {": "namespace tpfuse {" + TORN,
        }
    ),
    "late_counter": Mutation(
        {"store_global(counter, step)": "store_global(counter, step - 1)", "(counter), step)": "(counter), step - 1)"}
    ),
    "no_barrier_for_gamma": Mutation({"if (!kFew) barrier();": ""}, ("row",)),
    "no_barrier_before_exchange": Mutation(
        {"barrier();\n    if (warp_index() == 0)": "if (warp_index() == 0)"}, ("block",)
    ),
    "no_barrier_after_exchange": Mutation({"barrier();\n    if (failed)": "if (failed)"}, ("block",)),
    "no_barrier_before_turn": Mutation(
        {"work.load_tables(tables[step % kTables]);\n      barrier();": "work.load_tables(tables[step % kTables]);"},
        ("block",),
        few=3,
    ),
    "angles_in_one_place": Mutation({"% kTables": "% 1"}, ("block",), few=3),
    "any_position": Mutation({"if (position >= a.known_positions) return;": ""}, ("row",), few=3),
    "rows_of_the_other_lane": Mutation(
        {"lane() & kPartner ? kOwn : 0": "lane() & kPartner ? 0 : kOwn"}, ("block",), few=3
    ),
    "pair_of_the_next_lane": Mutation({"slot % kEach * kPartner": "slot % kEach"}, ("block",), few=3),
    "gamma_first": Mutation({"mul_rn(mul_rn(x[i], inverse), gamma[i])": "mul_rn(x[i], mul_rn(inverse, gamma[i]))"}),
}


def mutant(name: str) -> Path:
    text = '#pragma GCC diagnostic ignored "-Wunused-variable"\n' + HEADER
    for old, new in MUTATIONS[name].replaced.items():
        assert old in text, f"sharded_norm.h has changed: mutation {name} looks for {old!r}"
        text = text.replace(old, new)
    header = kept(name, ".h", text)
    kinds = sum(1 << KINDS.index(kind) for kind in MUTATIONS[name].kinds)
    return driver(name, WORLDS="2", FEW=str(MUTATIONS[name].few), KINDS=str(kinds), HEADER=f'"{header}"')


@pytest.fixture(scope="module", autouse=True)
def binaries() -> None:
    """Compiles on two cores at once, what takes longest first."""
    mutants = [mutant(name) for name in MUTATIONS]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(build, SANITIZED, sanitize=True)]
        jobs += [pool.submit(build, path) for path in (ODD, EVEN, *mutants)]
        wait(jobs)  # the test that needs it reports what does not compile


def passes(path: Path, *arguments: str, sanitize: bool = False) -> None:
    result = run(path, *arguments, sanitize=sanitize)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("world", "seeds"), [(2, 80), (3, 40), (4, 40), (6, 20), (8, 15)])
def test_calls_of_all_kinds(world: int, seeds: int) -> None:
    passes(BINARIES[world], f"world={world}", f"seeds={seeds}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "seeds"), [(2, 50), (4, 20), (8, 6)])
def test_one_kernel(kind: str, world: int, seeds: int) -> None:
    """More calls of one kernel share slots than where all three take turns."""
    passes(BINARIES[world], f"world={world}", f"seeds={seeds}", f"kind={KINDS.index(kind)}", "first=1000", "calls=6")


@pytest.mark.parametrize("world", [2, 4])
def test_slow_rank(world: int) -> None:
    passes(BINARIES[world], f"world={world}", "slow=1", "seeds=20", "first=2000")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "missing"), [(2, 0), (3, 1), (4, 3), (6, 0), (8, 5)])
def test_missing_rank_is_named(world: int, missing: int, kind: str) -> None:
    passes(BINARIES[world], f"world={world}", f"missing={missing}", "seeds=10", f"kind={KINDS.index(kind)}")


def test_sanitizers() -> None:
    passes(SANITIZED, "world=3", "seeds=15", sanitize=True)
    passes(SANITIZED, "world=3", "seeds=5", "missing=2", sanitize=True)


class Record:
    """Reads what `dump` of the driver writes."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def numbers(self, types: str) -> tuple[int | float, ...]:
        self.at += 4 * len(types)
        return struct.unpack_from("=" + types, self.content, self.at - 4 * len(types))

    def rows(self, dtype: torch.dtype, *shape: int) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        self.at += size
        return torch.frombuffer(bytearray(self.content[self.at - size : self.at]), dtype=dtype).reshape(shape)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """NaN where the other has NaN, whatever its payload; elsewhere every bit, the sign of zero included."""
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    integers = torch.int32 if ours.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.view(integers)[~nan], theirs.view(integers)[~nan])


@pytest.mark.parametrize("world", sorted(BINARIES))
def test_kernels_match_the_reference(world: int, tmp_path: Path) -> None:
    """Every compiled variant once, its results compared with torch."""
    passes(BINARIES[world], f"world={world}", "seeds=2", f"dump={tmp_path / 'calls'}")
    record = Record((tmp_path / "calls").read_bytes())
    compared = 0
    while record.at < len(record.content):
        _, kind, tensors, rows, bias, turn, head_dim, rotary_dim = record.numbers("IIIIfIII")
        dtype, rope = TYPES[int(kind)], None
        if turn:
            (count,) = record.numbers("I")
            cos, sin = (
                record.rows(torch.float32, world, int(count))[0].unflatten(0, (-1, int(rotary_dim) // 2))
                for _ in range(2)
            )
            positions = record.rows(torch.int64, world, int(rows))[0]
            rope = Rope(cos, sin, positions, int(head_dim), int(rotary_dim), interleaved=turn == 2)
        expected = []
        for _ in range(int(tensors)):
            width, gamma_kind, eps = record.numbers("IIf")
            x = record.rows(dtype, world, int(rows), int(width))
            gamma = record.rows(TYPES[int(gamma_kind)], world, int(width))
            expected.append(reference.rms_norm(list(x), list(gamma), eps=eps, weight_bias=bias, rope=rope))
        for theirs in expected:
            assert_same_bits(record.rows(dtype, world, int(rows), theirs[0].shape[-1]), torch.stack(theirs))
            compared += 1
    assert compared >= 2 * 15


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in MUTATIONS for kind in MUTATIONS[name].kinds])
def test_mutation_is_noticed(name: str, kind: str) -> None:
    result = run(mutant(name), f"kind={KINDS.index(kind)}", "calls=6", "seeds=1000")
    assert result.returncode != 0, result.stdout
    crashed = result.returncode == -signal.SIGSEGV
    assert crashed or re.search("timed out|wrong value|a hang", result.stdout), result.stdout
