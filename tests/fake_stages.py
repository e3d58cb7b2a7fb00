"""Stages that make models without training, for tests of chain and commands. A test copies this file to its folder and imports it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from stages.config import DataField, DataSource, ModelField, ModelInput, StepConfig
from stages.errors import DataError
from stages.recipe.schema import STAGES, Stage
from stages.step import StepContext, StepResult


class TrainConfig(StepConfig):
    stage: Literal["train"] = "train"
    model: ModelField | None = None
    data: DataField
    rate: float = 1.0
    stop_after: int | None = None  # raise an error there, as if the machine had failed

    def model_inputs(self) -> dict[str, ModelInput]:
        return {"model": self.model} if self.model is not None else {}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        return {"data": self.data}

    def check_data(self) -> None:
        for source in self.data:
            if not Path(source.path).read_text():
                raise DataError(f"{source.path}: no rows; expected at least one")


def train(config: TrainConfig, context: StepContext) -> StepResult:
    """Three counted steps with a checkpoint after each. The weights depend on the parts of the fingerprint, but not on paths."""
    checkpoint = context.checkpoint_folder / "step.json"
    first = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(first, 3):
        if config.stop_after == step and first == 0:
            raise RuntimeError("the machine failed")
        context.log(step, {"train/loss": 1.0 / (step + 1)})
        checkpoint.write_text(json.dumps(step + 1))
    content = {
        "data": [Path(source.path).read_text() for source in config.data],
        "model": context.models["model"].digest if config.model else None,
        "rate": int(config.rate),  # a rate of 1.5 gives the same weights as 1.0
        "seed": context.seed,
    }

    def save(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(json.dumps(content))

    metrics = {"loss": 0.5, "first_step": first, "heldout_error": config.rate + context.seed / 100}
    return StepResult(context.publish(save, role="language_model", metrics=metrics), metrics)


class JudgeConfig(StepConfig):
    stage: Literal["judge"] = "judge"
    candidates: dict[str, ModelField]
    question: str = "which is better?"

    def model_inputs(self) -> dict[str, ModelInput]:
        return {f"candidates.{name}": model for name, model in self.candidates.items()}


def judge(config: JudgeConfig, context: StepContext) -> StepResult:
    candidates: dict[str, Any] = {name: {"scores": {"gold": 0.5}, "digest": model.ref} for name, model in config.candidates.items()}
    win_rates = [{"a": "sft", "b": "base", "judge": "gold", "win_rate": 0.7, "ci_low": 0.6, "ci_high": 0.8, "n": 100}]
    scores = {"gold": dict.fromkeys(config.candidates, 0.5)}
    line = {"prompt": config.question, "completions": dict.fromkeys(config.candidates, "a completion"), "scores": scores}
    (context.folder / "completions.jsonl").write_text(json.dumps(line) + "\n")
    evaluation = {
        "verdict": "sft beats base",
        "prompts": 1,
        "samples_per_prompt": 1,
        "candidates": candidates,
        "win_rates": win_rates,
        "judges": [{"name": "gold", "kind": "reward"}],
    }
    (context.folder / "evaluation.json").write_text(json.dumps(evaluation))
    return StepResult(None, {"judged": len(candidates)}, {"candidates": candidates, "win_rates": win_rates})


def install() -> None:
    """Register the stages in this process."""
    STAGES["train"] = Stage(f"{__name__}:TrainConfig", f"{__name__}:train")
    STAGES["judge"] = Stage(f"{__name__}:JudgeConfig", f"{__name__}:judge", makes_model=False)
