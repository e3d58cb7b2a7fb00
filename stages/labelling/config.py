"""Recipe settings for human rankings, and the questions that the page asks (a YAML file next to the recipe)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.config import DataField, DataSource, ModelField, Strict
from stages.errors import DataError
from stages.labelling.tasks import read_gold


class Rating(Strict):
    """A Likert scale. Annotators rate every completion on it."""

    name: str = Field(pattern=r"^[\w-]+$", description="Name in the answers.")
    text: str = Field(min_length=1, description="What is asked.")
    lowest: int = Field(1, description="First number of the scale.")
    highest: int = Field(7, description="Last number of the scale.")
    low: str = Field("", description="What the first number means.")
    high: str = Field("", description="What the last number means.")
    required: bool = Field(True, description="Whether an answer needs it.")

    @model_validator(mode="after")
    def _scale(self) -> Rating:
        if not 1 <= self.highest - self.lowest <= 10:
            raise ValueError(f"rating {self.name}: the scale {self.lowest} to {self.highest} is invalid; expected 2 to 11 numbers")
        return self


class Check(Strict):
    """A check box that is shown for every completion."""

    name: str = Field(pattern=r"^[\w-]+$", description="Name in the answers.")
    text: str = Field(min_length=1, description="Text next to the box.")


class Questions(Strict):
    """The questions about the completions of a prompt: the ranking, and optional ratings, check boxes and notes."""

    title: str = Field("Rank the answers", min_length=1, description="Heading of the page.")
    ranking: str = Field("Rank the answers from best to worst.", min_length=1, description="The question that the ranking answers.")
    ties: bool = Field(True, description="Whether answers may share a rank.")
    ratings: list[Rating] = Field([], description="Likert scales.")
    checks: list[Check] = Field([], description="Check boxes.")
    notes: bool = Field(False, description="Whether the page has a field for a note about the task.")

    @model_validator(mode="after")
    def _names(self) -> Questions:
        names = [rating.name for rating in self.ratings] + [check.name for check in self.checks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two questions have the name {name!r}; give each one a different name")
        return self

    @property
    def check_names(self) -> list[str]:
        """The names of the check boxes."""
        return [check.name for check in self.checks]


def _file(value: object) -> object:
    if isinstance(value, str):
        return {"path": value}
    raise ValueError(f"expected the path of a file, got {value!r}")


FileField = Annotated[DataSource, BeforeValidator(lambda value: value if isinstance(value, DataSource) else _file(value))]
"""The path of one local file."""


class SimulatedPeople(Strict):
    """A function that replaces the annotators. It answers over the same HTTP interface as the page, so a recipe can run without people."""

    function: str = Field(
        pattern=r"^[\w.]+:\w+$", description="package.module:function, called with annotator, prompt and completions; returns scores."
    )
    tie_width: float = Field(
        0.0, ge=0, description="If two successive scores of the sorted completions differ by at most this, they share a rank."
    )


class People(Strict):
    """Settings for people who rank completions on the page of ``stages label``."""

    questions: FileField | None = Field(None, description="YAML file with the questions. null: only the ranking.")
    instructions: FileField | None = Field(None, description="Markdown file with the instructions for annotators.")
    annotators: int = Field(2, ge=1, description="Number of people who rank each overlap task.")
    overlap: float = Field(0.2, ge=0, le=1, description="Share of the tasks that several people rank, to measure their agreement.")
    target: int | None = Field(None, ge=1, description="Number of tasks that must be ranked before the recipe continues. null: all.")
    gold: DataField | None = Field(
        None,
        description="Screening tasks: prompt + completions + ranks (+ checks). Annotators answer them first. null: no screening.",
    )
    pass_mark: float = Field(0.75, ge=0, le=1, description="Minimum share of agreement with the gold answers to pass the screening.")
    reward_model: ModelField | None = Field(
        None, description="The reward model of the last round. Reports show its agreement with people, who never see its scores."
    )
    simulate: SimulatedPeople | None = Field(None, description="A function that replaces the people. null: people answer.")

    def data_inputs(self, field_path: str) -> dict[str, list[DataSource]]:
        """The input files by field path. ``field_path``: the path of this object."""
        files = {"questions": self.questions, "instructions": self.instructions}
        inputs = {f"{field_path}.{name}": [source] for name, source in files.items() if source is not None}
        return inputs | ({f"{field_path}.gold": self.gold} if self.gold is not None else {})

    def check(self) -> None:
        """Raise DataError if a file cannot be used."""
        questions = load_questions(self.questions)
        load_instructions(self.instructions)
        if self.gold is not None:
            read_gold(self.gold, questions.check_names)


class AskPeople(Strict):
    """A judge that asks people: ``judge: {people: {...}}``."""

    people: People = Field(description="The people, and the questions to them.")


class PeopleJudge(AskPeople):
    """People as a judge of an evaluation. They see the completions of the candidates side by side, without the candidates' names."""

    name: str = Field("people", pattern=r"^[\w.-]+$", description="Name in reports.")
    candidates: list[str] | None = Field(None, min_length=2, description="Candidates that are shown; null: all.")
    num_prompts: int | None = Field(None, ge=1, description="Number of prompts to ask about, from the first. null: all.")

    @model_validator(mode="after")
    def _no_scores(self) -> PeopleJudge:
        if self.people.reward_model is not None:
            raise ValueError("people.reward_model is only for collect; in an evaluation, add the reward model as a separate judge")
        return self

    @property
    def shown_name(self) -> str:
        """The name in reports."""
        return self.name

    def data_input(self) -> list[DataSource] | None:
        """Always None: this judge reads no file of judgements."""
        return None


def load_questions(source: DataSource | None) -> Questions:
    """Read the questions from a YAML file. Without a file, the page asks only for the ranking.

    Raises DataError with the file, the field and the problem.
    """
    if source is None:
        return Questions()

    text = _read(Path(source.path), "questions")
    try:
        content = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise DataError(f"{source.path}: not valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise DataError(f"{source.path}: contains {type(content).__name__}; expected the fields {', '.join(Questions.model_fields)}")
    try:
        return Questions.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "questions"
        raise DataError(f"{source.path}: {field}: {first['msg']} (got {first['input']!r:.80})") from error


def load_instructions(source: DataSource | None) -> str:
    """The Markdown text for annotators. Empty without a file."""
    return "" if source is None else _read(Path(source.path), "instructions")


def _read(path: Path, what: str) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; {what} must name a local file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8; convert the file to UTF-8") from error
