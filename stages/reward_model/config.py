"""Settings of the reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from stages.config import (
    AUTO_ROWS,
    DataField,
    DataInput,
    DataSource,
    FinalFraction,
    GenerationSettings,
    LearningRate,
    Microbatch,
    ModelField,
    ModelInput,
    OptimizerSettings,
    Strict,
    TrainingStepConfig,
    check_trainable,
    is_changed,
)
from stages.corpora.comparisons import load_comparisons
from stages.corpora.curation import Curation, Curator
from stages.corpora.demonstrations import demonstration
from stages.corpora.encoding.fitting import PromptFit
from stages.corpora.files import read_rows
from stages.reward_model.collection_config import Collection
from stages.rewards.config import QUESTION, RewardInput, check_names, check_question, check_rubrics, reward_model_inputs, rubric_inputs

if TYPE_CHECKING:
    from stages.corpora.conversations.messages import Completion, Prompt


class RewardModelOptimizer(OptimizerSettings):
    """Like ``OptimizerSettings``, but batch sizes count prompts, each with all its completions."""

    auto_rows: ClassVar[int] = AUTO_ROWS["reward_model"]

    learning_rate: LearningRate = 9e-6
    final_learning_rate_fraction: FinalFraction = 0.1
    batch_size: int = Field(64, ge=1, description="Prompts per optimizer step, summed over processes.")
    microbatch_size: Microbatch = Field(
        "auto",
        description="Maximum prompts per forward pass and process; larger batches use gradient accumulation. auto: 8 on a CPU and with "
        "several processes; on one GPU as many tokens as fit into its free memory.",
    )

    @property
    def measuring_rows(self) -> int:
        """Texts of a pass without gradients. A training pass has ``rows_per_pass`` prompts, each with several texts."""
        return 8 * self.rows_per_pass


class Normalization(Strict):
    """Offset and scale of the scores. A ranking loss determines neither, but PPO's KL penalty depends on both."""

    to: Literal["center", "standardize", "none"] = Field(
        "center",
        description="center: mean 0 (Stiennon et al. 2020, Ouyang et al. 2022); standardize: mean 0 and variance 1 (Ziegler et al. 2019); "
        "none: unchanged.",
    )
    on: Literal["demonstrations", "samples"] = Field(
        "demonstrations", description="Texts to normalize on: demonstrations, or a policy's samples for the training prompts."
    )
    sampler: ModelField | None = Field(None, description="For on: samples: the policy; null: the step's model.")
    num_samples: int = Field(256, ge=2, description="For on: samples: number of samples.")
    before_training: bool = Field(False, description="For on: samples: also normalize before training, as Ziegler et al. 2019.")
    generation: GenerationSettings = Field(GenerationSettings(), description="For on: samples: how to sample.")

    @model_validator(mode="after")
    def _samples(self) -> Normalization:
        if self.on != "samples" and (self.sampler is not None or self.before_training):
            raise ValueError("normalization.sampler and before_training need on: samples; set it, or remove them")
        return self


class Generative(Strict):
    """A language model as reward model: its log-odds of two answers to a question about the completion."""

    answers: list[str] = Field(
        min_length=2,
        max_length=2,
        description="Two answers; the score is log P(first) - log P(second). Without a chat template, a word usually begins with a space.",
    )
    question: str = Field(QUESTION, description="What the model is asked, with {prompt} and {completion}.")
    train: bool = Field(False, description="Train on the comparisons with the ranking loss. false: publish the language model unchanged.")

    @model_validator(mode="after")
    def _answerable(self) -> Generative:
        check_question(self.question, self.answers)
        return self


SCALAR_FIELDS = ("demonstrations", "normalization", "num_seeds")
TRAINING_FIELDS = ("checkpoints.keep_best", "collect", "lora", "loss", "training")


class RewardModelConfig(TrainingStepConfig):
    """Train a scalar head and its backbone on comparisons."""

    stage: Literal["reward_model"] = "reward_model"
    preset: str | None = Field(None, description="Published settings as defaults, e.g. instructgpt2022 (docs/presets.md).")
    model: ModelField = Field(description="A language model, which gets a new head, or a reward model to train further.")
    generative: Generative | None = Field(None, description="Score by the log-odds of two answers instead of a scalar head.")
    data: DataInput = Field(description="Comparisons.")
    preferred: str | None = Field(None, description="If the column responses has objects: the key of the preferred text.")
    demonstrations: DataField | None = Field(
        None, description="Rows of prompt + completion whose mean score becomes 0; null: the best completion of each training comparison."
    )
    beside: list[RewardInput] = Field([], description="Other reward sources to measure on the same held-out comparisons.")
    collect: Collection | None = Field(None, description="Also collect comparisons from policies; null: use only data.")
    loss: Literal["pairs", "best_of"] = Field(
        "pairs",
        description="pairs: every pair of a prompt's completions counts (Ouyang et al. 2022); best_of: the best one against all others, "
        "by a softmax (Ziegler et al. 2019).",
    )
    normalization: Normalization = Field(
        Normalization(),
        description="Offset and scale of the scores. A ranking loss determines neither, but PPO's KL penalty depends on both.",
    )
    num_seeds: int = Field(
        1,
        ge=1,
        description="Train with this many seeds and keep the best model (Stiennon et al. 2020). Half of the held-out comparisons select "
        "it; the other half measures it.",
    )
    group_by: list[str] = Field(
        [], description="Columns; the held-out accuracy is also measured for each of their values, e.g. annotator, batch, confidence."
    )
    prompt_fit: PromptFit | None = Field(None, description="Shorten prompts that are too long; null: the beginning is cut at max_length.")
    curation: Curation = Field(Curation(), description="Filters of rows.")
    max_length: int | None = Field(
        None,
        ge=2,
        description="Maximum tokens of prompt and completion; longer ones lose their beginning. null: the model's limit, or 2,048 if it "
        "has none.",
    )
    training: RewardModelOptimizer = Field(
        RewardModelOptimizer(), description="Optimizer, learning rate and batch sizes, which count prompts with all their completions."
    )

    @model_validator(mode="after")
    def _trainable(self) -> RewardModelConfig:
        check_trainable(self.model, self.lora)
        if self.num_seeds > 1 and self.checkpoints.keep_best:
            raise ValueError(
                f"checkpoints.keep_best={self.checkpoints.keep_best} needs num_seeds=1; with several seeds the best is already selected"
            )
        check_names(self.beside, "beside")
        if self.generative is not None:
            self._check_generative(self.generative)
        return self

    def _check_generative(self, generative: Generative) -> None:
        """Raise ValueError for fields that a generative reward model does not use."""
        for names, why in (
            (SCALAR_FIELDS, "is for a scalar head; remove it, because generative is set"),
            (() if generative.train else TRAINING_FIELDS, "is for training; set generative.train: true, or remove it"),
        ):
            for name in names:
                if is_changed(self, name):
                    raise ValueError(f"{name} {why}")
        if not generative.train and self.model.quantization != "none":
            raise ValueError(
                "model.quantization: a generative reward model is saved without quantization; set quantization in the steps that use it"
            )

    def model_inputs(self) -> dict[str, ModelInput]:
        inputs = {"model": self.model}
        if self.normalization.sampler is not None:
            inputs["normalization.sampler"] = self.normalization.sampler
        inputs |= reward_model_inputs(self.beside, "beside")
        return {**inputs, **(self.collect.model_inputs() if self.collect is not None else {})}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = self.data.data_inputs()
        if self.collect is not None:
            inputs |= self.collect.data_inputs()
        inputs |= rubric_inputs(self.beside, "beside")
        return inputs if self.demonstrations is None else {**inputs, "demonstrations": self.demonstrations}

    def check_data(self) -> None:
        """Raise DataError for data that this stage cannot use. No model is loaded."""
        load_comparisons(self.data, preferred=self.preferred, curator=Curator(self.curation), group_by=self.group_by)
        self.load_demonstrations()
        check_rubrics(self.beside)
        if self.collect is not None:
            self.collect.check_data()

    def conversations(self) -> list[tuple[Prompt, Sequence[Completion], str]]:
        """Rows (prompt, completions, location) that the models of this step read; see ``chain/conversations.py``."""
        loaded = load_comparisons(self.data, preferred=self.preferred, group_by=self.group_by)
        compared = [(item.prompt, item.completions, item.location) for side in (loaded.train, loaded.validation) for item in side]
        return [*compared, *((prompt, [completion], "") for prompt, completion in self.load_demonstrations())]

    def load_demonstrations(self) -> list[tuple[Prompt, Completion]]:
        """The named demonstrations as (prompt, completion); empty if there are none."""
        rows = [demonstration(row) for row in read_rows(self.demonstrations)] if self.demonstrations is not None else []
        return [(row["prompt"], row["completion"]) for row in rows]
