"""Recipe fields that several stages share. Every field says its unit and scope; an unknown field or a wrong type is an error.

Each stage has its own step config that extends ``StepConfig`` (or ``TrainingStepConfig``) and lives in the stage's module.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

HUB = "hub:"
"""Before an id in a recipe: it is on the Hub, whatever a step, a registry version or a folder is called."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Quantization = Literal["none", "int8", "nf4"]


ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
ATTENTION_KERNEL = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?")
ATTENTION_HELP = f"One of {', '.join(ATTENTIONS)}, or a kernel of the hub (owner/name)."


LARGEST_SEED = 2**32 - 1  # numpy takes no larger one


class Strict(BaseModel):
    """A recipe block: no unknown fields, no silent conversions, immutable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class LoraSettings(Strict):
    """Low-rank adapters (peft) trained instead of the whole model."""

    r: int = Field(8, ge=1, description="Rank of the update.")
    alpha: float = Field(16.0, gt=0, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input; reward_model, dpo and ppo steps switch it off.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: 'all-linear' (all but the output layer), a list of names, or a regular expression.",
    )
    modules_to_save: list[str] = Field(
        [],
        description="Modules that train whole and are saved with the adapter, e.g. [embed_tokens, lm_head]. Rows of tokens that the model "
        "had no rows for train in any case.",
    )


class ModelInput(Strict):
    """A model to read: a step of this recipe, a registry reference (``name``, ``name@3``, a digest), a local folder, or a hub id."""

    ref: str = Field(description="Step name, registry reference, folder or hub id (hub:owner/name where something else has that name).")
    quantization: Quantization = Field("none", description="Load the backbone in int8 or nf4 (bitsandbytes); heads stay in full precision.")
    double_quantization: bool = Field(True, description="nf4 only: quantize the quantization constants too.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    trust_remote_code: bool = Field(False, description="Run code that comes with a hub model. Recorded in the lineage.")
    attention: str = Field("auto", description="auto: the fastest that the model's class supports. " + ATTENTION_HELP)

    @field_validator("attention")
    @classmethod
    def _attention_is_known(cls, value: str) -> str:
        if value in ATTENTIONS or ATTENTION_KERNEL.fullmatch(value):
            return value
        near = get_close_matches(value, ATTENTIONS, n=1)
        raise ValueError(f"attention={value!r} is unknown. {ATTENTION_HELP}{f' Did you mean {near[0]}?' if near else ''}")


def ref_shorthand(value: Any) -> Any:
    """A bare string as the model input it stands for."""
    return {"ref": value} if isinstance(value, str) else value


ModelField = Annotated[ModelInput, BeforeValidator(ref_shorthand)]
"""A ``ModelInput`` that may be written as a bare string in a recipe."""


def check_architecture(architecture: dict[str, Any]) -> None:
    """Raise ValueError where a block ``{type: ..., field: ...}`` for random weights lacks its type, or sets what the tokenizer decides."""
    if not isinstance(architecture.get("type"), str):
        raise ValueError("architecture needs a type, e.g. {type: llama, hidden_size: 128, num_hidden_layers: 4}")
    if "vocab_size" in architecture:
        raise ValueError("architecture.vocab_size follows from the tokenizer; write tokenizer: {vocab_size: ...}")


class DataSource(Strict):
    """One table: a local file or folder, a data set of the Hub, or a part of the embedded world (``world:raw`` and so on)."""

    path: str = Field(
        description="File (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, also .gz), folder, hub id (hub:owner/name where a folder is "
        "called the same), or world:PART."
    )
    name: str | None = Field(None, description="Config of the data set, as its README names them.")
    split: str | None = Field(
        None,
        description="Split of a folder or a data set of the Hub: test, train[:100], train+test (default: train; held-out data: "
        "validation or test).",
    )
    data_dir: str | None = Field(None, description="Read only this folder of a folder or a data set of the Hub.")
    data_files: str | list[str] | None = Field(None, description="Read only the files that fit these patterns, e.g. data/*.parquet.")
    revision: str | None = Field(None, description="Branch, tag or commit of a data set of the Hub (default: main).")
    limit: int | None = Field(None, ge=1, description="Use only the first so many rows.")
    skip: int = Field(0, ge=0, description="Leave out the first so many rows.")
    columns: dict[str, str] = Field({}, description="Rename: our column name -> the file's, e.g. {text: review, label: sentiment}.")

    @property
    def on_hub(self) -> bool:
        """Whether reading it would ask the Hub."""
        if self.path.startswith(HUB):
            return True
        return not self.path.startswith("world:") and not Path(self.path).exists()

    @property
    def hub_id(self) -> str:
        """The id of a data set of the Hub."""
        return self.path.removeprefix(HUB)


def _sources(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


DataField = Annotated[list[DataSource], BeforeValidator(_sources), Field(min_length=1)]
"""One source or a list of sources (rows are concatenated in order); a bare string is a path."""


class DataInput(Strict):
    """Training data and held-out data of a step."""

    train: DataField
    validation: DataField | None = Field(None, description="Held-out data. Absent: validation_fraction of the training rows is held out.")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="Share of training rows held out when no validation source is named.")
    split_by: str | None = Field(
        None, description="Hold out whole groups of training rows: those with the same value in this column (user, annotator)."
    )
    folds: int | None = Field(None, ge=2, description="With split_by: deal the groups out into so many folds, of which one is held out.")
    fold: int = Field(0, ge=0, description="With folds: which one is held out, from 0.")

    @model_validator(mode="after")
    def _groups(self) -> "DataInput":
        if self.split_by is not None and self.validation is not None:
            raise ValueError("split_by holds out training rows, and a validation source is named, too; leave one of them out")
        if self.folds is not None and self.split_by is None:
            raise ValueError("folds goes with split_by: name the column whose groups are dealt out")
        if self.fold and (self.folds is None or self.fold >= self.folds):
            raise ValueError(f"fold={self.fold} must be below folds={self.folds}")
        return self


Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
OPTIMIZER_HELP = (
    "adamw_8bit: moments in 8 bits (bitsandbytes), 2 bytes a weight instead of 8; paged: moments may leave the GPU for the CPU's memory."
)


class OptimizerSettings(Strict):
    """How a step trains. Batch sizes count sequences (reward_model: prompts) summed over all processes."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Shape after warmup.")
    final_learning_rate_fraction: float = Field(0.0, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    warmup_fraction: float = Field(0.0, ge=0, lt=1, description="Share of the optimizer steps used for linear warmup.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimizer steps (overrides epochs).")
    batch_size: int = Field(32, ge=1, description="Sequences per optimizer step, summed over processes.")
    microbatch_size: int = Field(32, ge=1, description="Sequences per forward pass and process; the rest is gradient accumulation.")
    optimizer: Optimizer = Field("adamw", description=OPTIMIZER_HELP)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the global gradient norm; null: no clipping.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass: less memory, slower.")

    @model_validator(mode="after")
    def _microbatches_fit(self) -> "OptimizerSettings":
        if self.batch_size % min(self.microbatch_size, self.batch_size):
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of microbatch_size={self.microbatch_size}")
        return self


class StepConfig(Strict):
    """What every step of a recipe has."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the step, and of the model it makes: <recipe>/<name>.")
    stage: str = Field(description="Which stage runs.")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Random seed of this step (default: the recipe's).")
    precision: Precision = Field("auto", description="auto: bf16 where the hardware is measured to be faster at it, else fp32.")


class CheckpointedStepConfig(StepConfig):
    """A step that trains for long, and goes on after a cut where its newest checkpoint was."""

    checkpoint_seconds: float = Field(
        10.0, ge=0, description="Least time between two checkpoints; 0: at every safe point. Slow ones pause longer: writing takes 5 %."
    )
    keep_last: int = Field(2, ge=1, description="Checkpoints to keep while the step runs, the newest; a damaged one is passed over.")
    keep_best: int = Field(
        0,
        ge=0,
        description="Also keep so many of the best, and publish the best as <name>-best. ppo: by mean reward less KL penalty; "
        "other stages: by their held-out measure, taken ten times in a run.",
    )


class TrainingStepConfig(CheckpointedStepConfig):
    """A step that trains one model with a Trainer."""

    lora: LoraSettings | None = Field(None, description="Train low-rank adapters instead of the whole model.")
    training: OptimizerSettings = OptimizerSettings()


class GenerationSettings(Strict):
    """How completions are sampled. Defaults are pure sampling at temperature 1, as the papers' rollouts."""

    max_new_tokens: int = Field(48, ge=1, description="Most response tokens per completion.")
    temperature: float = Field(1.0, ge=0, description="Logits are divided by this; 0 is greedy.")
    top_k: int = Field(0, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this much probability; 1 keeps all.")
    stop: list[str] = Field([], description="Tokens (as text) that end a completion besides the tokenizer's eos and the model's own.")
    stop_after: int = Field(0, ge=0, description="The tokens of stop end a completion only at this response position (from 0) or later.")
    ignore_eos: bool = Field(
        False, description="Only the tokens of stop end a completion, at stop_after or later, the end token among them if named there."
    )
    batch_size: int = Field(64, ge=1, description="Sequences decoded together, per process.")
    cuda_graphs: bool = Field(
        True, description="On a GPU, record a decoding step and replay it; where a model cannot be recorded, its steps are computed."
    )
