"""A small labelling folder, and clients that send the same requests as the page."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.labelling.config import People
from stages.labelling.publishing import publish_settings, publish_tasks
from stages.labelling.store import Store
from stages.labelling.tasks import task_of

REPOSITORY = Path(__file__).resolve().parents[2]


class Started:
    """``stages label`` in a separate process."""

    def __init__(self, folder: Path, port: int, annotators: Sequence[str]) -> None:
        self.folder, self.port, self.annotators = folder, port, annotators
        named = [part for name in annotators for part in ("--annotator", name)]
        command = [sys.executable, "-m", "stages", "label", str(folder), "--port", str(port), *named]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        # A test run in the background ignores Ctrl-C, and so would its child processes.
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.links: dict[str, str] = {}
        said = ""
        assert self.process.stdout is not None
        while "progress" not in self.links:
            line = self.process.stdout.readline()
            assert line, said
            said += line
            if line.startswith("  "):
                name, _, address = line.strip().partition(": ")
                self.links[name] = address

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def killed_and_started_again(self) -> Started:
        """A new server at the same address, after SIGKILL."""
        self.kill()
        self.__init__(self.folder, self.port, self.annotators)  # type: ignore[misc]
        return self


@pytest.fixture
def start_server() -> Iterator[Callable[..., Started]]:
    """start_server(folder, *annotators) -> a running server; killed at the end of the test."""
    running: list[Started] = []

    def start(folder: Path, *annotators: str) -> Started:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        running.append(Started(folder, port, annotators))
        return running[-1]

    yield start
    for server in running:
        server.kill()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder(number=4, k=3, questions=None, gold=None, **fields of People) -> a published folder."""

    def make(number: int = 4, k: int = 3, name: str = "labels", texts: Sequence[Sequence[str]] | None = None, **fields: Any) -> Path:
        folder = tmp_path / name
        given = texts or [[f"answer {index} of task {task}" for index in range(k)] for task in range(number)]
        tasks = []
        for task, completions in enumerate(given):
            authors = [[f"model-{index}"] for index in range(len(completions))]
            digests = [[f"sha256:{index}"] for index in range(len(completions))]
            tasks.append(task_of(f"instruction {task}", list(completions), authors, digests))
        publish_tasks(folder, tasks)
        for field in ("questions", "instructions"):
            if field in fields:
                path = tmp_path / f"{name}-{field}{'.yaml' if field == 'questions' else '.md'}"
                path.write_text(fields[field])
                fields[field] = str(path)
        if "gold" in fields:
            path = tmp_path / f"{name}-gold.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in fields["gold"]))
            fields["gold"] = str(path)
        publish_settings(folder, "recipe/step", 0, People.model_validate(fields))
        return folder

    return make


@pytest.fixture
def answer() -> Callable[..., dict[str, Any]]:
    """answer(store, annotator, task, ranks, **fields) -> what the page sends; ranks follow the task's completions."""

    def make(store: Store, annotator: str, task: str, ranks: Sequence[int] | None, **fields: Any) -> dict[str, Any]:
        published = store.task(task)
        assert published is not None
        order = store.order(published, annotator)
        return {"id": uuid.uuid4().hex, "task": task, "order": order, "seconds": 2.0, "notes": "", "ranks": ranks and list(ranks), **fields}

    return make
