"""torch.compile through a Communicator: its methods become operators, so the model is one graph without a break.

    python examples/compile.py            starts its own ranks and compiles with inductor
    python examples/compile.py aot_eager  the same where there is no C++ compiler

fullgraph=True makes torch raise at the first graph break.
"""

import sys

import torch
from torch import Tensor, nn

from tpfuse.communicator import Communicator
from tpfuse.launch import Rank, default_device, resolve_world, run_ranks
from tpfuse.nn import AllReduceRMSNorm

HIDDEN, INNER, TOKENS = 256, 1024, 8


class MLP(nn.Module):
    """A tensor-parallel MLP and the layer boundary behind it."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER // comm.world, bias=False, device=comm.device)
        self.down = nn.Linear(INNER // comm.world, HIDDEN, bias=False, device=comm.device)
        self.norm = AllReduceRMSNorm(HIDDEN, comm)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        partial = self.down(nn.functional.silu(self.up(x)))  # not reduced: the norm does that
        y = self.norm(partial, residual)
        return y.norm, y.residual


@torch.no_grad()
def job(rank: Rank, backend: str) -> str:
    with Communicator(device=rank.device_type) as comm:
        torch.manual_seed(comm.rank)  # every rank has its own part of the weights
        model = MLP(comm)
        torch.manual_seed(0)  # and all have the same activations
        x = torch.randn(TOKENS, HIDDEN).to(comm.device)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for y, eager in zip(compiled(x, x), model(x, x), strict=True):
            torch.testing.assert_close(y, eager)
        return f"rank {comm.rank}: compiled with {backend} as one graph, same results as eager"


if __name__ == "__main__":
    device = default_device()
    backend = sys.argv[1] if len(sys.argv) > 1 else "inductor"
    print("\n".join(run_ranks(job, backend, world=resolve_world(None, device), device_type=device)))
