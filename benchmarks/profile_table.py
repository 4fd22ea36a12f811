"""Where the time of a decode step goes, by kind of kernel: a Markdown table from a profile of `tpfuse bench model`.

    python benchmarks/profile_table.py benchmarks/results/profile-minimax-m2-h200x4.jsonl

Times are µs on the device, a decode step and layer; what stands outside of the layers (embedding, head) is in them.
Kernels run one behind the other; what the step takes beyond their sum is gaps between them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

# The first that fits counts.
KINDS = {
    "GEMMs of Inductor": r"^triton_tem_",
    "fused by Inductor": r"^triton_",
    "all-reduce + residual + norm, one kernel": r"tpfuse::reduce_",
    "sharded QK norm + RoPE, one kernel": r"tpfuse::norm_by_",
    "NCCL": r"nccl",
    "GEMMs of the experts": r"GroupProblemShape|grouped_gemm",
    "other GEMMs": r"nvjet|splitK|gemm|gemv|cutlass",
    "attention": r"sdpa|fmha|flash",
    "routing: top-k, sort, scan": r"topk|[Ss]ort|[Hh]istogram|[Ss]can|scatter_gather|DeviceSelect",
    "norms in torch": r"layer_norm|rsqrt|pow_tensor|MeanOps",
    "copies, concatenations, gathers": r"copy|Copy|Memcpy|memcpy|Memset|gather|index",
    "other element-wise": r"",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel))


def table(path: Path) -> str:
    """One column for each mode, concurrency and compiler, in the order of the file."""
    columns: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        named = row["requested_mode"] or row["impl"], row["concurrency"], row.get("compiler")
        column = ", ".join(str(name) for name in named if name)
        columns[column][kind_of(row["kernel"])] += row["us"] / row["layers"]
    lines = [["µs a layer", *columns], ["---", *["---:"] * len(columns)]]
    for kind in KINDS:
        if any(kind in times for times in columns.values()):
            lines.append([kind, *(f"{times[kind]:.1f}" if kind in times else "-" for times in columns.values())])
    lines.append(["all kernels", *(f"{sum(times.values()):.1f}" for times in columns.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}\n\n{table(Path(name))}\n")
