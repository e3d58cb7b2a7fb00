"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from stages.config import (
    DataField,
    DataInput,
    DataSource,
    LearningRate,
    ModelField,
    ModelInput,
    OptimizerSettings,
    Strict,
    TrainingStepConfig,
    WarmupFraction,
    check_trainable,
)
from stages.corpora.curation import Curation, Curator
from stages.corpora.demonstrations import load_demonstrations
from stages.corpora.encoding.fitting import PromptFit
from stages.corpora.encoding.training_rows import TrainOn
from stages.corpora.prompts import load_prompt_rows
from stages.corpora.text import check_texts
from stages.rewards.signature import columns_asked_for
from stages.training.selection_config import Selection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.corpora.conversations.messages import Completion, Prompt


class SFTOptimizer(OptimizerSettings):
    """Like ``OptimizerSettings``, with a short warmup."""

    learning_rate: LearningRate = 2e-5
    warmup_fraction: WarmupFraction = 0.03


class SFTPretrainingMix(Strict):
    """Mix pretraining texts into the demonstrations, so that the initial model for PPO forgets less (Ouyang et al. 2022, C.3)."""

    data: DataField = Field(description="Texts of the pretraining distribution; every 20th block is held out.")
    share: float = Field(0.1, gt=0, lt=1, description="Share of training rows that are blocks of these texts; 0.1 in the paper.")
    block_size: int = Field(128, ge=2, description="Tokens per block; all of them count in the loss.")


class SFTStepConfig(TrainingStepConfig):
    """Fine-tune ``model`` on the demonstrations in ``data``."""

    stage: Literal["sft"] = "sft"
    preset: str | None = Field(None, description="Published settings as defaults, e.g. instructgpt2022 (docs/presets.md).")
    model: ModelField = Field(description="Language model to fine-tune.")
    data: DataInput = Field(description="Demonstrations.")
    template: str | None = Field(
        None,
        description="The text around prompts and completions. chat: the tokenizer's own chat template; chatml: the format of SmolLM and "
        "Qwen; plain, instruction, dialogue, question or tldr: a plain template; or a text with {prompt}. null: the tokenizer's, if it "
        "has one. docs/conversations.md has the details.",
    )
    completion_only_loss: bool = Field(True, description="Compute the loss only on the assistant's tokens; false: also on the prompt.")
    train_on: TrainOn = Field(
        "all_assistant_turns",
        description="Train on all replies of a conversation (in a row with a prompt column: of its completion), or on the last one.",
    )
    pretraining_mix: SFTPretrainingMix | None = Field(None, description="Mix in pretraining texts; null: only demonstrations.")
    residual_dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Dropout probability, only on the outputs of attention and MLP; null: the dropout of the model's config.",
    )
    selection: Selection | None = Field(None, description="Publish the model with the best reward during the run; null: the last.")
    prompt_fit: PromptFit | None = Field(None, description="Shorten prompts that are too long; null: drop long demonstrations.")
    curation: Curation = Field(Curation(), description="Filters of rows.")
    packing: bool = Field(
        False,
        description="Put several demonstrations into one row, without attention between them; batch_size then counts rows. Refused for "
        "models in which a demonstration would change the next one (docs/families.md).",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Maximum tokens of a demonstration and of a row; longer ones are dropped and counted. null: the model's limit, "
        "or 1,024 if it has none.",
    )
    training: SFTOptimizer = Field(SFTOptimizer(), description="Optimizer, learning rate and batch sizes.")

    @model_validator(mode="after")
    def _trainable(self) -> SFTStepConfig:
        check_trainable(self.model, self.lora)
        if self.model.template_arguments and self.template not in (None, "chat"):
            raise ValueError(
                f"template={self.template!r} replaces the model's chat template, so model.template_arguments would have no effect"
            )
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {"model": self.model, **(self.selection.model_inputs() if self.selection is not None else {})}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = self.data.data_inputs()
        if self.pretraining_mix is not None:
            inputs["pretraining_mix.data"] = self.pretraining_mix.data
        return inputs if self.selection is None else {**inputs, **self.selection.data_inputs()}

    def check_data(self) -> None:
        """Raise DataError for data that this stage cannot use. No model is loaded."""
        load_demonstrations(self.data, Curator(self.curation))
        if self.pretraining_mix is not None:
            check_texts(self.pretraining_mix.data)
        if self.selection is not None and self.selection.data is not None:
            columns = columns_asked_for(self.selection.reward, run=False)
            load_prompt_rows(self.selection.data, split="validation", columns=columns)

    def conversations(self) -> list[tuple[Prompt, Sequence[Completion], str]]:
        """Rows (prompt, completions, location) that the models of this step read; see ``chain/conversations.py``."""
        loaded = load_demonstrations(self.data)
        return [(row["prompt"], [row["completion"]], row.location) for side in (loaded.train, loaded.validation) for row in side]
