"""`tpfuse generate`: text from a checkpoint folder, or tokens from a preset with random weights, streamed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpfuse.errors import InvalidArgument
from tpfuse.integrations.transformers import load
from tpfuse.launch import Progress, Rank, default_device, resolve_world, run_ranks
from tpfuse.presets import MODELS, find_model

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Generated:
    """What came of it."""

    tokens: list[int]
    seconds: float
    requested_mode: str
    effective_mode: str
    reasons: list[str]


def run(
    model: str,
    prompt: str,
    *,
    tokens: int = 64,
    mode: str = "fused",
    world: int | None = None,
    device_type: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Generate greedily. model: a folder or a preset. progress: gets each piece of text as it comes.

    Without a tokenizer in the folder, the prompt is token numbers, as in `1,5,7`, and so is what comes.
    Raises InvalidArgument, Unsupported.
    """
    if model not in MODELS and not Path(model).is_dir():
        raise InvalidArgument(f"--model {model}: no such folder, nor one of the presets {', '.join(MODELS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise InvalidArgument(f"--dtype {dtype}: supported: {', '.join(DTYPES)}.")
    if tokens < 1:
        raise InvalidArgument(f"--tokens {tokens}: at least 1 token is needed.")
    device_type = device_type or default_device()
    ranks = resolve_world(world, device_type)
    arguments = (model, prompt, tokens, mode, dtype)
    results: list[Generated] = run_ranks(job, *arguments, world=ranks, device_type=device_type, progress=progress)
    return results[0]


def job(rank: Rank, model: str, prompt: str, tokens: int, mode: str, dtype: str | None) -> Generated:
    """What each rank runs."""
    device = torch.device("cuda", torch.cuda.current_device()) if rank.device_type == "cuda" else torch.device("cpu")
    tokenizer = None if model in MODELS else tokenizer_of(Path(model))
    ids = tokenizer(prompt)["input_ids"] if tokenizer else token_numbers(prompt)
    loaded = load_model(model, mode, rank.world, dtype)
    if not ids or max(ids) >= loaded.config.get_text_config().vocab_size:
        raise InvalidArgument(f"--prompt {prompt!r}: {len(ids)} tokens; needed: some, of the model's vocabulary.")
    given = torch.tensor([ids], device=device)
    began = time.perf_counter()
    with torch.inference_mode():
        output = loaded.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=Streamer(rank, tokenizer, tokens),
        )
    applied = getattr(loaded, "_tpfuse", None)
    told: dict[str, Any] = applied.report().as_dict() if applied else {}
    if applied:
        applied.comm.close()
    return Generated(
        output[0, len(ids) :].tolist(),
        time.perf_counter() - began,
        mode,
        told.get("effective_mode", "none"),
        told.get("reasons", ["one rank: nothing is divided, so the model is transformers' own"]),
    )


def load_model(model: str, mode: str, world: int, dtype: str | None) -> Any:
    chosen = getattr(torch, dtype) if dtype else None
    if model not in MODELS:
        return load.from_folder(Path(model), mode, world, chosen)
    preset = find_model(model)
    return load.random(load.config_of(preset), mode, world, chosen or preset.dtype)


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer, None if it has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def token_numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = [-1]
    if not found or min(found) < 0:
        raise InvalidArgument(
            f"--prompt {text!r}: the model has no tokenizer, so the prompt is token numbers, as in 1,5,7."
        )
    return found


class Streamer:
    """What `generate` hands its tokens to: rank 0 passes on the text of whole words, as soon as it is certain."""

    def __init__(self, rank: Rank, tokenizer: Any, total: int) -> None:
        self._rank, self._tokenizer, self._total = rank, tokenizer, total
        self._tokens: list[int] = []
        self._shown = ""
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._tokens += value.flatten().tolist()
        self._show(last=False)

    def end(self) -> None:
        self._show(last=True)

    def _show(self, last: bool) -> None:
        if self._rank.rank != 0:
            return
        if self._tokenizer is None:
            text = " ".join(map(str, self._tokens)) + (" " if self._tokens and not last else "")
        else:
            text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            if not last and text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens
                return
        self._rank.progress(len(self._tokens), self._total, text[len(self._shown) :])
        self._shown = text
