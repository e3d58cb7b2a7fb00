"""Settings of the selection of a model along a fine-tuning run."""

from __future__ import annotations

from pydantic import Field, model_validator

from stages.config import DataField, DataSource, GenerationSettings, ModelInput, Strict
from stages.rewards.config import RewardInput, check_names, reward_model_inputs, rubric_inputs


class Selection(Strict):
    """Try the model out along the run, and keep the best."""

    reward: list[RewardInput] = Field(min_length=1, description="Whose mean score decides; usually a reward model made before.")
    data: DataField | None = Field(None, description="Validation prompts; null: those of the held-out demonstrations.")
    num_prompts: int = Field(64, ge=1, description="Use the first so many distinct prompts.")
    every_epochs: float = Field(1.0, gt=0, description="Epochs between two tries; the end of the run is always tried.")
    generation: GenerationSettings = GenerationSettings()

    @model_validator(mode="after")
    def _named(self) -> Selection:
        check_names(self.reward, "selection.reward")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        """The models of the reward, by field path within the step."""
        return reward_model_inputs(self.reward, "selection.reward")

    def data_inputs(self) -> dict[str, list[DataSource]]:
        """The validation prompts, where they are named, and the rubrics of the reward, by field path within the step."""
        inputs = rubric_inputs(self.reward, "selection.reward")
        return inputs if self.data is None else {"selection.data": self.data, **inputs}
