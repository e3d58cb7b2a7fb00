"""Two processes train and two servers sample. If one process loses a server, both leave it out; they stop and continue together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import stages
from stages.sampling.generation import episode_seed

pytestmark = pytest.mark.timeout(900)  # a start takes 15 s on an idle machine, and minutes on a busy one
REPOSITORY = Path(__file__).resolve().parents[2]
TWO = ("-m", "stages.process.launching", "--cpu", "--num_processes", "2")
SEED, ITERATIONS, EPISODES = 3, 4, 8
EPISODE_OF = {episode_seed(SEED, iteration, row): (iteration, row) for iteration in range(ITERATIONS) for row in range(EPISODES)}

RECIPE = """
name: pair
seed: {seed}
steps:
  - stage: ppo
    name: aligned
    policy: {model}
    precision: fp32
    value: policy
    lora: {{r: 2}}
    reward: [{{function: "letters_reward:letters"}}]
    data: prompts.jsonl
    generation: {{engine: {{vllm: {{url: [{urls}], retries: 0, backoff_seconds: 0{key}}}}}, max_new_tokens: {tokens}}}
    overlap: {overlap}
    total_episodes: {total}
    rollout_batch_size: {episodes}
    minibatch_size: 4
    ppo_epochs: 1
    checkpoint_seconds: 0
    training: {{learning_rate: 0.01, adam_epsilon: 0.01}}
"""


def write_recipe(
    folder: Path, model: Path, *servers: Any, iterations: int = ITERATIONS, tokens: int = 6, overlap: int = 1, key: str = ""
) -> None:
    """``servers``: objects with a ``url``. ``key``: the environment variable with their key."""
    text = RECIPE.format(
        seed=SEED,
        model=model,
        urls=", ".join(one.url for one in servers),
        total=iterations * EPISODES,
        episodes=EPISODES,
        tokens=tokens,
        overlap=overlap,
        key=f", api_key_variable: {key}" if key else "",
    )
    (folder / "pair.yaml").write_text(text)


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the recipe with two processes."""
    given = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TWO, "-m", "stages", "run", "pair.yaml", "--home", "home"]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False, timeout=600)


def logs(home: Path) -> list[dict[str, float]]:
    """The last run's metrics, without times."""
    lines = (home / "runs" / "pair" / "latest" / "aligned" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not name.startswith("time/")} for line in lines]


def episodes(server: Any) -> set[tuple[int, int]]:
    """(iteration, row) of the episodes that a server was asked for."""
    return {EPISODE_OF[body["seed"]] for path, body in server.requests if path == "/v1/completions" and body.get("seed") in EPISODE_OF}


def test_two_processes_agree_on_lost_servers_and_compute_as_one(stub: Any, pair_folder: Path, tiny_llama_folder: Path) -> None:
    """Both servers are lost, one after the other, and two others continue. The metrics equal those of one process with one server.

    In iteration 1, the second server closes its connections to the second process only; both processes leave it out. In iteration 3, the
    first server dies, and both processes stop.
    """
    write_recipe(pair_folder, tiny_llama_folder, stub())
    stages.run(pair_folder / "pair.yaml", home=pair_folder / "alone", quiet=True)

    first, second = stub(), stub()

    def fail_at_second_process(path: str, body: dict[str, Any]) -> None:
        iteration, row = EPISODE_OF.get(body.get("seed", -1), (0, 0))
        if iteration >= 1 and row % 2:
            raise ConnectionError

    def die(path: str, body: dict[str, Any]) -> None:
        if EPISODE_OF.get(body.get("seed", -1), (0, 0))[0] == ITERATIONS - 1:
            threading.Thread(target=first.die).start()
            raise ConnectionError

    second.before, first.before = fail_at_second_process, die
    write_recipe(pair_folder, tiny_llama_folder, first, second)
    done = start(pair_folder)
    assert done.returncode == 2, done.stderr
    assert "iteration 3: no vLLM server is left" in done.stderr and "Traceback" not in done.stderr
    assert f"the vLLM server {second.url} is lost" in done.stdout
    # Each process distributes its four episodes over both servers. The second server gets no requests after iteration 1.
    assert {row for iteration, row in episodes(second) if iteration == 0} == {2, 3, 6, 7}
    assert not {iteration for iteration, _ in episodes(second)} & {2, 3}
    assert {row for iteration, row in episodes(first) if iteration == 2} == set(range(EPISODES))

    others = stub(), stub()
    write_recipe(pair_folder, tiny_llama_folder, *others)
    done = start(pair_folder)
    assert done.returncode == 0, done.stderr
    assert "resuming after iteration 3" in done.stdout
    assert episodes(others[0]) | episodes(others[1]) <= {(ITERATIONS - 1, row) for row in range(EPISODES)}
    metrics, expected = logs(pair_folder / "home"), logs(pair_folder / "alone")
    assert len(metrics) == len(expected) == ITERATIONS
    for number, (one, other) in enumerate(zip(metrics, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-3, abs=5e-4), f"iteration {number}"
