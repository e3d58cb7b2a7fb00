"""Settings for collecting new comparisons: whose completions, of which prompts, and who ranks them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from stages.config import DataField, DataSource, GenerationSettings, ModelField, ModelInput, Strict
from stages.corpora.labels import MOST_COMPLETIONS
from stages.corpora.prompts import load_prompt_rows
from stages.errors import DataError
from stages.labelling.config import AskPeople, People
from stages.rewards.config import RewardInput, check_rubrics, reward_model_inputs, rubric_inputs
from stages.rewards.signature import columns_asked_for


class CollectedPolicy(Strict):
    """A policy whose completions are compared. A bare string is its reference."""

    model: ModelField = Field(description="A language model.")
    weight: float = Field(1.0, gt=0, description="This policy's share of the completions, relative to the other weights.")


def _policies(value: object) -> object:
    items = value if isinstance(value, list) else [value]
    return [{"model": item} if isinstance(item, str) or (isinstance(item, dict) and "ref" in item) else item for item in items]


def _judge_kind(value: object) -> str:
    return "people" if "people" in (value if isinstance(value, dict) else vars(value)) else "reward"


JudgeOrPeople = Annotated[Annotated[RewardInput, Tag("reward")] | Annotated[AskPeople, Tag("people")], Discriminator(_judge_kind)]


SHORT_NAMES = {"prompts": "data", "per_prompt": "completions_per_prompt"}


class Collection(Strict):
    """Comparisons made by this step. Each prompt's completions come from all policies, in proportion to their weights.

    ``prompts`` and ``per_prompt`` are short for ``data`` and ``completions_per_prompt``.
    """

    policies: Annotated[list[CollectedPolicy], BeforeValidator(_policies)] = Field(
        min_length=1, description="Policies to sample from; in the paper mostly the SFT model, partly PPO policies."
    )
    data: DataField = Field(description="Prompts.")
    num_prompts: int = Field(256, ge=1, description="Number of prompts, drawn with the seed.")
    completions_per_prompt: int = Field(4, ge=2, description="K: distinct completions per comparison.")
    judge: JudgeOrPeople = Field(
        description="A function or model that scores (prompt, completion), higher is better; or people: {people: {...}}."
    )
    tie_width: float = Field(
        0.0, ge=0, description="If two successive scores of the sorted completions differ by at most this, they share a rank."
    )
    only_ended: bool = Field(
        False, description="Show only completions with an end token to the judge (Ziegler et al. 2019); sample the others again."
    )
    attempts: int = Field(4, ge=1, description="Maximum draws per completion until it ends and is distinct.")
    generation: GenerationSettings = Field(GenerationSettings(), description="How to sample.")

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        for short, name in SHORT_NAMES.items():
            if short in value and name in value:
                raise ValueError(f"collect.{short} and collect.{name} are the same setting; remove one of them")
        return {SHORT_NAMES.get(name, name): item for name, item in value.items()}

    @model_validator(mode="after")
    def _scores_texts(self) -> Collection:
        if isinstance(self.judge, AskPeople):
            if self.completions_per_prompt > MOST_COMPLETIONS:
                raise ValueError(
                    f"completions_per_prompt={self.completions_per_prompt}: people rank at most {MOST_COMPLETIONS} at a time; lower it"
                )
            if self.tie_width:
                raise ValueError("tie_width needs a judge that scores; people set ties themselves. Remove tie_width")
            target = self.judge.people.target
            if target is not None and target > self.num_prompts:
                raise ValueError(
                    f"judge.people.target={target} is more than num_prompts={self.num_prompts}, with one task per prompt; "
                    "lower target, or raise num_prompts"
                )
        elif self.judge.ensemble is not None or self.judge.level == "token":
            raise ValueError("collect.judge must be a single model or function with one score per completion")
        return self

    @property
    def people(self) -> People | None:
        """The settings of the annotators, if people rank."""
        return self.judge.people if isinstance(self.judge, AskPeople) else None

    def model_inputs(self) -> dict[str, ModelInput]:
        """The models of policies and judge, by field path within the step."""
        inputs = {f"collect.policies[{index}].model": policy.model for index, policy in enumerate(self.policies)}
        if isinstance(self.judge, AskPeople):
            model = self.judge.people.reward_model
            return inputs if model is None else {**inputs, "collect.judge.people.reward_model": model}
        judge = reward_model_inputs([self.judge], "collect.judge")
        return inputs | {field_path.replace("[0]", ""): model for field_path, model in judge.items()}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        """Prompts and the annotators' material, by field path within the step."""
        if isinstance(self.judge, AskPeople):
            return {"collect.data": self.data, **self.judge.people.data_inputs("collect.judge.people")}
        rubrics = rubric_inputs([self.judge], "collect.judge").items()
        return {"collect.data": self.data, **{path.replace("[0]", "", 1): rubric for path, rubric in rubrics}}

    def check_data(self) -> None:
        """Raise DataError for files that this collection cannot use. No model is loaded."""
        judges = [self.judge] if isinstance(self.judge, RewardInput) else []
        check_rubrics(judges)
        prompts = load_prompt_rows(self.data, columns=columns_asked_for(judges, run=False))
        if self.people is None:
            return
        self.people.check()
        num_prompts = min(len(prompts), self.num_prompts)
        if self.people.target is not None and self.people.target > num_prompts:
            raise DataError(f"collect.judge.people.target is {self.people.target}, but the data has {num_prompts} prompts (one task each)")
