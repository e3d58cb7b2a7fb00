"""Settings of an evaluation step: candidates, prompts, judges, and additional measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from stages.config import DataField, DataSource, GenerationSettings, ModelField, ModelInput, StepConfig, Strict
from stages.corpora.choices import Question, load_questions
from stages.corpora.completions import load_completions, prompt_key
from stages.corpora.conversations.messages import Prompt, location_of
from stages.corpora.files import read_rows
from stages.corpora.judgements import load_judgements
from stages.corpora.labels import MOST_COMPLETIONS
from stages.corpora.prompts import PromptRow
from stages.corpora.rows import text_of
from stages.errors import DataError
from stages.evaluation.few_shot import FewShot, few_shot_text, validation_prompts
from stages.evaluation.prompts import Exclusion, load_heldout
from stages.judges.config import JudgeInput, JudgementsFile, check_judges
from stages.labelling.config import PeopleJudge
from stages.rewards.config import RewardInput, check_rubrics, rubric_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.corpora.conversations.messages import Completion


class BestOfN(Strict):
    """Best of ``n`` samples by a reward source: the gain that a reward model gives without training."""

    n: int = Field(
        16, ge=2, le=1024, description="Samples per prompt. The report also estimates the results of best of 1, 2, 4, ... from them."
    )
    reward: RewardInput = Field(description="Reward source that selects the best sample.")


class CandidateInput(Strict):
    """One side of the comparison: a model (a bare string is its reference), or existing completions."""

    model: ModelField | None = Field(None, description="The model that answers.")
    completions: DataField | None = Field(
        None, description="Existing completions instead of a model: prompt + completion, or instruction (+ input) + output."
    )
    few_shot: FewShot | None = Field(None, description="Put examples before each prompt; null: only the prompt.")
    best_of: BestOfN | None = Field(None, description="Answer with the best of several samples; null: with a single sample.")

    @model_validator(mode="after")
    def _one_source(self) -> CandidateInput:
        if (self.model is None) == (self.completions is None):
            raise ValueError("give exactly one of model and completions")
        if self.completions is not None and (self.few_shot or self.best_of):
            raise ValueError("few_shot and best_of need a model, but this candidate has completions")
        return self

    def check_data(self, name: str, prompts: list[Prompt]) -> None:
        """Raise DataError if the completions or the examples of candidate ``name`` cannot be used with ``prompts``."""
        if self.completions is not None and not {prompt_key(prompt) for prompt in prompts} & set(load_completions(self.completions)):
            raise DataError(no_answers(name, len(prompts)))
        if self.few_shot is not None:
            few_shot_text(self.few_shot, 0)
            if self.few_shot.choose is not None:
                validation_prompts(self.few_shot, prompts, run=False)


def no_answers(name: str, num_prompts: int) -> str:
    """The message for completions of other prompts than those of the evaluation."""
    return (
        f"candidate {name!r}: its completions answer none of the {num_prompts} prompts of data; the prompts must be equal, also in "
        "tools and chat_template_kwargs. "
        "Use the prompts of this file as data, or write completions for those of data"
    )


def _candidate(value: object) -> object:
    return {"model": value} if isinstance(value, str) or (isinstance(value, dict) and "ref" in value) else value


class TokenDetails(Strict):
    """Per-token details for the report."""

    num_prompts: int = Field(24, ge=1, description="Number of prompts with token details.")
    value: ModelField | None = Field(None, description="A ppo step with publish_value: true, or a value network; null: only the KL.")


class TaskInput(Strict):
    """One task of an evaluation. A bare string, a source or a list of sources is its data."""

    data: DataField = Field(description="Rows with context, choices and answer.")
    context: str | None = Field(
        None, description="Text that becomes the context, with {column} for the value of a column; for rows without a column context."
    )
    choices: list[str] | None = Field(None, min_length=2, description="The choices of all rows; for rows without a column choices.")
    normalize: Literal["none", "tokens", "bytes"] = Field(
        "none",
        description="What a choice's log-likelihood is divided by: its number of tokens or bytes, if the choices differ in length; none: "
        "nothing.",
    )

    def load(self) -> list[Question]:
        """Load the questions. Raises DataError with the location of a malformed row."""
        return load_questions(self.data, self.context, self.choices)


def _task(value: object) -> object:
    is_block = isinstance(value, dict) and ("data" in value or not value)
    return value if is_block or isinstance(value, TaskInput) else {"data": value}


TaskField = Annotated[TaskInput, BeforeValidator(_task)]


class EvaluationConfig(StepConfig):
    """Compare ``candidates`` on held-out prompts."""

    stage: Literal["evaluation"] = "evaluation"
    candidates: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Annotated[CandidateInput, BeforeValidator(_candidate)]] = Field(
        min_length=1, description="Candidates by name, from the least to the most trained. The verdict is about the last one."
    )
    data: DataField = Field(description="Held-out prompts.")
    prompt_words: int | None = Field(None, ge=1, description="Use this many first words of each text as the prompt.")
    num_prompts: int | None = Field(256, ge=1, description="Use this many distinct prompts; null: all.")
    exclude: DataField | None = Field(None, description="Data whose prompts are excluded, e.g. PPO's training prompts.")
    samples_per_prompt: int = Field(1, ge=1, description="Completions per prompt and candidate.")
    generation: GenerationSettings = Field(GenerationSettings(), description="How the candidates' answers are sampled.")
    judges: list[JudgeInput] = Field(min_length=1, description="Judges of the completions; the first one determines the verdict.")
    kl_reference: str | None = Field(
        None, description="Candidate to which the KL of every other candidate is measured, in nats per completion; null: not measured."
    )
    token_details: TokenDetails | None = Field(None, description="Store each token's KL and value for the report; null: none.")
    perplexity: DataField | None = Field(
        None, description="Held-out texts on which each candidate's perplexity is measured; null: not measured."
    )
    perplexity_block_size: int = Field(128, ge=2, description="Context length in tokens for the perplexity.")
    tasks: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], TaskField] = Field(
        {}, description="Multiple-choice tasks by name, scored by likelihood: {facts: world:tasks/facts/heldout}."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        check_judges(self.judges)
        for judge in self.judges:
            if isinstance(judge, PeopleJudge):
                self._check_people(judge)
        if self.kl_reference is not None:
            if self.kl_reference not in self.candidates:
                raise ValueError(f"kl_reference={self.kl_reference!r} is not a candidate; expected one of {', '.join(self.candidates)}")
            reference = self.candidates[self.kl_reference]
            if reference.model is None or reference.few_shot is not None or reference.best_of is not None:
                raise ValueError(f"kl_reference={self.kl_reference!r} must be a model without few_shot and best_of")
        if self.token_details is not None and self.kl_reference is None and self.token_details.value is None:
            raise ValueError("token_details needs kl_reference, token_details.value, or both; set one, or remove token_details")
        return self

    def _check_people(self, judge: PeopleJudge) -> None:
        shown = judge.candidates or list(self.candidates)
        if unknown := [name for name in shown if name not in self.candidates]:
            raise ValueError(f"judge {judge.name}: {unknown[0]!r} is not a candidate; expected some of {', '.join(self.candidates)}")
        if not 2 <= len(shown) <= MOST_COMPLETIONS or len(set(shown)) < len(shown):
            raise ValueError(f"judge {judge.name}: expected 2 to {MOST_COMPLETIONS} different candidates, got {', '.join(shown)}")

    def scorers(self) -> list[RewardInput]:
        """The reward sources that score answers to ``data``: judges, and those of best-of-n."""
        judges = [judge for judge in self.judges if isinstance(judge, RewardInput)]
        return [*judges, *(one.best_of.reward for one in self.candidates.values() if one.best_of is not None)]

    def rewards(self) -> dict[str, RewardInput]:
        """All reward sources by field path."""
        rewards = {f"judges[{index}]": judge for index, judge in enumerate(self.judges) if isinstance(judge, RewardInput)}
        for name, candidate in self.candidates.items():
            if candidate.best_of is not None:
                rewards[f"candidates.{name}.best_of.reward"] = candidate.best_of.reward
            if candidate.few_shot is not None and candidate.few_shot.choose is not None:
                rewards[f"candidates.{name}.few_shot.choose.reward"] = candidate.few_shot.choose.reward
        return rewards

    def check_rewards(self) -> None:
        """Raise RecipeError if a rubric cannot be read."""
        check_rubrics(list(self.rewards().values()))

    def model_inputs(self) -> dict[str, ModelInput]:
        inputs = {}
        for name, candidate in self.candidates.items():
            field_path = f"candidates.{name}"
            if candidate.model is not None:
                inputs[field_path] = candidate.model
            if candidate.few_shot is not None and candidate.few_shot.choose is not None:
                inputs |= _reward_input(candidate.few_shot.choose.reward, f"{field_path}.few_shot.choose.reward")
            if candidate.best_of is not None:
                inputs |= _reward_input(candidate.best_of.reward, f"{field_path}.best_of.reward")
        if self.token_details is not None and self.token_details.value is not None:
            inputs["token_details.value"] = self.token_details.value
        for index, judge in enumerate(self.judges):
            if isinstance(judge, RewardInput):
                inputs |= _reward_input(judge, f"judges[{index}]")
        return inputs

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data": self.data}
        for field_path, reward in self.rewards().items():
            inputs |= {path.replace("[0]", "", 1): rubric for path, rubric in rubric_inputs([reward], field_path).items()}
        for name, candidate in self.candidates.items():
            field_path = f"candidates.{name}"
            if candidate.completions is not None:
                inputs[f"{field_path}.completions"] = candidate.completions
            if candidate.few_shot is not None:
                inputs[f"{field_path}.few_shot.data"] = candidate.few_shot.data
                if candidate.few_shot.choose is not None:
                    inputs[f"{field_path}.few_shot.choose.data"] = candidate.few_shot.choose.data
        for index, judge in enumerate(self.judges):
            if isinstance(judge, PeopleJudge):
                inputs |= judge.people.data_inputs(f"judges[{index}].people")
            elif not isinstance(judge, RewardInput) and (data := judge.data_input()) is not None:
                inputs[f"judges[{index}].judgements"] = data
        if self.exclude is not None:
            inputs["exclude"] = self.exclude
        if self.perplexity is not None:
            inputs["perplexity"] = self.perplexity
        return {**inputs, **{f"tasks.{name}.data": task.data for name, task in self.tasks.items()}}

    def load_heldout(self, *, run: bool = True) -> tuple[list[PromptRow], list[Exclusion]]:
        """The held-out prompts and the exclusions; see ``evaluation/prompts.py``. ``run=False``: do not import function modules."""
        return load_heldout(
            self.data,
            exclude=self.exclude,
            prompt_words=self.prompt_words,
            num_prompts=self.num_prompts,
            scorers=self.scorers(),
            run=run,
        )

    def load_texts(self) -> list[str]:
        """The texts for the perplexity; empty if there are none."""
        return [text_of(row, "text") for row in read_rows(self.perplexity, split="test")] if self.perplexity is not None else []

    def conversations(self) -> list[tuple[Prompt, Sequence[Completion], str]]:
        """Rows (prompt, completions, location) that the models of this step read; see ``chain/conversations.py``."""
        return [(row.prompt, [], location_of(row.prompt)) for row in self.load_heldout(run=False)[0]]

    def check_data(self) -> None:
        """Raise DataError for data that this stage cannot use. No model is loaded."""
        self.check_rewards()
        prompts = [row.prompt for row in self.load_heldout(run=False)[0]]
        for name, candidate in self.candidates.items():
            candidate.check_data(name, prompts)
        for judge in self.judges:
            if isinstance(judge, PeopleJudge):
                judge.people.check()
            elif isinstance(judge, JudgementsFile):
                self._check_judgements(judge)
        self.load_texts()
        for task in self.tasks.values():
            task.load()

    def _check_judgements(self, judge: JudgementsFile) -> None:
        judgements = load_judgements(judge.judgements)
        if not judgements.candidates & set(self.candidates):
            known = f"it judges {', '.join(sorted(judgements.candidates)[:10])}; candidates are {', '.join(self.candidates)}"
            raise DataError(f"judge {judge.shown_name!r}: its judgements contain no candidate; {known}. Use the same names")


def _reward_input(reward: RewardInput, field_path: str) -> dict[str, ModelInput]:
    return {f"{field_path}.model": reward.model} if reward.model is not None else {}
