"""The smallest program: one layer boundary on every rank.

    torchrun --nproc-per-node 2 examples/hello.py

It runs on GPUs where there are any, else on the CPU. README.md shows the same lines.
"""

import os

import torch
import torch.distributed as dist

from tpfuse import Communicator

if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group()
with Communicator() as comm:  # every rank of the tensor-parallel group makes one
    x = torch.randn(4, 3072, dtype=torch.bfloat16, device=comm.device)  # this rank's partial sum
    residual, gamma = torch.zeros_like(x), torch.ones(3072, device=comm.device)
    norm, residual, *_ = comm.all_reduce_rms_norm(x, gamma, residual=residual)
    print(f"rank {comm.rank} of {comm.world}: {norm.dtype} {list(norm.shape)}, {comm.report().effective_mode}")
dist.destroy_process_group()
