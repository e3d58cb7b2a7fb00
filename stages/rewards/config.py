"""The settings of a reward source or a judge in a recipe: a model, a Python function, an endpoint, a rubric, or an ensemble."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stages.config import SCORING_ROWS, DataField, DataSource, ModelField, ModelInput, Strict
from stages.errors import RecipeError

ENDPOINT_FIELDS = ("protocol", "served_model", "columns", "label_column", "api_key_variable", "concurrency", "on_failure", "cache")

QUESTION = (
    "<prompt>\n{prompt}\n</prompt>\n\n<response>\n{completion}\n</response>\n\nIs this a good response to the prompt? Answer Yes or No."
)


def check_question(question: str, answers: list[str]) -> None:
    """Raise ValueError if the question or the two answers of a generative reward model are not usable."""
    if not all(answers) or answers[0] == answers[1]:
        raise ValueError(f"answers is {list(answers)}; expected two texts that differ")
    if "{completion}" not in question:
        raise ValueError("question must contain {completion}, and usually {prompt}")


class ChatEndpoint(Strict):
    """A language model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, transformers serve, a provider)."""

    endpoint: str = Field(pattern=r"^https?://\S+$", description="Address up to /v1, e.g. http://localhost:8000/v1.")
    model: str = Field(min_length=1, description="Name of the model at the endpoint.")
    api_key_variable: str | None = Field(
        None, pattern=r"^[A-Za-z_]\w*$", description="Environment variable with the API key. The key is never written to a file."
    )
    max_tokens: int = Field(16, ge=1, description="Maximum number of tokens of a reply.")
    concurrency: int = Field(8, ge=1, description="Maximum number of simultaneous requests.")
    timeout_seconds: float = Field(60.0, gt=0, description="Maximum time for one reply, in seconds.")
    retries: int = Field(4, ge=0, description="Further attempts after a time-out, a dropped connection, or status 408, 429 or 5xx.")
    backoff_seconds: float = Field(
        1.0, ge=0, description="Seconds before the first retry, doubled for each one. A server may ask for more."
    )
    price_per_million_input: float | None = Field(None, ge=0, description="Price of a million prompt tokens, to compute the cost.")
    price_per_million_output: float | None = Field(None, ge=0, description="Price of a million reply tokens.")

    @field_validator("endpoint")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        return without_password(value)

    @property
    def prices(self) -> tuple[float, float] | None:
        """Prices of a prompt token and of a reply token; None if one of them is unknown."""
        if self.price_per_million_input is None or self.price_per_million_output is None:
            return None
        return self.price_per_million_input / 1e6, self.price_per_million_output / 1e6


class RubricJudge(ChatEndpoint):
    """A language model behind an OpenAI-compatible endpoint that grades each completion by a rubric."""

    rubric: DataField = Field(description="A text file that describes good completions.")
    scale: list[float] = Field([1.0, 10.0], min_length=2, max_length=2, description="Lowest and highest grade.")
    attempts: int = Field(2, ge=1, description="Maximum requests per completion until a reply has a grade.")
    max_refused_share: float = Field(0.1, ge=0, le=1, description="The run ends if a larger share of a call's completions has no grade.")

    @model_validator(mode="after")
    def _consistent(self) -> RubricJudge:
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale is [{self.scale[0]:g}, {self.scale[1]:g}]; expected the lowest and then the highest grade")
        if len(self.rubric) != 1:
            raise ValueError(f"rubric names {len(self.rubric)} files; expected one")
        return self


def without_password(address: str) -> str:
    """The URL ``address`` itself. Raises ValueError if it has a user name or a password before its host."""
    if "@" in address.partition("://")[2].partition("/")[0]:
        raise ValueError("endpoint contains a password, which would appear in logs and reports. Name a variable with api_key_variable")
    return address


class RewardInput(Strict):
    """One reward source. Exactly one of ``model``, ``function``, ``endpoint``, ``judge`` and ``ensemble`` must be set."""

    model: ModelField | None = Field(
        None, description="A reward model, a classifier (then set label), or a language model (then set answers)."
    )
    function: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="package.module:function. It gets lists of prompts and completions. Further parameters name what else it gets: "
        "columns of the data, messages, completion_ids. It returns one score per completion, or None if it does not apply to it.",
    )
    endpoint: str | None = Field(
        None, pattern=r"^https?://\S+$", description="The URL of a server's scoring call, e.g. http://localhost:5000/get_reward."
    )
    judge: RubricJudge | None = Field(None, description="A language model behind an endpoint that grades by a rubric.")
    answers: list[str] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Two answers to the question. The score of a language model is then log P(first) - log P(second).",
    )
    question: str = Field(QUESTION, description="answers: the question to the model, with {prompt} and {completion}.")
    ensemble: list[RewardInput] | None = Field(
        None,
        min_length=2,
        description="Several sources that judge the same thing, e.g. reward models of different seeds, combined into one score.",
    )
    combine: Literal["mean", "min", "uncertainty"] = Field(
        "mean",
        description="ensemble: how its scores become one: mean; min (the worst case); or uncertainty: the mean minus uncertainty_coef "
        "times the variance.",
    )
    uncertainty_coef: float = Field(
        1.0, ge=0, description="combine: uncertainty: weight of the variance. Higher: more careful (Coste et al. 2024, arXiv 2310.02743)."
    )
    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="Name in metrics and reports (default: the model's or function's).")
    weight: float = Field(1.0, description="Factor of this source in the weighted sum; may be negative.")
    label: str | int | None = Field(None, description="classifier: the class whose output is the score, by name or index.")
    output: Literal["logit", "probability", "logprob"] = Field(
        "logit",
        description="classifier: which output of the label is the score. The probability is a softmax, or a sigmoid if a text may have "
        "several labels (problem_type in the model's config) or if there is only one label. A regression has only a logit: its value.",
    )
    reads: Literal["completion", "prompt_and_completion"] = Field(
        "prompt_and_completion",
        description="classifier: the text that it reads. The beginning of a text that is too long is cut. A reward model always reads "
        "prompt and completion.",
    )
    level: Literal["completion", "token"] = Field(
        "completion",
        description="token: rewards are credited to single tokens instead of the last one. For a reward model: the change of its score by "
        "each token. For a function: it returns, per completion, a list of (character position, score).",
    )
    batch_size: int = Field(SCORING_ROWS, ge=1, description="Texts per forward pass and process.")
    timeout_seconds: float | None = Field(
        600.0,
        gt=0,
        description="function, endpoint: maximum seconds of one call; a longer one counts as a failure (see retries). null: no limit.",
    )
    retries: int | None = Field(
        None,
        ge=0,
        description="function, endpoint: further attempts after a failure; then the run ends. null: 0 for a function, 4 for an endpoint.",
    )
    backoff_seconds: float = Field(1.0, ge=0, description="function, endpoint: seconds before the first retry, doubled for each one.")
    protocol: Literal["openrlhf", "classify", "pooling", "score"] = Field(
        "openrlhf",
        description="endpoint: the server's protocol. openrlhf: OpenRLHF's remote reward model and `stages serve`. classify, pooling, "
        "score: vLLM's endpoints with these names.",
    )
    served_model: str | None = Field(None, min_length=1, description="endpoint: the model's name on the server, if it serves several.")
    columns: list[str] = Field([], description="endpoint, protocol: openrlhf: columns of the data that each request includes.")
    label_column: str | None = Field(None, description="endpoint, protocol: openrlhf: the column that each request includes as labels.")
    api_key_variable: str | None = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="endpoint: environment variable with the API key. The key is never written to a file.",
    )
    concurrency: int = Field(8, ge=1, description="endpoint: maximum number of simultaneous requests.")
    on_failure: Literal["stop", "wait"] = Field(
        "stop",
        description="endpoint: after all retries, stop the run and keep its episodes, or log it and ask again until the server answers.",
    )
    cache: bool = Field(True, description="endpoint: store scores on disk by request. false: for a server whose scores change.")

    @model_validator(mode="after")
    def _one_kind(self) -> RewardInput:
        if [self.model, self.function, self.endpoint, self.judge, self.ensemble].count(None) != 4:
            raise ValueError("set exactly one of model, function, endpoint, judge and ensemble")
        self._check_answers()
        if self.endpoint is not None:
            self._check_endpoint(self.endpoint)
        elif given := [name for name in ENDPOINT_FIELDS if self._is_changed(name)]:
            raise ValueError(f"{', '.join(given)} needs an endpoint; set endpoint, or remove it")
        elif self.model is None and self.label is not None:
            raise ValueError("label needs a classifier, but model is not set; set model, or remove label")
        if self.retries and self.function is None and self.endpoint is None:
            raise ValueError("retries needs a function or an endpoint; a model gives the same score every time")
        if self.level == "token" and (self.label is not None or self.ensemble is not None or self.endpoint is not None):
            raise ValueError("level: token needs a reward model or a function, not a classifier, an endpoint or an ensemble")
        if self.ensemble is not None:
            if self.name is None:
                raise ValueError("an ensemble needs a name; add name: NAME")
            if any(member.ensemble is not None or member.level == "token" for member in self.ensemble):
                raise ValueError("a member of an ensemble must be a model or a function with level: completion")
            check_names(self.ensemble, "ensemble")
        elif self.combine != "mean":
            raise ValueError(f"combine: {self.combine} needs an ensemble, a list of sources; set ensemble, or remove combine")
        return self

    def _is_changed(self, name: str) -> bool:
        """Whether a field differs from its default. Saved settings list every field, so the presence of a field says nothing."""
        return bool(getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True))

    def _check_answers(self) -> None:
        """Raise ValueError if the fields of a generative reward model contradict each other."""
        if self.answers is None:
            if self._is_changed("question"):
                raise ValueError('question needs answers, for example answers: [" Yes", " No"]')
            return
        if self.model is None or self.label is not None or self.level == "token":
            raise ValueError("answers needs model: a language model, level: completion, and no label")
        check_question(self.question, self.answers)

    def _check_endpoint(self, address: str) -> None:
        """Raise ValueError if the fields of an endpoint contradict each other."""
        without_password(address)
        if self.protocol == "classify":
            if not isinstance(self.label, int) or self.output == "logit":
                raise ValueError("protocol: classify needs label, the number of the class, and output: probability or logprob")
        elif self.label is not None:
            raise ValueError(f"label needs protocol: classify, got {self.protocol}")
        if self.protocol != "openrlhf" and (self.columns or self.label_column):
            raise ValueError(f"columns and label_column need protocol: openrlhf, got {self.protocol}")

    @property
    def shown_name(self) -> str:
        """The name in metrics and reports."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return self.function.rpartition(":")[2]
        if self.endpoint is not None:
            return re.sub(r"[^\w.-]+", "-", self.endpoint.partition("://")[2]).strip("-")
        if self.judge is not None:
            return re.sub(r"[^\w.-]+", "-", self.judge.model).strip("-") or "judge"
        assert self.model is not None
        return self.model.ref.rstrip("/").rpartition("/")[2]


def leaves(sources: list[RewardInput], field_path: str) -> dict[str, RewardInput]:
    """All sources except ensembles, by field path, e.g. ``reward[0]``. Members of an ensemble are included: ``reward[1].ensemble[0]``."""
    by_path: dict[str, RewardInput] = {}
    for index, source in enumerate(sources):
        here = f"{field_path}[{index}]"
        by_path |= {here: source} if source.ensemble is None else leaves(source.ensemble, f"{here}.ensemble")
    return by_path


def reward_model_inputs(sources: list[RewardInput], field_path: str) -> dict[str, ModelInput]:
    """The model inputs of a list of sources, by field path, e.g. ``reward[0].model``."""
    return {f"{path}.model": source.model for path, source in leaves(sources, field_path).items() if source.model is not None}


def rubric_inputs(sources: list[RewardInput], field_path: str) -> dict[str, list[DataSource]]:
    """The rubric files of a list of sources, by field path, e.g. ``reward[0].judge.rubric``."""
    by_path = leaves(sources, field_path).items()
    return {f"{path}.judge.rubric": source.judge.rubric for path, source in by_path if source.judge is not None}


def read_rubric(path: str) -> str:
    """Read the text of a rubric. Raises RecipeError if the file cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"rubric {path}: cannot be read ({error}); expected a Markdown or text file in UTF-8") from error
    if not text:
        raise RecipeError(f"rubric {path}: the file is empty; expected a description of a good response")
    return text


def check_rubrics(sources: list[RewardInput]) -> None:
    """Raise RecipeError if a rubric file cannot be read or is empty."""
    for rubric in rubric_inputs(sources, "reward").values():
        read_rubric(rubric[0].path)


def check_names(sources: list[RewardInput], field_path: str) -> None:
    """Raise ValueError if two sources have the same name in metrics."""
    names = [source.shown_name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{field_path}: two sources have the name {name!r}; give each one a different name")
