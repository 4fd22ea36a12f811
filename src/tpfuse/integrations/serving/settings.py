"""The one setting of an integration, and how its steps may fail. Needs neither torch nor an engine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from tpfuse.errors import InvalidArgument

MODES = ("off", "control", "fused")


def requested(variable: str) -> str:
    """The mode that an environment variable asks for. Raises InvalidArgument."""
    mode = os.environ.get(variable, "fused")
    if mode not in MODES:
        raise InvalidArgument(f"{variable}={mode}; supported: {', '.join(MODES)}.")
    return mode


def enter(variable: str, log: logging.Logger, hook: Callable[[str], None]) -> None:
    """An entry point: `hook(mode)` in the mode that is asked for, but off. Never raises."""
    try:
        mode = requested(variable)
        if mode != "off":
            hook(mode)
    except Exception as error:
        log.error("tpfuse stays out: %s", error)


def attempt(log: logging.Logger, engine: str, what: str, step: Callable[[], object]) -> bool:
    """Run a step; where it fails, the engine's own path is left as it is. Returns whether it went well."""
    try:
        step()
    except Exception as error:
        debugging = log.isEnabledFor(logging.DEBUG)
        log.warning("%s: left to %s: %s: %s", what, engine, type(error).__name__, error, exc_info=debugging)
        return False
    return True


def worker_state() -> Any:
    """The module state.py, if a worker could import it: an engine's keys and its end must not depend on that."""
    return sys.modules.get("tpfuse.integrations.serving.state")
