"""The errors of tpfuse. Every message says what was given, what is supported and what to do."""

from __future__ import annotations


class TpfuseError(RuntimeError):
    """Base of every error that tpfuse raises on purpose."""


class InvalidArgument(TpfuseError, ValueError):
    """A tensor or setting that the call can't take: dtype, shape, stride, device, name."""


class Unsupported(TpfuseError):
    """A well-formed request that this backend, machine or version can't serve."""


class RankMismatch(TpfuseError):
    """Ranks disagree: version, configuration, plan, or the call they are in."""


class PeerTimeout(TpfuseError, TimeoutError):
    """A rank did not arrive within the communicator's timeout."""


class CommunicatorClosed(TpfuseError):
    """The communicator was used after `close()`."""


def first_line(error: Exception) -> str:
    """What an exception says, without the stack that torch appends."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
