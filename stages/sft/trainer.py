"""TRL's SFTTrainer for tokenized rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import datasets
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from stages.json_types import JsonObject
from stages.models.adapters.attaching import train_in_fp32
from stages.models.packed_rows import refuse_leaks
from stages.models.passes.right_padding import without_masks
from stages.models.quiet import quiet_transformers
from stages.sft.config import SFTStepConfig
from stages.sft.packing import PackedCollator, pack_rows
from stages.sft.rows import EncodedRow
from stages.step import StepContext
from stages.training.arguments import training_arguments
from stages.training.label_head import fit_label_head
from stages.training.reproducible import IGNORED, reproducible

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


class DemonstrationTrainer(reproducible(SFTTrainer)):  # type: ignore[misc]
    """The loss is a mean over the counted tokens of the step, and so are entropy and accuracy."""

    loss_is_scaled_for_ga = True  # TRL divides the loss of a pass by the number of tokens of the step
    weighed_by = {"entropy": "tokens", "mean_token_accuracy": "tokens"}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *arguments: object, **named: object
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """TRL's loss of a pass. Counts the pass's tokens, on all processes, for the means of its metrics."""
        counted = self.accelerator.gather((inputs["labels"][..., 1:] != IGNORED).sum().reshape(1)).sum()
        with ExitStack() as stack:
            if "position_ids" not in inputs:  # rows that are not packed
                stack.enter_context(without_masks(self.model))
            made: torch.Tensor | tuple[torch.Tensor, object] = super().compute_loss(model, inputs, *arguments, **named)
        self.count_pass(tokens=counted)
        return made

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
        """Number of counted tokens of the step, over all processes.

        The Trainer counts none for classes that take no loss arguments (Gemma 3n and Gemma 4 for text and images), and for others (GPT-2)
        also the first label of a row, which nothing predicts.
        """
        count = sum(int((batch["labels"][..., 1:] != IGNORED).sum()) for batch in batch_samples)
        total: torch.Tensor = self.accelerator.gather(torch.tensor([count], device=device)).sum()
        return total


def make_trainer(
    config: SFTStepConfig,
    context: StepContext,
    model: TransformersModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[EncodedRow],
    max_length: int,
) -> DemonstrationTrainer:
    """A trainer on ``rows``, packed or unpacked."""
    options: JsonObject = {"max_length": None, "packing": False, "completion_only_loss": config.completion_only_loss}
    collator = None
    if config.packing:
        columns = pack_rows(rows, max_length, config.completion_only_loss)
        collator = PackedCollator(tokenizer.pad_token_id)
        options |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    else:
        columns = {"input_ids": [row.ids for row in rows]}
        if config.completion_only_loss:
            columns["completion_mask"] = [row.counted(True) for row in rows]
    with quiet_transformers(), _quiet_datasets():
        arguments = training_arguments(config.training, context, precision=config.precision, kind=SFTConfig, **options)
        trainer = DemonstrationTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer, data_collator=collator
        )
    dtype = context.runtime.dtype(config.precision)
    if config.packing:
        refuse_leaks(model, config.model.ref, dtype)
    fit_label_head(trainer, dtype)
    train_in_fp32(model)
    return trainer


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
