"""A server and its children end with the run that started the server, however the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.engines import keeper

SERVER = "import subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); time.sleep(600)"
RUN = """
import os, subprocess, sys, time
kept = subprocess.Popen([sys.executable, "-I", {keeper!r}, str(os.getpid()), sys.executable, "-c", {server!r}], start_new_session=True)
print(kept.pid, flush=True)
time.sleep(600)
"""


def gone(*pids: int, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", ["run killed", "run terminated", "keeper asked", "keeper killed"])
def test_server_and_children_end_with_the_run(end: str) -> None:
    code = RUN.format(keeper=keeper.__file__, server=SERVER)
    run = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    kept, grandchild = int(run.stdout.readline()), int(run.stdout.readline())
    (server,) = psutil.Process(kept).children()
    try:
        if end == "run killed":
            run.kill()
        elif end == "run terminated":
            run.terminate()
        else:
            os.kill(kept, signal.SIGTERM if end == "keeper asked" else signal.SIGKILL)
        # If the keeper is killed, Linux ends the server. Nobody ends the server's children then.
        assert gone(kept, server.pid, *([] if end == "keeper killed" else [grandchild]))
    finally:
        for pid in (run.pid, kept, server.pid, grandchild):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        run.wait()


def test_the_keeper_ends_with_its_server(tmp_path: Path) -> None:
    command = [sys.executable, "-I", keeper.__file__, str(os.getpid()), sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, check=False).returncode == 7
