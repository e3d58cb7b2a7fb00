"""One class per stage, to run single steps from a Python program. Fields are those of the recipe (docs/settings.md).

from stages import PPO

result = PPO(policy=(model, tokenizer), reward=my_function, data=prompts, total_episodes=512).train()
aligned, tokenizer = result.load()
"""

from __future__ import annotations

from pathlib import Path

from stages.api.results import Model, Results
from stages.api.running import Log, run
from stages.json_types import JsonObject


class Step:
    """A step of one stage. Keyword arguments are the step's fields; their values may be models, data sets and functions in memory."""

    stage: str

    def __init__(self, *, name: str | None = None, **fields: object) -> None:
        self.name = name or self.stage
        self.fields = fields

    def as_dict(self) -> JsonObject:
        """The step as an entry of ``stages.run([...])``."""
        return {"stage": self.stage, "name": self.name, **self.fields}

    def _run(self, home: str | Path | None, recipe: str, seed: int, on_log: Log | None, quiet: bool) -> Results:
        return run([self.as_dict()], home=home, name=recipe, seed=seed, on_log=on_log, quiet=quiet)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, {', '.join(sorted(self.fields))})"


class TrainingStep(Step):
    """A step that makes a model."""

    def train(
        self, home: str | Path | None = None, *, recipe: str = "python", seed: int = 0, on_log: Log | None = None, quiet: bool = False
    ) -> Model:
        """Train, publish as ``<recipe>/<name>``, and return the model. An equal step that was completed before is reused.

        ``on_log(model_name, step, metrics)`` is called for every logged step. Raises StagesError for invalid input.
        """
        return self._run(home, recipe, seed, on_log, quiet).models[self.name]


class Pretraining(TrainingStep):
    """Language modelling on text: ``model``, or ``architecture`` and ``tokenizer``; ``data={"train": ...}`` with the column text."""

    stage = "pretraining"


class SFT(TrainingStep):
    """Supervised fine-tuning: ``model``, ``data={"train": ...}`` with demonstrations."""

    stage = "sft"


class RewardModel(TrainingStep):
    """A reward model: ``model`` (usually the SFT model), ``data={"train": ...}`` with comparisons."""

    stage = "reward_model"


class SentimentClassifier(TrainingStep):
    """A sequence classifier: ``model`` or ``architecture``, ``data={"train": ...}`` with the columns text and label."""

    stage = "sentiment"


class DPO(TrainingStep):
    """Direct preference optimisation: ``model``, ``data={"train": ...}`` with comparisons."""

    stage = "dpo"


class PPO(TrainingStep):
    """PPO: ``policy``, ``reward`` (a function, a reward model, or a list), ``data`` with prompts, ``total_episodes``."""

    stage = "ppo"


class Evaluation(Step):
    """Compare candidates with judges: ``candidates={"sft": ..., "aligned": ...}``, ``data`` with prompts, ``judges``."""

    stage = "evaluation"

    def run(
        self, home: str | Path | None = None, *, recipe: str = "python", seed: int = 0, on_log: Log | None = None, quiet: bool = False
    ) -> Results:
        """Sample, judge and compare. Returns win rates and the report. Raises StagesError for invalid input."""
        return self._run(home, recipe, seed, on_log, quiet)
