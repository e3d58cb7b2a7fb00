"""The content of a Trainer's checkpoint: trained weights, optimizer, schedule, random generators, and sums that are not logged yet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stages.training.checkpoints import load_optimizer, load_tensors, save_generators, save_optimizer, save_tensors, trainable
from stages.training.microbatches import PassesByTokens
from stages.training.pass_metrics import WeightedMetrics

if TYPE_CHECKING:
    from stages.training.step_trainer import StepTrainer


def trained_parameters(trainer: StepTrainer) -> dict[str, torch.nn.Parameter]:
    """The parameters that ``trainer`` trains, by name."""
    return trainable(trainer.accelerator.unwrap_model(trainer.model))


def save_state(trainer: StepTrainer) -> Callable[[Path], None]:
    """Read the state of ``trainer`` and return the function that writes it into a folder. Call both on every process."""
    if isinstance(trainer, WeightedMetrics):
        trainer.read_counts()
    loss = trainer.accelerator.gather(trainer._tr_loss.reshape(1)).mean()
    state = {
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": trainer.accelerator.scaler.state_dict() if trainer.accelerator.scaler is not None else None,
        "loss": float(loss),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "logged": trainer.context.recorded,
        "metrics": getattr(trainer, "_metrics", {}).get("train"),  # TRL's sums since the last line of the log
        "tokens": int(getattr(trainer, "_total_train_tokens", 0)),
        "pass_tokens": trainer.budget.settled if isinstance(trainer, PassesByTokens) and trainer.budget is not None else None,
    }

    def write(folder: Path) -> None:
        is_main = trainer.runtime.is_main
        if trainer.is_deepspeed_enabled:
            trainer.model_wrapped.save_checkpoint(str(folder))
        else:
            parameters = trained_parameters(trainer)
            save_tensors(parameters, folder / "weights.safetensors", write=is_main)
            assert trainer.optimizer is not None
            save_optimizer(trainer.optimizer, parameters, folder / "optimizer.safetensors", write=is_main)
        save_generators(folder, trainer.runtime)
        if is_main:
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
            trainer.state.save_to_json(str(folder / "trainer_state.json"))

    return write


def restore_state(trainer: StepTrainer, folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Bring ``trainer`` to the state of the checkpoint in ``folder``. Returns the lines of the log until then: (step, metrics).

    The trainer must have its optimizer and its schedule. It restores the random generators itself, before its first batch. DeepSpeed
    restores weights and optimizer itself.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if not trainer.is_deepspeed_enabled:
        load_weights(trainer, folder)
        assert trainer.optimizer is not None
        load_optimizer(trainer.optimizer, trained_parameters(trainer), folder / "optimizer.safetensors")
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    if state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    if isinstance(trainer, PassesByTokens):
        trainer.pass_tokens = state.get("pass_tokens")
    trainer.generators_of = folder
    trainer._tr_loss.fill_(state["loss"])
    trainer._total_loss_scalar, trainer._globalstep_last_logged = state["total_loss"], state["last_logged"]
    if state["metrics"] is not None:
        trainer._metrics["train"].update(state["metrics"])
        trainer._total_train_tokens = state["tokens"]
    return state["logged"]


def load_weights(trainer: StepTrainer, folder: Path) -> None:
    """Copy the weights of the checkpoint in ``folder`` into the model."""
    load_tensors(trained_parameters(trainer), folder / "weights.safetensors")
