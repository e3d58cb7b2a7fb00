"""What the stages that train with a transformers Trainer share: its arguments, its logging, resuming, and the weights at the end."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import OptimizerSettings, TrainingStepConfig
from stages.errors import RecipeError, TrainingError

if TYPE_CHECKING:
    import torch

    from stages.runtime import ProgressBar, StepContext

NUM_CHECKPOINTS = 10  # per training run: what a cut-off run loses is at most a tenth
TRAINER_OPTIMIZERS = {
    "adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
NUM_LOG_LINES = 100  # per training run
COMPLETE = "complete"  # written into a checkpoint folder last


def split_batch(settings: OptimizerSettings, num_processes: int) -> tuple[int, int]:
    """(sequences per forward pass and process, forward passes per optimizer step) that make up ``batch_size``.

    The forward pass holds at most ``microbatch_size``; the gradient is that of the whole batch either way. Raises RecipeError where the
    processes cannot share the batch evenly.
    """
    if settings.batch_size % num_processes:
        raise RecipeError(
            f"training.batch_size={settings.batch_size} cannot be shared evenly by {num_processes} processes; "
            f"use a multiple of {num_processes}"
        )
    share = settings.batch_size // num_processes
    microbatch = max(size for size in range(1, min(settings.microbatch_size, share) + 1) if share % size == 0)
    return microbatch, share // microbatch


def schedule_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """The Trainer's names for warmup, then constant, or linear or cosine descent to ``final_learning_rate_fraction`` of the peak."""
    warmup = {"warmup_steps": settings.warmup_fraction}
    final = settings.final_learning_rate_fraction
    if settings.schedule == "constant" or final == 1:
        return {**warmup, "lr_scheduler_type": "constant_with_warmup"}
    if settings.schedule == "cosine":
        return {**warmup, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": final}}
    options = {"power": 1.0, "lr_end": settings.learning_rate * final}
    return {**warmup, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": options}


def weights_dtype(config: TrainingStepConfig, context: StepContext) -> torch.dtype:
    """The dtype to load weights in: fp32 where they are trained (the Trainer computes in lower precision), else the compute dtype."""
    import torch

    return torch.float32 if config.lora is None else context.runtime.dtype(config.precision)


def training_arguments(settings: OptimizerSettings, context: StepContext, *, precision: str, kind: Any = None, **options: Any) -> Any:
    """``TrainingArguments`` (or the subclass ``kind``) of a step; ``options`` override or add.

    Checkpoints go to ``context.checkpoint_folder``; the Trainer evaluates nothing and prints nothing itself.
    """
    import torch
    from transformers import TrainingArguments

    device, dtype = context.runtime.device, context.runtime.dtype(precision)
    if dtype == torch.float16 and device.type == "cpu":
        raise RecipeError("precision: fp16 cannot be trained on a CPU; use auto, fp32 or bf16")
    microbatch, accumulation = split_batch(settings, context.runtime.num_processes)
    arguments = {
        "output_dir": str(context.checkpoint_folder),
        "per_device_train_batch_size": microbatch,
        "per_device_eval_batch_size": microbatch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        **schedule_arguments(settings),
        "optim": TRAINER_OPTIMIZERS[settings.optimizer],
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
        "logging_strategy": "steps",
        "logging_steps": 1 / NUM_LOG_LINES,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 1 / NUM_CHECKPOINTS,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "push_to_hub": False,
    }
    with warnings.catch_warnings():
        # transformers renames gradient_checkpointing, which TRL's arguments still call by that name
        warnings.simplefilter("ignore", FutureWarning)
        made = (kind or TrainingArguments)(**{**arguments, **options})
    if made.n_gpu > 1:
        made._n_gpu = 1  # one process trains on one GPU (its runtime.device); accelerate launch starts one per GPU
    return made


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that was written to its end."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).exists()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(trainer: Any, context: StepContext, description: str, *, room: str = "train") -> dict[str, float]:
    """Run ``trainer`` to its end, from the newest checkpoint where a run was cut off; returns loss, optimizer steps,
    seconds and speed.

    Logs go to ``context.log`` as ``<room>/...`` and to a progress bar. Raises TrainingError where the loss is not a number.
    """
    from transformers import PrinterCallback, ProgressCallback

    from stages.models.loading import quiet_transformers

    checkpoint = find_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is not None:
        context.runtime.console.print(f"{context.name}: resuming from {checkpoint.name}")
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    with ExitStack() as stack:
        trainer.add_callback(_step_callback(context, description, room, stack))
        stack.enter_context(quiet_transformers())
        stack.enter_context(warnings.catch_warnings())
        # peft looks for the base's vocabulary at each checkpoint; the embedding is never an adapter's part here
        warnings.filterwarnings("ignore", message="Could not find a config file")
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    seconds = max(float(output.metrics["train_runtime"]), 1e-9)
    resumed_at = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    return {
        "train_loss": float(output.training_loss),
        "optimizer_steps": float(output.global_step),
        "train_seconds": seconds,
        "steps_per_second": (output.global_step - resumed_at) / seconds,
    }


def _step_callback(context: StepContext, description: str, room: str, stack: ExitStack) -> Any:
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        """Shows progress, hands the Trainer's logs on, and marks checkpoints as whole."""

        bar: ProgressBar
        shown: dict[str, float | str] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = stack.enter_context(context.runtime.progress(description, state.max_steps))
            self.bar.advance(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.advance(1, **self.shown)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
            if "loss" not in numbers:  # the summary at the end
                return
            if not math.isfinite(numbers["loss"]):
                raise TrainingError(
                    f"{context.name}: the loss is {numbers['loss']} at optimizer step {state.global_step}; "
                    "lower training.learning_rate, add warmup, or use precision: fp32"
                )
            self.shown = {"loss": numbers["loss"]}
            context.log(state.global_step, {f"{room}/{name}": value for name, value in numbers.items()})

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if context.runtime.is_main:
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    return StepCallback()


def gathered_weights(trainer: Any) -> dict[str, torch.Tensor] | None:
    """All weights on rank zero where they are sharded over processes (FSDP, ZeRO); None where the model has them. Call on every process."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return None
