"""The common part of this project's Trainers, in addition to transformers' Trainer: the parts of a step, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.config import Microbatch
from stages.training.checkpoints import Checkpoints, load_generators

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from stages.process.runtime import Runtime
    from stages.step import StepContext

    class StepArguments(TrainingArguments):
        """Arguments from ``training.arguments.training_arguments``."""

        output_dir: str
        data_seed: int
        batch_size: int
        by_tokens: bool
        compiles_layers: bool
        microbatch_size: Microbatch
        rows_per_pass: int
else:
    Trainer = object

Batch = dict[str, torch.Tensor]
"""A collated batch: tensors [B, ...] by name."""


class StepTrainer(Trainer):
    """Base of the classes that ``training.reproducible`` mixes into a Trainer. ``training.running.train`` sets the parts of the step."""

    if TYPE_CHECKING:
        args: StepArguments
        model: torch.nn.Module
        model_wrapped: Any  # DeepSpeed's engine, if it is enabled; mypy does not read that package
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR
        _metrics: dict[str, dict[str, list[float]]]  # TRL's trainers only
        _total_train_tokens: float  # TRL's trainers only

    checkpoints: Checkpoints
    context: StepContext
    runtime: Runtime
    steps_per_epoch: int
    score: float | None = None  # of the checkpoint that is written next
    generators_of: Path | None = None  # checkpoint whose states of the random generators are not yet restored

    def __init__(self, *arguments: object, **named: object) -> None:
        settings = vars(getattr(named.get("model"), "config", object))
        self._uses_cache = {"use_cache": settings["use_cache"]} if "use_cache" in settings else {}
        super().__init__(*arguments, **named)  # type: ignore[arg-type]  # those of a Trainer

    def restore_config(self) -> None:
        """Give the model's config its own ``use_cache`` again, which transformers' Trainer changes."""
        config = getattr(self.model, "config", None)
        if config is not None:
            vars(config).pop("use_cache", None)
            vars(config).update(self._uses_cache)

    def restore_generators(self) -> None:
        """Bring the random generators to the state of the checkpoint, once."""
        if self.generators_of is not None:
            load_generators(self.generators_of, self.runtime)
            self.generators_of = None
