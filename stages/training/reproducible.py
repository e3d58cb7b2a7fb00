"""A transformers Trainer whose steps do not depend on the number of processes, and whose checkpoints lose nothing.

A class here overrides a method of the Trainer only where neither an argument nor a callback does the same. The comment above each private
method gives the reason. ``tests/training/test_reproducible.py`` fails if a transformers release renames or drops one of them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, cast

import datasets
import torch
from torch.nn import functional

from stages.errors import TrainingError
from stages.models.sharding import clip_gradients, grouped, reduce_gradients
from stages.training.batching import BatchPlan, Rows, make_loader
from stages.training.microbatches import PassesByTokens
from stages.training.pass_metrics import WeightedMetrics
from stages.training.state import save_state
from stages.training.step_trainer import Batch, StepTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.data import DataLoader
    from transformers import Trainer
    from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput, TokenClassifierOutput

IGNORED = -100  # label of a token that is ignored in the loss


@cache
def reproducible(kind: type[Trainer]) -> type[StepTrainer]:
    """A subclass of the Trainer class ``kind`` for ``training.running.train``.

    The loss of the Trainer must be divided by the number of items of the complete step on all processes (``num_items_in_batch``), as
    transformers does for most language models; ``counted_loss`` does so for classifiers, ``next_token_loss`` for other language models.
    """
    parts = (BatchesByRow, PassesByTokens, WeightedMetrics, ShardedGradients, LosslessCheckpoints)
    return type(f"Reproducible{kind.__name__}", (*parts, kind), {})


def counted_loss(
    outputs: SequenceClassifierOutput | TokenClassifierOutput | CausalLMOutputWithPast,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int,
) -> torch.Tensor:
    """Cross-entropy of the logits of texts or tokens. Labels [B] or [B, T], with -100 for what does not count; returns a scalar.

    The sum over the labels of this forward pass is divided by the number of labels of the complete optimizer step.
    """
    assert outputs.logits is not None
    logits = outputs.logits.float()
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum") / num_items_in_batch


def next_token_loss(outputs: CausalLMOutputWithPast, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """``counted_loss`` of a language model, whose logits predict the label of the next position. Labels [B, T]; returns a scalar."""
    return counted_loss(outputs, functional.pad(labels[:, 1:], (0, 1), value=IGNORED), num_items_in_batch)


class BatchesByRow(StepTrainer):
    """The rows of an optimizer step are the same for any number of processes (training/batching.py)."""

    def get_train_dataloader(self) -> DataLoader[dict[str, list[int]]]:
        """The rows of this process, in the order of a ``BatchPlan``."""
        dataset, collate = cast("Rows[dict[str, list[int]]]", self.train_dataset), self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        by_length = self.args.train_sampling_strategy == "group_by_length"
        plan = BatchPlan(
            num_rows=len(dataset),
            batch_size=self.args.batch_size,
            microbatch_size=self.args.per_device_train_batch_size,
            seed=self.args.data_seed,
            process_index=self.args.process_index,
            num_processes=self.args.world_size,
            lengths=self.lengths_of(dataset) if by_length or not self.args.by_tokens else None,
            groups_steps=by_length,
        )
        self.steps_per_epoch = -(-plan.num_rows // plan.batch_size)
        return make_loader(dataset, collate, self.blank, plan)

    def lengths_of(self, rows: Rows[dict[str, list[int]]]) -> list[int]:
        """Number of tokens of each training row."""
        return [len(row["input_ids"]) for row in rows]

    def blank(self, batch: Batch) -> Batch:
        """Change ``batch`` in place so that it adds nothing to the loss, and return it."""
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Leave at least one step after the warmup: a linear schedule divides by the number of those steps."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        self.args.warmup_steps = min(warmup, num_training_steps - 1)
        return super().create_scheduler(num_training_steps, optimizer)


class ShardedGradients(StepTrainer):
    """Gradients of weights that FSDP2 shards are averaged once per optimizer step, by Tristage (models/sharding.py)."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        if self.is_distributed_loading_by_transformers:
            groups = [{**group, **side} for group in made.param_groups for side in grouped(group["params"])]
            made.param_groups[:] = groups
        return made

    # The Trainer would average the gradients of replicated weights after each microbatch. No argument turns that off.
    def _sync_replicated_trainable_parameters(self, model: torch.nn.Module) -> None:
        """Do nothing: processes begin with equal weights, and ``_get_grad_norm`` averages the gradients before the optimizer step."""

    # The gradients must be averaged before they are clipped. The callback before the optimizer step comes after both.
    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor | None:
        if not self.is_distributed_loading_by_transformers:
            return super()._clip_grad_norm(model)
        return self._sharded_grad_norm(model, self.args.max_grad_norm)

    # The callback before the optimizer step does not receive the norm; only this method has it before the weights change.
    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        """The norm, before each optimizer step. Raises TrainingError if it is not finite; the weights are those before the step."""
        if grad_norm is None and self.is_distributed_loading_by_transformers:
            grad_norm = self._sharded_grad_norm(model, None)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None  # fp16 overflows now and then; the scaler then skips the step
        if norm is not None and not scaled and not math.isfinite(float(norm)):
            loss = float(self._tr_loss)
            what = f"the gradient norm is {float(norm)}" if math.isfinite(loss) else f"the loss is {loss}"
            raise TrainingError(
                f"{what} at optimizer step {self.state.global_step + 1}; lower training.learning_rate, add warmup, or use "
                "precision: fp32. Checkpoints before it are kept"
            )
        return norm

    def _sharded_grad_norm(self, model: torch.nn.Module, max_norm: float | None) -> torch.Tensor:
        reduce_gradients(model, average=True)
        return torch.tensor(clip_gradients(list(model.parameters()), max_norm))


class LosslessCheckpoints(StepTrainer):
    """Checkpoints in Tristage's own format (training/state.py): safetensors, the same for any number of processes.

    The callback of ``training.running.train`` restores a checkpoint when the training begins.
    """

    # The Trainer writes pickles, and each process its own files. No argument gives another format.
    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        self.checkpoints.write(save_state(self), score=self.score)
        self.score = None

    # The Trainer raises an error for a checkpoint without files in its format.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Do nothing: the callback restores the weights (``training.state.restore_state``)."""

    # With DeepSpeed, the Trainer would read a pickled scheduler that the checkpoint does not have.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Do nothing: the callback restores both."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Restore the random generators before the first batch of a resumed epoch: the collator of masked words draws from them.

        No callback runs at this point: PyTorch's loader has drawn from the generators already, and the first batch is not made yet.
        """
        self.restore_generators()
        return super().get_batch_samples(epoch_iterator, num_batches, device)
