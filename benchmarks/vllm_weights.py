"""Random weights that differ between ranks: a file with `register()`, for `bench_vllm.py --hook`.

A loader of dummy weights that draws by a parameter's name gives all ranks the same shards. Then all partial sums are
equal, four of them add up exactly in any order, and whoever mixed up ranks would not be found out.
"""

from __future__ import annotations

from typing import Any

SHARDED = ("qkv_proj", "o_proj", ".experts.", "in_proj", "out_proj", "up_proj", "down_proj")


def register() -> None:
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    stock = DummyModelLoader.load_weights

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        import torch

        stock(self, model, model_config)
        rank = torch.distributed.get_rank()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and any(part in name for part in SHARDED):
                parameter.data.copy_(parameter.data.roll(7 * rank, -1))

    DummyModelLoader.load_weights = load_weights
