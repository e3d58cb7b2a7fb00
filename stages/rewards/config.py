"""How a recipe names a reward source, or a judge: a model of the registry, the hub or a folder, or a Python function."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.config import ModelField, ModelInput, Strict


class RewardInput(Strict):
    """One source of scores. Exactly one of ``model``, ``function`` and ``ensemble``."""

    model: ModelField | None = Field(None, description="A reward model, or a classifier (then set label).")
    function: str | None = Field(
        None, pattern=r"^[\w.]+:\w+$", description="package.module:function, called with lists of prompts and completions; returns scores."
    )
    ensemble: list[RewardInput] | None = Field(
        None, min_length=2, description="Several sources that judge the same thing, e.g. reward models of different seeds, made one score."
    )
    combine: Literal["mean", "min", "uncertainty"] = Field(
        "mean", description="Ensemble: mean; min (the worst case); uncertainty: mean less uncertainty_coef times the variance."
    )
    uncertainty_coef: float = Field(1.0, ge=0, description="combine: uncertainty alone (Coste et al. 2024, arXiv 2310.02743).")
    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="Name in metrics and reports (default: the model's or function's).")
    weight: float = Field(1.0, description="Factor in the sum of all sources.")
    label: str | int | None = Field(None, description="Classifier: the class whose score counts, by name or number.")
    output: Literal["logit", "probability", "logprob"] = Field("logit", description="Classifier: what of the label counts as its score.")
    reads: Literal["completion", "prompt_and_completion"] = Field(
        "prompt_and_completion", description="Classifier: the text it is shown. A reward model always sees prompt and completion."
    )
    level: Literal["completion", "token"] = Field(
        "completion",
        description="token: scores are paid where they arise instead of at the end. A reward model's: what each token adds to its score. A "
        "function's: it returns, per completion, a list of (character position, score).",
    )
    batch_size: int = Field(64, ge=1, description="Texts scored together, per process.")
    timeout_seconds: float | None = Field(
        600.0, gt=0, description="function: the longest it may take for the completions of one call, before the run ends; null: for ever."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> RewardInput:
        if [self.model, self.function, self.ensemble].count(None) != 2:
            raise ValueError("give exactly one of model, function and ensemble")
        if self.model is None and self.label is not None:
            raise ValueError("label belongs to a classifier, and no model was given")
        if self.level == "token" and (self.label is not None or self.ensemble is not None):
            raise ValueError("level: token goes with a reward model or a function, not with a classifier or an ensemble")
        if self.ensemble is not None:
            if self.name is None:
                raise ValueError("an ensemble needs a name")
            if any(member.ensemble is not None or member.level == "token" for member in self.ensemble):
                raise ValueError("a member of an ensemble is a model or a function that scores whole completions")
            check_names(self.ensemble, "ensemble")
        elif self.combine != "mean":
            raise ValueError(f"combine: {self.combine} belongs to an ensemble")
        return self

    @property
    def shown_name(self) -> str:
        """The name in metrics and reports."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return self.function.rpartition(":")[2]
        assert self.model is not None
        return self.model.ref.rstrip("/").rpartition("/")[2]


def leaves(sources: list[RewardInput], place: str) -> dict[str, RewardInput]:
    """The sources that are no ensembles, by field path: ``reward[0]``, ``reward[1].ensemble[0]``."""
    found: dict[str, RewardInput] = {}
    for index, source in enumerate(sources):
        here = f"{place}[{index}]"
        found |= {here: source} if source.ensemble is None else leaves(source.ensemble, f"{here}.ensemble")
    return found


def reward_model_inputs(sources: list[RewardInput], place: str) -> dict[str, ModelInput]:
    """Model inputs of a list of sources by field path, e.g. ``reward[0].model``."""
    return {f"{path}.model": source.model for path, source in leaves(sources, place).items() if source.model is not None}


def check_names(sources: list[RewardInput], place: str) -> None:
    """Raise ValueError where two sources would share a name in metrics."""
    names = [source.shown_name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{place}: two sources are called {name!r}; give each a name of its own")
