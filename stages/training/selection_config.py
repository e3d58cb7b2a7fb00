"""Settings for selecting the best model of a fine-tuning run by the reward of its completions."""

from __future__ import annotations

from pydantic import Field, model_validator

from stages.config import DataField, DataSource, GenerationSettings, ModelInput, Strict
from stages.rewards.config import RewardInput, check_names, reward_model_inputs, rubric_inputs


class Selection(Strict):
    """Evaluate the model during training, and keep the best one."""

    reward: list[RewardInput] = Field(min_length=1, description="Reward sources whose mean score decides; usually an earlier reward model.")
    data: DataField | None = Field(None, description="Validation prompts; null: prompts of the held-out demonstrations.")
    num_prompts: int = Field(64, ge=1, description="Use this many distinct prompts.")
    every_epochs: float = Field(1.0, gt=0, description="Epochs between evaluations; the end of the run is always evaluated.")
    generation: GenerationSettings = Field(GenerationSettings(), description="How to sample the completions that are scored.")

    @model_validator(mode="after")
    def _named(self) -> Selection:
        check_names(self.reward, "selection.reward")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        """The reward's models, by field path within the step."""
        return reward_model_inputs(self.reward, "selection.reward")

    def data_inputs(self) -> dict[str, list[DataSource]]:
        """The validation prompts, if given, and the reward's rubrics, by field path within the step."""
        inputs = rubric_inputs(self.reward, "selection.reward")
        return inputs if self.data is None else {"selection.data": self.data, **inputs}
