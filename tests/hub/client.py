"""Runs ``stages`` commands one after another in one process, which imports the libraries once: ``python tests/hub/client.py``.

It reads ``{"arguments": [...], "folder": ...}`` from stdin, one line for each command, and writes ``{"status": ..., "output": ...}`` to
stdout. The libraries read HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when they are imported. So a test that needs other values must start
another process.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    """How a command ended, and what it printed."""

    status: int
    output: str


class Client:
    """A process with its own environment variables that runs commands."""

    def __init__(self, environment: dict[str, str]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )

    def run(self, *arguments: str, folder: Path | None = None) -> Answer:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "folder": str(folder or Path.cwd())}) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _run(command: dict[str, Any], printed: io.StringIO) -> dict[str, Any]:
    from stages.cli import app

    os.chdir(command["folder"])
    printed.seek(0)
    printed.truncate()
    sys.stdout = sys.stderr = printed
    status: Any = 0
    try:
        app(command["arguments"], prog_name="stages")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # as Python would, with a traceback
        status = 1
        traceback.print_exc()
    return {"status": status, "output": printed.getvalue()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries that bypasses sys.stdout must not be read as an answer
    printed = io.StringIO()  # one object for all commands, because loggers of libraries keep a reference to it
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line), printed)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
