"""Keeps a server process for as long as the run that asked for it lives, and ends it with all its children however the run ends.

    python keeper.py PID_OF_THE_RUN COMMAND...

A program of its own on the standard library alone: a run that is killed (SIGKILL) cannot clean up after itself. It ends the server when the
run is gone, when it is asked to (SIGTERM), and with the server's own end. Should the keeper itself be killed, Linux ends the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.25
PATIENCE_SECONDS = 10.0  # between the request to end and the order
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def keep(run: int, command: list[str]) -> int:
    """Start ``command`` and wait; returns its exit status, or 0 where it was ended here."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_keeper)
    while True:
        try:
            return server.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if asked or os.getppid() != run:
                _end(server)
                return 0
        finally:
            if server.returncode is not None:
                _signal(server.pid, signal.SIGKILL)  # children that outlived it


def _die_with_keeper() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def _end(server: subprocess.Popen[bytes]) -> None:
    _signal(server.pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE_SECONDS
    while server.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    _signal(server.pid, signal.SIGKILL)
    server.wait()


def _signal(group: int, number: int) -> None:
    """Send a signal to the server and the children in its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
