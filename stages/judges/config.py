"""Judges in a recipe: a reward source, a language model behind an OpenAI-compatible endpoint, people, or a file of judgements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from stages.config import DataField, DataSource, Strict
from stages.labelling.config import PeopleJudge
from stages.rewards.config import ChatEndpoint, RewardInput

SCORING = {"protocol", "served_model", "columns", "label_column", "on_failure", "cache"}
"""Fields that only an endpoint which scores single completions has."""
CRITERIA = "Which response answers the prompt better? Judge by helpfulness, truth and harmlessness, not by length or by order."


class EndpointJudge(ChatEndpoint):
    """A language model behind an OpenAI-compatible endpoint that compares two completions, in both orders."""

    name: str = Field("llm", pattern=r"^[\w.-]+$", description="Name in reports.")
    criteria: str = Field(CRITERIA, min_length=1, description="Text for the judge: what makes a response better.")
    against: Literal["last", "all"] = Field(
        "last", description="last: compare the last candidate with each of the others; all: compare all pairs."
    )
    num_prompts: int | None = Field(None, ge=1, description="Judge only this many prompts; null: all. Two requests per pair and prompt.")
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="The step ends with an error if a larger share of the comparisons has no verdict."
    )

    @property
    def shown_name(self) -> str:
        """The name in reports."""
        return self.name

    def data_input(self) -> list[DataSource] | None:
        """The file of judgements: none for an endpoint."""
        return None


class JudgementsFile(Strict):
    """Judgements from outside, usually by people: votes between two candidates, or ratings of one candidate."""

    judgements: DataField = Field(
        description="Rows of prompt + a + b + vote (a and b name candidates; vote is a, b or tie), or of prompt + candidate + score; with "
        "annotator if there are several people. Or a labelling folder of `stages label`."
    )
    name: str = Field("people", pattern=r"^[\w.-]+$", description="Name in reports.")

    @property
    def shown_name(self) -> str:
        """The name in reports."""
        return self.name

    def data_input(self) -> list[DataSource] | None:
        """The file of judgements."""
        return self.judgements


def _kind(value: object) -> str:
    """The kind of a judge. An endpoint that scores is distinguished from one that compares by its additional fields."""
    if not isinstance(value, dict):
        kinds = {EndpointJudge: "endpoint", JudgementsFile: "judgements", PeopleJudge: "people"}
        return next((name for kind, name in kinds.items() if isinstance(value, kind)), "reward")
    if "endpoint" in value:
        return "reward" if SCORING & value.keys() else "endpoint"
    return next((kind for kind in ("judgements", "people") if kind in value), "reward")


Judge = RewardInput | EndpointJudge | JudgementsFile | PeopleJudge
JudgeInput = Annotated[
    Annotated[RewardInput, Tag("reward")]
    | Annotated[EndpointJudge, Tag("endpoint")]
    | Annotated[JudgementsFile, Tag("judgements")]
    | Annotated[PeopleJudge, Tag("people")],
    Discriminator(_kind),
]
"""A judge of an evaluation. Its fields determine its kind."""


def check_judges(judges: Sequence[Judge]) -> None:
    """Raise ValueError if two judges have the same name in reports."""
    names = [judge.shown_name for judge in judges]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"judges: two have the name {name!r}; give each one a different name")
