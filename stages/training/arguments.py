"""Arguments of a transformers Trainer, made from the settings of a step."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import TrainingArguments

from stages.config import OptimizerSettings, TrainingStepConfig
from stages.errors import LaunchError, RecipeError
from stages.json_types import JsonObject
from stages.training.fused import fused_adamw_works
from stages.training.smaller_passes import read_limit

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from stages.step import StepContext
    from stages.training.step_trainer import StepArguments

TRAINER_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
EXAMPLES = "examples of a training pass"
"""The work whose limit ``training/smaller_passes.py`` keeps: passes of a step with several processes."""
NUM_LOG_LINES = 100  # log lines per training run
LOGS_ONLY: JsonObject = {
    "logging_strategy": "steps",
    "logging_steps": 1 / NUM_LOG_LINES,
    "logging_nan_inf_filter": False,
    "eval_strategy": "no",
    "save_strategy": "no",  # a callback asks for a checkpoint when one is due (training/running.py)
    "disable_tqdm": True,
    "report_to": "none",
    "push_to_hub": False,
}


def split_batch(settings: OptimizerSettings, num_processes: int, *, most: int | None = None) -> tuple[int, int]:
    """Split ``batch_size`` into (sequences per forward pass and process, forward passes per optimizer step).

    A forward pass has at most ``rows_per_pass`` sequences, and at most ``most`` if that is given. The gradient is that of the complete
    batch. Raises RecipeError if a process would have no sequence.
    """
    if settings.batch_size < num_processes:
        raise RecipeError(
            f"training.batch_size={settings.batch_size} is less than one sequence for each of {num_processes} processes; "
            f"raise it to {num_processes} or more, or start fewer processes"
        )
    share = -(-settings.batch_size // num_processes)
    rows = settings.rows_per_pass if most is None else min(settings.rows_per_pass, most)
    num_microbatches = -(-share // rows)
    return -(-share // num_microbatches), num_microbatches


def splits_steps(context: StepContext) -> bool:
    """Whether ``training/microbatches.py`` splits each optimizer step into passes by tokens.

    Several processes exchange metrics in every pass, so all need the same number of passes. DeepSpeed's engine counts passes itself.
    """
    return context.runtime.num_processes == 1 and not context.runtime.uses_deepspeed


def schedule_arguments(settings: OptimizerSettings) -> JsonObject:
    """The Trainer's arguments for a warmup, followed by a constant rate or a descent to ``final_learning_rate_fraction`` of the peak."""
    warmup = {"warmup_steps": settings.warmup_fraction}
    final = settings.final_learning_rate_fraction
    if settings.schedule == "constant" or final == 1:
        return {**warmup, "lr_scheduler_type": "constant_with_warmup"}
    if settings.schedule == "cosine":
        return {**warmup, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": final}}
    options = {"power": 1.0, "lr_end": settings.learning_rate * final}
    return {**warmup, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": options}


def weights_dtype(config: TrainingStepConfig, context: StepContext) -> torch.dtype:
    """The dtype in which a step loads its weights.

    Weights that are trained are fp32 (the Trainer computes in lower precision). Weights under an adapter have the compute dtype.
    """
    return torch.float32 if config.lora is None else context.runtime.dtype(config.precision)


def _optimizer_name(settings: OptimizerSettings, device: torch.device) -> str:
    """The Trainer's name of the optimizer for trained weights, which are fp32."""
    if settings.optimizer == "adamw" and not fused_adamw_works([torch.empty(0, device=device)]):
        return "adamw_torch"
    return TRAINER_OPTIMIZERS[settings.optimizer]


def training_arguments(
    settings: OptimizerSettings, context: StepContext, *, precision: str, kind: type[TrainingArguments] | None = None, **options: object
) -> StepArguments:
    """``TrainingArguments`` (or an instance of its subclass ``kind``) of a step. ``options`` replace or add arguments.

    Checkpoints go to ``context.checkpoint_folder``. The Trainer itself evaluates nothing, saves nothing and prints nothing. Raises
    RecipeError for fp16 on a CPU, LaunchError for an optimizer that FSDP cannot shard.
    """
    device, dtype = context.runtime.device, context.runtime.dtype(precision)
    if dtype == torch.float16 and device.type == "cpu":
        raise RecipeError("precision: fp16 cannot be trained on a CPU; use auto, fp32 or bf16")
    if context.runtime.shards and settings.optimizer != "adamw":
        raise LaunchError(
            f"training.optimizer: {settings.optimizer} does not work with FSDP, which shards the weights over the processes; use adamw, or "
            "start without FSDP"
        )
    by_tokens = splits_steps(context)
    limit = None if by_tokens else read_limit(context, EXAMPLES)
    microbatch, accumulation = split_batch(settings, context.runtime.num_processes, most=limit)
    arguments = {
        "output_dir": str(context.checkpoint_folder),
        "per_device_train_batch_size": settings.batch_size if by_tokens else microbatch,
        "per_device_eval_batch_size": microbatch,
        "gradient_accumulation_steps": 1 if by_tokens else accumulation,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        **schedule_arguments(settings),
        "optim": _optimizer_name(settings, device),
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm or 0.0,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "seed": context.seed,
        "data_seed": context.seed,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        **LOGS_ONLY,
    }
    with warnings.catch_warnings():
        # transformers renames gradient_checkpointing; TRL's arguments still have the old name.
        warnings.simplefilter("ignore", FutureWarning)
        made = cast("StepArguments", (kind or TrainingArguments)(**cast("dict[str, Any]", {**arguments, **options})))
    made.batch_size = settings.batch_size  # of all processes; the Trainer's own product of its arguments is rounded
    made.by_tokens = by_tokens  # training/microbatches.py splits each step into passes
    made.compiles_layers = settings.torch_compile  # not the Trainer's torch_compile, which compiles the complete model
    made.microbatch_size, made.rows_per_pass = settings.microbatch_size, settings.rows_per_pass
    if made.n_gpu > 1:
        made._n_gpu = 1  # one process trains on one GPU (runtime.device); accelerate launch starts one process per GPU
    return made
