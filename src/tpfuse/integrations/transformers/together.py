"""Linears of one input as one matrix product: their weights are views of one tensor, the module's buffer `together`.

Design record
- For everybody else they stay parameters, which may be replaced instead of written to: by `.to()`,
  `load_state_dict(assign=True)`, `p.data = ...`. What `.to()` and the like convert is laid together again. What was
  assigned stays where it is, because its memory may be shared with others who write to it: the Linears then multiply
  one by one. `views` are the weights as they should lie, so looking whether they do is a call a weight.
- Compiled code can't look where memory lies. It sees `together`, which is None as soon as a load or a forward that is
  not compiled has found the weights elsewhere; Dynamo guards that. So what it may miss is `p.data = ...`, and what is
  assigned to one Linear alone, until then.
- Tried and left: copying what was assigned into a new `together` in the forward. It cuts the sharing of memory, and
  in a CUDA graph's capture it is a copy in every replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tpfuse.integrations.transformers.architecture import Module


def tie(module: Module, names: tuple[str, ...]) -> None:
    """Lay the weights of these Linears of `module` together, now and whenever all are converted."""
    module.register_buffer("together", None, persistent=False)
    module.tied, module.views = names, ()
    _lay(module)
    stock = module._apply

    def apply(function: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        before = module.together if _in_place(module) else None
        module.together = None  # or it would be converted by itself
        stock(function, recurse)
        if before is not None:
            module.together = before
            if not _in_place(module):
                _lay(module)
        return module

    def loaded(*_: object) -> None:
        _in_place(module)

    module._apply = apply
    module.register_load_state_dict_post_hook(loaded)


def products(module: Module, x: Tensor) -> list[Tensor]:
    """What the tied Linears make of x: in one product, or one by one where a weight lies elsewhere or a Linear is
    watched, wrapped or replaced."""
    linears = [getattr(module, name) for name in module.tied]
    known = module.together is not None and all(_plain(each) for each in linears)
    if not known or not (torch.compiler.is_compiling() or _in_place(module)):
        return [each(x) for each in linears]
    return list(linear(x, module.together).split([len(each.weight) for each in linears], -1))


def _plain(each: nn.Module) -> bool:
    """Whether calling it is a product with its weight and nothing else."""
    hooked = each._forward_pre_hooks or each._forward_hooks or "forward" in vars(each)
    return type(each) is nn.Linear and each.bias is None and not hooked


def _in_place(module: Module) -> bool:
    """Whether all weights lie in `together`. If not, it is given up, so that compiled code knows, too."""
    if module.together is not None:
        weights: list[Any] = [getattr(getattr(module, name), "weight", None) for name in module.tied]
        if all(_is(weight, view) for weight, view in zip(weights, module.views, strict=True)):
            return True
        module.together, module.views = None, ()
    return False


def _is(weight: Any, view: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype == view.dtype and weight.is_set_to(view)


@torch.inference_mode(False)  # a parameter of an inference tensor could not be written to afterwards
def _lay(module: Module) -> None:
    weights = [getattr(module, name).weight for name in module.tied]
    module.together = torch.cat([weight.detach() for weight in weights])
    module.views = module.together.split([len(weight) for weight in weights])
    for weight, view in zip(weights, module.views, strict=True):
        weight.data = view
