"""The entry point: what happens in a process of SGLang, and when.

Design record
- register() runs in every process: front end, detokenizer, schedulers. It only hands SGLang two hooks on functions of
  sglang.srt.distributed.parallel_state; models and layers are imported and hooked in a worker, once it has its groups.
- `initialize_model_parallel` is that moment. Every rank passes it at the same time, the device is set, no memory is
  measured and no model is built yet, nothing is captured, and no region of the memory saver is active.
- The group is that of attention TP: the QK norm's, and without data-parallel attention also that of the whole TP.
- Applying hooks late is what the registry allows: targets that are applied already are skipped.
- Whatever raises here is logged once, and SGLang goes on with its own path. What is decided from facts that differ
  between ranks is decided while a Communicator is made and tried, which all ranks leave with the same answer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

from tpfuse.integrations.serving.settings import attempt, enter, worker_state
from tpfuse.integrations.sglang import hooks
from tpfuse.integrations.sglang.hooks import ENGINE, LOG, NAME

PARALLEL = "sglang.srt.distributed.parallel_state"
FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
EVENT_LOOP = "sglang.srt.managers.scheduler.Scheduler.run_event_loop"
# modules beside this one, each with an install(), and what they replace
FEATURES = {"qk_norm": "QK norm", "boundary": "all-reduce + norm"}
# Arguments of initialize_model_parallel that speak against tpfuse, if they are set. The first is the same on every
# rank; where the second is not, the others stay out by the backend of their group.
AGAINST = {
    "duplicate_tp_group": "PD multiplexing: prefill and decode run side by side, and two calls would meet",
    "recovered_rank": "elastic expert parallelism: ranks come and go",
}
ELASTIC = "mooncake"  # the backend of groups that survive the loss of a rank


def register() -> None:
    """Make SGLang use tpfuse in this process, as TPFUSE_SGLANG says. Never raises; calling it twice is fine."""
    enter(NAME, LOG, _hook)


def _hook(mode: str) -> None:
    """Raises where SGLang does not have what is hooked."""
    parallel_state = import_module(PARALLEL)
    for name in ("initialize_model_parallel", "destroy_model_parallel", "get_attn_tp_group"):
        if not callable(getattr(parallel_state, name, None)):
            raise LookupError(f"{PARALLEL}.{name} is not there, so tpfuse does not know this version of SGLang")

    def initialize(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        guarded(
            "the start of this worker",
            lambda: _engage(mode, parallel_state, signature(stock).bind(*args, **kwargs).arguments),
        )
        return result

    def destroy(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        guarded("the end of this worker", _disengage)
        return stock(*args, **kwargs)

    hooks.register(f"{PARALLEL}.initialize_model_parallel", initialize)
    hooks.register(f"{PARALLEL}.destroy_model_parallel", destroy)


def _engage(mode: str, parallel_state: Any, given: dict[str, Any]) -> None:
    """Make this worker's Communicator and put everything in its place. Collective over the attention-TP group."""
    import torch.distributed as dist

    from tpfuse.integrations.serving import state

    state.disengage()
    group = parallel_state.get_attn_tp_group()
    if group.world_size == 1:
        return
    against = next((reason for name, reason in AGAINST.items() if given.get(name)), "")
    if dist.get_backend(group.device_group) == ELASTIC:
        against = AGAINST["recovered_rank"]
    engaged = state.engage(ENGINE, mode, group, against)
    if engaged.effective == "off":
        LOG.warning("%s", engaged)
        return
    for feature, what in FEATURES.items():
        guarded(what, lambda name=feature: import_module(f"tpfuse.integrations.sglang.{name}").install())  # type: ignore[misc]
    guarded("errors of kernels in graphs", lambda: hooks.place(FORWARD, _checked))
    guarded("the report after capture", lambda: hooks.place(EVENT_LOOP, _report))
    LOG.info("%s", engaged)


def _disengage() -> None:
    state = worker_state()
    if state is not None:
        state.disengage()


def _checked(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A step of a worker, which may replay a graph: a kernel that gave up in an earlier one is an error here."""
    from tpfuse.integrations.serving import state

    state.check()
    return stock(*args, **kwargs)


def _report(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Log what is served once a worker has loaded, warmed up and captured, before it takes requests."""
    from tpfuse.integrations.serving import state

    if state.current is not None:
        LOG.info("%s", state.current.summary("left to SGLang"))
    return stock(*args, **kwargs)


def guarded(what: str, step: Callable[[], object]) -> bool:
    """Run a step; where it fails, SGLang's own path is left as it is. Returns whether it went well."""
    return attempt(LOG, ENGINE, what, step)
