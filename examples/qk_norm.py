"""MiniMax-M2's attention norm under tensor parallelism: RMSNorm over ALL heads of q and k, each rank holding a part,
and the rotation (RoPE) that follows it, in one call.

    python examples/qk_norm.py            starts its own ranks
    torchrun --nproc-per-node 4 examples/qk_norm.py

The norm loads its gammas from full checkpoint tensors. The ranks exchange two floats a token, and the result is
compared with the reference, which sees the whole rows.
"""

import torch
from torch import Tensor

from tpfuse import Rope, reference
from tpfuse.communicator import Communicator
from tpfuse.launch import Rank, default_device, resolve_world, run_ranks
from tpfuse.nn import ShardedQKNorm, shard

Q_HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, TOKENS, EPS = 48, 8, 128, 64, 16, 1e-6
Q, K = Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM


def qkv_of(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a fused projection leaves on a rank: one tensor, of which q, k and v are views."""
    generator = torch.Generator().manual_seed(rank)
    qkv = torch.randn(TOKENS, (Q + 2 * K) // world, generator=generator) * (1 + rank)
    return qkv.bfloat16().to(default_device()).split([Q // world, K // world, K // world], -1)


@torch.no_grad()
def job(rank: Rank) -> str:
    checkpoint = {"q_weight": torch.linspace(0.5, 2, Q), "k_weight": torch.linspace(2, 0.5, K)}
    with Communicator(device=rank.device_type) as comm:
        norm = ShardedQKNorm(Q_HEADS, KV_HEADS, HEAD_DIM, comm, eps=EPS)
        norm.load_state_dict(checkpoint)
        positions = torch.arange(TOKENS, device=comm.device)
        angles = positions[:, None] * 5e6 ** (-torch.arange(0, ROTARY_DIM, 2, device=comm.device) / ROTARY_DIM)
        rope = Rope(angles.cos(), angles.sin(), positions, HEAD_DIM, ROTARY_DIM)
        q, k, _ = qkv_of(comm.rank, comm.world)
        normed = norm(q, k, rope)

        qs, ks, _ = zip(*(qkv_of(r, comm.world) for r in range(comm.world)), strict=True)
        gammas = [[shard(g, r, comm.world).to(comm.device) for r in range(comm.world)] for g in checkpoint.values()]
        want = reference.qk_rms_norm(qs, ks, *gammas, eps=EPS, rope=rope)[comm.rank]
        for y, right in zip(normed, want, strict=True):  # one step of bfloat16, and what cancels in a rotation
            torch.testing.assert_close(y, right, rtol=2**-7, atol=1e-5)
        sent = comm.report().counters[0].bytes // TOKENS
        whole = (q.shape[-1] + k.shape[-1]) * q.element_size()
        return f"rank {comm.rank}: right. It sent {sent} bytes a token; to gather whole rows it would send {whole}"


if __name__ == "__main__":
    device = default_device()
    print("\n".join(run_ranks(job, world=resolve_world(None, device), device_type=device)))
