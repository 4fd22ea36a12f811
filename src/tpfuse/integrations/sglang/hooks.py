"""SGLang's registry of hooks, with the questions that come before one is placed.

A hook is `ours(stock, *args, **kwargs)`, SGLang's AROUND. Only public names of `sglang.srt.plugins.hook_registry` are
used: HookRegistry.register, HookRegistry.apply_hooks, HookType.AROUND.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import signature
from pkgutil import resolve_name
from typing import Any

NAME = "TPFUSE_SGLANG"
ENGINE = "SGLang"
LOG = logging.getLogger("tpfuse.sglang")  # SGLang configures the handlers of the root logger

_placed: set[str] = set()  # targets; a second hook on one of them would run inside of the first


def known(target: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """A function or method of SGLang by its dotted name. Raises LookupError if it takes other arguments."""
    try:
        stock: Callable[..., Any] = resolve_name(target)
    except AttributeError as error:
        raise LookupError(f"{target} is not there") from error
    found = tuple(signature(stock).parameters)
    if found != parameters:
        raise LookupError(f"{target} takes {found}; known: {parameters}")
    return stock


def register(target: str, ours: Callable[..., Any]) -> None:
    """Hand a hook to SGLang, which applies it when all plugins are loaded. Once a process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if target not in _placed:
        HookRegistry.register(target, ours, HookType.AROUND)
        _placed.add(target)


def place(target: str, ours: Callable[..., Any]) -> None:
    """Register a hook and have it applied now. Raises LookupError where SGLang did not apply it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if target in _placed:
        return
    stock = resolve_name(target)
    register(target, ours)
    HookRegistry.apply_hooks()
    if resolve_name(target) is stock:
        raise LookupError(f"SGLang has not applied the hook on {target}; another plugin may have one there")
