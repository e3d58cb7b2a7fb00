"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from stages.config import DataField, DataInput, DataSource, ModelField, ModelInput, OptimizerSettings, Strict, TrainingStepConfig
from stages.corpora.curation import Curation
from stages.corpora.fitting import PromptFit
from stages.corpora.training_rows import TrainOn
from stages.training.config import Selection


class SFTOptimizer(OptimizerSettings):
    """As ``OptimizerSettings``, with a short warmup."""

    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the optimizer steps used for linear warmup.")


class SFTPretrainingMix(Strict):
    """Pretraining texts among the demonstrations: the model that PPO starts from should not forget (Ouyang et al. 2022, C.3)."""

    data: DataField = Field(description="Texts of the pretraining distribution; every twentieth block of them is held out.")
    share: float = Field(0.1, gt=0, lt=1, description="Share of the training rows that are blocks of these texts; the paper's is 0.1.")
    block_size: int = Field(128, ge=2, description="Tokens per block; all of them count in the loss.")


class SFTStepConfig(TrainingStepConfig):
    """Fine-tune ``model`` on the demonstrations in ``data``."""

    stage: Literal["sft"] = "sft"
    preset: str | None = Field(None, description="Published settings beneath the step's own, e.g. instructgpt2022 (recipe/presets.py).")
    model: ModelField = Field(description="Language model to fine-tune.")
    data: DataInput
    template: str | None = Field(
        None,
        description="chat: the tokenizer's own; chatml: the format of SmolLM and Qwen; a plain template's name; or a format string with "
        "{prompt}. null: keep the tokenizer's template.",
    )
    completion_only_loss: bool = Field(True, description="Only the assistant's tokens count in the loss; false: the prompt's, too.")
    train_on: TrainOn = Field(
        "all_assistant_turns",
        description="Which replies train: all of a conversation (of a row with a prompt column, those of its completion), or the last one.",
    )
    pretraining_mix: SFTPretrainingMix | None = Field(None, description="Mix pretraining texts in; null: demonstrations alone.")
    residual_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout on what attention and MLP add, and nowhere else; null: as the model's config has it."
    )
    selection: Selection | None = Field(None, description="Publish the model along the run that a reward likes best; null: the last.")
    prompt_fit: PromptFit | None = Field(None, description="Shorten prompts that are too long; null: leave long demonstrations out.")
    curation: Curation = Field(Curation(), description="Which rows are used.")
    packing: bool = Field(False, description="Several demonstrations in one row (they do not see each other); batch_size counts rows.")
    max_length: int | None = Field(
        None, ge=2, description="Longest demonstration and row, in tokens; longer ones are left out, and said. null: the model's positions."
    )
    training: SFTOptimizer = SFTOptimizer()

    @model_validator(mode="after")
    def _trainable(self) -> SFTStepConfig:
        if self.model.quantization != "none" and self.lora is None:
            raise ValueError(f"model.quantization={self.model.quantization!r} needs lora: quantized weights cannot be trained themselves")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {"model": self.model, **(self.selection.model_inputs() if self.selection is not None else {})}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data.train": self.data.train}
        if self.data.validation is not None:
            inputs["data.validation"] = self.data.validation
        if self.pretraining_mix is not None:
            inputs["pretraining_mix.data"] = self.pretraining_mix.data
        return inputs if self.selection is None else {**inputs, **self.selection.data_inputs()}

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        from stages.corpora.curation import Curator
        from stages.corpora.demonstrations import load_demonstrations
        from stages.corpora.files import read_rows, text_of
        from stages.corpora.prompts import load_prompt_rows

        load_demonstrations(self.data, Curator(self.curation))
        for row in read_rows(self.pretraining_mix.data) if self.pretraining_mix is not None else ():
            text_of(row, "text")
        if self.selection is not None and self.selection.data is not None:
            from stages.rewards.signature import columns_asked_for

            columns = columns_asked_for(self.selection.reward, run=False)
            load_prompt_rows(self.selection.data, split="validation", columns=columns)

    def conversations(self) -> list[tuple[Any, list[Any], str]]:
        """Rows of (prompt, its completions, the row's place) that the models of this step read; see ``chain/texts.py``."""
        from stages.corpora.demonstrations import load_demonstrations

        loaded = load_demonstrations(self.data)
        return [(row["prompt"], [row["completion"]], row.location) for side in (loaded.train, loaded.validation) for row in side]
