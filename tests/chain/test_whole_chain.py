"""All stages in one chain on a few rows of the embedded world: a run, a second run, an override, and a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import check_declared

REPOSITORY = Path(__file__).resolve().parents[2]

RECIPE = """
name: tiny
seed: 3
steps:
  - stage: pretraining
    name: base
    architecture: {type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
    tokenizer: {vocab_size: 400}
    block_size: 64
    precision: fp32
    data: {train: {path: "world:raw", limit: 200}, validation: {path: "world:raw/validation", limit: 20}}
    training: {epochs: 1, batch_size: 8, microbatch_size: 8}
  - stage: sft
    name: sft
    model: base
    precision: fp32
    template: "Request: {prompt}\\nReview:"
    data: {train: {path: "world:demonstrations", limit: 64}, validation: {path: "world:demonstrations/validation", limit: 16}}
    training: {epochs: 1, batch_size: 8, microbatch_size: 8}
  - stage: sentiment
    name: taste
    precision: fp32
    architecture: {type: distilbert, dim: 32, hidden_dim: 64, n_layers: 1, n_heads: 2}
    tokenizer: {vocab_size: 300}
    max_length: 64
    data: {train: {path: "world:reviews", limit: 64}, validation: {path: "world:reviews/validation", limit: 32}}
    training: {learning_rate: 1.0e-3, epochs: 1, batch_size: 8, microbatch_size: 8}
  - stage: reward_model
    name: preference
    model: sft
    precision: fp32
    data: {train: {path: "world:comparisons", limit: 24}, validation: {path: "world:comparisons/validation", limit: 8}}
    training: {learning_rate: 1.0e-3, batch_size: 4, microbatch_size: 4}
  - stage: ppo
    name: aligned
    policy: sft
    precision: fp32
    reward: [{model: preference}, {model: taste, label: positive, weight: 0.1}]
    data: "world:prompts"
    generation: {max_new_tokens: 12}
    total_episodes: 64
    rollout_batch_size: 16
    minibatch_size: 8
    microbatch_size: 8
    ppo_epochs: 2
    checkpoint_seconds: 0
  - stage: dpo
    name: dpo
    model: sft
    precision: fp32
    data: {train: {path: "world:comparisons", limit: 24}, validation: {path: "world:comparisons/validation", limit: 8}}
    pairs_per_prompt: 1
    training: {batch_size: 8, microbatch_size: 4, learning_rate: 1.0e-4}
  - stage: evaluation
    name: verdict
    precision: fp32
    candidates:
      base: base
      prompted: {model: base, few_shot: {data: "world:demonstrations", num_examples: 1}}
      sft: sft
      best: {model: sft, best_of: {n: 4, reward: {model: preference}}}
      dpo: dpo
      aligned: aligned
    data: "world:prompts/heldout"
    num_prompts: 8
    generation: {max_new_tokens: 12}
    judges: [{function: "stages.corpora.world.gold:score_batch", name: gold}, {model: preference}]
    kl_reference: sft
    perplexity: {path: "world:raw/heldout", limit: 10}
"""


def command(recipe: Path, home: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "stages", "run", str(recipe), "--home", str(home), *overrides]


def start(recipe: Path, home: Path, *overrides: str) -> dict[str, Any]:
    done = subprocess.run(command(recipe, home, *overrides), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((home / "runs" / "tiny" / "latest" / "summary.json").read_text())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    home = tmp_path_factory.mktemp("home")
    return home, start(recipe, home)


def models(summary: dict[str, Any]) -> dict[str, Any]:
    return {step["name"]: step["model"] for step in summary["steps"]}


def test_summary_has_the_documented_fields(undisturbed) -> None:
    home, summary = undisturbed
    assert summary["finished"] and summary["wall_seconds"] > 0 and summary["peak_memory_bytes"] > 2**27
    assert [step["stage"] for step in summary["steps"]] == ["pretraining", "sft", "sentiment", "reward_model", "ppo", "dpo", "evaluation"]
    assert not any(step["reused"] for step in summary["steps"])
    assert set(summary["candidates"]) == {"base", "prompted", "sft", "best", "dpo", "aligned"}
    assert len(summary["win_rates"]) == 2 * 6 * 5
    folder = home / "runs" / "tiny" / "latest" / "verdict"
    assert (folder.parent / "report.html").exists() and len((folder / "completions.jsonl").read_text().splitlines()) == 8
    assert summary["candidates"]["sft"]["kl"] == pytest.approx(0, abs=1e-3)


def test_every_logged_metric_has_a_meaning(undisturbed) -> None:
    home, _ = undisturbed
    logged = {name for path in home.glob("runs/tiny/latest/*/metrics.jsonl") for line in path.open() for name in json.loads(line)}
    assert {"policy/kl", "rewards/preference", "heldout/perplexity", "train/rewards/margins"} <= logged
    check_declared(logged - {"step"})


def test_a_second_run_reuses_everything(undisturbed, recipe) -> None:
    home, first = undisturbed
    began = time.monotonic()
    second = start(recipe, home)
    assert time.monotonic() - began < 60
    assert all(step["reused"] for step in second["steps"])
    assert models(second) == models(first) and second["win_rates"] == first["win_rates"]


def test_changed_setting_reruns_dependent_steps(undisturbed, recipe) -> None:
    home, first = undisturbed
    changed = start(recipe, home, "aligned.kl_coef=0.2")
    assert {step["name"]: step["reused"] for step in changed["steps"]} == {
        "base": True,
        "sft": True,
        "taste": True,
        "preference": True,
        "aligned": False,
        "dpo": True,
        "verdict": False,
    }
    assert "kl.coef (0.05 -> 0.2)" in changed["steps"][4]["reason"]


def test_repeatedly_killed_run_produces_the_same_models(undisturbed, recipe, tmp_path) -> None:
    _, calm = undisturbed
    kills = 0
    for seconds in (9.0, 11.0, 13.0):
        process = subprocess.Popen(
            command(recipe, tmp_path), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills > 0
    assert models(start(recipe, tmp_path)) == models(calm)
