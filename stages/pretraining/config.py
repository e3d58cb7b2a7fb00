"""Settings of the pretraining stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from stages.config import (
    AdamBeta2,
    DataInput,
    DataSource,
    FinalFraction,
    LearningRate,
    ModelField,
    ModelInput,
    OptimizerSettings,
    Strict,
    TrainingStepConfig,
    WarmupFraction,
    WeightDecay,
    check_origin,
    check_trainable,
    ref_shorthand,
)
from stages.corpora.text import load_text
from stages.json_types import JsonObject


class TokenizerSettings(Strict):
    """A byte-level BPE tokenizer trained on the step's training corpus, with an end and a pad token."""

    vocab_size: int = Field(1024, ge=258, description="Number of tokens: 256 bytes, special tokens, and merges.")
    special_tokens: list[str] = Field([], description="Special tokens besides the end and pad tokens, e.g. role markers of a template.")


class PretrainingOptimizer(OptimizerSettings):
    """Like ``OptimizerSettings``, with the usual schedule and weight decay of pretraining."""

    learning_rate: LearningRate = 1e-3
    final_learning_rate_fraction: FinalFraction = 0.1
    warmup_fraction: WarmupFraction = 0.02
    weight_decay: WeightDecay = 0.1
    adam_beta2: AdamBeta2 = 0.95


class PretrainingConfig(TrainingStepConfig):
    """Either ``model`` (continued pretraining) or ``architecture`` (random weights)."""

    stage: Literal["pretraining"] = "pretraining"
    model: ModelField | None = Field(None, description="Model to train further, with its own tokenizer.")
    architecture: JsonObject | None = Field(
        None,
        description="Start from random weights: {type: llama | gpt2 | ..., and fields of that transformers config, e.g. hidden_size: 128}.",
    )
    tokenizer: Annotated[TokenizerSettings | ModelInput | None, BeforeValidator(ref_shorthand)] = Field(
        None,
        description="With architecture: {vocab_size: 1024} trains a tokenizer on the corpus (default); a model means that model's "
        "tokenizer.",
    )
    block_size: int = Field(256, ge=2, description="Tokens per training sequence.")
    data: DataInput = Field(description="Texts: the column text.")
    training: PretrainingOptimizer = Field(PretrainingOptimizer(), description="Optimizer, learning rate and batch sizes.")

    @model_validator(mode="after")
    def _one_origin(self) -> PretrainingConfig:
        check_origin(self.model, self.architecture, self.tokenizer, self.lora, further="continued pretraining")
        check_trainable(self.model, self.lora)
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        if self.model is not None:
            return {"model": self.model}
        return {"tokenizer": self.tokenizer} if isinstance(self.tokenizer, ModelInput) else {}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        return self.data.data_inputs()

    def check_data(self) -> None:
        """Raise DataError for data that this stage cannot use. No model is loaded."""
        load_text(self.data)
