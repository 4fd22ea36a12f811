"""What tests of packed batches run on ranks: a schedule of prefill chunks and decodes, against the plain model."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
from torch import Tensor

from tpfuse.integrations.transformers.packed import PackedModel, PiecewiseModel
from tpfuse.launch import Rank

SLOTS, LENGTH, SIZES = 4, 30, (4, 8, 16)
# Of each step, by slot: which prompt, and its tokens from where to where. The slots are not in the order of prompts;
# there are chunks alone, decodes alone, and both, one slot with a hole before it, and 18 tokens, more than any size.
SCHEDULE = (
    {3: (0, 0, 7)},
    {3: (0, 7, 8), 1: (1, 0, 9)},
    {1: (1, 9, 10), 3: (0, 8, 9)},
    {3: (0, 9, 10), 0: (2, 0, 3), 1: (1, 10, 13)},
    {0: (2, 3, 4), 1: (1, 13, 14), 3: (0, 10, 11)},
    {3: (0, 11, 20), 0: (2, 4, 13)},
)


def prompts(device: str) -> Tensor:
    """Without token 0, which generate() takes for padding."""
    return torch.randint(1, tiny.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0)).to(device)


def plain(rank: Rank, path: Path) -> tuple[list[Tensor], Tensor]:
    """The undivided model: for each step of the schedule the logits behind each slot's tokens, and greedy tokens."""
    with tiny.closing(tiny.load(path, "whole", 1)) as model, torch.no_grad():
        given = prompts("cpu")
        logits = model(given).logits
        steps = [torch.stack([logits[row, end - 1] for row, _, end in step.values()]) for step in SCHEDULE]
        settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
        return steps, model.generate(given, **settings)[:, given.shape[1] :]


def run_schedule(packed: PackedModel, given: Tensor) -> list[Tensor]:
    """Logits of each step; everything is in place afterwards."""
    found = [
        packed.step({slot: given[row, first:end] for slot, (row, first, end) in step.items()}).cpu()
        for step in SCHEDULE
    ]
    for slot in range(SLOTS):
        packed.free(slot)
    return found


def greedy(packed: PackedModel, given: Tensor, tokens: int = 8) -> Tensor:
    """The second and third prompt in chunks, beside decodes of the first; then all decode."""
    found: dict[int, list[Tensor]] = {}

    def step(batch: Mapping[int, Tensor], *decoding: int) -> None:
        batch = {**batch, **{slot: found[slot][-1] for slot in decoding}}
        for slot, logits in zip(batch, packed.step(batch), strict=True):
            found.setdefault(slot, []).append(logits.argmax(-1, keepdim=True))

    def prefill(batch: Mapping[int, Tensor], *decoding: int) -> None:
        """A chunk that more of the prompt follows: what comes behind it is no token."""
        step(batch, *decoding)
        for slot in batch:
            found.pop(slot)

    step({2: given[0]})
    prefill({0: given[1, :9], 1: given[2, :4]}, 2)
    prefill({0: given[1, 9:12]}, 2)
    step({0: given[1, 12:], 1: given[2, 4:]}, 2)
    while any(len(found[slot]) < tokens for slot in (0, 1, 2)):
        step({}, *(slot for slot in (0, 2, 1) if len(found[slot]) < tokens))
    return torch.stack([torch.cat(found[slot]) for slot in (2, 0, 1)]).cpu()


def packed_batches(rank: Rank, path: Path, mode: str, stand_in: bool, inductor: bool = False) -> dict[str, Any]:
    """Logits of the schedule, captured lazily and, after a clear, before it; greedy tokens; whether a step of one slot
    left the places of others and behind it alone; and the report. stand_in: for CUDA graphs, on a CPU."""
    settings: dict[str, Any] = {}
    if stand_in:
        sys.path.append(str(Path(__file__).parent.parent / "graphs"))
        from stand_in import StandIn

        settings = {"mechanism": StandIn()}
    if inductor:
        from torch._inductor.compile_fx import compile_fx

        settings |= {"compiler": compile_fx}
    os.environ["LOCAL_RANK"] = str(rank.rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    given = prompts(rank.device_type)
    with tiny.closing(tiny.load(path, mode, rank.world).to(rank.device_type)) as model:
        packed = PiecewiseModel(model, SIZES, slots=SLOTS, length=LENGTH, **settings)
        lazily = run_schedule(packed, given)
        packed.clear()
        packed.capture()
        captured = run_schedule(packed, given)
        tokens = greedy(packed, given)
        report = packed.report()
        for keys in packed.cache.keys:
            keys.fill_(7.0)
        for slot in range(SLOTS):
            packed.free(slot)
        packed.step({1: given[0, :5]})  # padded to 8
        untouched = all(
            bool((keys[[0, 2, 3]] == 7).all() and (keys[1, 5:] == 7).all() and not (keys[1, :5] == 7).all())
            for keys in packed.cache.keys
        )
        with torch.no_grad():
            model(given)  # transformers' own forward goes on
        return {
            "lazily": lazily,
            "captured": captured,
            "tokens": tokens,
            "untouched": untouched,
            "report": report.as_dict(),
        }


def check(found: dict[str, Any], expected: tuple[list[Tensor], Tensor]) -> None:
    """What `packed_batches` returned, against `plain`."""
    steps, tokens = expected
    for given in (found["lazily"], found["captured"]):
        for logits, wanted in zip(given, steps, strict=True):
            assert (logits - wanted).abs().max() <= 1e-5
    assert torch.equal(found["tokens"], tokens)
    assert found["untouched"]


def against_eager(rank: Rank, path: Path, dtype: torch.dtype) -> list[float]:
    """Of each step, how far logits in graphs are from those without, as part of the largest."""
    os.environ["LOCAL_RANK"] = str(rank.rank)
    torch._dynamo.reset()
    given = prompts(rank.device_type)
    with tiny.closing(tiny.load(path, "fused", rank.world, dtype=dtype, experts="grouped_mm")) as model:
        eager = run_schedule(PackedModel(model, slots=SLOTS, length=LENGTH), given)
        graphs = PiecewiseModel(model, SIZES, slots=SLOTS, length=LENGTH)
        graphs.capture()
        captured = run_schedule(graphs, given)
        assert graphs.report().replays
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(eager, captured, strict=True)]
