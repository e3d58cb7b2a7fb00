"""Two processes train and two servers of vLLM itself sample; one server is killed. Needs an environment with vLLM (test_real_vllm.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import stages
from stages.config import VllmStart
from stages.engines.vllm_start import Served, StartedServer, find_installed
from stages.errors import LaunchError
from tests.engines.test_several_processes import REPOSITORY, TWO, logs
from tests.ppo.conftest import PROMPTS

try:
    find_installed(VllmStart())
except LaunchError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
RECIPE = """
name: pair
seed: 3
steps:
  - stage: ppo
    name: aligned
    policy: {model}
    precision: fp32
    value: policy
    lora: {{r: 2}}
    reward: [{{function: "letters_reward:letters"}}]
    data: prompts.jsonl
    generation: {{engine: {{vllm: {{url: [{urls}], api_key_variable: PAIR_KEY, retries: 0, backoff_seconds: 0}}}}, max_new_tokens: 12}}
    total_episodes: 48
    rollout_batch_size: 8
    minibatch_size: 4
    ppo_epochs: 1
    checkpoint_seconds: 0
    training: {{learning_rate: 0.01, adam_epsilon: 0.01}}
"""


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The metrics equal those of one process with one server that is not killed, because each episode has its own seed."""
    monkeypatch.setenv("PAIR_KEY", "two-servers")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    shutil.copy(REPOSITORY / "tests" / "ppo" / "letters_reward.py", tmp_path)
    first, second = servers
    (tmp_path / "pair.yaml").write_text(RECIPE.format(model=wide_llama, urls=first.url))
    stages.run(tmp_path / "pair.yaml", home=tmp_path / "alone", quiet=True)

    def kill_after_two_iterations() -> None:
        metrics = tmp_path / "home" / "runs" / "pair"
        while not any(len(path.read_text().splitlines()) >= 2 for path in metrics.glob("*/aligned/metrics.jsonl")):
            time.sleep(0.05)
        assert second._process is not None
        (server,) = psutil.Process(second._process.pid).children()
        os.kill(server.pid, signal.SIGKILL)

    (tmp_path / "pair.yaml").write_text(RECIPE.format(model=wide_llama, urls=f"{first.url}, {second.url}"))
    threading.Thread(target=kill_after_two_iterations, daemon=True).start()
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TWO, "-m", "stages", "run", "pair.yaml", "--home", "home"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"the vLLM server {second.url} is lost" in done.stdout
    metrics, expected = logs(tmp_path / "home"), logs(tmp_path / "alone")
    assert len(metrics) == len(expected) == 6
    for number, (one, other) in enumerate(zip(metrics, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-3, abs=5e-4), f"iteration {number}"
