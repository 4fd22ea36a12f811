"""`enable()`: what it replaces in transformers, and what then happens to a model that is loaded with a TP plan.

Design record
- transformers 5.17 turns a model into a tensor-parallel one in ONE function, `apply_tensor_parallelism(model, mesh)`,
  between building it on the meta device and loading its weights. There model, mesh and configuration are known. That
  function is replaced, and `_finalize_model_loading`, which runs when the weights are there. A model that is loaded
  without a TP plan never comes by, nor does one that was loaded before `enable()`.
- Only modules of that one model are changed, by giving them a `forward` of their own, as transformers' hooks do.
- Tried and left: `register_patch_mapping`, which replaces classes for every model of the process, with TP or without,
  and leaves `_can_record_outputs` of the classes changed. Own styles in ALL_PARALLEL_STYLES: a style sees one module,
  but deferral is about layers, and a Linear's hook swaps its weights in and out of DTensors on every call. The
  `kernels` hub route, which overwrites the TP hooks.
- Inside of mixers only the architecture's rules hold; the stock plan's hooks there gather or reduce too early. Of them
  only the expert-parallel router's stays. Outside, embedding and lm_head, the stock plan holds as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpfuse.communicator import Communicator
from tpfuse.deferred import Deferral, Place
from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.integrations.transformers import layers
from tpfuse.integrations.transformers.architecture import Architecture, Forward, pattern_of
from tpfuse.integrations.transformers.architectures import ARCHITECTURES
from tpfuse.integrations.transformers.sharding import Sharding
from tpfuse.plan import MODES, Report

SUPPORTED = "5.17 and 5.23"
SETTINGS = ("backend", "max_hidden", "timeout")  # of the Communicator; the others of its arguments the model decides
ROUTER = "ep_router"  # the stock style that stays inside of a mixer


@dataclass
class Applied:
    """What tpfuse did to one model. `applied(model)` finds it."""

    architecture: Architecture
    base: nn.Module
    comm: Communicator
    sharding: Sharding

    def report(self) -> Report:
        """What really ran, from the Communicator."""
        return self.comm.report()

    def close(self) -> None:
        """Give back what the Communicator holds. The model can't run afterwards."""
        self.comm.close()


class _Seam:
    """A function of transformers that is replaced between `put` and `take`."""

    def __init__(self, owner: Any, name: str, known: tuple[str, ...], ours: Callable[..., Any]) -> None:
        found = owner.__dict__.get(name)
        stock = found.__func__ if isinstance(found, staticmethod) else found
        parameters = "" if stock is None else ", ".join(signature(stock).parameters)
        if parameters not in known:
            raise Unsupported(
                f"tpfuse.integrations.transformers: this transformers has {owner.__name__}.{name}({parameters}); "
                f"known: ({'), ('.join(known)}). Supported: transformers {SUPPORTED}."
            )
        self.stock: Callable[..., Any] = stock
        self._owner, self._name, self._found, self._ours = owner, name, found, ours

    def put(self) -> None:
        ours = staticmethod(self._ours) if isinstance(self._found, staticmethod) else self._ours
        setattr(self._owner, self._name, ours)

    def take(self) -> None:
        setattr(self._owner, self._name, self._found)


@dataclass
class _Enabled:
    mode: str
    settings: dict[str, Any]
    apply: _Seam
    finish: _Seam


_enabled: _Enabled | None = None


def enable(mode: str = "fused", **settings: Any) -> None:
    """From now on, models that are loaded with a TP plan run through tpfuse.

    mode: "fused", "control" (the same, but all-reduce and norm stay separate) or "off" (every sum reduced where the
    model's author reduces it). All three divide the weights alike. settings: backend, max_hidden and timeout of the
    Communicator, which is made when a model is loaded, and checks their values then.
    Raises Unsupported for a transformers that it does not know. Calling it again changes the mode for later models.
    """
    global _enabled
    if mode not in MODES:
        raise InvalidArgument(f"enable: mode={mode!r}; supported: {', '.join(MODES)}.")
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise InvalidArgument(f"enable: unknown setting {', '.join(unknown)}; supported: {', '.join(SETTINGS)}.")
    disable()
    try:
        from transformers import PreTrainedModel
        from transformers.distributed import mixin
    except ImportError as error:
        raise Unsupported(
            f"tpfuse.integrations.transformers needs transformers {SUPPORTED}, which can't be imported ({error}). "
            "pip install 'tpfuse[transformers]'"
        ) from error
    enabled = _Enabled(
        mode,
        settings,
        _Seam(mixin, "apply_tensor_parallelism", ("model, tp_mesh", "model, tp_mesh, tp_plan"), _apply),
        _Seam(PreTrainedModel, "_finalize_model_loading", ("model, load_config, loading_info",), _finish),
    )
    enabled.apply.put()
    enabled.finish.put()
    _enabled = enabled


def disable() -> None:
    """Models loaded from now on are transformers' own. Those that run through tpfuse go on doing so."""
    global _enabled
    if _enabled is not None:
        _enabled.apply.take()
        _enabled.finish.take()
        _enabled = None


def applied(model: nn.Module) -> Applied:
    """What tpfuse did to a model. Raises InvalidArgument if it did nothing."""
    found = getattr(model, "_tpfuse", None)
    if not isinstance(found, Applied):
        raise InvalidArgument(
            f"{type(model).__name__}: not a model of tpfuse. Call enable() before from_pretrained, and load with a TP "
            "plan on more than one rank."
        )
    return found


def _apply(model: Any, tp_mesh: DeviceMesh, *plan: dict[str, str]) -> Any:
    """In the place of transformers' apply_tensor_parallelism. plan: none in 5.17, where the model has it as patterns;
    later one of the names of modules and parameters."""
    assert _enabled is not None
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ in ARCHITECTURES]
    if not found:
        known = ", ".join(ARCHITECTURES)
        warnings.warn(
            f"tpfuse: {type(model).__name__} runs by transformers' own TP plan; tpfuse knows {known}.", stacklevel=2
        )
        return _enabled.apply.stock(model, tp_mesh, *plan)
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise Unsupported(
            f"{type(model).__name__} has more than one model that tpfuse knows: {names}; supported: one. "
            "Call disable() to load it by transformers' own plan."
        )
    name, base = found[0]
    model._tpfuse = shard(model, base, f"{name}." if name else "", tp_mesh, plan, _enabled.mode, _enabled.settings)
    return model


def _finish(model: Any, load_config: Any, loading_info: Any) -> Any:
    """In the place of transformers' _finalize_model_loading: afterwards, parameters become plain local tensors."""
    assert _enabled is not None
    info = _enabled.finish.stock(model, load_config, loading_info)
    made = getattr(model, "_tpfuse", None)
    if isinstance(made, Applied):
        made.sharding.finish()
        made.sharding.put_together(made.base, made.architecture)
        model.requires_grad_(False)
        _meet(made.comm)
    return info


def _meet(comm: Communicator) -> None:
    """Wait for the other ranks, which read files at a speed of their own. The first call of the Communicator would wait
    no longer than its timeout; the process group waits as long as it was told to."""
    arrived = torch.ones(1, device=comm.device)
    dist.all_reduce(arrived, group=comm.group)
    arrived.item()


def shard(
    model: Any,
    base: Any,
    prefix: str,
    mesh: DeviceMesh,
    plan: tuple[dict[str, str], ...],
    mode: str,
    settings: dict[str, Any],
) -> Applied:
    """Divide the weights of `base` inside of `model`, and give its modules the forwards of the mode. Collective."""
    architecture = ARCHITECTURES[type(base).__name__]
    expert_parallel = bool(getattr(model.config.distributed_config, "enable_expert_parallel", False))
    world = mesh.size()
    architecture.check(base.config, world)
    _refuse(model)
    sharding = Sharding(mesh)
    sharding.declare(base, prefix, architecture, expert_parallel)
    _apply_stock_plan(model, prefix, architecture, mesh, plan, expert_parallel)
    comm = Communicator(mesh.get_group(), device=mesh.device_type, mode=mode, **settings)
    _give_forwards(base, architecture, expert_parallel, Deferral(comm), Place(world, deferring=mode != "off"))
    _save_in_order(model, sharding)
    return Applied(architecture, base, comm, sharding)


def _apply_stock_plan(
    model: Any,
    prefix: str,
    architecture: Architecture,
    mesh: DeviceMesh,
    plan: tuple[dict[str, str], ...],
    expert_parallel: bool,
) -> None:
    """What the stock plan does outside of mixers. Afterwards the model's plan says what is divided: transformers reads
    from it whether the KV cache is."""
    assert _enabled is not None

    def outside(plan: dict[str, str]) -> dict[str, str]:
        return {
            name: style
            for name, style in plan.items()
            if style == ROUTER or not architecture.is_mixer(pattern_of(name).removeprefix(prefix))
        }

    field = "_ep_plan" if expert_parallel else "_tp_plan"
    kept = outside(getattr(model, field))
    setattr(model, field, kept)
    _enabled.apply.stock(model, mesh, *(outside(named) for named in plan))
    ours = {prefix + name: rule.style for name, rule in architecture.rules(expert_parallel).items()}
    setattr(model, field, kept | ours)


def _give_forwards(
    base: Any, architecture: Architecture, expert_parallel: bool, deferral: Deferral, place: Place
) -> None:
    followers = [*getattr(base, architecture.layers)[1:], getattr(base, architecture.final_norm)]
    local = architecture.locals(expert_parallel)
    for name, module in base.named_modules():
        pattern = pattern_of(name)
        for attribute, value in local[pattern](module, base.config, place.world).items() if pattern in local else ():
            setattr(module, attribute, value)
        if pattern in architecture.forwards:
            _give(module, architecture.forwards[pattern](module, deferral.comm))
        if pattern in architecture.reduces:
            _give(module, layers.mixer(module, deferral, place, name))
        if place.deferring and pattern in architecture.norms:
            _give(module, layers.norm(module, getattr(module, architecture.norm_eps), architecture.norm_bias))
        if place.deferring and pattern in architecture.head_norms:
            _give(module, layers.head_norm(module, getattr(module, architecture.norm_eps), architecture.norm_bias))
        if place.deferring and pattern == f"{architecture.layers}.*":
            _give(module, architecture.layer(module, followers[int(name.rpartition(".")[2])]))
    _give(base, layers.model(base, deferral))


def _give(module: Any, forward: Forward) -> None:
    """A forward knows its module. In a copy it would go on running the module that was copied."""
    module.forward, module.__deepcopy__ = forward, partial(_no_copy, type(module).__name__)


def _no_copy(name: str, memo: dict[int, Any]) -> NoReturn:
    raise Unsupported(f"{name}: a model that runs through tpfuse can't be copied. Load it with from_pretrained again.")


def _save_in_order(model: Any, sharding: Sharding) -> None:
    """What save_pretrained gathers from the ranks is put into the model's order. transformers saves the lm_head beside
    the embedding that it is tied to, once it has divided it: it is left out again."""
    gather = model.gather_sharded_state_dict_for_save

    def gather_in_order(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = sharding.join(gather(*args, **kwargs))
        for copy, source in model.all_tied_weights_keys.items():
            if copy in state and source in state and torch.equal(state[copy], state[source]):
                del state[copy]
        return state

    model.gather_sharded_state_dict_for_save = gather_in_order


def _refuse(model: Any) -> None:
    """Raise Unsupported for what a model may ask for and tpfuse does not do."""
    distributed = model.config.distributed_config
    for field, what in (
        ("pp_size", "pipeline parallelism"),
        ("fsdp_size", "FSDP"),
        ("ep_size", "the expert parallelism of transformers 5.23 (that of 5.17 is supported)"),
    ):
        if getattr(distributed, field, None) not in (None, 1):
            raise Unsupported(f"{type(model).__name__}: {field}={getattr(distributed, field)}; not with {what}.")
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None and not getattr(quantised, "dequantize", False):
        raise Unsupported(
            f"{type(model).__name__}: a quantised checkpoint ({type(quantised).__name__}); supported: weights in "
            "float32, bfloat16 or float16. Load it with a configuration that has dequantize=True."
        )
