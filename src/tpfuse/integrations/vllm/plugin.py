"""The entry point: what happens in a process of vLLM, and when.

Design record
- register() runs in every process: front end, engine core, workers. It only replaces two functions of
  vllm.distributed.parallel_state and one of vllm.envs; all else is done in a worker, once that has its TP group.
- `initialize_model_parallel` is that moment. Every rank passes it at the same time, the device is set, nothing is
  measured or captured yet (so the workspace is no part of what the model seems to need), no pool of sleep mode is
  active, and the model is not yet imported by most.
- vLLM keys compiled graphs by configuration and by `envs.compile_factors()`, not by its passes alone: with the AOT
  cache a pass never runs. So our mode and sources become a factor there. Where that can't be done, tpfuse stays out.
- Whatever raises here is logged once, and vLLM goes on with its own path. What is decided from facts that differ
  between ranks is decided while a Communicator is made and tried, which all ranks leave with the same answer.
- --disable-custom-all-reduce is not taken as a word against peer access: 0.24 sets it itself in batch-invariant mode
  and on several nodes. NCCL_P2P_DISABLE is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from tpfuse.integrations.serving.settings import attempt, enter, worker_state
from tpfuse.integrations.vllm import settings
from tpfuse.integrations.vllm.settings import LOG, NAME

RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
# Modules beside this one, each with an install(), and what they replace.
FEATURES = {
    "passes": "all-reduce + norm",
    "experts": "the sum over experts in all-reduce + norm",
    "qk_norm": "QK norm",
    "functions": "all-reduce + norm as a function",
}


_missing: list[str] = []  # features that could not be placed in this worker


def register() -> None:
    """Make vLLM use tpfuse in this process, as TPFUSE_VLLM says. Never raises; calling it twice is fine."""
    _tell_ray()
    enter(NAME, LOG, _hook)


def _tell_ray() -> None:
    """vLLM's workers under Ray get the variables that vLLM knows, and those that it is told of."""
    named = [name for name in os.environ.get(RAY, "").split(",") if name]
    ours = sorted(name for name in os.environ if name.startswith("TPFUSE_") and name not in named)
    if ours:
        os.environ[RAY] = ",".join((*named, *ours))


def _hook(mode: str) -> None:
    """Raises where vLLM does not have what is replaced."""
    import vllm.envs as envs
    from vllm.distributed import parallel_state

    for owner, name in (
        (envs, "compile_factors"),
        (parallel_state, "initialize_model_parallel"),
        (parallel_state, "destroy_model_parallel"),
        (parallel_state, "get_tp_group"),
    ):
        if not callable(getattr(owner, name, None)):
            raise LookupError(f"{owner.__name__}.{name} is not there, so tpfuse does not know this version of vLLM")

    def factors(stock: Callable[..., Any]) -> dict[str, Any]:
        return {**stock(), NAME: f"{settings.fingerprint(_effective())} {' '.join(_missing)}".strip()}

    def initialize(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        guarded("the start of this worker", lambda: _engage(mode, parallel_state))
        return result

    def destroy(stock: Callable[..., Any]) -> Any:
        guarded("the end of this worker", _disengage)
        return stock()

    replace(envs, "compile_factors", factors)
    replace(parallel_state, "initialize_model_parallel", initialize)
    replace(parallel_state, "destroy_model_parallel", destroy)


def replace(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Put `ours(stock, ...)` in the place of a function of vLLM, once a process."""
    stock = getattr(owner, name)
    if hasattr(stock, "tpfuse_stock"):
        return

    @wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ours(stock, *args, **kwargs)

    replacement.tpfuse_stock = stock  # type: ignore[attr-defined]
    setattr(owner, name, replacement)
    if isinstance(owner, ModuleType):
        rebind(name, stock, replacement)


def rebind(name: str, stock: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Put `ours` wherever a module of vLLM has `stock` under its name: imported before, or by `import *`."""
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "vllm" and getattr(module, "__dict__", {}).get(name) is stock:
            setattr(module, name, ours)


def _engage(mode: str, parallel_state: Any) -> None:
    """Make this worker's Communicator and put everything in its place. Collective over the TP group."""
    from importlib import import_module

    from vllm.config import get_current_vllm_config

    from tpfuse.integrations.serving import state

    state.disengage()
    _missing.clear()
    group = parallel_state.get_tp_group()
    if group.world_size == 1:
        return
    # Micro-batches of one worker run side by side on two streams, and would meet in one workspace.
    micro = get_current_vllm_config().parallel_config.use_ubatching
    engaged = state.engage("vLLM", mode, group, "micro-batching (DBO) is on" if micro else "")
    if engaged.effective == "off":
        LOG.warning("%s", engaged)
        return
    for feature, what in FEATURES.items():
        if not guarded(what, lambda name=feature: import_module(f"tpfuse.integrations.vllm.{name}").install()):  # type: ignore[misc]
            _missing.append(feature)
    guarded("errors of kernels in graphs", lambda: import_module("tpfuse.integrations.vllm.failures").install())
    guarded("what vLLM compiles", lambda: _look_at_compilation(engaged))
    guarded("the report after warm-up", _report_after_warm_up)
    LOG.info("%s", engaged)


def _look_at_compilation(engaged: Any) -> None:
    """Say where nothing is compiled; and in a cache_dir of the user's, vLLM looks graphs up without their key, so ours
    get a folder of their own."""
    from vllm.config import get_current_vllm_config

    compilation = get_current_vllm_config().compilation_config
    mode = getattr(compilation.mode, "name", compilation.mode)
    if mode != "VLLM_COMPILE":
        engaged.left[f"compilation mode {mode}, so there are no graphs to look at"] += 1
    folder = "-".join(("tpfuse", *settings.fingerprint(_effective()).split(), *_missing))
    if compilation.cache_dir and folder not in compilation.cache_dir:
        compilation.cache_dir = os.path.join(compilation.cache_dir, folder)


def _disengage() -> None:
    state = worker_state()
    if state is not None:
        state.disengage()


def _effective() -> str:
    state = worker_state()
    return "off" if state is None or state.current is None else state.current.effective


def _report_after_warm_up() -> None:
    """Log what is served once a worker has compiled, warmed up and captured."""
    from vllm.v1.worker.gpu_worker import Worker

    def warm_up(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from tpfuse.integrations.serving import state

        result = stock(*args, **kwargs)
        if state.current is not None:
            LOG.info("%s", state.current.summary("left to vLLM"))
        return result

    replace(Worker, "compile_or_warm_up_model", warm_up)


def guarded(what: str, step: Callable[[], object]) -> bool:
    """Run a step; where it fails, vLLM's own path is left as it is. Returns whether it went well."""
    return attempt(LOG, "vLLM", what, step)
