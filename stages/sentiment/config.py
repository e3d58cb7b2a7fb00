"""Settings of the sentiment classifier."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.config import (
    DataField,
    DataInput,
    DataSource,
    Epochs,
    LearningRate,
    ModelField,
    ModelInput,
    OptimizerSettings,
    Schedule,
    Strict,
    TrainingStepConfig,
    WeightDecay,
    check_origin,
    check_trainable,
)
from stages.corpora.reviews import load_reviews
from stages.corpora.text import check_texts
from stages.json_types import JsonObject


class WordPieceSettings(Strict):
    """An uncased WordPiece tokenizer trained on the step's texts."""

    vocab_size: int = Field(8192, ge=100, description="Number of tokens, including special ones.")
    max_chars: int = Field(100, ge=1, description="Longer words become the unknown token.")


class MaskedSettings(Strict):
    """Masked-language modelling of the step's texts before the labels are learned (Devlin et al. 2018)."""

    data: DataField | None = Field(None, description="Additional texts without labels; null: only the texts of data.")
    mask_probability: float = Field(0.15, gt=0, lt=1, description="Share of tokens that are masked.")
    training: OptimizerSettings = Field(
        OptimizerSettings(learning_rate=5e-4, warmup_fraction=0.05), description="Optimizer, learning rate and batch sizes of this part."
    )


class SentimentOptimizer(OptimizerSettings):
    """Like ``OptimizerSettings``, with the usual values for fine-tuning an encoder."""

    learning_rate: LearningRate = 2e-5
    schedule: Schedule = "linear"
    epochs: Epochs = 2.0
    weight_decay: WeightDecay = 0.01


class SentimentConfig(TrainingStepConfig):
    """Train a classifier, either from ``model`` or from an ``architecture`` with random weights."""

    stage: Literal["sentiment"] = "sentiment"
    model: ModelField | None = Field(None, description="Encoder or classifier to fine-tune, e.g. distilbert-base-uncased.")
    architecture: JsonObject | None = Field(
        None,
        description="Start from random weights: {type: distilbert | bert | ..., and fields of that transformers config, e.g. dim: 128}.",
    )
    tokenizer: WordPieceSettings | None = Field(None, description="With architecture: the tokenizer to train on the texts.")
    labels: list[str] = Field(["negative", "positive"], min_length=2, description="Names of the classes, by label index.")
    max_length: int = Field(512, ge=8, description="Maximum tokens per text, within the model's limit; longer ones lose their end.")
    data: DataInput = Field(description="Columns text and label (an index, or one of labels).")
    masked: MaskedSettings | None = Field(None, description="First train by masked-language modelling; null: train on the labels directly.")
    num_examples: int = Field(
        10, ge=0, description="Number of held-out texts to show with label and prediction, before and after training."
    )
    training: SentimentOptimizer = Field(SentimentOptimizer(), description="Optimizer, learning rate and batch sizes.")

    @model_validator(mode="after")
    def _one_origin(self) -> SentimentConfig:
        check_origin(self.model, self.architecture, self.tokenizer, self.lora, further="fine-tuning")
        if self.model is not None and self.masked is not None:
            raise ValueError("masked needs architecture (random weights); with model, remove masked")
        check_trainable(self.model, self.lora)
        folded = [name.casefold() for name in self.labels]
        if twice := [name for name in self.labels if folded.count(name.casefold()) > 1]:
            raise ValueError(f"labels contains {' and '.join(map(repr, twice))}; names of classes must differ by more than case")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {} if self.model is None else {"model": self.model}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = self.data.data_inputs()
        if self.masked is not None and self.masked.data is not None:
            inputs["masked.data"] = self.masked.data
        return inputs

    def check_data(self) -> None:
        """Raise DataError for data that this stage cannot use. No model is loaded."""
        load_reviews(self.data, self.labels)
        if self.masked is not None and self.masked.data is not None:
            check_texts(self.masked.data)
