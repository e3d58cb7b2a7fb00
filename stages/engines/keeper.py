"""Runs a server process while a run is alive, and ends the server and all its children when the run ends.

    python keeper.py PID_OF_THE_RUN COMMAND...

This is a separate program that uses only the standard library, because a killed run (SIGKILL) cannot clean up after itself. The keeper ends
the server when the run has ended, or when the keeper gets SIGTERM, SIGINT or SIGHUP. When the server ends by itself, the keeper ends its
remaining children. If the keeper itself is killed, Linux ends the server.
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
PATIENCE_SECONDS = 10.0  # seconds between SIGTERM and SIGKILL
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def keep(run: int, command: list[str]) -> int:
    """Start ``command`` and wait for its end; returns its exit status, or 0 if the keeper ended it. ``run``: process id of the run."""
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
                _signal(server.pid, signal.SIGKILL)  # end the children that are still running


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
    """Send a signal to the server's process group, which includes its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
