"""The emulated machine keeps its promises: it reports what is wrong, runs what is right, and finds planted bugs.

A test that can only pass proves nothing about an emulator, so every bug of `toy_exchange.h` has to be found within a
bounded number of seeds, and everything the machine may reorder has to be seen reordered.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .build import HERE, build, compiler, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no host C++ compiler")

TOY = HERE / "toy_driver.cpp"
CASES = HERE / "cases.cpp"
CONVERSIONS = HERE / "conversions.cpp"
# In the order of `Bug`.
BUGS = [
    "short_ring",
    "grid_stride",
    "no_dependency_wait",
    "no_packet_wait",
    "torn_packet",
    "slot_out_of_bounds",
    "no_barrier",
]


@pytest.fixture(scope="module", autouse=True)
def binaries() -> None:
    """Compiles on two cores at once: most of a first run is the compiler."""

    def build_all(drivers: list[Path], sanitize: bool) -> None:
        for driver in drivers:
            build(driver, sanitize=sanitize)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build_all, ([TOY, CASES, CONVERSIONS], [TOY, CASES]), (False, True)))


def passes(driver: Path, *arguments: str, sanitize: bool = False) -> str:
    result = run(driver, *arguments, sanitize=sanitize)
    assert result.returncode == 0, result.stdout
    return result.stdout


def fails(driver: Path, *arguments: str, sanitize: bool = False) -> str:
    result = run(driver, *arguments, sanitize=sanitize)
    assert result.returncode != 0, result.stdout
    return result.stdout


@pytest.mark.parametrize("mode", ["", "pdl=1", "slow=1", "pdl=1 slow=1"])
@pytest.mark.parametrize(("world", "seeds"), [(2, 100), (3, 60), (4, 60), (8, 25)])
def test_correct_exchange_passes(world: int, seeds: int, mode: str) -> None:
    passes(TOY, f"world={world}", f"seeds={seeds}", *mode.split())


@pytest.mark.parametrize("world", [2, 4])
def test_correct_exchange_passes_sanitizers(world: int) -> None:
    passes(TOY, f"world={world}", "pdl=1", "seeds=10", sanitize=True)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_missing_rank_is_named(world: int) -> None:
    passes(TOY, f"world={world}", f"missing={world - 1}", "seeds=10")


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug: str, world: int) -> None:
    output = fails(TOY, f"bug={BUGS.index(bug) + 1}", f"world={world}", "pdl=1", "seeds=300")
    expected = "out of bounds: byte" if bug == "slot_out_of_bounds" else "timed out|wrong sum"
    assert re.search(expected, output), output


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("divergence", r"is stuck.*barrier at cases.cpp:\d+: threads 0-15\n.*shuffle at cases.cpp:\d+: threads 16-31"),
        ("mixed_meeting", "lanes of one warp meet in different operations"),
        ("shuffle_from_the_dead", "shuffles from lane 20, which is not there"),
        ("hang", r"a hang: .*spin_pause at cases.cpp:\d+: threads 0-31"),
        (
            "a_block_leaves_its_cluster",
            r"ended before \d words from its cluster came|of the cluster, which is not there",
        ),
        ("too_many_words", "a gate that is not open, or has had all its words"),
        ("endless", "step limit reached.*load_system at cases.cpp"),
        ("out_of_bounds", "byte 40 of 'x' of rank 1, which has 40"),
        ("out_of_bounds_raw", "written outside of 'x' of rank 0"),
        ("out_of_bounds_shared", "wrote outside of a shared variable"),
        ("misaligned", "misaligned 8-byte access to 'x'"),
    ],
)
def test_failure_is_reported(case: str, words: str) -> None:
    output = fails(CASES, case)
    assert re.search(words, output, re.DOTALL), output


@pytest.mark.parametrize("case", ["out_of_bounds_raw", "out_of_bounds_shared"])
def test_address_sanitizer_sees_fibers(case: str) -> None:
    assert re.search(r"AddressSanitizer: use-after-poison.*cases\.cpp", fails(CASES, case, sanitize=True), re.DOTALL)


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        "every_primitive_runs",
        "deterministic",
        "waves",
        "shared_is_per_block",
        "named_barrier",
        "cluster",
        "loaded_back",
        "the_living_meet",
        "time_leaps",
        "a_rare_look_at_the_clock",
    ],
)
def test_promise_is_kept(case: str, sanitize: bool) -> None:
    passes(CASES, case, "seeds=5" if sanitize else "seeds=50", sanitize=sanitize)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("weak_order", "overtaking"),
        ("late_own_stores", "overwriting"),
        ("torn", "tearing"),
        ("pdl_overlaps", "overlap"),
        ("slow_rank_falls_behind", "behind"),
    ],
)
def test_seeds_differ(case: str, what: str) -> None:
    seen = re.search(rf"{what}=(\d+)", passes(CASES, case, "seeds=200"))
    assert seen
    assert int(seen[1]) >= 20


def floats_to_round() -> torch.Tensor:
    """Random bit patterns, and all neighbours of every 16-bit number and of every midpoint between two."""
    random = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    patterns = torch.arange(65536).to(torch.uint16)
    exact = torch.cat([patterns.view(dtype).float() for dtype in (torch.bfloat16, torch.float16)])
    midpoints = exact.view(torch.int32).long() + torch.tensor([[0], [1 << 15], [1 << 12], [1 << 22]])
    near = midpoints.flatten() + torch.tensor([[-1], [0], [1]])
    # Halves of the smallest f16 subnormals are ties too, at many exponents.
    ties = (torch.arange(4096) * 2.0**-25).view(torch.int32).long()
    bits = torch.cat([random, near.flatten(), ties, ties + 1, ties - 1])
    return (bits & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)


def load(path: Path, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor, integers: torch.dtype) -> None:
    """NaN where torch has NaN, whatever its payload; elsewhere every bit, the sign of zero included."""
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours.view(integers)[~nan], theirs.view(integers)[~nan])


def test_conversions_match_torch(tmp_path: Path) -> None:
    x = floats_to_round()
    (tmp_path / "in").write_bytes(x.numpy().tobytes())
    passes(CONVERSIONS, str(tmp_path / "in"), str(tmp_path))
    patterns = torch.arange(65536).to(torch.uint16)
    for name, dtype in {"bf16": torch.bfloat16, "f16": torch.float16}.items():
        for how in ("one", "packed"):
            assert_same_bits(load(tmp_path / f"{name}.{how}", dtype), x.to(dtype), torch.int16)
        for how in ("wide", "unpacked"):
            assert_same_bits(load(tmp_path / f"{name}.{how}", torch.float32), patterns.view(dtype).float(), torch.int32)
