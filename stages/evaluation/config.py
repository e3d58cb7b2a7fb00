"""Settings of an evaluation step: who answers which prompts, who judges, and what is measured beside."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stages.config import DataField, DataSource, GenerationSettings, ModelField, ModelInput, StepConfig, Strict
from stages.corpora.labels import MOST_COMPLETIONS
from stages.evaluation.tasks import TaskField
from stages.judges.config import JudgeInput, check_judges
from stages.labelling.config import PeopleJudge
from stages.rewards.config import RewardInput, check_rubrics, rubric_inputs


class FewShotChoice(Strict):
    """Prompt engineering by a reward model (Ouyang et al. 2022, section 3.5): of several prompts the one whose answers it likes best."""

    reward: RewardInput = Field(description="Who scores the answers to the validation prompts.")
    data: DataField = Field(description="Validation prompts; those of the evaluation itself are left out.")
    num_prompts: int = Field(32, ge=1, description="Validation prompts that each try answers.")
    tries: int = Field(4, ge=2, description="Draws of examples to choose among (for each instruction).")


class FewShot(Strict):
    """Prompt engineering: worked examples are put before every prompt."""

    data: DataField = Field(description="Demonstrations to take the examples from.")
    num_examples: int = Field(3, ge=1, description="Examples before each prompt, drawn once by the step's seed.")
    instruction: str | list[str] = Field("", description="Text before the first example; a list: one of them, by choose.")
    template: str = Field("{prompt}\n{completion}\n\n", description="One example; the prompt to answer is shown up to {completion}.")
    stop: str = Field("\n", min_length=1, description="The completion is cut where this text begins: the model would go on with more.")
    choose: FewShotChoice | None = Field(None, description="Choose examples and instruction by a reward model; null: the first draw.")

    @model_validator(mode="after")
    def _consistent(self) -> FewShot:
        if self.template.find("{prompt}") < 0 or self.template.find("{completion}") < self.template.find("{prompt}"):
            raise ValueError(f"template must hold {{prompt}} and then {{completion}}, got {self.template!r}")
        if isinstance(self.instruction, list) and (self.choose is None or not self.instruction):
            raise ValueError("instruction is a list: set choose, which picks one of at least one instruction")
        return self


class BestOfN(Strict):
    """The best of ``n`` samples by a reward source: what sampling alone gets out of a reward model, without training."""

    n: int = Field(16, ge=2, le=1024, description="Samples of each prompt; the curve over 1, 2, 4, ... n is estimated from this one set.")
    reward: RewardInput = Field(description="Who picks the best sample.")


class CandidateInput(Strict):
    """One side of the comparison: a model (a bare string is its reference), or completions made elsewhere."""

    model: ModelField | None = None
    completions: DataField | None = Field(
        None, description="Completions made elsewhere: prompt + completion, or instruction (+ input) + output. Instead of model."
    )
    few_shot: FewShot | None = Field(None, description="Show the model examples before each prompt; null: the prompt alone.")
    best_of: BestOfN | None = Field(None, description="Answer with the best of several samples; null: with the first.")

    @model_validator(mode="after")
    def _one_source(self) -> CandidateInput:
        if (self.model is None) == (self.completions is None):
            raise ValueError("give exactly one of model and completions")
        if self.completions is not None and (self.few_shot or self.best_of):
            raise ValueError("few_shot and best_of need a model; these completions are already there")
        return self


def _candidate(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) or (isinstance(value, dict) and "ref" in value) else value


class TokenDetails(Strict):
    """What the report can colour tokens by."""

    num_prompts: int = Field(24, ge=1, description="The first so many prompts get token details.")
    value: ModelField | None = Field(
        None, description="A ppo step with publish_value: true, or a value network; null: tokens have their KL only."
    )


class EvaluationConfig(StepConfig):
    """Compare ``candidates`` on held-out prompts."""

    stage: Literal["evaluation"] = "evaluation"
    candidates: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Annotated[CandidateInput, BeforeValidator(_candidate)]] = Field(
        min_length=1, description="What to compare, by name, from the least to the most trained: the verdict is about the last."
    )
    data: DataField = Field(description="Held-out prompts.")
    prompt_words: int | None = Field(None, ge=1, description="Make prompts of the first so many words of each text.")
    num_prompts: int | None = Field(256, ge=1, description="Use the first so many distinct prompts; null: all.")
    exclude: DataField | None = Field(None, description="Prompts that occur in these data (what PPO trained on) are left out.")
    samples_per_prompt: int = Field(1, ge=1, description="Completions of each prompt by each candidate.")
    generation: GenerationSettings = GenerationSettings()
    judges: list[JudgeInput] = Field(min_length=1, description="Who judges the completions; the first decides the verdict.")
    kl_reference: str | None = Field(None, description="Candidate to which every other's KL per completion is measured.")
    token_details: TokenDetails | None = Field(None, description="Keep each token's KL and value for the report; null: none.")
    perplexity: DataField | None = Field(None, description="Held-out texts on which each candidate's perplexity is measured.")
    perplexity_block_size: int = Field(128, ge=2, description="Tokens of context for the perplexity.")
    tasks: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], TaskField] = Field(
        {}, description="Small tasks by name, scored by the likelihood of each choice: {facts: world:tasks/facts/heldout}."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        check_judges(self.judges)
        for judge in self.judges:
            if isinstance(judge, PeopleJudge):
                self._check_people(judge)
        if self.kl_reference is not None:
            if self.kl_reference not in self.candidates:
                raise ValueError(f"kl_reference={self.kl_reference!r} is no candidate; expected one of {', '.join(self.candidates)}")
            reference = self.candidates[self.kl_reference]
            if reference.model is None or reference.few_shot is not None or reference.best_of is not None:
                raise ValueError(f"kl_reference={self.kl_reference!r} must be a model that answers the prompt alone, with its first sample")
        if self.token_details is not None and self.kl_reference is None and self.token_details.value is None:
            raise ValueError("token_details has nothing to keep: set kl_reference, token_details.value, or both")
        return self

    def _check_people(self, judge: PeopleJudge) -> None:
        shown = judge.candidates or list(self.candidates)
        if unknown := [name for name in shown if name not in self.candidates]:
            raise ValueError(f"judge {judge.name}: {unknown[0]!r} is no candidate; expected some of {', '.join(self.candidates)}")
        if not 2 <= len(shown) <= MOST_COMPLETIONS or len(set(shown)) < len(shown):
            raise ValueError(f"judge {judge.name}: people compare 2 to {MOST_COMPLETIONS} different candidates, got {', '.join(shown)}")

    def scorers(self) -> list[RewardInput]:
        """The reward sources that score answers to ``data``: judges, and those that pick the best of several samples."""
        judges = [judge for judge in self.judges if isinstance(judge, RewardInput)]
        return [*judges, *(one.best_of.reward for one in self.candidates.values() if one.best_of is not None)]

    def _rewards(self) -> dict[str, RewardInput]:
        """Every reward source by field path."""
        found = {f"judges[{index}]": judge for index, judge in enumerate(self.judges) if isinstance(judge, RewardInput)}
        for name, candidate in self.candidates.items():
            if candidate.best_of is not None:
                found[f"candidates.{name}.best_of.reward"] = candidate.best_of.reward
            if candidate.few_shot is not None and candidate.few_shot.choose is not None:
                found[f"candidates.{name}.few_shot.choose.reward"] = candidate.few_shot.choose.reward
        return found

    def check_rewards(self) -> None:
        """Raise RecipeError where a rubric cannot be read."""
        check_rubrics(list(self._rewards().values()))

    def model_inputs(self) -> dict[str, ModelInput]:
        inputs = {}
        for name, candidate in self.candidates.items():
            place = f"candidates.{name}"
            if candidate.model is not None:
                inputs[place] = candidate.model
            if candidate.few_shot is not None and candidate.few_shot.choose is not None:
                inputs |= _reward_input(candidate.few_shot.choose.reward, f"{place}.few_shot.choose.reward")
            if candidate.best_of is not None:
                inputs |= _reward_input(candidate.best_of.reward, f"{place}.best_of.reward")
        if self.token_details is not None and self.token_details.value is not None:
            inputs["token_details.value"] = self.token_details.value
        for index, judge in enumerate(self.judges):
            if isinstance(judge, RewardInput):
                inputs |= _reward_input(judge, f"judges[{index}]")
        return inputs

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data": self.data}
        for place, reward in self._rewards().items():
            inputs |= {path.replace("[0]", "", 1): rubric for path, rubric in rubric_inputs([reward], place).items()}
        for name, candidate in self.candidates.items():
            place = f"candidates.{name}"
            if candidate.completions is not None:
                inputs[f"{place}.completions"] = candidate.completions
            if candidate.few_shot is not None:
                inputs[f"{place}.few_shot.data"] = candidate.few_shot.data
                if candidate.few_shot.choose is not None:
                    inputs[f"{place}.few_shot.choose.data"] = candidate.few_shot.choose.data
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

    def conversations(self) -> list[tuple[Any, list[Any], str]]:
        """Rows of (prompt, its completions, the row's place) that the models of this step read; see ``chain/texts.py``."""
        from stages.corpora.messages import location_of
        from stages.evaluation.prompts import load_heldout

        return [(row.prompt, [], location_of(row.prompt)) for row in load_heldout(self, run=False)[0]]

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        from stages.evaluation.prompts import check_data

        check_data(self)
        for judge in self.judges:
            if isinstance(judge, PeopleJudge):
                judge.people.check()


def _reward_input(reward: RewardInput, place: str) -> dict[str, ModelInput]:
    return {f"{place}.model": reward.model} if reward.model is not None else {}
