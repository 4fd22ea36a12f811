"""One model's weights, divided: placeholders before they are loaded, plain local tensors after, and back when saved.

Design record
- transformers 5.17 loads a parameter in shards if it is a DTensor, and saves what is a DTensor in full. So the weights
  are DTensors while they are loaded, and `state_dict()` gives DTensors again. In between they are plain tensors: the
  model's own code then runs on its rank's part unchanged, and neither eager mode nor torch.compile sees a subclass.
- Not everything that tpfuse divides has a placement: Mamba's in_proj is five things side by side, KV heads may be
  copied, and a packed gate and up is read from one tensor or from two, as the checkpoint has it. Such weights are
  loaded whole, one by one, and cut. Experts, the bulk of the bytes, are read in shards from either kind of checkpoint.
- For saving, every part is one shard of a tensor in rank order, and `Split.join` puts it into the model's order. So
  what is saved is the checkpoint, bit for bit, whatever the division was.
- A bias that is added to a partial sum stays with rank 0; the others keep it for `state_dict()` and add zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tpfuse.integrations.transformers.architecture import Architecture, pattern_of
from tpfuse.integrations.transformers.split import Split
from tpfuse.integrations.transformers.together import tie


@dataclass
class Part:
    """One divided parameter. split None: a bias that rank 0 adds for all; `whole` is then its value."""

    name: str  # in the whole model, as in its state dict
    module: nn.Module
    parameter: str
    split: Split | None
    whole: Tensor | None = None


class Sharding:
    """The divided parameters of `base`, which is `prefix` inside of the model."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.rank, self.world = mesh, mesh.get_local_rank(), mesh.size()
        self.parts: dict[str, Part] = {}

    def declare(self, base: nn.Module, prefix: str, architecture: Architecture, expert_parallel: bool) -> None:
        """Find out what is divided, check that it can be, and put placeholders where the loader reads in shards."""
        rules = architecture.rules(expert_parallel)
        for name, module, parameter in parameters_of(base):
            rule = rules.get(pattern_of(name)) or rules.get(pattern_of(name.rpartition(".")[0]))
            if rule is None:
                continue
            full = module._parameters[parameter]
            assert full is not None
            part = Part(prefix + name, module, parameter, rule.split(base.config, full))
            for segment in part.split.segments if part.split else ():
                segment.check(self.world, part.name)
            self.parts[part.name] = part
            if part.split and (placement := placement_of(part.split, full, self.world)):
                placeholder = distribute_tensor(full, self.mesh, [placement], src_data_rank=None)
                module._parameters[parameter] = nn.Parameter(placeholder, requires_grad=full.requires_grad)

    def finish(self) -> None:
        """After loading: plain local tensors, which `state_dict()` gives as shards of the whole."""
        for part in self.parts.values():
            loaded = part.module._parameters[part.parameter]
            assert loaded is not None
            part.module._parameters[part.parameter] = nn.Parameter(self._local(part, loaded), requires_grad=False)
        for module in {id(part.module): part.module for part in self.parts.values()}.values():
            own = {part.parameter: part for part in self.parts.values() if part.module is module}
            module.register_state_dict_post_hook(self._giving(own))
            module.register_load_state_dict_pre_hook(self._taking(own))

    def put_together(self, base: nn.Module, architecture: Architecture) -> None:
        """After `finish`: weights that one matrix product uses become views of one tensor."""
        for name, module in base.named_modules():
            if linears := architecture.together.get(pattern_of(name)):
                tie(module, linears)

    def _local(self, part: Part, loaded: Tensor) -> Tensor:
        if part.split is None:
            part.whole = loaded.detach()
            return part.whole if self.rank == 0 else torch.zeros_like(part.whole)
        if isinstance(loaded, DTensor):
            return loaded.to_local().detach().contiguous()
        return part.split.cut(loaded.detach(), self.rank, self.world)

    def _giving(self, own: dict[str, Part]) -> Callable[..., None]:
        def give(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
            for parameter, part in own.items():
                if part.split is None:
                    assert part.whole is not None
                    if self.rank > 0:  # the model may have been converted since: in the dtype of the zeros
                        state[prefix + parameter] = part.whole.to(state[prefix + parameter])
                else:
                    local, dim = state[prefix + parameter], part.split.dim
                    state[prefix + parameter] = DTensor.from_local(local, self.mesh, [Shard(dim)], run_check=False)

        return give

    def _taking(self, own: dict[str, Part]) -> Callable[..., None]:
        def take(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
            for parameter, part in own.items():
                given = state.get(prefix + parameter)
                if isinstance(given, DTensor):
                    given = given.to_local()
                elif isinstance(given, Tensor) and part.split is None:
                    part.whole = given.to(module._parameters[parameter])
                    given = part.whole if self.rank == 0 else torch.zeros_like(part.whole)
                elif isinstance(given, Tensor) and given.shape != module._parameters[parameter].shape:  # type: ignore[union-attr]
                    assert part.split is not None
                    given = part.split.cut(given, self.rank, self.world)
                if given is not None:
                    state[prefix + parameter] = given

        return take

    def join(self, state: dict[str, Any]) -> dict[str, Any]:
        """What was gathered from all ranks, in the order of the model."""
        for name, part in self.parts.items():
            if part.split is not None and name in state:
                state[name] = part.split.join(state[name], self.world).contiguous()
        return state


def placement_of(split: Split, full: Tensor, world: int) -> Placement | None:
    """How the loader can read just this rank's part; None: it can't, and reads the whole. See the design record."""
    if full.dim() == 1:  # transformers initialises some from a whole tensor, if the checkpoint lacks them
        return None
    even = all(segment.units % world == 0 for segment in split.segments)
    if even and len(split.segments) == 1:
        return Shard(split.dim)
    if even and full.dim() == 3 and len(set(split.segments)) == 1:
        return _StridedShard(dim=split.dim, split_factor=len(split.segments))
    return None


def parameters_of(base: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and name in the module of every parameter."""
    for name, module in base.named_modules():
        for parameter, _ in list(module.named_parameters(recurse=False)):
            yield f"{name}.{parameter}" if name else parameter, module, parameter
