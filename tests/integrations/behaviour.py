"""What tests of the integration run on ranks, beside whole forwards: caches, compilation, hooks, captured outputs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
from tiny_models import PROMPT
from torch import Tensor

from tpfuse.launch import Rank


def cache_shapes(rank: Rank, path: Path, mode: str) -> list[tuple[int, ...]]:
    """Shapes of the keys of every attention layer after the prompt."""
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        cache = model(torch.tensor(PROMPT), use_cache=True).past_key_values
        return [tuple(layer.keys.shape) for layer in cache.layers if getattr(layer, "keys", None) is not None]


def hidden_states(rank: Rank, path: Path, mode: str) -> dict[str, Any]:
    """What output_hidden_states gives, what a forward after it costs, and what hooks see."""
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        prompt = torch.tensor(PROMPT)
        captured = [state.detach() for state in model(prompt, output_hidden_states=True).hidden_states]
        before = tiny.calls(model) if mode != "whole" else Counter()
        model(prompt)
        after = tiny.calls(model) if mode != "whole" else Counter()
        return {"hidden_states": captured, "calls": dict(after - before)}


def hooked(rank: Rank, path: Path, mode: str, name: str, before: bool = False) -> dict[str, Any]:
    """What a hook on the module `name` of the base model sees, behind it or before it; and the logits."""
    seen: list[Any] = []
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        module = model.model.get_submodule(name)
        if before:
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        else:
            module.register_forward_hook(lambda module, args, output: seen.append(output))
        logits = model(torch.tensor(PROMPT)).logits.detach()
    found = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return {"seen": found.detach() if isinstance(found, Tensor) else repr(found), "logits": logits}


def compiled(rank: Rank, path: Path, mode: str, backend: str) -> dict[str, Any]:
    """Logits of the compiled model, twice; and how many graphs it was."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        forward = torch.compile(model, backend=counter, fullgraph=True)
        logits = [forward(torch.tensor(PROMPT), use_cache=False).logits.detach() for _ in range(2)]
        return {"logits": logits, "graphs": counter.frame_count, "calls": dict(tiny.calls(model))}


def continuous(rank: Rank, path: Path, mode: str, tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt through continuous batching."""
    import transformers

    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        settings = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        results = model.generate_batch(inputs=PROMPT, generation_config=settings)
        return [output.generated_tokens for output in results.values()]
