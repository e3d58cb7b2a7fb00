"""How a recipe names a reward source, or a judge: a model of the registry, the hub or a folder, or a Python function."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from stages.config import ModelField, ModelInput, Strict

ENDPOINT_FIELDS = {
    "protocol", "served_model", "columns", "label_column", "api_key_variable", "concurrency", "on_failure", "cache",
}  # fmt: skip


class RewardInput(Strict):
    """One source of scores. Exactly one of ``model``, ``function``, ``endpoint`` and ``ensemble``."""

    model: ModelField | None = Field(None, description="A reward model, or a classifier (then set label).")
    function: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="package.module:function. It is called with lists of prompts and completions, and with what else its parameters name: "
        "columns of the data, messages, completion_ids. It returns one score per completion, or None where it does not apply.",
    )
    endpoint: str | None = Field(
        None, pattern=r"^https?://\S+$", description="A server that scores, by the address of the call: http://localhost:5000/get_reward."
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
    output: Literal["logit", "probability", "logprob"] = Field(
        "logit",
        description="Classifier: what of the label counts as its score. The probability is a softmax, or a sigmoid for a model of several "
        "labels at once (problem_type in its config) or of one label; a regression has a logit alone, which is its value.",
    )
    reads: Literal["completion", "prompt_and_completion"] = Field(
        "prompt_and_completion",
        description="Classifier: the text it is shown; where that is too long, its beginning is cut. A reward model always sees prompt and "
        "completion.",
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
    retries: int | None = Field(
        None, ge=0, description="function, endpoint: further attempts after a failure or time-out. null: 0 for a function, else 4."
    )
    backoff_seconds: float = Field(1.0, ge=0, description="function, endpoint: wait before the first retry, doubled for each.")
    protocol: Literal["openrlhf", "classify", "pooling", "score"] = Field(
        "openrlhf",
        description="endpoint: what it speaks. openrlhf: OpenRLHF's remote reward model and `stages serve`; classify, pooling and score: "
        "vLLM's addresses of those names.",
    )
    served_model: str | None = Field(None, min_length=1, description="endpoint: the model's name there, where it has several.")
    columns: list[str] = Field([], description="endpoint, openrlhf: columns of the data that are sent along.")
    label_column: str | None = Field(None, description="endpoint, openrlhf: the column that is sent as labels.")
    api_key_variable: str | None = Field(
        None, pattern=r"^[A-Za-z_]\w*$", description="endpoint: environment variable with the key; it is read there and written nowhere."
    )
    concurrency: int = Field(8, ge=1, description="endpoint: requests under way at once.")
    on_failure: Literal["stop", "wait"] = Field(
        "stop", description="endpoint: after all retries, end the run with its episodes kept, or say so and ask again until it answers."
    )
    cache: bool = Field(True, description="endpoint: keep scores on disk by what was asked; false for a server whose scores change.")

    @model_validator(mode="after")
    def _one_kind(self) -> RewardInput:
        if [self.model, self.function, self.endpoint, self.ensemble].count(None) != 3:
            raise ValueError("give exactly one of model, function, endpoint and ensemble")
        if self.endpoint is not None:
            self._check_endpoint(self.endpoint)
        elif given := ENDPOINT_FIELDS & self.model_fields_set:
            raise ValueError(f"{', '.join(sorted(given))} belongs to an endpoint")
        elif self.model is None and self.label is not None:
            raise ValueError("label belongs to a classifier, and no model was given")
        if self.retries and self.function is None and self.endpoint is None:
            raise ValueError("retries belongs to a function or an endpoint; a model gives the same score every time")
        if self.level == "token" and (self.label is not None or self.ensemble is not None or self.endpoint is not None):
            raise ValueError("level: token goes with a reward model or a function, not with a classifier, an endpoint or an ensemble")
        if self.ensemble is not None:
            if self.name is None:
                raise ValueError("an ensemble needs a name")
            if any(member.ensemble is not None or member.level == "token" for member in self.ensemble):
                raise ValueError("a member of an ensemble is a model or a function that scores whole completions")
            check_names(self.ensemble, "ensemble")
        elif self.combine != "mean":
            raise ValueError(f"combine: {self.combine} belongs to an ensemble")
        return self

    def _check_endpoint(self, address: str) -> None:
        """Raise ValueError where fields of an endpoint contradict each other."""
        if "@" in address.partition("://")[2].partition("/")[0]:
            raise ValueError("endpoint holds a password, which would be written to logs and reports; name a variable by api_key_variable")
        if self.protocol == "classify":
            if not isinstance(self.label, int) or self.output == "logit":
                raise ValueError("protocol: classify needs label, the number of the class, and output: probability or logprob")
        elif self.label is not None:
            raise ValueError(f"label belongs to protocol: classify, got {self.protocol}")
        if self.protocol != "openrlhf" and (self.columns or self.label_column):
            raise ValueError(f"columns and label_column belong to protocol: openrlhf, got {self.protocol}")

    @property
    def shown_name(self) -> str:
        """The name in metrics and reports."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return self.function.rpartition(":")[2]
        if self.endpoint is not None:
            return re.sub(r"[^\w.-]+", "-", self.endpoint.partition("://")[2]).strip("-")
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
