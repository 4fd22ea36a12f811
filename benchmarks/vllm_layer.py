"""One decoder layer of vLLM's decode, kernel by kernel, out of a trace of torch's profiler.

    python benchmarks/vllm_layer.py TRACE.pt.trace.json.gz > layer.txt

The trace is of one rank (`profiler_config` of vllm.LLM). A layer begins with each kernel whose name has BEGINS in it;
those of the most frequent length count. µs: the median of a kernel over these layers, and of the gap behind it, which
is negative where the next kernel has been launched early and waits.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--begins", default="1x2_h_bz_splitK", help="part of the name of a layer's first kernel")
    given = parser.parse_args()
    events = json.loads(gzip.decompress(given.trace.read_bytes()))["traceEvents"]
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    starts = [i for i, kernel in enumerate(kernels) if given.begins in kernel["name"]]
    spans = [range(begin, end) for begin, end in pairwise(starts)]
    if not spans:
        raise SystemExit(f"{given.trace}: fewer than two kernels with {given.begins!r} in their name")
    usual = Counter(map(len, spans)).most_common(1)[0][0]
    layers = [span for span in spans if len(span) == usual]
    whole = median(kernels[span.stop]["ts"] - kernels[span.start]["ts"] for span in layers)
    print(f"{len(layers)} layers of {usual} kernels, {whole:.1f} us each\n    us   gap  kernel")
    for place in range(usual):
        here = [kernels[span.start + place] for span in layers]
        gaps = [
            kernels[span.start + place + 1]["ts"] - k["ts"] - k["dur"] for span, k in zip(layers, here, strict=True)
        ]
        print(f"{median(k['dur'] for k in here):6.1f}{median(gaps):6.1f}  {here[0]['name'][:100]}")


if __name__ == "__main__":
    main()
