"""How a process ends: its last message, and what several processes must heed. Imports no torch."""

from __future__ import annotations

import os
import sys

from stages.process.environment import launched_processes


def print_error(text: str) -> None:
    """One message on stderr, whole even where several processes write at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def leave_at_once(status: int) -> None:
    """End a process among several that met an error: the exchange with the others is broken off, and may not be taken down in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lost_the_others(error: BaseException) -> bool:
    """Whether ``error`` says that another process of this run is gone (gloo and NCCL notice it at their next exchange)."""
    if launched_processes() == 1:
        return False
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "closed by peer", "reset by peer"))
