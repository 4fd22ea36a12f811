"""Commands as their users have them: processes of their own, on a machine without GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ALONE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # not under a torchrun of the caller's


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ALONE}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def python(*arguments: str | Path | int, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment() | changes,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def tpfuse(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    return python("-m", "tpfuse.cli", *arguments)
