"""Thresholds: chosen from times, kept in a file, compared between ranks. Times come from stand-ins, not from GPUs."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import OnRanks, Refused
from rich.console import Console

from tpfuse.agreement import Board
from tpfuse.backends.cuda import tuning
from tpfuse.backends.cuda.all_reduce import DEFAULTS, MAX_SPLIT_ROWS, Thresholds, limits
from tpfuse.backends.cuda.backend import routes
from tpfuse.bench import tune
from tpfuse.bench.method import gathered
from tpfuse.bench.tune import ROWS, WAYS, WIDTHS, Size, Times, Tuning, Way, choose, way_of
from tpfuse.errors import InvalidArgument, RankMismatch, TpfuseError, Unsupported
from tpfuse.info import Info, Tuned, show, thresholds_of
from tpfuse.launch import Rank

H200 = "NVIDIA H200 with 132 multiprocessors"


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user who has none yet."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("TPFUSE_TUNING", str(path))
    return path


def stand_in_us(size: Size, way: Way, one_shot_kib: float, split_rows: float) -> float:
    """A stand-in for the time of a call: curves that cross behind so many KiB, and behind so many rows."""
    slow_algorithm = (size.kib / (one_shot_kib + 0.5)) ** (0.3 if way.algorithm == "one_shot" else -0.3)
    slow_spread = (size.rows / (split_rows + 0.5)) ** (0.2 if way.split else -0.2)
    return (3 + size.rows * size.width / 1e6) * slow_algorithm * slow_spread


def stand_in_times(one_shot_kib: float, split_rows: float, world: int = 4) -> Times:
    most = limits(world).one_shot_kib
    return {
        size: {
            way: stand_in_us(size, way, one_shot_kib, split_rows)
            for way in WAYS
            if way.algorithm == "two_shot" or size.kib <= most
        }
        for size in (Size(*both) for both in product(ROWS, WIDTHS))
    }


# Choosing


@pytest.mark.parametrize(
    ("one_shot_kib", "split_rows"), [(64, 128), (128, 128), (192, 256), (288, 24), (6, 512), (1536, 1), (768, 0)]
)
def test_the_choice_is_where_the_curves_cross(one_shot_kib: int, split_rows: int) -> None:
    assert choose(stand_in_times(one_shot_kib, split_rows), 4) == Thresholds(one_shot_kib, split_rows)


def test_a_size_counts_as_thresholds_do() -> None:
    assert (Size(16, 3072).size_in_bytes, Size(16, 3072).kib) == (96 << 10, 96)
    assert (Size(3, 2880).size_in_bytes, Size(3, 2880).kib) == (17280, 17)  # the least bound that it is within
    for size in (Size(3, 2880), Size(16, 3072)):
        assert way_of(size, Thresholds(size.kib, 0)).algorithm == "one_shot"
        assert way_of(size, Thresholds(size.kib - 1, 0)).algorithm == "two_shot"


def test_one_noisy_point_does_not_decide() -> None:
    times = {size: dict(ways) for size, ways in stand_in_times(192, 128).items()}
    for split in (True, False):
        times[Size(4, WIDTHS[0])][Way("one_shot", split)] *= 1.5
        times[Size(48, WIDTHS[1])][Way("one_shot", split)] *= 0.8
    assert choose(times, 4) == Thresholds(192, 128)


def test_the_defaults_stay_where_nothing_is_faster() -> None:
    flat = {size: dict.fromkeys(ways, 5.0) for size, ways in stand_in_times(1, 1).items()}
    assert choose(flat, 4) == DEFAULTS[4]
    for ways in flat.values():
        ways[Way("two_shot", True)] = ways[Way("two_shot", False)] = 4.98  # less than is worth a change
    assert choose(flat, 4) == DEFAULTS[4]


@pytest.mark.parametrize("world", DEFAULTS)
def test_one_shot_is_never_chosen_for_more_rows_than_have_slots(world: int) -> None:
    chosen = choose(stand_in_times(1e6, 0.1, world), world)
    sizes = {size.kib for size in (Size(*both) for both in product(ROWS, WIDTHS))}
    assert chosen.one_shot_kib == max(kib for kib in sizes if kib <= limits(world).one_shot_kib)


def test_the_ways_are_what_thresholds_decide_between() -> None:
    for way, rows, width in product(WAYS, ROWS, WIDTHS):
        assert way_of(Size(rows, width), way.forced) == way


class StandInTimer:
    """In place of GPUs. Each rank's clock is its own; like the real timer it returns the maximum over ranks."""

    def __init__(self, rank: Rank, slow: int) -> None:
        self.rank, self.slow = rank.rank, slow

    def __call__(self, size: Size) -> Mapping[Way, float]:
        one_shot = 72 if self.rank == self.slow else 192
        own = {way: stand_in_us(size, way, one_shot, 64) * (10 if self.rank == self.slow else 1) for way in WAYS}
        every = gathered(own)
        return {way: max(times[way] for times in every) for way in WAYS}


class StandInTimerOfOneRank(StandInTimer):
    """A timer that is broken: its ranks see different times."""

    def __call__(self, size: Size) -> Mapping[Way, float]:
        return {way: stand_in_us(size, way, 48 if self.rank else 144, 64) for way in WAYS}


def tune_with(rank: Rank, timer: Any, *arguments: Any) -> Tuning:
    return tune.tune(rank, timer(rank, *arguments), H200, rows=(1, 8, 12, 24, 32, 48, 64, 96))


def test_the_slowest_rank_decides(on_ranks: OnRanks) -> None:
    found = on_ranks(2, tune_with, StandInTimer, 1)
    assert found[0] == found[1]
    assert found[0].thresholds == Thresholds(72, 64)
    assert (found[0].world, found[0].model) == (2, H200)


def test_all_ranks_have_the_choice_of_rank_0(on_ranks: OnRanks) -> None:
    found = on_ranks(2, tune_with, StandInTimerOfOneRank, 0)
    assert found[0].times != found[1].times
    assert [tuning.thresholds for tuning in found] == [Thresholds(144, 64)] * 2


def test_the_table_shows_times_and_choice() -> None:
    console = Console(file=io.StringIO(), width=200)
    times = stand_in_times(192, 64)
    console.print(tune.report(Tuning(H200, 4, times, Thresholds(192, 64))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 x NVIDIA H200 with 132 multiprocessors" in text
    assert "6 KiB a row" in text
    assert "one-shot up to 192 KiB, rows split up to 64 (by default 128 KiB and 128)" in text
    (row,) = (line for line in text.splitlines() if line.startswith("│  256 "))
    cells = [cell.strip() for cell in row.split("│")]
    whole = times[Size(256, 3072)][Way("one_shot", False)], times[Size(256, 3072)][Way("two_shot", False)]
    assert cells[2] == "{:.2f} / {:.2f}".format(*whole)
    assert cells[4].startswith("- / ")  # no slots for one-shot of so many bytes


def test_the_table_has_what_is_taken_in_bold() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(tune.report(Tuning(H200, 4, stand_in_times(192, 24), Thresholds(192, 24))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (row,) = (line for line in text.splitlines() if re.search(r"│\s+32 │", line))
    found = [[part.startswith("\x1b[1m") for part in cell.strip().split(" / ")] for cell in row.split("│")[2:-1]]
    one, two, whole = [True, False], [False, True], [False, True]
    assert found == [one, two, two, whole]  # 192, 256 and 384 KiB; more than 24 rows


# The file


def test_a_file_keeps_an_entry_for_each_model_and_number_of_ranks(file: Path) -> None:
    assert tuning.load(H200, 4) == DEFAULTS[4]  # there is none, and that is fine
    tuning.save(file, H200, 4, Thresholds(32, 64))
    tuning.save(file, H200, 2, Thresholds(100, 0))
    tuning.save(file, "other", 4, Thresholds(1, 1))
    tuning.save(file, H200, 4, Thresholds(24, 96))
    assert tuning.load(H200, 4) == Thresholds(24, 96)
    assert tuning.load(H200, 2) == Thresholds(100, 0)
    assert tuning.load("other", 4) == Thresholds(1, 1)
    assert tuning.load("other", 2) == DEFAULTS[2]
    assert os.listdir(file.parent) == [file.name]  # nothing is left of the writing


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuning.tuning_file() == tmp_path / "tuning.json"
    monkeypatch.delenv("TPFUSE_TUNING")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert tuning.tuning_file() == tmp_path / "config" / "tpfuse" / "tuning.json"
    tuning.save(tuning.tuning_file(), H200, 4, Thresholds(24, 96))  # makes the folders
    assert tuning.load(H200, 4) == Thresholds(24, 96)
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert tuning.tuning_file() == Path("/home/someone/.config/tpfuse/tuning.json")


def entry(**fields: object) -> str:
    given = {"one_shot_kib": 128, "split_rows": 128} | fields
    return json.dumps({"format": 2, "gpus": {H200: {"4": given}}})


FORMER = json.dumps({"format": 1, "gpus": {H200: {"4": {"one_shot_rows": 16, "split_rows": 128}}}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "JSONDecodeError"),
        (entry()[:-3], "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"format": 3, "gpus": {}}', "format 3, supported: 2"),
        (FORMER, "format 1, supported: 2; format 1 had rows instead of KiB). Delete it and tune again."),
        ('{"gpus": {}}', "'format'"),
        ('{"format": 2, "gpus": {"H200": {"four": {}}}}', "four"),
        ('{"format": 2, "gpus": {"H200": {"9": {}}}}', "9 ranks; supported: 2 to 8"),
        (entry(other=1), "other"),
        (entry(one_shot_kib="16"), "one_shot_kib='16'"),
        (entry(one_shot_kib=True), "one_shot_kib=True"),
        (entry(one_shot_kib=0), "one_shot_kib=0 for 4 ranks; supported: 1 to 1984"),
        (entry(one_shot_kib=10**6), "one_shot_kib=1000000"),
        (entry(split_rows=-1), "split_rows=-1"),
        (entry(split_rows=MAX_SPLIT_ROWS + 1), f"supported: 0 to {MAX_SPLIT_ROWS}"),
        ("\udc80", "can't be read"),
    ],
)
def test_a_file_that_is_none_is_one_warning_and_the_defaults(file: Path, text: str, says: str) -> None:
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="The defaults serve instead") as caught:
        assert tuning.load(H200, 4) == DEFAULTS[4]
    (warning,) = caught
    assert str(file) in str(warning.message)
    assert says in str(warning.message)
    with pytest.raises(InvalidArgument):  # and it stays as it is: it may be somebody's
        tuning.save(file, H200, 4, Thresholds(24, 96))
    assert file.read_bytes() == text.encode(errors="surrogateescape")
    assert all(says in tuned.source for tuned in thresholds_of(H200, 4))


def test_a_folder_in_its_place(file: Path) -> None:
    file.mkdir()
    with pytest.warns(UserWarning, match="can't be read"):
        assert tuning.load(H200, 4) == DEFAULTS[4]


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TpfuseError, match="can't be"):
        tuning.save(tmp_path / "file" / "tuning.json", H200, 4, Thresholds(24, 96))
    with pytest.raises(TpfuseError, match=r"can't be written: .* --output"):
        tuning.save(Path("/proc/tpfuse/tuning.json"), H200, 4, Thresholds(24, 96))


@pytest.mark.parametrize("world", DEFAULTS)
def test_defaults_and_limits_are_valid_entries(file: Path, world: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thresholds in (DEFAULTS[world], limits(world)):
            tuning.save(file, H200, world, thresholds)
            assert tuning.load(H200, world) == thresholds


# Between ranks


def load_and_compare(rank: Rank, files: list[str]) -> str:
    """What a Communicator does with the thresholds, each rank with a file of its own."""
    os.environ["TPFUSE_TUNING"] = files[rank.rank]
    assert dist.group.WORLD is not None
    try:
        return str(tuning.agreed(Board(dist.group.WORLD, f"test-tuning/{files}"), tuning.load(H200, rank.world), 20.0))
    except RankMismatch as error:
        return str(error)
    finally:
        del os.environ["TPFUSE_TUNING"]


def test_ranks_that_loaded_other_thresholds_are_a_mismatch(on_ranks: OnRanks, tmp_path: Path) -> None:
    one, other, none = (tmp_path / name for name in ("one", "other", "none"))
    tuning.save(one, H200, 2, Thresholds(24, 96))
    tuning.save(other, H200, 2, Thresholds(32, 96))
    assert on_ranks(2, load_and_compare, [str(one)] * 2) == [str(Thresholds(24, 96))] * 2
    assert on_ranks(2, load_and_compare, [str(none)] * 2) == [str(DEFAULTS[2])] * 2
    for rank, message in enumerate(on_ranks(2, load_and_compare, [str(one), str(other)])):
        assert "the ranks differ: rank 1 has one_shot_kib=32, rank 0 has 24." in message
        assert f"`tpfuse tune` keeps them in {(one, other)[rank]}: give all ranks the same file" in message
    for message in on_ranks(2, load_and_compare, [str(none), str(one)]):
        assert f"rank 1 has one_shot_kib=24, rank 0 has {DEFAULTS[2].one_shot_kib}" in message


# Where they show


def test_the_plan_has_the_bound_in_kib() -> None:
    found = routes(Thresholds(24, 96))
    bounds = {(r.op, r.max_kib): r.algorithm for r in found if r.op.startswith("all_reduce")}
    assert bounds == {
        (op, kib): algorithm
        for op in ("all_reduce", "all_reduce_rms_norm")
        for kib, algorithm in ((24, "one-shot push"), (None, "two-shot push"))
    }


def test_info_says_what_a_new_communicator_goes_by(file: Path) -> None:
    tuning.save(file, H200, 4, Thresholds(24, 96))
    two, three, four = thresholds_of(H200, 4)
    assert (two.world, two.thresholds, two.source) == (2, DEFAULTS[2], "default")
    assert (three.world, three.source) == (3, "default")
    assert (four.world, four.thresholds, four.source) == (4, Thresholds(24, 96), str(file))


def test_info_shows_thresholds_with_their_units() -> None:
    console = Console(file=io.StringIO(), width=200)
    show(console, Info({}, "", (), (), (), (Tuned(4, Thresholds(24, 96), "default"),)))
    (row,) = (line for line in console.file.getvalue().splitlines() if "default" in line)  # type: ignore[attr-defined]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["4", "24 KiB of a rank", "96 rows", "default"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "tune: needs at least 2 GPUs that reach each other; torch sees 0."),
        (("--device", "cuda", "--world", "4"), "needs at least 2 GPUs"),
        (("--device", "cpu"), "--device cpu has none of them"),
        (("--device", "abacus"), "supported: cpu, cuda"),
        (("--output", "no/such/folder/tuning.json"), "no/such/folder"),
        (("--output", __file__), "not a file of `tpfuse tune`"),
    ],
)
def test_the_command_without_gpus_is_one_line(arguments: tuple[str, ...], says: str, refused: Refused) -> None:
    assert says in refused("tune", *arguments)


@pytest.mark.parametrize(("device", "says"), [("cpu", "--device cpu has none"), ("cuda", "needs at least 2 GPUs")])
def test_without_gpus_there_is_nothing_to_tune(device: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(Unsupported, match=says):
        tune.run(None, device)


def test_without_a_home_folder_the_error_says_what_to_set(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TPFUSE_TUNING", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert "set TPFUSE_TUNING" in refused("tune")
    assert thresholds_of(H200, 2)[0].source.startswith("default: no home folder")
