"""Two processes train and two servers of vLLM itself sample; one server is killed. Needs an environment with vLLM (test_real_vllm.py)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import stages
from stages.config import VllmStart
from stages.engines.vllm_start import Served, StartedServer, find_installed
from stages.errors import LaunchError
from tests.engines.test_several_processes import logs, start, write_recipe

try:
    find_installed(VllmStart())
except LaunchError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
ITERATIONS = 6


@pytest.fixture
def servers(wide_llama: Path, tmp_path: Path) -> Iterator[list[StartedServer]]:
    """Two servers with the same key."""
    served = Served(str(wide_llama), "float32", lora_rank=2)
    started = [StartedServer(VllmStart(), served, tmp_path / f"vllm-{index}.log", key="two-servers") for index in range(2)]
    try:
        for server in started:
            server.start()
        yield started
    finally:
        for server in started:
            server.end()


def test_two_processes_continue_when_one_of_two_servers_is_killed(
    servers: list[StartedServer],
    wide_llama: Path,
    pair_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The metrics equal those of one process with one server that is not killed, because each episode has its own seed."""
    monkeypatch.setenv("PAIR_KEY", "two-servers")
    options: dict[str, Any] = {"iterations": ITERATIONS, "tokens": 12, "overlap": 0, "key": "PAIR_KEY"}
    first, second = servers
    write_recipe(pair_folder, wide_llama, first, **options)
    stages.run(pair_folder / "pair.yaml", home=pair_folder / "alone", quiet=True)

    def kill_after_two_iterations() -> None:
        metrics = pair_folder / "home" / "runs" / "pair"
        while not any(len(path.read_text().splitlines()) >= 2 for path in metrics.glob("*/aligned/metrics.jsonl")):
            time.sleep(0.05)
        assert second._process is not None
        (server,) = psutil.Process(second._process.pid).children()
        os.kill(server.pid, signal.SIGKILL)

    write_recipe(pair_folder, wide_llama, first, second, **options)
    threading.Thread(target=kill_after_two_iterations, daemon=True).start()
    done = start(pair_folder)
    assert done.returncode == 0, done.stderr
    assert f"the vLLM server {second.url} is lost" in done.stdout
    metrics, expected = logs(pair_folder / "home"), logs(pair_folder / "alone")
    assert len(metrics) == len(expected) == ITERATIONS
    for number, (one, other) in enumerate(zip(metrics, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-3, abs=5e-4), f"iteration {number}"
