"""TRL's DPOTrainer for tokenized pairs, and its reference model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from stages.dpo.config import DPOStepConfig
from stages.dpo.pairs import Pair
from stages.errors import ModelError
from stages.metric_names import reward_name
from stages.models.adapters.activation import without_copies, without_new_adapter
from stages.models.adapters.attaching import train_in_fp32
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.passes.right_padding import without_masks
from stages.models.quiet import quiet_transformers
from stages.models.sharding import shard
from stages.step import StepContext
from stages.training.arguments import training_arguments
from stages.training.batching import Rows
from stages.training.label_head import fit_label_head
from stages.training.microbatches import chosen_rows, row_lengths
from stages.training.reproducible import IGNORED, reproducible

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

Batch: TypeAlias = dict[str, torch.Tensor]


def load_reference(config: DPOStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase) -> TransformersModel | None:
    """The frozen reference; None if it is the model without its new adapter. Raises ModelError for a different vocabulary."""
    if config.reference is None and config.lora is not None:
        return None
    source = context.models["reference" if config.reference is not None else "model"]
    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        own = context.models["model"].ref
        raise ModelError(f"reference {source.ref!r} has a different vocabulary than the model {own!r}; use models with the same tokenizer")
    return load_language_model(source, dtype=context.runtime.dtype(config.precision), trainable=False, tokenizer=tokenizer)


class TokenizedDPOTrainer(reproducible(DPOTrainer)):  # type: ignore[misc]
    """A DPOTrainer for tokenized rows, whose loss is divided by the number of pairs in the full step.

    Its metrics are means over pairs, or over the tokens of the completions.
    """

    loss_is_scaled_for_ga = True
    weighed_by = {
        **dict.fromkeys(map(reward_name, ("chosen", "rejected", "accuracies", "margins")), "pairs"),
        **dict.fromkeys(("logps/chosen", "logps/rejected"), "pairs"),
        "entropy": "tokens",
        "logits/chosen": "chosen",
        "logits/rejected": "rejected",
        "mean_token_accuracy": "chosen",
    }

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of a pass [scalar], divided by the number of pairs of its step; TRL divides by those of the pass."""
        own = pairs_in(inputs)
        with without_masks(self.model, self.ref_model), _gathering_unequal_shares(self.accelerator, own), _unselected_logits(self.model):
            if self.precompute_ref_logps:
                inputs = {**inputs, **self._reference_logprobs(inputs)}
            loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs)
        if num_items_in_batch is None:
            return loss
        halves = inputs["completion_mask"][:, 1:].chunk(2)
        counts = torch.stack([own, *(half.sum() for half in halves)])
        pairs, chosen, rejected = self.accelerator.gather(counts[None]).sum(dim=0)  # on all processes, as TRL's metrics
        self.count_pass(pairs=pairs, tokens=chosen + rejected, chosen=chosen, rejected=rejected)
        return loss * own / num_items_in_batch * self.args.world_size  # DDP takes the mean over processes

    def _reference_logprobs(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """Log-probabilities [pairs] of the completions under the initial model, computed with the adapters below the new one."""
        masked = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        tensors = {name: value for name, value in inputs.items() if name != "completion_mask"}
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, without_new_adapter(self.model):
            outputs = self.model(**tensors, use_cache=False, labels=masked, fused_lm_head=True)
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Number of pairs in the step, over all processes."""
        num_pairs = sum(int(pairs_in(batch)) for batch in batch_samples)
        total: torch.Tensor = self.accelerator.gather(torch.tensor([num_pairs], device=device)).sum()
        return total

    def lengths_of(self, rows: Rows[dict[str, list[int]]]) -> list[int]:
        """For each pair, the number of tokens of its longer text."""
        return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]

    def sizes_of(self, batch: Batch) -> list[int]:
        """Of each pair: twice its longer text."""
        lengths = row_lengths(batch)
        pairs = len(lengths) // 2
        return [2 * max(lengths[row], lengths[row + pairs]) for row in range(pairs)]

    def part_of(self, batch: Batch, rows: list[int]) -> Batch:
        """The chosen texts of the pairs, then the rejected ones."""
        pairs = len(batch["input_ids"]) // 2
        return chosen_rows(batch, [*rows, *(row + pairs for row in rows)])

    def blank(self, batch: Batch) -> Batch:
        return {**batch, "completion_mask": torch.zeros_like(batch["completion_mask"])}


def pairs_in(batch: Batch) -> torch.Tensor:
    """Number of counted pairs, a scalar on the device of the batch. One of the two texts may be empty."""
    chosen, rejected = batch["completion_mask"].any(dim=1).chunk(2)
    return (chosen | rejected).sum()


def make_trainer(
    config: DPOStepConfig,
    context: StepContext,
    model: TransformersModel,
    reference: TransformersModel | None,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
) -> TokenizedDPOTrainer:
    """A trainer on ``pairs``; ``reference`` None: the model without its new adapter."""
    options = {"beta": config.beta, "loss_type": [config.loss], "label_smoothing": config.label_smoothing, "max_length": None}
    with quiet_transformers(), without_copies(model):
        arguments = training_arguments(config.training, context, precision=config.precision, kind=DPOConfig, **options)
        columns = {name: [getattr(pair, name) for pair in pairs] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        trainer = TokenizedDPOTrainer(
            model=model, ref_model=reference, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
        )
    # TRL's reference of an adapter is a copy of only that adapter; ours includes every adapter below it.
    trainer.precompute_ref_logps = reference is None
    fit_label_head(trainer, context.runtime.dtype(config.precision))
    if trainer.ref_model is not None and context.runtime.shards:
        shard(trainer.ref_model, add_up=False)
    train_in_fp32(model)
    return trainer


class _SummedByMask(torch.Tensor):
    """Numbers of tokens of which TRL sums those of a mask. A selection by a mask would make the CPU wait for its size."""

    def __getitem__(self, index: object) -> torch.Tensor:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.shape == self.shape:
            return torch.where(index, self, 0.0)
        selected: torch.Tensor = super().__getitem__(index)  # type: ignore[index]
        return selected


class _TokenOutputs(Protocol):
    """The output of a model that TRL has patched. ``mean_logits`` [B, T]: the mean over the vocabulary."""

    mean_logits: torch.Tensor


@contextmanager
def _unselected_logits(model: nn.Module) -> Iterator[None]:
    """Context manager in which TRL sums the mean logits of counted tokens without selecting them."""

    def replace(module: nn.Module, inputs: object, outputs: _TokenOutputs) -> None:
        if getattr(outputs, "mean_logits", None) is not None:
            outputs.mean_logits = outputs.mean_logits.as_subclass(_SummedByMask)

    handle = model.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _gathering_unequal_shares(accelerator: Accelerator, own: torch.Tensor) -> Iterator[None]:
    """Let TRL gather its per-pair metrics although processes may have different numbers of pairs. ``own``: of this process, maybe 0."""
    if accelerator.num_processes == 1:
        yield
        return
    gather, counts = accelerator.gather, bool(own > 0)  # read once, because the CPU waits for it

    def unequal(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0:
            return gather(tensor)
        padded = accelerator.pad_across_processes(tensor if counts else torch.full_like(tensor, torch.nan), pad_index=torch.nan)
        gathered = gather(padded)
        return gathered[~gathered.isnan()]

    accelerator.gather = unequal
    try:
        yield
    finally:
        accelerator.gather = gather
