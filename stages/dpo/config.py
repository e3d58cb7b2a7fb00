"""Settings of direct preference optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from stages.config import (
    AUTO_ROWS,
    DataInput,
    DataSource,
    Microbatch,
    ModelField,
    ModelInput,
    OptimizerSettings,
    Schedule,
    TrainingStepConfig,
    WarmupFraction,
    check_trainable,
)
from stages.corpora.comparisons import load_comparisons
from stages.corpora.curation import Curation, Curator

if TYPE_CHECKING:
    from stages.corpora.conversations.messages import Completion, Prompt


class DPOOptimizer(OptimizerSettings):
    """Like ``OptimizerSettings``, but batch sizes count pairs."""

    auto_rows: ClassVar[int] = AUTO_ROWS["dpo"]

    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate; TRL's default. Very small models need more.")
    schedule: Schedule = "linear"
    warmup_fraction: WarmupFraction = 0.1
    batch_size: int = Field(32, ge=1, description="Pairs per optimizer step, summed over processes.")
    microbatch_size: Microbatch = Field(
        "auto",
        description="Maximum pairs per forward pass and process; larger batches use gradient accumulation. auto: 8 on a CPU and with "
        "several processes; on one GPU as many tokens as fit into its free memory.",
    )


class DPOStepConfig(TrainingStepConfig):
    """Train ``model`` to prefer the preferred completions, close to its reference."""

    stage: Literal["dpo"] = "dpo"
    model: ModelField = Field(description="Language model to train, usually an sft step.")
    reference: ModelField | None = Field(None, description="Frozen reference of the loss; null: the initial model.")
    data: DataInput = Field(description="Comparisons, as for the reward model.")
    curation: Curation = Field(Curation(), description="Filters of rows; set them as for the reward model to use the same rows.")
    preferred: str | None = Field(None, description="If the column responses has objects: the key of the preferred text.")
    pairs_per_prompt: int | None = Field(None, ge=1, description="Maximum pairs of a ranked list, drawn with the seed; null: all.")
    beta: float = Field(0.1, gt=0, description="Higher: the model stays closer to the reference, as with PPO's kl.coef.")
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = Field(
        "sigmoid", description="sigmoid: as in the paper of DPO; the others as in TRL."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="With loss: robust: assumed share of wrong comparisons.")
    max_length: int | None = Field(
        None,
        ge=2,
        description="Maximum tokens of prompt and completion; longer pairs are dropped and counted. null: the model's limit, or 1,024 "
        "if it has none.",
    )
    training: DPOOptimizer = Field(DPOOptimizer(), description="Optimizer, learning rate and batch sizes, which count pairs.")

    @model_validator(mode="after")
    def _trainable(self) -> DPOStepConfig:
        check_trainable(self.model, self.lora)
        if self.label_smoothing and self.loss != "robust":
            raise ValueError(
                f"{self.setting('label_smoothing')} requires loss: robust; loss: {self.loss} has no label smoothing. Set loss: robust, or "
                "remove label_smoothing"
            )
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {"model": self.model} if self.reference is None else {"model": self.model, "reference": self.reference}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        return self.data.data_inputs()

    def check_data(self) -> None:
        """Raise DataError for data that this stage cannot use. No model is loaded."""
        load_comparisons(self.data, preferred=self.preferred, curator=Curator(self.curation))

    def conversations(self) -> list[tuple[Prompt, Sequence[Completion], str]]:
        """Rows (prompt, completions, location) that the models of this step read; see ``chain/conversations.py``."""
        loaded = load_comparisons(self.data, preferred=self.preferred)
        return [(item.prompt, item.completions, item.location) for side in (loaded.train, loaded.validation) for item in side]
