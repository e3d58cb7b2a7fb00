"""Recipe fields shared by several stages. Every field states its unit and scope; unknown fields and wrong types are errors.

Each stage has its own step config in its own module, which extends ``StepConfig`` or ``TrainingStepConfig``.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from stages.json_types import JsonObject

HUB = "hub:"
"""Prefix that makes an id a Hub id, even if a step, a registry version or a folder has the same name."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Quantization = Literal["none", "int8", "nf4"]


ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
ATTENTION_KERNEL = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?")
ATTENTION_HELP = f"One of {', '.join(ATTENTIONS)}, or a kernel of the Hub (owner/name)."


LARGEST_SEED = 2**32 - 1  # numpy's limit


class Strict(BaseModel):
    """A recipe block: unknown fields are errors, types are not converted, instances are immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    def former_settings(self, settings: JsonObject) -> JsonObject:
        """``settings`` (of this block) in the format of the first version. Fingerprints use it, so new field names do not change them."""
        return settings

    def without_effect(self) -> set[str]:
        """Fields (dotted paths) that have no effect with the current values of the others. The fingerprint of a step leaves them out."""
        return set()

    def setting(self, name: str) -> str:
        """The field ``name`` with its value for a message, e.g. ``batch_size=8`` or ``batch_size=8 (the default)``."""
        return f"{name}={getattr(self, name)}{'' if name in self.model_fields_set else ' (the default)'}"


class LoraSettings(Strict):
    """Low-rank adapters (peft), trained instead of all weights. The fields mean the same as in peft's LoraConfig."""

    r: int = Field(8, ge=1, description="Rank of the update. Higher: more weights to train.")
    alpha: float = Field(16.0, gt=0, description="Scale of the update: it is multiplied by alpha / r.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability on the adapter's input; reward_model, dpo and ppo steps disable it."
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: all-linear (all linear layers except the output layer), a list of names, or a regular "
        "expression.",
    )
    exclude_modules: str | list[str] = Field(
        [], description="Modules that get no adapter, although target_modules names them: a list of names, or a regular expression."
    )
    modules_to_save: list[str] = Field(
        [],
        description="Modules whose weights are all trained and saved with the adapter, e.g. [embed_tokens, lm_head]. Embedding rows of new "
        "tokens are always trained.",
    )
    rank_pattern: dict[str, int] = Field(
        {}, description="Other ranks for some modules: r by name or regular expression, e.g. {down_proj: 32}."
    )
    alpha_pattern: dict[str, float] = Field({}, description="The same for alpha.")
    use_rslora: bool = Field(False, description="Multiply the update by alpha / sqrt(r) instead of alpha / r (rank-stabilized LoRA).")
    use_dora: bool = Field(False, description="Train the norm of each output's weights separately from their direction (DoRA). Slower.")
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "pissa", "olora"] = Field(
        True,
        description="Initial weights. true, gaussian: one matrix is random, the other one 0. orthogonal: both are random, their product is "
        "0. pissa, olora: the main part of the weights; the base does not change, and plain LoRA with twice the rank is saved.",
    )

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _expressions_are_valid(cls, value: str | list[str] | dict[str, float], info: ValidationInfo) -> str | list[str] | dict[str, float]:
        for expression in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            try:
                re.compile(expression)
                if info.field_name != "target_modules":  # a part of a longer expression, here and in peft
                    re.compile(f"(?:{expression})")
            except re.error as error:
                flags = "; write the flags as (?i:...)" if "global flags" in str(error) else ""
                raise ValueError(f"{expression!r} is not a regular expression: {error}{flags}") from error
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "LoraSettings":
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key, number in pattern.items():
                if number <= 0:
                    raise ValueError(f"{name}[{key!r}]={number} must be greater than 0")
        if self.init_lora_weights == "orthogonal" and (odd := [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]):
            raise ValueError(f"init_lora_weights=orthogonal needs even ranks, but a rank is {odd[0]}; change r or rank_pattern")
        if self.init_lora_weights in ("pissa", "olora") and self.use_dora:
            raise ValueError(f"init_lora_weights={self.init_lora_weights} and use_dora cannot be combined; remove one of them")
        return self


class ModelInput(Strict):
    """A model to load: a step of this recipe, a registry reference (``name``, ``name@3``, a digest), a local folder, or a Hub id."""

    ref: str = Field(description="Step name, registry reference, folder or Hub id (hub:owner/name if something else has that name).")
    quantization: Quantization = Field(
        "none",
        description="Load the linear layers in 8 bits (int8) or 4 bits (nf4) to save memory, with bitsandbytes. Heads stay in full "
        "precision. A model that is trained then needs lora.",
    )
    double_quantization: bool = Field(True, description="nf4 only: also quantize the quantization constants.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    trust_remote_code: bool = Field(False, description="Run the Python code in a Hub model's repository. Recorded in the lineage.")
    attention: str = Field("auto", description="auto: the fastest implementation that the model class supports. " + ATTENTION_HELP)
    template_arguments: dict[str, JsonValue] = Field(
        {},
        description="Values of the chat template's variables, e.g. {enable_thinking: false}. A model that is trained from this one keeps "
        "them as the defaults in its template.",
    )

    def without_effect(self) -> set[str]:
        return set() if self.template_arguments else {"template_arguments"}

    @field_validator("attention")
    @classmethod
    def _attention_is_known(cls, value: str) -> str:
        if value in ATTENTIONS or ATTENTION_KERNEL.fullmatch(value):
            return value
        near = get_close_matches(value, ATTENTIONS, n=1)
        raise ValueError(f"attention={value!r} is unknown. {ATTENTION_HELP}{f' Did you mean {near[0]}?' if near else ''}")


def ref_shorthand(value: object) -> object:
    """Convert a bare string to a model input."""
    return {"ref": value} if isinstance(value, str) else value


ModelField = Annotated[ModelInput, BeforeValidator(ref_shorthand)]
"""A ``ModelInput`` that a recipe may write as a bare string."""


def check_trainable(model: ModelInput | None, lora: LoraSettings | None, field: str = "model") -> None:
    """Raise ValueError if ``model``, the input ``field`` of a step that trains it, is quantized and gets no adapter."""
    if model is not None and model.quantization != "none" and lora is None:
        raise ValueError(f"{field}.quantization={model.quantization!r} needs lora, because quantized weights cannot be trained")


def check_origin(
    model: ModelInput | None, architecture: Mapping[str, object] | None, tokenizer: object, lora: LoraSettings | None, *, further: str
) -> None:
    """Raise ValueError unless a step starts either from ``model``, with its tokenizer, or from random weights of an ``architecture``.

    ``further``: what the stage calls further training of a model.
    """
    if (model is None) == (architecture is None):
        raise ValueError(f"give either model ({further}) or architecture (random weights), not both")
    if model is not None and tokenizer is not None:
        raise ValueError("tokenizer needs architecture; a model has its own")
    if architecture is not None:
        _check_architecture(architecture)
        if lora is not None:
            raise ValueError("lora needs model; with architecture all weights are random and must be trained")


def _check_architecture(architecture: Mapping[str, object]) -> None:
    """Check a block ``{type: ..., field: ...}`` for random weights. Raises ValueError if it lacks the type or sets the vocabulary size."""
    if not isinstance(architecture.get("type"), str):
        raise ValueError("architecture needs a type, e.g. {type: llama, hidden_size: 128, num_hidden_layers: 4}")
    if "vocab_size" in architecture:
        raise ValueError("architecture.vocab_size is set by the tokenizer; write tokenizer: {vocab_size: ...} instead")


class DataSource(Strict):
    """One table: a local file or folder, a data set of the Hub, or a part of the embedded world (such as ``world:raw``)."""

    path: str = Field(
        description="File (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, also .gz), folder, Hub id (hub:owner/name if a folder has "
        "the same name), or world:PART."
    )
    name: str | None = Field(None, description="Config of the data set, as named in its README.")
    split: str | None = Field(
        None,
        description="Split of a folder or Hub data set: test, train[:100], train+test (default: train; for held-out data: "
        "validation or test).",
    )
    data_dir: str | None = Field(None, description="Read only this subfolder of a folder or Hub data set.")
    data_files: str | list[str] | None = Field(None, description="Read only the files that match these patterns, e.g. data/*.parquet.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set (default: main).")
    limit: int | None = Field(None, ge=1, description="Use at most this many rows.")
    skip: int = Field(0, ge=0, description="Skip this many rows at the start.")
    columns: dict[str, str] = Field(
        {},
        description="Rename columns: our name -> name in the data, e.g. {text: review, label: sentiment}. The name in the data may be a "
        "path: answers[].text is the field text of every entry of the list answers.",
    )

    @property
    def on_hub(self) -> bool:
        """Whether the source is read from the Hub."""
        if self.path.startswith(HUB):
            return True
        return not self.path.startswith("world:") and not Path(self.path).exists()

    @property
    def hub_id(self) -> str:
        """The Hub id."""
        return self.path.removeprefix(HUB)


def _sources(value: object) -> object:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


DataField = Annotated[list[DataSource], BeforeValidator(_sources), Field(min_length=1)]
"""One source or a list of sources (their rows are concatenated in order). A bare string is a path."""


class DataInput(Strict):
    """A step's training data and held-out data."""

    train: DataField = Field(description="Training data.")
    validation: DataField | None = Field(None, description="Held-out data. null: the last validation_fraction of the training rows.")
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="Without validation: the share of training rows to hold out, from the end."
    )
    split_by: str | None = Field(
        None,
        description="Without validation: hold out complete groups of rows, which have the same value in this column (user, annotator).",
    )
    folds: int | None = Field(None, ge=2, description="With split_by: assign the groups to this many folds, and hold out one of them.")
    fold: int = Field(0, ge=0, description="With folds: the fold to hold out, from 0.")

    @model_validator(mode="before")
    @classmethod
    def _only_train(cls, value: object) -> object:
        """Convert a bare source, or a list of sources, to the training data. Raises ValueError for a source with fields of a split."""
        if isinstance(value, dict) and "path" in value and (own := [name for name in cls.model_fields if name in value]):
            raise ValueError(
                f"path belongs to one source, and {own[0]} to a mapping of splits. Write train: {value['path']} instead of path"
            )
        is_source = isinstance(value, str | list) or (isinstance(value, dict) and "path" in value and "train" not in value)
        return {"train": value} if is_source else value

    @model_validator(mode="after")
    def _groups(self) -> "DataInput":
        if self.split_by is not None and self.validation is not None:
            raise ValueError("split_by holds out training rows, but a validation source is also given; remove one of them")
        if self.folds is not None and self.split_by is None:
            raise ValueError("folds needs split_by, the column whose groups are assigned to folds")
        if self.fold and (self.folds is None or self.fold >= self.folds):
            raise ValueError(f"fold={self.fold} must be below folds={self.folds}; folds are counted from 0")
        return self

    def data_inputs(self) -> dict[str, list[DataSource]]:
        """The training data, and the held-out data if it is given, by field path within the step."""
        inputs = {"data.train": self.train}
        return inputs if self.validation is None else {**inputs, "data.validation": self.validation}


# Fields of several blocks of optimizer settings, each of which has its own default

Optimizer = Annotated[
    Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"],
    Field(
        description="adamw_8bit: 8-bit moments (bitsandbytes), 2 bytes per weight instead of 8; paged: moments can be moved to CPU memory."
    ),
]
LearningRate = Annotated[float, Field(gt=0, description="Peak learning rate.")]
Schedule = Annotated[Literal["constant", "linear", "cosine"], Field(description="Learning rate schedule after warmup.")]
FinalFraction = Annotated[float, Field(ge=0, le=1, description="Final learning rate as a share of the peak.")]
WarmupFraction = Annotated[
    float, Field(ge=0, lt=1, description="Share of the optimizer steps in which the learning rate rises linearly to its peak.")
]
Epochs = Annotated[float, Field(gt=0, description="How often all training rows are used; may be a fraction.")]
WeightDecay = Annotated[float, Field(ge=0, description="Weight decay of AdamW; 0: none.")]
AdamBeta1 = Annotated[float, Field(ge=0, lt=1, description="Adam: decay of the mean of the gradients.")]
AdamBeta2 = Annotated[float, Field(ge=0, lt=1, description="Adam: decay of the mean of the squared gradients.")]
AdamEpsilon = Annotated[float, Field(gt=0, description="Adam: added to the denominator.")]
GradientCheckpointing = Annotated[bool, Field(description="Recompute activations in the backward pass: less memory, but slower.")]
TorchCompile = Annotated[
    bool,
    Field(
        description="Compile the decoder layers with torch.compile, for training and scoring (docs/compiled-layers.md). The first passes "
        "take seconds to minutes longer. If the layers cannot be compiled, the step runs as usual and one line says why. Results are equal "
        "up to rounding."
    ),
]


def _rows_or_auto(value: object) -> object:
    """Accept a number of rows, or auto. An invalid value gives one message; pydantic would give one for each alternative."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"got {value!r}, expected a whole number of at least 1, or auto")


Microbatch = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_rows_or_auto)]
"""Number of sequences in a forward pass. auto: as many as are useful on this machine and fit into its memory."""
AUTO_ROWS = {"pretraining": 32, "sft": 32, "sentiment": 32, "reward_model": 8, "dpo": 8, "ppo": 16}
"""By stage: rows of a pass on a CPU with microbatch_size: auto. More rows are not faster there."""
SCORING_ROWS = 64
"""Texts per forward pass of a reward model or classifier, if the recipe does not set it."""
CHECKED_WEIGHTS = 300_000_000
"""A saved model of up to this many weights is loaded again and compared with the model in memory."""


class OptimizerSettings(Strict):
    """Training settings of a step. Batch sizes count sequences (reward_model: prompts), summed over all processes."""

    auto_rows: ClassVar[int] = AUTO_ROWS["sft"]

    learning_rate: LearningRate = 1e-4
    schedule: Schedule = "cosine"
    final_learning_rate_fraction: FinalFraction = 0.0
    warmup_fraction: WarmupFraction = 0.0
    epochs: Epochs = 1.0
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps (overrides epochs).")
    batch_size: int = Field(32, ge=1, description="Sequences per optimizer step, summed over processes.")
    microbatch_size: Microbatch = Field(
        "auto",
        description="Maximum sequences per forward pass and process; larger batches use gradient accumulation. Passes contain sequences of "
        "similar length; on a CPU also at most 800 tokens. auto: 32 on a CPU and with several processes; on one GPU as many tokens as "
        "fit into its free memory.",
    )
    optimizer: Optimizer = "adamw"
    weight_decay: WeightDecay = 0.0
    adam_beta1: AdamBeta1 = 0.9
    adam_beta2: AdamBeta2 = 0.999
    adam_epsilon: AdamEpsilon = 1e-8
    max_grad_norm: float | None = Field(1.0, gt=0, description="Larger gradients are scaled down to this norm; null: no clipping.")
    gradient_checkpointing: GradientCheckpointing = False
    torch_compile: TorchCompile = False

    def without_effect(self) -> set[str]:
        return set() if self.torch_compile else {"torch_compile"}

    @model_validator(mode="after")
    def _microbatches_fit(self) -> "OptimizerSettings":
        if self.microbatch_size != "auto" and self.batch_size % min(self.microbatch_size, self.batch_size):
            raise ValueError(f"{self.setting('batch_size')} must be a multiple of {self.setting('microbatch_size')}")
        return self

    @property
    def rows_per_pass(self) -> int:
        """The most sequences of a pass, where passes are not filled by tokens."""
        return self.auto_rows if self.microbatch_size == "auto" else self.microbatch_size


class StepConfig(Strict):
    """Fields of every step."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the step; its model is called <recipe>/<name>.")
    stage: str = Field(description="The stage to run.")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Random seed of this step (default: the recipe's).")
    precision: Precision = Field(
        "auto",
        description="Number format of the computations. auto: bf16 on a GPU of CUDA capability 8 or higher, and on a CPU with matrix "
        "tiles (AMX) if a short measurement at the model's width shows that it is faster; else fp32. A resumed step keeps its format.",
    )

    former_names: ClassVar[dict[str, str]] = {}
    """Flat field names of earlier versions, and their path today: {"kl_coef": "kl.coef"}. Both are accepted, and have one fingerprint."""

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, value: object) -> object:
        return with_current_names(value, cls.former_names) if isinstance(value, dict) else value

    def former_settings(self, settings: JsonObject) -> JsonObject:
        """``settings`` with the flat names of earlier versions."""
        flat = {name: dict(item) if isinstance(item, dict) else item for name, item in settings.items()}
        for former, path in self.former_names.items():
            group, _, name = path.partition(".")
            block = flat[group]
            assert isinstance(block, dict)  # a group of settings
            flat[former] = block.pop(name)
        groups = {path.partition(".")[0] for path in self.former_names.values()}
        return {name: item for name, item in flat.items() if name not in groups or item}


def with_current_names(content: Mapping[str, object], former_names: dict[str, str]) -> JsonObject:
    """``content`` of a step with the fields of earlier versions moved to their path today. Raises ValueError if both are set."""
    renamed = {name: value for name, value in content.items() if name not in former_names}
    for former in (name for name in content if name in former_names):
        group, _, name = former_names[former].partition(".")
        block = renamed.get(group, {})
        block = block.model_dump(exclude_unset=True) if isinstance(block, BaseModel) else block
        if not isinstance(block, dict) or name in block:
            raise ValueError(f"{former} is the former name of {group}.{name}, and {group} is set, too; remove {former}")
        renamed[group] = {**block, name: content[former]}
    return renamed


def is_changed(block: BaseModel, path: str) -> bool:
    """Whether the field at a dotted path below ``block`` differs from its default."""
    *groups, name = path.split(".")
    for group in groups:
        block = getattr(block, group)
    return bool(getattr(block, name) != type(block).model_fields[name].get_default(call_default_factory=True))


def default_at(block: type[BaseModel], path: str) -> object:
    """The default of the field at a dotted path below the class ``block``. Raises LookupError if a block on the path has none."""
    *groups, name = path.split(".")
    for group in groups:
        default = block.model_fields[group].get_default(call_default_factory=True)
        if not isinstance(default, BaseModel):
            raise LookupError(f"{group} has no default")
        block = type(default)
    if block.model_fields[name].is_required():
        raise LookupError(f"{path} has no default")
    return block.model_fields[name].get_default(call_default_factory=True)


def as_written(value: object) -> str:
    """A field's value as written in a recipe."""
    if value is None:
        return "null"
    return value.ref if isinstance(value, ModelInput) else str(value).lower() if isinstance(value, bool) else str(value)


class CheckpointSettings(Strict):
    """When a step writes checkpoints, and which of them it keeps."""

    seconds: float = Field(
        10.0,
        ge=0,
        description="Minimum seconds between checkpoints; 0: as often as possible. The time grows if writing takes over 5 % of the run.",
    )
    keep_last: int = Field(
        2, ge=1, description="Number of newest checkpoints to keep while the step runs. With two, a damaged one can be skipped."
    )
    keep_best: int = Field(
        0,
        ge=0,
        description="Also keep this many of the best checkpoints, and publish the best one as <name>-best. ppo: by mean reward minus KL "
        "penalty; other stages: by their held-out metric, which is measured ten times per run.",
    )


class CheckpointedStepConfig(StepConfig):
    """A long step that resumes from its newest checkpoint after an interruption."""

    checkpoints: CheckpointSettings = Field(CheckpointSettings(), description="When to write checkpoints, and which to keep.")

    former_names: ClassVar[dict[str, str]] = {
        "checkpoint_seconds": "checkpoints.seconds",
        "keep_last": "checkpoints.keep_last",
        "keep_best": "checkpoints.keep_best",
    }


class TrainingStepConfig(CheckpointedStepConfig):
    """A step that trains one model with a Trainer."""

    lora: LoraSettings | None = Field(None, description="Train low-rank adapters instead of all weights.")
    training: OptimizerSettings = Field(OptimizerSettings(), description="Optimizer, learning rate and batch sizes.")


OWN_VLLM_ARGUMENTS = {
    *("model", "served_model_name", "host", "port", "api_key", "dtype", "generation_config", "enable_lora", "max_lora_rank", "max_loras"),
    *("logprobs_mode", "quantization", "revision", "trust_remote_code", "enable_sleep_mode", "gpu_memory_utilization", "max_model_len"),
    *("tensor_parallel_size", "enforce_eager", "tokenizer"),
}


class VllmStart(Strict):
    """A vLLM server that the run starts in a separate environment, and ends."""

    python: str | None = Field(
        None,
        description="Interpreter of an environment with vLLM. null: STAGES_VLLM_PYTHON, else the one made by ./launch.sh --with-vllm.",
    )
    gpus: list[int] | None = Field(
        None,
        min_length=1,
        description="Numbers of separate GPUs for the server; the weights are divided over them. null: the server shares the run's first "
        "GPU and sleeps while the run trains.",
    )
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1, description="Maximum share of a GPU's memory for the server.")
    max_model_len: int | None = Field(None, ge=2, description="Maximum tokens of prompt and completion. null: the model's positions.")
    arguments: dict[str, str | int | float | bool] = Field(
        {}, description="Further arguments of the server by name, e.g. {max_num_seqs: 512}; true is a flag without a value."
    )
    wait_seconds: float = Field(900.0, gt=0, description="Maximum seconds until the server answers.")

    @field_validator("arguments")
    @classmethod
    def _arguments_are_free(cls, value: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
        taken = sorted({name.replace("-", "_") for name in value} & OWN_VLLM_ARGUMENTS)
        if taken:
            raise ValueError(f"arguments names {', '.join(taken)}, which the run sets itself; remove it")
        return value


class Vllm(Strict):
    """Sampling by vLLM over HTTP: servers that run elsewhere (``url``), or one that the run starts (``start``)."""

    url: Annotated[list[str] | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        None, min_length=1, description="URL of a server, or of several. Prompts are distributed round-robin."
    )
    start: VllmStart | None = Field(None, description="Start a server on this machine, and end it with the run. {}: default settings.")
    api_key_variable: str | None = Field(None, description="Environment variable with the API key of the servers under url.")
    adapter_folder: str | None = Field(
        None,
        description="Folder for adapters and weights; the servers must read it under the same path. null: this machine's shared memory, "
        "or the home if a server runs on another machine.",
    )
    concurrency: int = Field(256, ge=1, description="Maximum simultaneous requests per process, over all servers.")
    timeout_seconds: float = Field(600.0, gt=0, description="Maximum seconds for one answer.")
    retries: int = Field(3, ge=0, description="Further attempts after a request without a usable answer.")
    backoff_seconds: float = Field(0.5, ge=0, description="Seconds before the first further attempt, doubled for each one.")
    probe_bound: float | None = Field(
        None,
        gt=0,
        description="After every transfer of weights, the maximum mean difference between the servers' and the trainer's "
        "log-probabilities of a probe, in nats per token. null: 0.001 in fp32, 0.1 in half precision or on quantized weights.",
    )

    def without_effect(self) -> set[str]:
        return set(type(self).model_fields)  # the address of a server does not change the distribution; the probe checks this

    @field_validator("url")
    @classmethod
    def _addresses(cls, value: list[str] | None) -> list[str] | None:
        for url in value or ():
            if not re.fullmatch(r"https?://[^/\s]+(/[^\s]*)?", url):
                raise ValueError(f"url: {url!r} is not a valid URL; expected http://HOST:PORT")
        if value is not None and len(set(value)) < len(value):
            raise ValueError("url has the same server twice; name each server once")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> "Vllm":
        if (self.url is None) == (self.start is None):
            raise ValueError("vllm needs either url (running servers) or start (a server to start), e.g. vllm: {start: {}}")
        if self.start is not None and self.api_key_variable is not None:
            raise ValueError("api_key_variable needs url; a server that the run starts gets a generated key")
        return self


class Engine(Strict):
    """The sampling engine, if it is not the local one."""

    vllm: Vllm


def _engine(value: object) -> object:
    """``local`` as the absence of an engine; other words are unknown."""
    if value == "local":
        return None
    if isinstance(value, str):
        raise ValueError(f"engine={value!r} is unknown; expected local, {{vllm: {{start: {{}}}}}} or {{vllm: {{url: http://HOST:PORT}}}}")
    return value


class GenerationSettings(Strict):
    """How to sample completions. The default is pure sampling at temperature 1, as in the papers' rollouts."""

    engine: Annotated[Engine | None, BeforeValidator(_engine)] = Field(
        None,
        description="What samples: local (the model in this process), or vLLM: {vllm: {url: ...}} or {vllm: {start: {}}} (docs/vllm.md).",
    )
    max_new_tokens: int = Field(48, ge=1, description="Maximum tokens of a completion.")
    temperature: float = Field(1.0, ge=0, description="Logits are divided by this. Lower: less variety; 0: always the most likely token.")
    top_k: int = Field(0, ge=0, description="Sample from the k most likely tokens; 0: all tokens.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this total probability; 1: all tokens.")
    stop: list[str] = Field([], description="Tokens (as text) that end a completion, besides the end tokens of tokenizer and model.")
    stop_after: int = Field(0, ge=0, description="A token of stop ends a completion only at this position (in tokens, from 0) or later.")
    ignore_eos: bool = Field(
        False, description="Only the tokens of stop end a completion; the end token does so only if it is one of them."
    )
    batch_size: int = Field(
        64, ge=1, description="Completions that are sampled at the same time, per process. Lower it if memory runs out."
    )
    continuous_batching: Literal["auto"] | bool = Field(
        "auto",
        description="When a completion is finished, begin the next prompt immediately, instead of when the batch is finished. auto: on a "
        "GPU.",
    )
    cuda_graphs: bool = Field(
        True, description="On a GPU, record a decoding step as a CUDA graph and replay it. Models that cannot be recorded run normally."
    )

    def without_effect(self) -> set[str]:
        return {"engine"} if self.engine is None else set()

    @field_serializer("engine")
    def _written_engine(self, value: Engine | None) -> object:
        return "local" if value is None else value

    @property
    def vllm(self) -> Vllm | None:
        """The settings of vLLM, if it samples; None if this process samples."""
        return self.engine.vllm if self.engine is not None else None

    @model_validator(mode="after")
    def _engine_can(self) -> "GenerationSettings":
        vllm = self.vllm
        if vllm is not None and vllm.url is not None and not self.cuda_graphs:
            raise ValueError(
                "cuda_graphs=false does nothing for vLLM servers under url; start them with --enforce-eager, and remove cuda_graphs"
            )
        return self
