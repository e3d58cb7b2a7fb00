"""How a process ends: its last message, and rules for several processes. Does not import torch."""

from __future__ import annotations

import os
import sys

from stages.process.environment import launched_processes


def print_error(text: str) -> None:
    """Write one message to stderr in a single call, so that messages of several processes do not mix."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def leave_at_once(status: int) -> None:
    """End one of several processes after an error, without an orderly shutdown of the communication, which could hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lost_the_others(error: BaseException) -> bool:
    """Whether ``error`` means that another process of this run has ended. gloo and NCCL notice it at their next communication."""
    if launched_processes() == 1:
        return False
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "closed by peer", "reset by peer"))
