"""Training a reward model with one seed, or the best of several."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from stages.metric_names import TRAIN_PREFIX, seed_prefix
from stages.models.heads import RewardModel
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.measuring import measure
from stages.reward_model.preferences import EncodedComparison
from stages.reward_model.rows import collate
from stages.rl.ranking import best_of_losses, ranking_losses, ranking_pairs
from stages.step import StepContext
from stages.training.arguments import training_arguments, weights_dtype
from stages.training.batching import Rows
from stages.training.checkpoints import Checkpoints, load_tensors, save_tensors, trainable
from stages.training.microbatches import chosen_rows, row_lengths
from stages.training.reproducible import reproducible
from stages.training.running import train

Batch: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Attempt:
    """A reward model trained with one seed: training metrics, and its accuracy on the comparisons that select the seed."""

    seed: int
    trained: dict[str, float]
    accuracy: float


def new_model(config: RewardModelConfig, context: StepContext, seed: int) -> RewardModel:
    """The model before training: a reward model that is trained further, or a language model with a new head drawn from ``seed``."""
    source, dtype = context.models["model"], weights_dtype(config, context)
    if source.record is not None and source.record.role == "reward_model":
        return RewardModel.from_pretrained(source, dtype=dtype, lora=config.lora, trainable=True)
    return RewardModel.from_language_model(source, dtype=dtype, lora=config.lora, seed=seed)


def train_with_seed(
    config: RewardModelConfig,
    context: StepContext,
    model: RewardModel,
    rows: list[EncodedComparison],
    deciding: list[EncodedComparison],
    scoring: dict[str, int],
    seed: int,
) -> tuple[Attempt, RankingTrainer]:
    """Train with one seed. Returns (the attempt, the trainer). With several seeds, each one has its own checkpoints and final weights."""
    several = config.num_seeds > 1
    own = replace(context, seed=seed, checkpoint_folder=context.checkpoint_folder / f"seed-{seed}") if several else context
    arguments = training_arguments(config.training, own, precision=config.precision, remove_unused_columns=False)
    trainer = make_trainer(model, arguments, rows, scoring["pad_token_id"], config.loss)
    done = finished(context, seed)
    checkpoint = done.newest() if several else None
    if checkpoint is not None:
        load_tensors(trainable(model), checkpoint.path / "model.safetensors")
        trainer.restore_config()
        return Attempt(**json.loads((checkpoint.path / "attempt.json").read_text(encoding="utf-8"))), trainer
    context.runtime.seed_everything(seed)
    trained = train(
        trainer,
        own,
        f"{context.name}: reward model",
        prefix=seed_prefix(seed) if several else TRAIN_PREFIX,
        rule=config,
        measure=lambda: measure(model, deciding, **scoring)["loss"],
    )
    accuracy = measure(model, deciding, **scoring)["accuracy"] if several else 0.0
    attempt = Attempt(seed, trained, accuracy)
    if several:
        context.runtime.console.print(f"{context.name}: seed {seed}: accuracy {accuracy:.3f} on the selection half")

        def fill(folder: Path) -> None:
            save_tensors(trainable(model), folder / "model.safetensors", write=context.runtime.is_main)
            if context.runtime.is_main:
                (folder / "attempt.json").write_text(json.dumps(vars(attempt)), encoding="utf-8")

        done.write(fill)
    return attempt, trainer


def finished(context: StepContext, seed: int) -> Checkpoints:
    """The folder for the final weights of a seed."""
    return Checkpoints(context.checkpoint_folder / f"seed-{seed}-done", context.runtime, keep_last=1)


class RankingTrainer(reproducible(Trainer)):  # type: ignore[misc]
    """A Trainer whose examples are prompts with all their completions, so a prompt is never split across steps."""

    losses_of = staticmethod(ranking_losses)
    on_cpu = ("ranks", "prompt_index", "text_index")  # the number of pairs depends on them
    loss_is_scaled_for_ga = True  # the loss below is already divided by the number of items in the step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **_: object,
    ) -> torch.Tensor | tuple[torch.Tensor, Batch]:
        """The mean loss over the prompts of the step, or (the loss, the scores [N])."""
        scores = model(inputs["input_ids"], inputs["attention_mask"], right_padded=True)
        losses = self.losses_of(scores, inputs["ranks"], inputs["prompt_index"], inputs["text_index"])
        assert num_items_in_batch is not None  # only training calls this method
        loss = losses.sum() / num_items_in_batch * self.args.world_size  # DDP takes the mean over processes
        return (loss, {"scores": scores}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Number of prompts in the step with a preference, over all processes."""
        count = 0
        for batch in batch_samples:
            better, _ = ranking_pairs(batch["ranks"], batch["prompt_index"], batch["text_index"])
            count += len(torch.unique(batch["prompt_index"][better]))
        return self.accelerator.gather(torch.tensor([count], device=device)).sum().clamp(min=1)

    def lengths_of(self, rows: Rows[EncodedComparison]) -> list[int]:
        """For each prompt, the number of tokens of its longest text."""
        return [max(map(len, comparison.rows)) for comparison in rows]

    def sizes_of(self, batch: Batch) -> list[int]:
        """Of each prompt: its number of completions, times the longest text."""
        lengths, owners = row_lengths(batch), batch["prompt_index"].tolist()
        texts = [[length for length, owner in zip(lengths, owners, strict=True) if owner == prompt] for prompt in range(max(owners) + 1)]
        return [len(own) * max(own) for own in texts]

    def part_of(self, batch: Batch, rows: list[int]) -> Batch:
        """All completions of the prompts ``rows``. These prompts get the new numbers 0, 1, ..."""
        owners: list[int] = batch["prompt_index"].tolist()
        numbers = {prompt: number for number, prompt in enumerate(rows)}
        part = chosen_rows(batch, [text for text, owner in enumerate(owners) if owner in numbers])
        renumbered = [numbers[owner] for owner in part["prompt_index"].tolist()]
        return {**part, "prompt_index": torch.tensor(renumbered, device=part["prompt_index"].device)}

    def blank(self, batch: Batch) -> Batch:
        return {**batch, "ranks": torch.zeros_like(batch["ranks"])}  # all ties: no pairs


def make_trainer(
    model: nn.Module, arguments: TrainingArguments, rows: list[EncodedComparison], pad_token_id: int, loss: str = "pairs"
) -> RankingTrainer:
    """A trainer on prompts with all their completions. ``loss``: pairs | best_of."""
    trainer = RankingTrainer(model=model, args=arguments, train_dataset=rows, data_collator=lambda items: collate(items, pad_token_id))
    trainer.losses_of = ranking_losses if loss == "pairs" else best_of_losses
    return trainer
