"""A tiny tensor-parallel decoder, once with separate all-reduce, add and norm, once with AllReduceRMSNorm.

Run it as `python examples/layer.py`; it starts its own ranks. A layer returns its partial sum, and whoever consumes the
sum reduces it: that is all that changes in a model.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpfuse.communicator import Communicator
from tpfuse.launch import Rank, default_device, resolve_world, run_ranks
from tpfuse.nn import AllReduceRMSNorm

HIDDEN, HEAD_DIM, LAYERS, TOKENS, EPS = 256, 32, 2, 8, 1e-6


class Attention(nn.Module):
    def __init__(self, comm: Communicator) -> None:
        super().__init__()
        local = HIDDEN // comm.world  # this rank's heads
        self.qkv = nn.Linear(HIDDEN, 3 * local, bias=False, device=comm.device)
        self.out = nn.Linear(local, HIDDEN, bias=False, device=comm.device)
        self.norm = AllReduceRMSNorm(HIDDEN, comm, eps=EPS)  # consumes what `forward` returns

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for t in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1))


def unfused(partial: Tensor, residual: Tensor, norm: AllReduceRMSNorm) -> tuple[Tensor, Tensor]:
    dist.all_reduce(partial)
    residual = residual + partial
    return nn.functional.rms_norm(residual, (HIDDEN,), norm.weight, EPS), residual


def fused(partial: Tensor, residual: Tensor, norm: AllReduceRMSNorm) -> tuple[Tensor, Tensor]:
    return norm(partial, residual)[:2]  # .norm and .residual


@torch.no_grad()
def job(rank: Rank) -> str:
    with Communicator(device=rank.device_type) as comm:
        torch.manual_seed(comm.rank)  # every rank has its own part of the weights
        layers = [Attention(comm) for _ in range(LAYERS)]
        torch.manual_seed(0)  # and all have the same embedding
        embedding, results = torch.randn(TOKENS, HIDDEN).to(comm.device), []
        for boundary in (unfused, fused):
            residual = embedding  # it is whole: the first norm has nothing to reduce
            x = nn.functional.rms_norm(residual, (HIDDEN,), None, EPS)
            for layer in layers:
                x, residual = boundary(layer(x), residual, layer.norm)
            results.append(x)
        torch.testing.assert_close(*results)
        return f"rank {comm.rank}: same results; {comm.report().counters[0].calls} layers, as many calls of tpfuse"


if __name__ == "__main__":
    device = default_device()
    print("\n".join(run_ranks(job, world=resolve_world(None, device), device_type=device)))
