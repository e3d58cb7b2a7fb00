"""Two processes compute what one computes: the same updates, one summary, one version of each model. They end together; one can resume.

Processes are started as users start them, on a CPU with gloo. Each start takes seconds, so there are few, and each tests several things.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.registry.ledger import Registry
from tests.rewards.conftest import Server

pytestmark = pytest.mark.timeout(900)  # a start takes 15 s on an idle machine, and minutes on a busy one
REPOSITORY = Path(__file__).resolve().parents[2]
ACCELERATE = Path(sys.executable).with_name("accelerate")

RECIPE = """
name: pair
seed: 3
steps:
  - stage: sft
    name: sft
    model: {model}
    precision: fp32
    data: {{train: rows.jsonl, validation_fraction: 0.1}}
    # 27 rows in steps of 8: the last step has 3, one of them for the second process. Epsilon keeps Adam from full steps of rounding errors.
    training: {{epochs: 2, batch_size: 8, microbatch_size: 2, learning_rate: 0.01, adam_epsilon: 0.01, warmup_fraction: 0}}
  - stage: reward_model
    name: preference
    model: sft
    precision: fp32
    data: {{train: comparisons.jsonl, validation_fraction: 0.1}}
    training: {{epochs: 1, batch_size: 6, microbatch_size: 2, learning_rate: 0.01, adam_epsilon: 0.01}}
  - stage: ppo
    name: aligned
    policy: sft
    precision: fp32
    reward:
      - {{model: preference}}
      - {{function: "pair_reward:vowels", weight: 0.5}}
      - {{function: "pair_reward:about", weight: 0.1}}
      - {{endpoint: "{server}", name: far, weight: 0.1, label_column: thing, columns: [number]}}
    data: prompts.jsonl
    generation: {{max_new_tokens: 10, stop: [a, e, i, o, u, s, t, n, r, l, d, h, m]}}
    total_episodes: 70
    rollout_batch_size: 14
    minibatch_size: 7
    microbatch_size: 3
    ppo_epochs: 2
    kl_target: 0.5
    whiten_rewards: true
    pretraining_mix: {{data: texts.jsonl, examples_per_episode: 1, block_size: 8}}
    ema_decay: 0.9
    num_samples: 14
    checkpoint_seconds: 0
    training: {{learning_rate: 0.002, adam_epsilon: 0.01}}
  - stage: dpo
    name: direct
    model: sft
    lora: {{r: 2}}
    precision: fp32
    data: {{train: comparisons.jsonl, validation_fraction: 0.1}}
    training: {{epochs: 1, batch_size: 14, microbatch_size: 2, learning_rate: 0.01, adam_epsilon: 0.01}}
  - stage: evaluation
    name: verdict
    candidates: {{sft: sft, aligned: aligned, direct: direct}}
    data: prompts.jsonl
    judges: [{{function: "pair_reward:vowels"}}]
    kl_reference: sft
    generation: {{max_new_tokens: 10}}
    precision: fp32
"""

REWARD = '''
import os, signal, time

calls = 0

def vowels(prompts, completions):
    """The share of vowels; on the call and in the process that the environment names, something happens."""
    global calls
    calls += 1
    if os.environ.get("AT_CALL") == str(calls) and os.environ.get("IN_PROCESS", os.environ.get("RANK")) == os.environ.get("RANK"):
        what = os.environ["WHAT"]
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stops":
            os.kill(os.getppid(), signal.SIGTERM)  # the launcher's
            time.sleep(1)
        if what == "raises":
            raise ValueError("no reward today")
        if what == "lists":
            import gc
            from torch.distributed.fsdp import FSDPModule
            from stages.models.heads import RewardModel
            models = [thing for thing in gc.get_objects() if type(thing) is RewardModel]
            sharded = [model for model in models if any(isinstance(module, FSDPModule) for module in model.modules())]
            open("sharded_rewards.txt", "w").write(f"{len(sharded)} of {len(models)}")
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]

def about(prompts, completions, thing, number):
    """1 where the columns are those of the prompt's own row."""
    return [float(prompt.endswith(f"{one} {row}")) for prompt, one, row in zip(prompts, thing, number)]
'''


def far(body: dict[str, Any], number: int) -> tuple[int, Any]:
    """The server's scores: the length of each completion, and 100 if the columns are not those of the prompt's row."""
    rows = zip(body["prompts"], body["completions"], body["labels"], body["columns"]["number"], strict=True)
    return 200, {"rewards": [len(text) / 10 if prompt.endswith(f"{one} {row}") else 100.0 for prompt, text, one, row in rows]}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    running.reply = far
    yield running
    running.server.shutdown()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, server: Server) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    things = ("film", "plot", "music")
    rows = [
        {"prompt": f"write about the {thing}", "completion": f"the {thing} was a joy" + " indeed" * number}
        for number in range(10)
        for thing in things
    ]
    comparisons = [
        {
            "prompt": f"write {number}",
            "completions": ["a joy", "dull", "weak", "so so"][: 2 + number % 3],
            "ranks": [0, 1, 1, 2][: 2 + number % 3],
        }
        for number in range(30)
    ]
    prompts = [
        {"prompt": f"{'the ' * (number % 4)}{thing} {number}", "thing": thing, "number": number} for number in range(4) for thing in things
    ]
    texts = [{"text": f"the film number {number} was warm"} for number in range(40)]
    for name, table in (("rows", rows), ("comparisons", comparisons), ("prompts", prompts), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    (folder / "pair.yaml").write_text(RECIPE.format(model=tiny_llama_folder, server=server.url))
    (folder / "pair_reward.py").write_text(REWARD)
    return folder


def start(workdir: Path, home: str, *launcher: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``stages run pair.yaml`` with ``launcher`` in ``workdir``."""
    given = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{workdir}", "OMP_NUM_THREADS": "1", **environment}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        given.pop(name, None)
    command = [*launcher, "-m", "stages", "run", "pair.yaml", "--home", home]
    return subprocess.run(command, cwd=workdir, env=given, capture_output=True, text=True, check=False, timeout=600)


ONE = (sys.executable,)
TWO = (sys.executable, "-m", "stages.process.launching", "--cpu", "--num_processes", "2")
TWO_BY_ACCELERATE = (str(ACCELERATE), "launch", "--cpu", "--num_processes", "2")


SHARDED = (sys.executable, "-m", "stages.process.launching", "--config_file", str(REPOSITORY / "recipes" / "accelerate" / "fsdp2.yaml"))


@pytest.fixture(scope="module")
def alone(workdir: Path) -> Path:
    done = start(workdir, "alone", *ONE)
    assert done.returncode == 0, done.stderr
    return workdir / "alone"


@pytest.fixture(scope="module")
def pair(workdir: Path) -> Path:
    """Started by ``accelerate launch``, which without Tristage's defaults would start only one process, without a message."""
    done = start(workdir, "pair", *TWO_BY_ACCELERATE)
    assert done.returncode == 0, done.stderr
    return workdir / "pair"


def logs(home: Path, step: str) -> list[dict[str, float]]:
    """The logged metrics without times."""
    lines = (home / "runs" / "pair" / "latest" / step / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not name.startswith("time/")} for line in lines]


def weights(home: Path, step: str) -> dict[str, torch.Tensor]:
    return load_file(next(Registry(home / "registry").get(f"pair/{step}").path.glob("*model.safetensors")))


def assert_same_updates(one: Path, two: Path, step: str, *, tolerance: float) -> None:
    first, second = logs(one, step), logs(two, step)
    assert len(first) == len(second) > 0
    for number, (expected, actual) in enumerate(zip(first, second, strict=True)):
        assert actual == pytest.approx(expected, rel=1e-3, abs=tolerance), f"{step}, line {number}"
    for name, value in weights(one, step).items():
        torch.testing.assert_close(weights(two, step)[name], value, rtol=0, atol=tolerance, msg=f"{step}: {name}")


def assert_same_scores(one: Path, two: Path) -> None:
    """Compare the candidates' scores of the evaluation: processes divide its prompts and gather them in order."""
    summaries = [json.loads((home / "runs" / "pair" / "latest" / "summary.json").read_text()) for home in (one, two)]
    for name, candidate in summaries[0]["candidates"].items():
        for key in ("scores", "kl"):
            assert summaries[1]["candidates"][name].get(key) == pytest.approx(candidate.get(key), rel=1e-3, abs=1e-3), (name, key)


def test_two_processes_compute_the_updates_of_one(alone: Path, pair: Path) -> None:
    """Rounding depends on the shape of a batch. It grows with the optimizer steps, and from sft to the steps that use it."""
    assert_same_updates(alone, pair, "sft", tolerance=2e-5)
    assert_same_updates(alone, pair, "preference", tolerance=1e-4)
    assert_same_updates(alone, pair, "aligned", tolerance=5e-4)
    assert_same_updates(alone, pair, "direct", tolerance=1e-4)
    assert_same_scores(alone, pair)


def test_each_process_scores_its_own_rows(pair: Path, server: Server) -> None:
    """A function and a server get the columns of each row. The server scores while the processes sample."""
    lines = (pair / "runs" / "pair" / "latest" / "aligned" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["rewards/about"] == 1.0 and line["rewards/far"] < 100.0 and "time/scoring_hidden_s" in line
    assert 7 in {len(body["prompts"]) for body in server.bodies}  # half of the 14 episodes


def test_sharding_over_two_processes_does_not_change_the_updates(workdir: Path, alone: Path) -> None:
    """FSDP2 with gloo, by the shipped accelerate config. Sampling does not wait for the other process, so it cannot hang."""
    done = start(workdir, "sharded", *SHARDED, AT_CALL="1", IN_PROCESS="0", WHAT="lists")
    assert done.returncode == 0, done.stderr
    assert (workdir / "sharded_rewards.txt").read_text() == "1 of 1"  # the reward model, which shares no weights with the policy
    home = workdir / "sharded"
    summary = json.loads((home / "runs" / "pair" / "latest" / "summary.json").read_text())
    assert summary["environment"]["sharded"] and summary["environment"]["num_processes"] == 2
    assert_same_updates(alone, home, "sft", tolerance=2e-5)
    assert_same_updates(alone, home, "preference", tolerance=1e-4)
    assert_same_updates(alone, home, "aligned", tolerance=5e-4)
    assert_same_updates(alone, home, "direct", tolerance=1e-4)
    assert_same_scores(alone, home)


def test_there_is_one_summary_and_one_version_of_each_model(pair: Path) -> None:
    summary = json.loads((pair / "runs" / "pair" / "latest" / "summary.json").read_text())
    assert summary["finished"] and summary["environment"]["num_processes"] == 2
    assert [step["name"] for step in summary["steps"]] == ["sft", "preference", "aligned", "direct", "verdict"]
    assert [record.ref for record in Registry(pair / "registry").records()] == [
        "pair/aligned@1",
        "pair/direct@1",
        "pair/preference@1",
        "pair/sft@1",
    ]
    assert len([path for path in (pair / "runs" / "pair").iterdir() if not path.is_symlink()]) == 1


def test_processes_sample_different_rows_with_the_results_of_one_process(alone: Path, pair: Path) -> None:
    samples = [(home / "runs" / "pair" / "latest" / "aligned" / "samples.jsonl").read_text().splitlines() for home in (alone, pair)]
    texts = [[json.loads(line)["completion"] for line in lines] for lines in samples]
    assert len(texts[0]) == 70 and texts[0] == texts[1]
    # The episodes of the first rollout by process: with equal random streams, the completions would be equal.
    assert texts[1][0:14:2] != texts[1][1:14:2]


def test_dead_process_ends_the_others_and_one_process_can_resume(workdir: Path, alone: Path, pair: Path) -> None:
    shutil.copytree(pair / "registry", workdir / "cut" / "registry")
    Registry(workdir / "cut" / "registry").remove("pair/aligned")
    began = time.monotonic()
    done = start(workdir, "cut", *TWO, AT_CALL="3", IN_PROCESS="1", WHAT="dies")
    assert time.monotonic() - began < 100  # including the start; ending takes a moment
    assert done.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by SIGKILL; the others were ended with it" in done.stderr
    assert "Traceback" not in done.stderr

    stopped = start(workdir, "cut", *TWO, AT_CALL="2", IN_PROCESS="0", WHAT="stops")
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "resuming after iteration 2" in stopped.stdout
    command = "accelerate launch --cpu --num_processes 2 -m stages run pair.yaml --home cut"
    assert f"stopped by SIGTERM; completed work is kept. To continue: {command}" in stopped.stderr

    resumed = start(workdir, "cut", *ONE)  # with another number of processes
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after iteration 3" in resumed.stdout
    assert_same_updates(alone, workdir / "cut", "aligned", tolerance=5e-4)


def test_error_of_one_process_is_reported(workdir: Path, pair: Path) -> None:
    shutil.copytree(pair / "registry", workdir / "raising" / "registry")
    Registry(workdir / "raising" / "registry").remove("pair/aligned")
    done = start(workdir, "raising", *TWO, AT_CALL="1", IN_PROCESS="1", WHAT="raises")
    assert done.returncode == 2
    said = "reward function pair_reward:vowels raised ValueError: no reward today"
    assert f"process 1: error: pair/aligned: iteration 0: {said}" in done.stderr
    assert "Traceback" not in done.stderr
