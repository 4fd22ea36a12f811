"""The benchmark's machinery: figures are honest, failed rows stay, and nothing wrong gets into a ratio."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tpfuse.backends.cuda.backend import EARLY
from tpfuse.bench import ceilings, machine
from tpfuse.bench.cases import OPS as BENCH_OPS
from tpfuse.bench.cases import (
    Case,
    Inputs,
    Outputs,
    cases_of,
    check_ops,
    difference,
    expected,
    make_inputs,
    ops_of,
)
from tpfuse.bench.ceilings import Rates, ceiling_us, link_bytes, memory_bytes
from tpfuse.bench.implementations import BASELINES, Baseline, Ran, Site, Step, Tpfuse, find_baselines
from tpfuse.bench.ops import finish, job, parse_tokens, run
from tpfuse.bench.plot import check_plot, plot, spread
from tpfuse.bench.records import TPFUSE, Record, modes, read, result_name, short_commit, short_gpu, write
from tpfuse.bench.report import Key, ratio, times
from tpfuse.errors import InvalidArgument, TpfuseError, Unsupported
from tpfuse.launch import Ranks
from tpfuse.plan import OPS, Counter, Plan, Report, Route
from tpfuse.presets import PRESETS, find_preset

ALL_REDUCE = {"all_reduce": "test"}
CPU = torch.device("cpu")


def make_no_sum(site: Site) -> Mapping[str, Step]:
    """Forgets the other ranks, and is very fast."""
    return {"all_reduce": lambda case, inputs: (inputs["x"].clone(),)}


def make_wrong_later(site: Site) -> Mapping[str, Step]:
    """Right until the second check: its first call of a case is right, the others are not."""
    seen: set[Case] = set()

    def step(case: Case, inputs: Inputs) -> Outputs:
        first = case not in seen
        seen.add(case)
        return expected(case, site.rank, 0, site.device) if first else (inputs["x"].clone(),)

    return {"all_reduce": step}


def make_raises_on_one_rank(site: Site) -> Mapping[str, Step]:
    def step(case: Case, inputs: Inputs) -> Outputs:
        if site.rank == 1:
            raise ValueError("no luck here")
        return expected(case, site.rank, 0, site.device)

    return {"all_reduce": step}


def make_dies(site: Site) -> Mapping[str, Step]:
    os._exit(3) if site.rank == 1 else None
    return {}


BAD = (
    Baseline("no_sum", "test", ALL_REDUCE, make_no_sum),
    Baseline("wrong_later", "test", ALL_REDUCE, make_wrong_later),
    Baseline("raises", "test", ALL_REDUCE, make_raises_on_one_rank),
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def records(ranks: Ranks) -> list[Record]:
    """A run of everything: tpfuse, every baseline of ours, and the bad ones."""
    steps: list[tuple[int, int, str]] = []
    m2, baselines = PRESETS["minimax-m2"], (*BASELINES.values(), *BAD)
    results = ranks.run(job, m2, "fused", (5,), baselines, ops_of(m2), progress=lambda *s: steps.append(s))
    assert results[0] == results[1]  # every rank has the same rows
    assert steps[-1][0] == steps[-1][1] == len(ops_of(m2)) == 9
    found: list[Record] = results[0]
    return found


def rows(records: list[Record], impl: str) -> list[Record]:
    return [r for r in records if r.impl == impl]


@pytest.mark.parametrize("name", PRESETS)
def test_every_op_has_a_time(ranks: Ranks, records: list[Record], name: str) -> None:
    preset = PRESETS[name]
    baselines = find_baselines(["gloo", "gather"])
    every = ops_of(preset)
    found = records if name == "minimax-m2" else ranks.run(job, preset, "fused", (3,), baselines, every)[0]
    for impl, ops in ((TPFUSE, every), ("gloo", every), ("gather", ("qk_rms_norm", "qk_rms_norm_rope"))):
        ours = rows(found, impl)
        assert {r.op for r in ours} == set(ops) & set(every)
        for r in ours:
            assert r.ok, r.error
            assert r.us is not None
            assert r.us == max(r.us_ranks) > 0
            assert len(r.us_ranks) == r.world == 2


def test_rows_say_what_really_ran(records: list[Record]) -> None:
    for r in rows(records, TPFUSE):
        assert (r.requested_mode, r.effective_mode, r.backend) == ("fused", "control", "collective")
        assert r.reason
        assert r.gpu.startswith("CPU: ")
    assert modes(records) == ("fused", "control")
    assert result_name("minimax-m2", records) == "ops-minimax-m2-cpux2-control.jsonl"


def test_rows_say_which_variant_they_are_of(records: list[Record]) -> None:
    found = {r.op: (r.layout, r.quant) for r in records}
    assert found == {name: (op.layout, op.quant) for name, op in BENCH_OPS.items()}
    assert found["all_reduce_rms_norm_rows_fp8_per_token"] == ("row_sharded", "fp8_per_token")
    (gloo,) = (r for r in records if r.op == "all_reduce_rms_norm_fp8_static" and r.impl == "gloo")
    assert gloo.algorithm == "all-reduce in place, add, norm, cast"


class Counted:
    """A communicator of which only the counters matter here."""

    def __init__(self) -> None:
        own = Route("all_reduce", 64, "cuda", "two-shot", "fused", "")
        fallback = Route("all_reduce", None, "collective", "all-reduce", "control", "too many rows")
        others = (Route(op, None, "cuda", "one-shot", "fused", "") for op in OPS if op != "all_reduce")
        self.plan = Plan("fused", "auto", 2, (own, fallback, *others))
        self.counters = {route: Counter(route) for route in self.plan.routes}

    def report(self) -> Report:
        counters = tuple(c for c in self.counters.values() if c.calls)
        return Report("fused", "mixed", 0, 2, "cuda:0", "nccl", self.plan, counters)


def test_what_ran_is_read_from_the_counters() -> None:
    comm, one = Counted(), case("minimax-m2", "all_reduce", 5, 2)
    own, fallback, other, *_ = comm.plan.routes
    ours = Tpfuse(comm)  # type: ignore[arg-type]
    assert ours.ran(one) == Ran("", "", "fused", "none", "")  # whatever the plan says
    comm.counters[own].calls += 2
    comm.counters[other].calls += 1
    assert ours.ran(one) == Ran("cuda", "two-shot", "fused", "fused", "")
    comm.counters[fallback].calls += 1  # although the plan has another route for 5 rows
    assert ours.ran(one) == Ran("collective", "all-reduce", "fused", "control", "too many rows")
    comm.counters[own].calls += 1
    comm.counters[fallback].calls += 1
    assert ours.ran(one) == Ran("cuda + collective", "two-shot + all-reduce", "fused", "mixed", "too many rows")
    assert ours.ran(one).effective_mode == "none"


def test_a_baseline_that_cannot_run_is_a_failed_row(records: list[Record]) -> None:
    for name in ("nccl", "symm_mem_one_shot", "symm_mem_two_shot"):
        failed = rows(records, name)
        assert {r.op for r in failed} == set(BASELINES[name].algorithms)
        assert all(not r.ok and r.us is None and "Unsupported" in r.error for r in failed)


def test_wrong_results_have_no_time(records: list[Record]) -> None:
    for name, text in (("no_sum", "wrong result"), ("wrong_later", "wrong result"), ("raises", "rank 1: ValueError")):
        failed = rows(records, name)
        assert len(failed) == 1
        assert all(not r.ok and r.us is None and not r.us_ranks and text in r.error for r in failed)
    cases = times(r for r in records if r.op == "all_reduce")
    assert all(set(case) == {TPFUSE, "gloo"} for case in cases.values())


def test_only_ok_rows_count(records: list[Record]) -> None:
    ours, theirs = (replace(records[0], op="all_reduce", tokens=1, cache="hot", impl=i) for i in (TPFUSE, "gloo"))
    lie = replace(theirs, impl="no_sum", ok=False, us=0.001, error="wrong result")
    case = times([replace(ours, us=2.0), replace(theirs, us=3.0), lie])[Key(1, "hot")]
    assert ratio(case) == 1.5
    mixed = [replace(ours, effective_mode="fused"), ours, replace(ours, ok=False, effective_mode="none")]
    assert modes(mixed)[1] == "mixed"


def test_a_rank_that_dies_is_one_error() -> None:
    dies = Baseline("dies", "test", ALL_REDUCE, make_dies)
    with pytest.raises(TpfuseError, match=r"lost the other ranks|exit code 3"):
        run("minimax-m3", world=2, device_type="cpu", tokens=[1], baselines=[dies])


def test_report_shows_modes_ratios_and_failures(records: list[Record], tmp_path: Path) -> None:
    console = Console(width=160, file=io.StringIO())
    finish(console, records, tmp_path / "any.jsonl", None)
    assert read(tmp_path / "any.jsonl") == records
    narrow = Console(width=40, file=io.StringIO())
    finish(narrow, records, tmp_path / "a rather long name.jsonl", None)
    assert f"figures: {tmp_path}/a rather long name.jsonl\n" in narrow.file.getvalue()  # type: ignore[attr-defined]
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "requested fused, effective control" in text
    assert "On a CPU only ratios" in text
    assert text.count("the best baseline's speed") == 9
    assert text.count("vs without RoPE") == 1
    assert re.search(r"[+-]\d+% │", text)
    assert "failed: no_sum, all rows: rank 0: wrong result" in text
    assert "failed: raises, all rows: rank 1: ValueError: no luck here" in text


def test_records_round_trip(records: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "ops.jsonl"
    write(records, path)
    assert read(path) == records
    assert ", ".join(json.loads(path.read_text().splitlines()[0])) == (
        "op, impl, backend, algorithm, requested_mode, effective_mode, reason, world, tokens, width, dtype, layout, "
        "quant, cache, us, us_ranks, ceiling_us, ok, error, gpu, driver, versions, commit"
    )
    path.write_text('{"op": "all_reduce"}\n')
    with pytest.raises(InvalidArgument, match=r"ops\.jsonl:1"):
        read(path)


def test_plot_is_written(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ops.png"
    plot(records, path, "minimax-m2")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
    with pytest.raises(InvalidArgument, match="no row has a time"):
        plot(rows(records, "no_sum"), path)
    for ending in ("pdf", "SVG"):
        plot(records, tmp_path / f"ops.{ending}")
    with pytest.raises(InvalidArgument, match=r"ops\.doc; supported endings: \.png, \.pdf, \.svg"):
        check_plot("ops.doc")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unsupported, match=r"pip install tpfuse\[plot\]"):
        plot(records, path)


def test_labels_do_not_overlap() -> None:
    assert spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    placed = spread([0.1, 0.12, 0.2, 0.21, 0.7], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(placed))


def case(preset: str, op: str, tokens: int, world: int) -> Case:
    return cases_of(PRESETS[preset], world, [tokens], [op])[0]


def test_bytes_by_hand() -> None:
    qk = case("minimax-m2", "qk_rms_norm", 10, 4)  # 1536 + 256 = 1792 columns a rank
    assert memory_bytes(qk) == 10 * 1792 * 2 + 10 * 1792 * 2 + 1792 * 2
    assert link_bytes(qk) == 8 * 3 * 10
    rotated = case("minimax-m2", "qk_rms_norm_rope", 10, 4)  # 32 cosines and sines in fp32 and a position for each row
    assert memory_bytes(rotated) == memory_bytes(qk) + 10 * (2 * 32 * 4 + 8)
    assert link_bytes(rotated) == link_bytes(qk)
    reduce = case("minimax-m2", "all_reduce", 10, 4)
    assert memory_bytes(reduce) == 61440 + 61440
    assert link_bytes(reduce) == 1.5 * 61440
    norm = case("nemotron-h", "all_reduce_rms_norm", 10, 2)  # bf16 x and norm, fp32 residual in and out, gamma
    assert memory_bytes(norm) == 10 * 4096 * (2 + 4 + 2 + 4) + 4096 * 2
    assert link_bytes(norm) == 10 * 4096 * 2
    assert ceiling_us(reduce, Rates(copy=1e6, link=46080.0)) == 2.0
    assert ceiling_us(reduce, Rates(copy=1e6, link=46080.0), "one-shot push") == 4.0
    assert ceiling_us(reduce, Rates(copy=122.88, link=46080.0)) == 1000.0
    assert ceiling_us(reduce, Rates(copy=122880.0, link=None)) == 1.0


def test_bytes_of_variants_by_hand() -> None:
    payload = 10 * 3072 * 2  # bf16
    plain, static, token, own, both = (
        case("minimax-m2", f"all_reduce_rms_norm{suffix}", 10, 4)
        for suffix in ("", "_fp8_static", "_fp8_per_token", "_rows", "_rows_fp8_per_token")
    )
    assert memory_bytes(plain) == 4 * payload + 6144
    assert memory_bytes(static) == 3.5 * payload + 4 + 6144
    assert memory_bytes(token) == 3.5 * payload + 10 * 4 + 6144
    assert memory_bytes(own) == 2 * payload + 2 * 3 * 6144 + 6144  # 3 of 10 rows of the residual, read and written
    assert memory_bytes(both) == 1.5 * payload + 40 + 2 * 3 * 6144 + 6144
    early = EARLY.algorithm
    assert [link_bytes(c, "one-shot push") for c in (plain, token)] == [3 * payload] * 2
    assert [link_bytes(c, "two-shot push") for c in (plain, static, token)] == [1.5 * payload] * 3
    assert link_bytes(own, early) == 1.5 * payload
    assert link_bytes(both, early) == (0.75 + 0.375) * payload  # quantised rows go back in one byte an element


def test_the_links_of_a_known_gpu_are_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_copy_rate", lambda device: 4e6)
    for measured, name, link in (
        (319e3, "NVIDIA H200", 353e3),
        (360e3, "NVIDIA H200", 360e3),
        (319e3, "NVIDIA H200 NVL", 319e3),
    ):
        monkeypatch.setattr(ceilings, "_link_rate", lambda device, world, rate=measured: rate)
        monkeypatch.setattr(ceilings, "device_name", lambda device, model=name: model)
        assert ceilings.measure_rates(CPU, 4) == Rates(4e6, link)
        assert ceilings.measure_rates(CPU, 1) == Rates(4e6, None)


@pytest.mark.parametrize("name", PRESETS)
def test_the_check_sees_what_is_wrong(name: str) -> None:
    for one in cases_of(PRESETS[name], 2, [5], ops_of(PRESETS[name])):
        right = expected(one, 1, 0, CPU)
        assert difference(one, right, right) == ""
        assert "wrong result" in difference(one, right[:-1], right)
        for number in range(len(right)):
            spoilt = [y.clone() for y in right]
            spoilt[number][-1, -1] = torch.nan
            assert f"{one.widths[0] if spoilt[number].shape[1] == 1 else 1} of" in difference(one, tuple(spoilt), right)
        alone = replace(one, world=1, widths=one.local)  # what this rank alone would get
        assert "wrong result" in difference(one, expected(alone, 0, 0, CPU), right)


def test_every_rank_makes_the_same_inputs_and_none_is_zero() -> None:
    one = case("minimax-m2", "all_reduce_rms_norm", 5, 2)
    first, again, other = (make_inputs(one, rank, 0, CPU) for rank in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["residual"], other["residual"])
    assert not torch.equal(first["x"], other["x"])
    assert not torch.equal(first["x"], make_inputs(one, 0, 1, CPU)["x"])
    assert all(bool((row != 0).any()) for row in first["x"])


@pytest.mark.parametrize("op", [name for name, op in BENCH_OPS.items() if op.quant != "none"])
def test_a_quantised_norm_may_be_a_step_of_its_format_off_and_no_more(op: str) -> None:
    one = case("minimax-m2", op, 5, 2)
    quant, *others = expected(one, 0, 0, CPU)
    largest = int(quant[3].float().abs().argmax())
    for steps, wrong in ((1, False), (3, True)):
        codes = quant.view(torch.uint8).clone()
        codes[3, largest] -= steps
        found = difference(one, (codes.view(quant.dtype), *others), (quant, *others))
        assert bool(found) == wrong, found


def test_which_ops_run() -> None:
    m2, m3 = PRESETS["minimax-m2"], PRESETS["minimax-m3"]
    assert set(ops_of(m2)) == set(BENCH_OPS)
    assert ops_of(m2, variants=False) == m2.ops
    assert not any(op.startswith("qk") for op in ops_of(m3))
    assert check_ops(m3, ["all_reduce", "all_reduce"]) == ("all_reduce",)
    with pytest.raises(InvalidArgument, match="op 'qk_rms_norm'; minimax-m3 has: all_reduce, "):
        check_ops(m3, ["qk_rms_norm"])


def test_names_and_numbers_from_the_command_line() -> None:
    assert parse_tokens("8,1,64") == (1, 8, 64)
    assert [b.name for b in find_baselines(["symm_mem", "gather"])] == [
        "symm_mem_one_shot", "symm_mem_two_shot", "gather",
    ]  # fmt: skip
    for wrong in ("", "0", "a", "1,-2"):
        with pytest.raises(InvalidArgument, match="tokens"):
            parse_tokens(wrong)
    with pytest.raises(InvalidArgument, match="gather"):
        find_baselines(["nvls"])
    with pytest.raises(InvalidArgument, match="nemotron-h"):
        find_preset("llama")


def test_host_cost(tmp_path: Path) -> None:
    path = tmp_path / "host.jsonl"
    script = Path(__file__).parents[1] / "benchmarks" / "host_cost.py"
    options = ("--device", "cpu", "--calls", "2", "--repeats", "3", "--json", str(path))
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["us"] == max(row["us_ranks"]) > 0 and len(row["us_ranks"]) == 2 for row in found)
    calls = {(row["backend"], row["op"]) for row in found}
    assert ("torch", "torch.add") in calls
    assert calls >= {(b, op) for b in ("nothing", "collective") for op in PRESETS["minimax-m2"].ops}


def test_machines_have_short_names() -> None:
    assert short_gpu("NVIDIA H200") == "h200"
    assert short_gpu("AMD Instinct MI300X") == "mi300x"
    assert short_gpu("NVIDIA GeForce RTX 5090") == "rtx-5090"
    assert short_gpu("CPU: AMD EPYC") == "cpu"
    assert machine.commit()
    assert short_commit("0123456789abcdef+dirty") == "0123456789ab+dirty"


def test_a_width_that_cannot_be_sharded_is_a_reason() -> None:
    assert "3 ranks" in case("minimax-m2", "qk_rms_norm", 1, 3).unsupported
    assert case("minimax-m2", "qk_rms_norm", 1, 16).unsupported == ""
    assert "16 ranks" in case("minimax-m2", "qk_rms_norm_rope", 1, 16).unsupported  # half a head
    assert case("minimax-m2", "all_reduce", 1, 3).unsupported == ""
