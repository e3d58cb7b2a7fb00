"""What the stages that train with a transformers Trainer share: its arguments, its logging, resuming, and the weights at the end."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from stages.config import CheckpointedStepConfig, OptimizerSettings, Precision, TrainingStepConfig
from stages.errors import LaunchError, RecipeError, TrainingError
from stages.models.sharding import clip_gradients, grouped, reduce_gradients, shard, whole, whole_state_dict
from stages.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    load_generators,
    load_optimizer,
    load_tensors,
    save_generators,
    save_optimizer,
    save_tensors,
    trainable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.models.likelihood import Likelihood
    from stages.process.progress import ProgressBar
    from stages.step import StepContext

TRAINER_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
PROCESS_SEEDS = 100_003  # apart by this much are the processes' random streams
NUM_MEASURES = 10  # held-out measures per training run, where the best checkpoints are kept
NUM_LOG_LINES = 100  # per training run
IGNORED = -100  # label of a token that does not count in the loss


def split_batch(settings: OptimizerSettings, num_processes: int) -> tuple[int, int]:
    """(sequences per forward pass and process, forward passes per optimizer step) that make up ``batch_size``.

    The forward pass holds at most ``microbatch_size``; the gradient is that of the whole batch either way. Raises RecipeError where a
    process would have no sequence.
    """
    if settings.batch_size < num_processes:
        raise RecipeError(f"training.batch_size={settings.batch_size} is less than one sequence for each of {num_processes} processes")
    share = -(-settings.batch_size // num_processes)
    passes = -(-share // settings.microbatch_size)
    return -(-share // passes), passes


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
    return torch.float32 if config.lora is None else context.runtime.dtype(config.precision)


def training_arguments(settings: OptimizerSettings, context: StepContext, *, precision: str, kind: Any = None, **options: Any) -> Any:
    """``TrainingArguments`` (or the subclass ``kind``) of a step; ``options`` override or add.

    Checkpoints go to ``context.checkpoint_folder``; the Trainer evaluates nothing and prints nothing itself.
    """
    from transformers import TrainingArguments

    device, dtype = context.runtime.device, context.runtime.dtype(precision)
    if dtype == torch.float16 and device.type == "cpu":
        raise RecipeError("precision: fp16 cannot be trained on a CPU; use auto, fp32 or bf16")
    if context.runtime.shards and settings.optimizer != "adamw":
        raise LaunchError(
            f"training.optimizer: {settings.optimizer} needs whole weights, and FSDP cuts them over the processes; leave one of the two"
        )
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
        "save_strategy": "no",  # checkpoints are ours, written when the callback below asks for one
        "disable_tqdm": True,
        "report_to": "none",
        "push_to_hub": False,
    }
    with warnings.catch_warnings():
        # transformers renames gradient_checkpointing, which TRL's arguments still call by that name
        warnings.simplefilter("ignore", FutureWarning)
        made = (kind or TrainingArguments)(**{**arguments, **options})
    made.batch_size = settings.batch_size  # of all processes; what the Trainer computes from the others is rounded
    if made.n_gpu > 1:
        made._n_gpu = 1  # one process trains on one GPU (its runtime.device); accelerate launch starts one per GPU
    return made


def counted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy of a classifier of texts or tokens: the sum over labels that count, divided by their number in the whole step."""
    logits = outputs.logits.float()
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum") / num_items_in_batch


@cache
def exact(kind: type[Any]) -> type[Any]:
    """The Trainer class ``kind`` with steps that do not depend on the number of processes, and checkpoints that lose nothing.

    The rows of a step come from ``batching``; the loss has to be divided by the items of the whole step on all processes
    (``num_items_in_batch``), as transformers does for language models. ``train`` takes such trainers only.
    """

    class ExactTrainer(kind):
        checkpoints: Checkpoints
        context: StepContext
        steps_per_epoch: int
        score: float | None = None  # of the checkpoint about to be written
        _resumed_from: str | None = None
        _awaits_generators = False

        def get_train_dataloader(self) -> Any:
            import datasets

            from stages.training.batching import BatchPlan, make_loader

            dataset, collate = self.train_dataset, self.data_collator
            if isinstance(dataset, datasets.Dataset):
                dataset = self._remove_unused_columns(dataset, description="training")
            else:
                collate = self._get_collator_with_removed_columns(collate, description="training")
            grouped = self.args.train_sampling_strategy == "group_by_length"
            plan = BatchPlan(
                num_rows=len(dataset),
                batch_size=self.args.batch_size,
                microbatch_size=self.args.per_device_train_batch_size,
                seed=self.args.data_seed,
                process_index=self.args.process_index,
                num_processes=self.args.world_size,
                lengths=[len(row["input_ids"]) for row in dataset] if grouped else None,
            )
            self.steps_per_epoch = -(-plan.num_rows // plan.batch_size)
            return make_loader(dataset, collate, self.blank, plan)

        def blank(self, batch: dict[str, Any]) -> dict[str, Any]:
            """``batch`` made into one that adds nothing to the loss."""
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            return batch

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            """Leave at least one step after the warmup: a linear schedule divides by the number of those steps."""
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.args.warmup_steps = min(warmup, num_training_steps - 1)
            return super().create_scheduler(num_training_steps, optimizer)

        # Sharding

        def create_optimizer(self, model: Any = None) -> Any:
            made = super().create_optimizer(model)
            if self.is_distributed_loading_by_transformers:
                groups = [{**group, **side} for group in made.param_groups for side in grouped(group["params"])]
                made.param_groups[:] = groups
            return made

        def _sync_replicated_trainable_parameters(self, model: Any) -> None:
            """Nothing yet: processes begin with equal weights, and gradients are averaged before the step."""

        def _clip_grad_norm(self, model: Any) -> Any:
            if not self.is_distributed_loading_by_transformers:
                return super()._clip_grad_norm(model)
            reduce_gradients(model, average=True)
            return torch.tensor(clip_gradients(list(model.parameters()), self.args.max_grad_norm))

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            """Called before every optimizer step. Raises TrainingError for a gradient that is no number; the weights are as before it."""
            if grad_norm is None and self.is_distributed_loading_by_transformers:
                reduce_gradients(model, average=True)
                grad_norm = torch.tensor(clip_gradients(list(model.parameters()), None))
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
            scaled = self.accelerator.scaler is not None  # fp16 meets infinity now and then, and skips the step
            if norm is not None and not scaled and not math.isfinite(float(norm)):
                loss = float(self._tr_loss)
                what = f"the gradient norm is {float(norm)}" if math.isfinite(loss) else f"the loss is {loss}"
                raise TrainingError(
                    f"{what} at optimizer step {self.state.global_step + 1}; lower training.learning_rate, add warmup, or use "
                    "precision: fp32. Checkpoints before it are kept"
                )
            return norm

        # Checkpoints

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            gathered = self.accelerator.gather(self._tr_loss.reshape(1)).mean()
            state = {
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "loss": float(gathered),
                "total_loss": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
                "logged": self.context.recorded,
                "metrics": getattr(self, "_metrics", {}).get("train"),  # TRL's, since the last line of the log
                "tokens": getattr(self, "_total_train_tokens", 0),
            }
            is_main = self.runtime.is_main

            def fill(folder: Path) -> None:
                if self.is_deepspeed_enabled:
                    self.model_wrapped.save_checkpoint(str(folder))
                else:
                    parameters = self._trainable()
                    save_tensors(parameters, folder / "weights.safetensors", write=is_main)
                    save_optimizer(self.optimizer, parameters, folder / "optimizer.safetensors", write=is_main)
                save_generators(folder, self.runtime)
                if is_main:
                    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
                    self.state.save_to_json(str(folder / "trainer_state.json"))

            self.checkpoints.write(fill, score=self.score)
            self.score = None

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            load_tensors(self._trainable(), Path(resume_from_checkpoint) / "weights.safetensors")

        def _trainable(self) -> dict[str, torch.nn.Parameter]:
            return trainable(self.accelerator.unwrap_model(self.model))

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            if not self.is_deepspeed_enabled:
                load_optimizer(self.optimizer, self._trainable(), Path(checkpoint) / "optimizer.safetensors")
            self.lr_scheduler.load_state_dict(self._read_state(checkpoint)["scheduler"])
            self._resumed_from, self._awaits_generators = checkpoint, True

        def _load_scaler(self, checkpoint: str | None) -> None:
            if checkpoint is not None and (kept := self._read_state(checkpoint)["scaler"]) is not None:
                self.accelerator.scaler.load_state_dict(kept)

        def _load_rng_state(self, checkpoint: str | None) -> None:
            # The Trainer calls this after it has made the first batch; a batch may be random, too (masked words).
            if checkpoint is not None and self._awaits_generators:
                self._awaits_generators = False
                load_generators(Path(checkpoint), self.runtime)

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            self._load_rng_state(self._resumed_from)
            return super().get_batch_samples(epoch_iterator, num_batches, device)

        def _read_state(self, checkpoint: str) -> dict[str, Any]:
            return json.loads((Path(checkpoint) / "state.json").read_text(encoding="utf-8"))

        def restore_logs(self, checkpoint: str) -> None:
            """What was summed up since the last line of the log; the Trainer itself begins at zero."""
            state = self._read_state(checkpoint)
            self._tr_loss.fill_(state["loss"])
            self._total_loss_scalar, self._globalstep_last_logged = state["total_loss"], state["last_logged"]
            if state["metrics"] is not None:
                self._metrics["train"].update(state["metrics"])
                self._total_train_tokens = state["tokens"]

        def load_weights(self, checkpoint: Checkpoint) -> None:
            """Put the weights of a checkpoint into the model."""
            self._load_from_checkpoint(str(checkpoint.path), self.model)

    ExactTrainer.__name__ = f"Exact{kind.__name__}"
    return ExactTrainer


def train(
    trainer: Any,
    context: StepContext,
    description: str,
    *,
    room: str = "train",
    rule: CheckpointedStepConfig | None = None,
    measure: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Run ``trainer`` (of an ``exact`` class) to its end, from the newest whole checkpoint where a run was cut off; returns loss,
    optimizer steps, seconds and speed.

    ``rule`` says when checkpoints are written and which are kept; ``measure`` is the held-out loss by which the best are chosen. Logs go
    to ``context.log`` as ``<room>/...`` and to a progress bar. Raises TrainingError where the loss is not a number.
    """
    from transformers import PrinterCallback, ProgressCallback

    from stages.models.dropout import has_dropout
    from stages.models.loading import quiet_transformers

    assert hasattr(trainer, "restore_logs"), "make the trainer of training.exact(Trainer): others depend on the number of processes"
    runtime = trainer.runtime = context.runtime
    dtypes = {True: "bfloat16", False: "float16" if trainer.args.fp16 else "float32"}
    runtime.say_model(f"{context.name}: {description}", trainer.model, dtypes[bool(trainer.args.bf16)])
    rule = rule or CheckpointedStepConfig(name="step", stage="")
    trainer.checkpoints = Checkpoints(
        Path(trainer.args.output_dir), runtime, keep_last=rule.keep_last, keep_best=rule.keep_best, seconds=rule.checkpoint_seconds
    )
    if trainer.checkpoints.keep_best and measure is None:
        raise RecipeError(f"{context.name}: keep_best is not for this stage; leave it at 0")
    found = trainer.checkpoints.newest()
    checkpoint = str(found.path) if found is not None else None
    trainer.context, context.recorded = context, []
    if runtime.shards:
        shard(trainer.model, add_up=False)
        trainer.is_distributed_loading_by_transformers = True  # so that the Trainer does not wrap it once more
    if found is None:
        runtime.seed_everything(trainer.args.seed + PROCESS_SEEDS * runtime.process_index)  # dropout differs from process to process
    if runtime.num_processes > 1 and has_dropout(trainer.model):
        runtime.console.print(
            f"{context.name}: dropout is on, and each process draws its own masks: with another number of processes the weights differ by "
            "chance. Set dropout to 0 for results that do not depend on it."
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    with ExitStack() as stack:
        callback = _step_callback(trainer, context, description, room, stack, checkpoint, measure)
        trainer.add_callback(callback)
        stack.enter_context(quiet_transformers())
        stack.enter_context(warnings.catch_warnings())
        # peft looks for the base's vocabulary at each checkpoint; the embedding is never an adapter's part here
        warnings.filterwarnings("ignore", message="Could not find a config file")
        stack.enter_context(runtime.stop.deferred())
        output = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = max(float(output.metrics["train_runtime"]), 1e-9)
    return {
        "train_loss": trainer._total_loss_scalar / max(output.global_step, 1),
        "optimizer_steps": float(output.global_step),
        "train_seconds": seconds,
        "steps_per_second": (output.global_step - callback.resumed_at) / seconds,
    }


def _step_callback(
    trainer: Any,
    context: StepContext,
    description: str,
    room: str,
    stack: ExitStack,
    checkpoint: str | None,
    measure: Callable[[], float] | None,
) -> Any:
    from transformers import TrainerCallback

    runtime = context.runtime

    class StepCallback(TrainerCallback):
        """Shows progress, hands the Trainer's logs on, and asks for checkpoints."""

        bar: ProgressBar
        shown: dict[str, float | str] = {}
        resumed_at = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = stack.enter_context(runtime.progress(description, state.max_steps))
            self.bar.advance(state.global_step)
            if checkpoint is None:
                return
            self.resumed_at = state.global_step
            runtime.console.print(f"{context.name}: resuming after optimizer step {state.global_step} of {state.max_steps}")
            trainer.restore_logs(checkpoint)
            for step, metrics in trainer._read_state(checkpoint)["logged"]:
                context.log(step, metrics)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.advance(1, **self.shown)
            due, stop = runtime.largest(float(runtime.is_main and trainer.checkpoints.is_due()), runtime.stop.number or 0)
            control.should_save = bool(due or stop)
            if stop:
                runtime.stop.ask(int(stop))
                control.should_training_stop = True
            if trainer.checkpoints.keep_best and measure is not None and self._is_measured(state):
                with whole(trainer.model):
                    score = -measure()
                if trainer.checkpoints.wants(score):
                    trainer.score, control.should_save = score, True

        def _is_measured(self, state: Any) -> bool:
            number = min(NUM_MEASURES, state.max_steps)
            return any(state.global_step == state.max_steps * place // number for place in range(1, number + 1))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
            if "loss" not in numbers:  # the summary at the end
                return
            numbers["epoch"] = state.global_step / trainer.steps_per_epoch  # the Trainer counts forward passes, whose number varies
            self.shown = {"loss": numbers["loss"]}
            context.log(state.global_step, {f"{room}/{name}": value for name, value in numbers.items()})

    return StepCallback()


@contextmanager
def best_weights(trainer: Any) -> Iterator[dict[str, float] | None]:
    """Inside, the model has the weights of the best checkpoint (measured on held-out data); yields its loss and optimizer step.

    Yields None, and changes nothing, where none is kept.
    """
    checkpoints = getattr(trainer, "checkpoints", None)  # a training that was done before has none
    best = checkpoints.best() if checkpoints is not None and checkpoints.keep_best else None
    if best is None:
        yield None
        return
    parameters = trainer._trainable()
    last = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trainer.load_weights(best)
    state = json.loads((best.path / "trainer_state.json").read_text(encoding="utf-8"))
    try:
        yield {"heldout_loss": -float(best.score or 0.0), "optimizer_step": float(state["global_step"])}
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(last[name])


def heldout_likelihood(
    trainer: Any,
    context: StepContext,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    precision: Precision,
) -> Likelihood:
    """How likely held-out rows of (token ids, mask) are by the model in training. Call on every process."""
    from stages.models.likelihood import measure_likelihood

    with whole(trainer.model):
        return measure_likelihood(
            trainer.model.to(context.runtime.device),
            rows,
            pad_token_id=tokenizer.pad_token_id,
            batch_size=trainer.args.per_device_eval_batch_size,
            device=context.runtime.device,
            dtype=context.runtime.dtype(precision),
        )


def publish_best(
    trainer: Any,
    context: StepContext,
    save: Callable[[Path, dict[str, torch.Tensor] | None], None],
    *,
    prepare: Callable[[], Any] | None = None,
    **options: Any,
) -> None:
    """Publish the best checkpoint as ``<name>-best`` where one is kept: what ``save(folder, gathered weights)`` writes.

    ``prepare`` is called first, with the model's weights in place; ``options`` as of ``context.publish``.
    """
    with best_weights(trainer) as found:
        if found is None:
            return
        if prepare is not None:
            prepare()
        weights = gathered_weights(trainer)
        context.publish(lambda folder: save(folder, weights), metrics=found, name=f"{context.name}-best", **options)


def gathered_weights(trainer: Any) -> dict[str, torch.Tensor] | None:
    """All weights where they are sharded over processes (FSDP, ZeRO); None where the model has them. Call on every process."""
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return whole_state_dict(trainer.model)
