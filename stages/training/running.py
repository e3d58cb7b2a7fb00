"""Runs a Trainer to its end: progress, logs, checkpoints, and continuing after an interruption."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from stages.config import CheckpointedStepConfig
from stages.errors import RecipeError
from stages.metric_names import TRAIN_PREFIX
from stages.models.layers.compiled import NOT_WANTED, LayerCompiler
from stages.models.layers.dropout import has_dropout
from stages.models.quiet import quiet_transformers
from stages.models.sharding import shard, unsharded
from stages.training.checkpoints import Checkpoints
from stages.training.state import restore_state

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from stages.process.console import ProgressBar
    from stages.step import StepContext
    from stages.training.step_trainer import StepTrainer

PROCESS_SEEDS = 100_003  # difference of the seeds of two neighbouring processes
NUM_MEASURES = 10  # held-out measures per training run, if the best checkpoints are kept

Measure = Callable[[], float]


def train(
    trainer: StepTrainer,
    context: StepContext,
    description: str,
    *,
    prefix: str = TRAIN_PREFIX,
    rule: CheckpointedStepConfig | None = None,
    measure: Measure | None = None,
) -> dict[str, float]:
    """Run ``trainer`` (of a ``reproducible`` class) to its end. Returns loss, optimizer steps, seconds and steps per second.

    Training continues from the newest complete checkpoint, if an earlier start was interrupted. ``rule`` says when checkpoints are written
    and which are kept. ``measure`` is the held-out loss by which the best ones are chosen. Logs go to ``context.log`` as
    ``<prefix>/...`` and to a progress bar. Raises TrainingError if the loss is not finite. Raises RecipeError if the best checkpoints
    should be kept in a stage without a held-out loss.
    """
    assert hasattr(trainer, "restore_generators"), "make the trainer from training.reproducible(Trainer)"
    runtime = trainer.runtime = context.runtime
    rule = rule or CheckpointedStepConfig(name="step", stage="")
    trainer.checkpoints = Checkpoints(Path(trainer.args.output_dir), runtime, **rule.checkpoints.model_dump())
    if trainer.checkpoints.keep_best and measure is None:
        raise RecipeError(f"{context.name}: checkpoints.keep_best is not supported in this stage; set it to 0")
    newest = trainer.checkpoints.newest()
    checkpoint = newest.path if newest is not None else None
    trainer.context, context.recorded = context, []
    _announce(trainer, context, description)
    if runtime.shards:
        shard(trainer.model, add_up=False)
        trainer.is_distributed_loading_by_transformers = True  # the Trainer must not shard the model again
    compiler = None
    if getattr(trainer.args, "compiles_layers", False):
        compiler = LayerCompiler(distributed="DeepSpeed" if runtime.uses_deepspeed else "")
        compiler.add(trainer.model, getattr(trainer, "ref_model", None))
    if checkpoint is None:
        runtime.seed_everything(trainer.args.seed + PROCESS_SEEDS * runtime.process_index)  # each process draws its own dropout masks
    with ExitStack() as stack:
        callback = StepCallback(trainer, context, description, prefix, stack, checkpoint, measure)
        _replace_callbacks(trainer, callback)
        stack.enter_context(quiet_transformers())
        stack.enter_context(warnings.catch_warnings())
        # peft looks for the base model's vocabulary at each checkpoint. The embedding is never part of an adapter here.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        stack.enter_context(runtime.stop.deferred())
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    trainer.restore_config()
    context.compiled_layers.update(NOT_WANTED if compiler is None else compiler.facts())
    seconds = max(float(output.metrics["train_runtime"]), 1e-9)
    return {
        "train_loss": trainer._total_loss_scalar / max(output.global_step, 1),
        "optimizer_steps": float(output.global_step),
        "train_seconds": seconds,
        "steps_per_second": (output.global_step - callback.resumed_at) / seconds,
    }


def _announce(trainer: StepTrainer, context: StepContext, description: str) -> None:
    """Say which model is trained, in which precision, and whether the result depends on the number of processes."""
    runtime = context.runtime
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else torch.float32
    runtime.say_model(f"{context.name}: {description}", trainer.model, dtype)
    if runtime.num_processes > 1 and has_dropout(trainer.model):
        runtime.console.print(
            f"{context.name}: dropout is on, and each process draws its own masks. With a different number of processes the weights differ "
            "randomly. Set dropout to 0 for results that do not depend on it."
        )


def _replace_callbacks(trainer: StepTrainer, callback: TrainerCallback) -> None:
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(callback)


class StepCallback(TrainerCallback):
    """Restores a checkpoint, shows progress, passes the Trainer's logs to the step, and asks for checkpoints."""

    bar: ProgressBar

    def __init__(
        self,
        trainer: StepTrainer,
        context: StepContext,
        description: str,
        prefix: str,
        stack: ExitStack,
        checkpoint: Path | None,
        measure: Measure | None,
    ) -> None:
        self.trainer, self.context, self.description, self.prefix = trainer, context, description, prefix
        self.stack, self.checkpoint, self.measure = stack, checkpoint, measure
        self.resumed_at = 0  # optimizer step
        self.shown: dict[str, float | str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar = self.stack.enter_context(self.context.runtime.progress(self.description, state.max_steps, state.global_step))
        if self.checkpoint is None:
            return
        self.resumed_at = state.global_step
        self.context.runtime.console.print(f"{self.context.name}: resuming after optimizer step {state.global_step} of {state.max_steps}")
        for step, metrics in restore_state(self.trainer, self.checkpoint):
            self.context.log(step, metrics)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Restore the random generators here if the checkpoint was written at the end of an epoch: the loader draws from them next."""
        if state.global_step % self.trainer.steps_per_epoch == 0:
            self.trainer.restore_generators()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar.advance(1, **self.shown)
        runtime, checkpoints = self.context.runtime, self.trainer.checkpoints
        due, stop = runtime.largest(float(runtime.is_main and checkpoints.is_due()), runtime.stop.number or 0)
        control.should_save = bool(due or stop)
        if stop:
            runtime.stop.ask(int(stop))
            control.should_training_stop = True
        if checkpoints.keep_best and self.measure is not None and self._is_measured(state):
            with unsharded(self.trainer.model):
                score = -self.measure()
            if checkpoints.wants(score):
                self.trainer.score, control.should_save = score, True

    def _is_measured(self, state: TrainerState) -> bool:
        count = min(NUM_MEASURES, state.max_steps)
        return any(state.global_step == state.max_steps * index // count for index in range(1, count + 1))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, object] | None = None, **_: object
    ) -> None:
        metrics = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" not in metrics:  # the summary at the end
            return
        metrics["epoch"] = state.global_step / self.trainer.steps_per_epoch  # the Trainer counts forward passes, whose number varies
        self.shown = {"loss": metrics["loss"]}
        self.context.log(state.global_step, {f"{self.prefix}/{name}": value for name, value in metrics.items()})
