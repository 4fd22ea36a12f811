"""`tpfuse generate` and `tpfuse bench model`, as their users have them: processes, their output, their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models as tiny
from commands import tpfuse

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tpfuse[transformers]'")


def with_tokenizer(folder: Path) -> Path:
    """A checkpoint whose tokens are words: `w5` is token 5."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny.make("llama", folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(tiny.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def test_text_from_a_checkpoint_is_the_same_for_any_number_of_ranks(tmp_path):
    folder = with_tokenizer(tmp_path)
    texts = set()
    for ranks in (1, 2):
        done = tpfuse("generate", "--model", folder, "--prompt", "w5 w11 w3", "--tokens", 12, "--tp", ranks)
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout.strip())
        assert "12 tokens" in done.stderr
        assert "requested fused, effective " in done.stderr
    (text,) = texts
    assert len(text.split()) == 12


def test_without_a_tokenizer_tokens_are_numbers(tmp_path):
    done = tpfuse("generate", "--model", tiny.make("llama", tmp_path), "--prompt", "5,11,3", "--tokens", 4, "--tp", 1)
    assert done.returncode == 0, done.stderr
    assert len([int(token) for token in done.stdout.split()]) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "no/such/folder", "--prompt", "1"), "no such folder, nor one of the presets minimax-m2, "),
        (("--model", ".", "--prompt", "1", "--tp", "1"), r"no *.safetensors here"),
        (("--model", "tiny-llama", "--prompt", "hello", "--tp", "1"), "the prompt is token numbers, as in 1,5,7"),
        (("--model", "tiny-llama", "--prompt", "9999", "--tp", "1"), "needed: some, of the model's vocabulary"),
        (("--model", "tiny-llama", "--prompt", "1", "--dtype", "int8"), "supported: float32, bfloat16, float16"),
    ],
)
def test_what_generate_refuses(arguments, says, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert says in refused("generate", *arguments)


def test_a_pickled_checkpoint_is_not_touched(tmp_path, refused):
    folder = tiny.make("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no *.safetensors here" in refused("generate", "--model", folder, "--prompt", "5,11", "--tp", 1)


def test_bench_model_writes_what_it_prints(tmp_path):
    figures = tmp_path / "model.jsonl"
    done = tpfuse(
        "bench", "model", "--preset", "tiny-minimax-m2", "--layers", 2, "--tp", 2, "--concurrency", "1,2", "--in", 16,
        "--out", 4, "--modes", "stock,off,fused", "--json", figures,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in figures.read_text().splitlines()]
    assert [(row["concurrency"], row["impl"], row["requested_mode"], row["effective_mode"]) for row in rows] == [
        (1, "stock", "", ""), (2, "stock", "", ""), (1, "tpfuse", "off", "off"), (2, "tpfuse", "off", "off"),
        (1, "tpfuse", "fused", "control"), (2, "tpfuse", "fused", "control"),
    ]  # fmt: skip
    for row in rows:
        assert row["ok"], row["error"]
        assert row["ttft_s"] > 0
        latency = row["ttft_s"] + 3 * row["tpot_s"]
        assert row["output_tok_s"] == pytest.approx(row["concurrency"] * 4 / latency)
        assert row["total_tok_s"] == pytest.approx(row["concurrency"] * 20 / latency)
        assert row["tok_s_per_gpu"] == pytest.approx(row["output_tok_s"] / 2)
        assert (row["layers"], row["world"], row["graphs"]) == (2, 2, "none")
        # stock: q, k, v gathered, o_proj and experts reduced. tpfuse: both norms of q and k in one, and two boundaries.
        assert row["collectives_per_layer"] == (5 if row["impl"] == "stock" else 3)
    assert "not as requested: " in done.stdout
    assert str(figures) in done.stdout


def test_bench_model_in_pieces(tmp_path):
    preset, workload = "tiny-minimax-m3", ("--layers", 2, "--concurrency", "1,2", "--in", 16, "--out", 4)
    arguments = ("--modes", "fused", "--graphs", "piecewise", "--chunks", "8,16", "--results", tmp_path)
    done = tpfuse("bench", "model", "--preset", preset, "--tp", 2, *workload, *arguments)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / f"model-{preset}-cpux2-control-none.jsonl"  # what there was: no fused kernels, and no graphs
    first, second = (json.loads(line) for line in figures.read_text().splitlines())
    for row in (first, second):
        assert row["ok"], row["error"]
        assert (row["requested_graphs"], row["graphs"]) == ("piecewise", "none")
        assert row["collectives_per_layer"] == 2
    assert {way: list(times) for way, times in first["chunk_s"].items()} == {
        way: ["8", "16"] for way in ("eager", "compiled", "piecewise")
    }
    assert second["chunk_s"] == {}  # of the first number of requests alone
    assert "CUDA graphs none (piecewise requested)" in done.stdout
    assert figures.with_suffix(".png").exists()


def test_bench_model_with_compiled_steps(tmp_path):
    preset, workload = "tiny-llama", ("--layers", 1, "--concurrency", "2", "--in", 16, "--out", 4)
    arguments = ("--modes", "control", "--compiler", "inductor", "--results", tmp_path)
    done = tpfuse("bench", "model", "--preset", preset, "--tp", 2, *workload, *arguments)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / f"model-{preset}-cpux2-control-none-inductor.jsonl"
    row = json.loads(figures.read_text())
    assert (row["ok"], row["error"]) == (True, "")
    assert (row["requested_graphs"], row["compiler"]) == ("full", "inductor")
    assert "CUDA graphs none (full requested), compiled by inductor" in done.stdout


@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-minimax-m3", "tiny-nemotron-h"])
def test_every_tiny_preset_runs_on_cpu_ranks(preset, on_ranks):
    from tpfuse.bench import model

    workload = model.Workload(concurrency=(2,), input_len=16, output_len=4)
    for records in on_ranks(2, model.job, model.find_model(preset), None, ("stock", "control"), workload):
        assert [record.error for record in records] == ["", ""]
        assert all(record.ok and record.tpot_s > 0 for record in records)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "m2"), "model preset 'm2'; there are: minimax-m2, "),
        (("--preset", "tiny-llama", "--layers", "9"), "tiny-llama with 9 layers; it has 4"),
        (("--preset", "tiny-llama", "--modes", "fast"), "supported: stock, off, control, fused"),
        (("--preset", "tiny-llama", "--out", "1"), "needed: at least one request, one token in and two out"),
        (("--preset", "tiny-llama", "--concurrency", "0"), "whole numbers of at least 1"),
        (
            ("--preset", "tiny-llama", "--graphs", "none", "--compiler", "inductor"),
            "compiler='inductor', graphs='none'; with full or piecewise: 'inductor'",
        ),
        (("--preset", "tiny-llama", "--compiler", "gcc"), "compiler='gcc', graphs='full'; with full or piecewise: "),
        (("--preset", "tiny-llama", "--graphs", "some"), "graphs='some'; supported: none, full, piecewise"),
        (
            ("--preset", "tiny-llama", "--chunks", "64"),
            "needed: at least 2 tokens, no more than a prompt has, and graphs=",
        ),
        (("--preset", "tiny-llama", "--graphs", "piecewise", "--modes", "stock"), "graphs=piecewise with stock"),
        (("--preset", "tiny-nemotron-h", "--graphs", "piecewise"), "tiny-nemotron-h has layers of linear_attention"),
    ],
)
def test_what_bench_model_refuses(arguments, says, refused):
    assert says in refused("bench", "model", *arguments)


def test_a_refusal_is_all_that_a_user_sees():
    done = tpfuse("bench", "model", "--preset", "tiny-nemotron-h", "--graphs", "piecewise")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
