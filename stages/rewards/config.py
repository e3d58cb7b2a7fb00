"""How a recipe names a reward source, or a judge: a model of the registry, the hub or a folder, or a Python function."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.config import ModelField, ModelInput, Strict


class RewardInput(Strict):
    """One source of scores. Exactly one of ``model`` and ``function``."""

    model: ModelField | None = Field(None, description="A reward model, or a classifier (then set label).")
    function: str | None = Field(
        None, pattern=r"^[\w.]+:\w+$", description="package.module:function, called with lists of prompts and completions; returns scores."
    )
    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="Name in metrics and reports (default: the model's or function's).")
    weight: float = Field(1.0, description="Factor in the sum of all sources.")
    label: str | int | None = Field(None, description="Classifier: the class whose score counts, by name or number.")
    output: Literal["logit", "probability", "logprob"] = Field("logit", description="Classifier: what of the label counts as its score.")
    reads: Literal["completion", "prompt_and_completion"] = Field(
        "prompt_and_completion", description="Classifier: the text it is shown. A reward model always sees prompt and completion."
    )
    batch_size: int = Field(64, ge=1, description="Texts scored together, per process.")

    @model_validator(mode="after")
    def _one_kind(self) -> RewardInput:
        if (self.model is None) == (self.function is None):
            raise ValueError("give exactly one of model and function")
        if self.function is not None and self.label is not None:
            raise ValueError("label belongs to a classifier, and a function was given")
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


def reward_model_inputs(sources: list[RewardInput], place: str) -> dict[str, ModelInput]:
    """Model inputs of a list of sources by field path, e.g. ``reward[0].model``."""
    return {f"{place}[{index}].model": source.model for index, source in enumerate(sources) if source.model is not None}


def check_names(sources: list[RewardInput], place: str) -> None:
    """Raise ValueError where two sources would share a name in metrics."""
    names = [source.shown_name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{place}: two sources are called {name!r}; give each a name of its own")
