"""Where a figure came from: device, driver, versions, commit. Facts for the rows; none of them steers anything."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from tpfuse import __version__


class Machine(NamedTuple):
    """The fields of a row that are the same for the whole run."""

    gpu: str
    driver: str
    versions: dict[str, str]
    commit: str


def describe(device: torch.device) -> Machine:
    return Machine(device_name(device), driver_version(device), versions(device), commit())


def device_name(device: torch.device) -> str:
    """The GPU's name; on a CPU its model name behind `CPU: `, so that no one takes it for a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU: {_cpu_name()}"


def driver_version(device: torch.device) -> str:
    """The version of the GPU's kernel driver; empty on a CPU."""
    if device.type != "cuda":
        return ""
    module = Path("/sys/module/amdgpu/version" if torch.version.hip else "/sys/module/nvidia/version")
    if module.exists():
        return module.read_text().strip()
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else "unknown"


def versions(device: torch.device) -> dict[str, str]:
    """Whatever a figure may depend on. NVLink multicast makes NCCL faster, so its switch is recorded too."""
    found = {"tpfuse": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        found["cuda"] = str(torch.version.hip or torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["NCCL_NVLS_ENABLE"] = os.environ.get("NCCL_NVLS_ENABLE", "")
    return found


def commit() -> str:
    """The commit of this source, `+dirty` where the tree has changes, `unknown` where the source is not in git."""
    here = Path(__file__).resolve()
    tracked = _output("git", "-C", str(here.parent), "ls-files", here.name)
    found = _output("git", "-C", str(here.parent), "rev-parse", "HEAD")
    if not tracked or not found:  # e.g. a virtual environment inside somebody else's repository
        return "unknown"
    return found + ("+dirty" if _output("git", "-C", str(here.parent), "status", "--porcelain") else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a command prints; empty where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
