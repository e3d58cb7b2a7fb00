"""Every stage that trains with a Trainer resumes bitwise: weights, logs and metrics equal those of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.dpo import run as dpo
from stages.errors import Stopped
from stages.pretraining import run as pretraining
from stages.reward_model import run as reward_model
from stages.sentiment import run as sentiment
from stages.sft import run as sft
from stages.training.checkpoints import Checkpoints

TIMES = ("train_seconds", "steps_per_second", "tokens_per_second")
RANKED = ("prompt", "completions", "ranks")
THINGS = ("film", "plot", "music", "ending", "acting")
STAGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # Dropout uses the random stream of the process. Packing and masking are the most complicated ways to make a batch.
    "pretraining": (
        pretraining,
        pretraining.PretrainingConfig,
        {
            "architecture": {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
            "tokenizer": {"vocab_size": 300},
            "block_size": 16,
            "training": {"epochs": 6.0, "batch_size": 8, "microbatch_size": 4},
        },
    ),
    "sft": (
        sft,
        sft.SFTStepConfig,
        {
            "model": "base",
            "lora": {"r": 2, "dropout": 0.2},
            "training": {"epochs": 2.0, "batch_size": 6, "microbatch_size": 2},
        },
    ),
    "sft packed": (
        sft,
        sft.SFTStepConfig,
        {
            "model": "base",
            "packing": True,
            "max_length": 128,
            "training": {"epochs": 3.0, "batch_size": 4, "microbatch_size": 2},
        },
    ),
    "reward_model": (
        reward_model,
        reward_model.RewardModelConfig,
        {
            "model": "base",
            "training": {"learning_rate": 1e-3, "epochs": 2.0, "batch_size": 6, "microbatch_size": 3},
        },
    ),
    "dpo": (
        dpo,
        dpo.DPOStepConfig,
        {
            "model": "base",
            "lora": {"r": 2, "dropout": 0.2},
            "training": {"learning_rate": 1e-3, "epochs": 2.0, "batch_size": 10, "microbatch_size": 5},
        },
    ),
    "sentiment": (
        sentiment,
        sentiment.SentimentConfig,
        {
            "architecture": {"type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
            "max_length": 24,
            "tokenizer": {"vocab_size": 120},
            "training": {"epochs": 2.0, "batch_size": 8, "microbatch_size": 4},
            "masked": {"training": {"epochs": 2.0, "batch_size": 8, "microbatch_size": 8}},
        },
    ),
}


class Killed(BaseException):
    """As SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One file with the columns of all stages."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "prompt": f"write a line about the {thing} {number}:",
            "completion": f"the {thing} was a joy" + " indeed" * number,
            "text": f"the {thing} was {'dull' if number % 2 else 'a joy'}, they said" + " again" * number,
            "label": number % 2,
            "completions": [f"the {thing} was a joy", f"the {thing} was dull", "write"][: 2 + number % 2],
            "ranks": [0, 1, 1][: 2 + number % 2],
        }
        for number in range(6)
        for thing in THINGS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(stage: str, data: str, **more: Any) -> Any:
    _, kind, fields = STAGES[stage]
    columns = {"reward_model": RANKED, "dpo": RANKED, "sentiment": ("text", "label"), "pretraining": ("text",)}
    wanted = columns.get(stage, ("prompt", "completion"))
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    own = Path(data).with_name(f"{stage}.jsonl")
    own.write_text("".join(json.dumps({name: row[name] for name in wanted}) + "\n" for row in rows))
    source = {"train": str(own), "validation_fraction": 0.2}
    return kind.model_validate({"name": "step", "precision": "fp32", "data": source, "checkpoint_seconds": 1e9, **fields, **more})


def run(stage: str, data: str, context: Any) -> dict[str, Any]:
    result = STAGES[stage][0].run(config_of(stage, data), context)
    return {
        "weights": load_file(next(path for path in result.model.path.glob("*.safetensors") if "head" not in path.name)),
        "metrics": {name: value for name, value in result.metrics.items() if name not in TIMES},
        "logs": (context.folder / "metrics.jsonl").read_text().splitlines(),
    }


@pytest.fixture(scope="module")
def finished() -> dict[str, Any]:
    return {}


@pytest.fixture
def uninterrupted_run(data, step_context, resolve_folder, tiny_llama_folder, finished) -> Callable[[str], dict[str, Any]]:
    def make(stage: str) -> dict[str, Any]:
        if stage not in finished:
            finished[stage] = run(stage, data, step_context("test/uninterrupted", 5, {"model": resolve_folder(tiny_llama_folder)}))
        return finished[stage]

    return make


@pytest.mark.parametrize("ending", ["killed", "SIGTERM"])
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_equals_an_uninterrupted_one(
    data, uninterrupted_run, step_context, resolve_folder, tiny_llama_folder, monkeypatch, stage, ending
) -> None:
    models = {"model": resolve_folder(tiny_llama_folder)}
    context = step_context("test/cut", 5, models)
    steps = 0

    def is_due(self: Checkpoints) -> bool:  # called once after every optimizer step
        nonlocal steps
        steps += 1
        if steps in (3, 6):
            if ending == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return ending == "killed" and steps % 2 == 0

    monkeypatch.setattr(Checkpoints, "is_due", is_due)
    for _ in range(2):  # the second cut is in the second epoch, or in another phase
        with pytest.raises(Killed if ending == "killed" else Stopped), context.runtime.stop.installed():
            run(stage, data, context)
        context.close()
        context.runtime.stop.number = None
    again = step_context("test/again", 5, models)  # the chain makes a new run folder for every attempt
    again.checkpoint_folder = context.checkpoint_folder
    torch.manual_seed(999)  # as if the process had used random numbers in between
    resumed, uninterrupted = run(stage, data, again), uninterrupted_run(stage)
    assert resumed["weights"].keys() == uninterrupted["weights"].keys()
    for name, expected in uninterrupted["weights"].items():
        assert torch.equal(resumed["weights"][name], expected), name
    assert resumed["metrics"] == uninterrupted["metrics"]
    if stage != "sentiment":  # its masked phase is finished and not logged again
        assert resumed["logs"] == uninterrupted["logs"]


def test_adapter_checkpoints_contain_only_the_adapter(data, step_context, resolve_folder, tiny_llama_folder, monkeypatch) -> None:
    context = step_context("test/lora", 5, {"model": resolve_folder(tiny_llama_folder)})
    monkeypatch.setattr(Checkpoints, "is_due", lambda self: True)
    run("sft", data, context)
    kept = sorted(context.checkpoint_folder.glob("checkpoint-*"))
    assert len(kept) == 2  # keep_last
    assert all("lora_" in name for name in load_file(kept[-1] / "weights.safetensors"))
    assert {path.suffix for path in kept[-1].iterdir()} == {".safetensors", ".json"}


def test_best_and_last_checkpoints_are_both_published(data, step_context, resolve_folder, tiny_llama_folder) -> None:
    context = step_context("test/step", 5, {"model": resolve_folder(tiny_llama_folder)})
    settings = {"learning_rate": 3e-2, "schedule": "constant", "epochs": 10.0, "batch_size": 6}  # too high: it gets worse again
    config = config_of("reward_model", data, keep_best=1)
    config = config.model_copy(update={"training": config.training.model_copy(update=settings)})
    result = reward_model.run(config, context)
    best = context.registry.get("test/step-best")
    assert best.manifest["metrics"]["heldout_loss"] <= result.metrics["heldout_loss"]
    assert best.digest != result.model.digest or best.manifest["metrics"]["optimizer_step"] == result.metrics["optimizer_steps"]
