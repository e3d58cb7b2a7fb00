"""Split a Trainer's step into passes over rows of similar length, within a token budget. Passes get smaller if memory runs out.

Random rows in a pass are padded to the longest one, which doubles the tokens of typical instructions. Sorted rows need little padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from stages.errors import MemoryExhausted, is_out_of_memory
from stages.kernels.token_budget import tokens_of
from stages.kernels.transfers import on_device
from stages.models.layers.compiled import compiled_passes
from stages.models.passes.budget import PassBudget, PassTooLarge
from stages.training.arguments import EXAMPLES
from stages.training.smaller_passes import write_limit
from stages.training.step_trainer import Batch, StepTrainer

ADVICE = (
    "Lower max_length (pretraining: block_size), set training.gradient_checkpointing: true, or use lora, a quantized model or a smaller one"
)


class PassesByTokens(StepTrainer):
    """With ``args.by_tokens`` (one process) the loader gives a complete step as one batch, and ``training_step`` splits it into passes.

    The loss of a pass must be its share of the step's loss, so that the sum over passes is the step's loss. ``sizes_of`` and ``part_of``
    define how a batch is split. A trainer whose batches are not rows of tokens overrides both.
    """

    budget: PassBudget | None = None
    pass_tokens: int | None = None  # of the checkpoint that the training continues from
    on_cpu: ClassVar[tuple[str, ...]] = ()
    """The tensors of a batch from which the loss reads values."""

    # The Trainer's gradient accumulation uses the same number of passes in each step. With a token budget this number differs per step.
    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """Forward and backward passes over the step. Returns the summed loss. Gradients must be empty before the call."""
        with compiled_passes():
            if not getattr(self.args, "by_tokens", False):
                try:
                    return super().training_step(model, inputs, num_items_in_batch)
                except Exception as error:
                    self._refuse_alone(error)
                    raise
            return self._step_by_tokens(model, inputs, num_items_in_batch)

    def _refuse_alone(self, error: Exception) -> None:
        """Raise PassTooLarge if memory ran out in a pass that takes all processes. The next start of the step makes smaller passes.

        Raises MemoryExhausted if the pass had a single example.
        """
        if not is_out_of_memory(error):
            return
        what, examples = f"{self.context.name}: training", self.args.per_device_train_batch_size
        if examples == 1:
            raise MemoryExhausted(f"{what}: memory ran out in a pass over one example, which cannot be divided. {ADVICE}") from error
        move = write_limit(self.context, EXAMPLES, examples // 2)
        raise PassTooLarge.of(what, move, size=f"over {examples} examples") from error

    def _step_by_tokens(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """``training_step`` in passes by tokens."""
        if self.budget is None:
            size, rows = self.args.microbatch_size, self.args.rows_per_pass
            self.budget = PassBudget(f"{self.context.name}: training", self.args.device, size, rows=rows, trains=True, advice=ADVICE)
            self.budget.resume(self.pass_tokens)
        metrics = _MetricCounts(self)
        while True:
            try:
                loss = self._all_passes(model, inputs, num_items_in_batch)
                break
            except Exception as error:
                self.budget.retreat(error)
            # This is after the except clause, because the error keeps the tensors of the failed pass in memory.
            model.zero_grad(set_to_none=True)
            metrics.restore()
            self.budget.release()
        self.budget.succeeded()
        if self.budget.measures:
            self.budget.settle(self._pending_moments(model))
        return loss

    def _all_passes(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        assert self.budget is not None
        sizes = self.sizes_of(inputs)
        order = sorted(range(len(sizes)), key=lambda row: -sizes[row])  # largest first, so that a pass that does not fit fails immediately
        groups = self.budget.groups(order, sizes)
        self.current_gradient_accumulation_steps = len(groups)  # TRL divides the load-balancing loss of experts by it
        losses = []
        for rows in groups:
            part = inputs if len(groups) == 1 else self.part_of(inputs, sorted(rows))
            with self.budget.one_pass(len(rows), tokens_of(rows, sizes)):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    # The Trainer copies every tensor from pageable memory, for which the CPU waits. Its loader cannot pin the parts of a step.
    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Move a pass to the device without making the CPU wait for a GPU. The tensors of ``on_cpu`` stay on the CPU."""
        kept = {name: inputs[name] for name in self.on_cpu if name in inputs}
        others = {
            name: on_device(value, self.args.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
            if name not in kept
        }
        return {**super()._prepare_inputs(others), **kept}

    def sizes_of(self, batch: Batch) -> list[int]:
        """Number of tokens of each example of a collated batch."""
        return row_lengths(batch)

    def part_of(self, batch: Batch, rows: list[int]) -> Batch:
        """The examples ``rows`` of a collated batch."""
        return chosen_rows(batch, rows)

    def _pending_moments(self, model: torch.nn.Module) -> int:
        """Bytes of the optimizer's moments, which are allocated at the first step. 0 if they are already allocated."""
        if self.optimizer is None or self.optimizer.state:
            return 0
        each = 2 if "8bit" in self.args.optim else 8
        return sum(each * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class _MetricCounts:
    """The metrics that TRL's trainers have collected so far. ``restore`` removes those of failed passes, so repeated passes count once."""

    def __init__(self, trainer: StepTrainer) -> None:
        self._trainer = trainer
        self._lists: dict[str, list[float]] = getattr(trainer, "_metrics", {}).get("train", {})
        self._lengths = {name: len(values) for name, values in self._lists.items()}
        self._tokens = getattr(trainer, "_total_train_tokens", None)

    def restore(self) -> None:
        for name, values in self._lists.items():
            del values[self._lengths.get(name, 0) :]
        if self._tokens is not None:
            self._trainer._total_train_tokens = self._tokens


def row_lengths(batch: Batch) -> list[int]:
    """Number of tokens of each row of a batch with ``input_ids`` [B, T]: those that its mask counts, or T without a mask."""
    rows, width = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    return [width] * rows if mask is None else mask.sum(dim=1).tolist()


def chosen_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """The rows of every tensor [B, ...] of a batch, without columns that are padding in all of these rows.

    Padding is on the right, or (in a batch whose mask excludes the first column of a row) on the left.
    """
    number, width = batch["input_ids"].shape
    lengths = row_lengths(batch)
    longest = max(lengths[row] for row in rows)
    mask = batch.get("attention_mask")
    is_left = mask is not None and not bool(mask[:, 0].all())
    columns = slice(width - longest, width) if is_left else slice(0, longest)
    index = torch.tensor(list(rows), device=batch["input_ids"].device)
    made = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == number:
            value = value.index_select(0, index)
            value = value[:, columns] if value.dim() > 1 and value.shape[1] == width else value
        made[name] = value
    return made
