"""Causal language modelling on a text corpus: from random weights with a new tokenizer, or continued from a model.

Documents are joined by the end token and cut into blocks. Every token of a block counts in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer

from stages.config import ModelInput
from stages.corpora.encoding.blocks import encode_documents, overlapping_windows, pack_blocks
from stages.corpora.text import load_text
from stages.errors import ModelError
from stages.json_types import JsonObject
from stages.metric_names import HELDOUT_BITS_PER_BYTE, HELDOUT_LOG_BITS_PER_BYTE, HELDOUT_LOG_PERPLEXITY, HELDOUT_PERPLEXITY
from stages.models.architectures import random_model
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.passes.likelihood import Likelihood
from stages.pretraining.config import PretrainingConfig, TokenizerSettings
from stages.pretraining.tokenizer import train_tokenizer
from stages.step import Publication, StepContext, StepResult
from stages.tokens.positions import model_length
from stages.training.arguments import training_arguments, weights_dtype
from stages.training.best import heldout_likelihood, publish_trained
from stages.training.reproducible import IGNORED, next_token_loss, reproducible
from stages.training.running import train

if TYPE_CHECKING:
    from stages.model_types import TransformersModel
    from stages.training.step_trainer import StepTrainer


def run(config: PretrainingConfig, context: StepContext) -> StepResult:
    """Train on packed blocks; publish the language model with its held-out perplexity and bits per byte before and after."""
    corpus = load_text(config.data)
    tokenizer = _tokenizer(config, context, corpus.train)
    model = _model(config, context, tokenizer)
    train_tokens = encode_documents(tokenizer, corpus.train)
    heldout_tokens = encode_documents(tokenizer, corpus.validation)
    blocks = pack_blocks(train_tokens, config.block_size)
    heldout_bytes = sum(len(text.encode()) for text in corpus.validation)

    trainer = _make_trainer(config, context, model, blocks)

    def likelihood() -> Likelihood:
        return heldout_likelihood(trainer, context, tokenizer, overlapping_windows(heldout_tokens, config.block_size), config.precision)

    before = _measured(context, likelihood(), heldout_bytes, step=0, when="before")
    trained = train(
        trainer,
        context,
        f"{context.name}: pretraining",
        rule=config,
        measure=lambda: likelihood().loss,
    )
    after = _measured(context, likelihood(), heldout_bytes, step=trainer.state.global_step, when="after")

    metrics: JsonObject = {
        **before,
        **after,
        **trained,
        "train_tokens": len(train_tokens),
        "heldout_tokens": len(heldout_tokens),
        "tokens_per_second": trained["steps_per_second"] * config.training.batch_size * config.block_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    kind: Publication = {"role": "language_model", "base": context.models["model"] if config.lora is not None else None}
    shown = [heldout_tokens[: config.block_size]]  # tokens on which the saved model is compared with the model in memory
    record = publish_trained(trainer, context, model, tokenizer, rows=shown, metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


def _tokenizer(config: PretrainingConfig, context: StepContext, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    if config.model is not None:
        return load_tokenizer(context.models["model"])
    if isinstance(config.tokenizer, ModelInput):
        return load_tokenizer(context.models["tokenizer"])
    return train_tokenizer(texts, config.tokenizer or TokenizerSettings())


def _model(config: PretrainingConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    context.runtime.seed_everything(context.seed)  # so that data loading does not affect the initial weights
    model: TransformersModel
    if config.architecture is not None:
        model = random_model(AutoModelForCausalLM, config.architecture, tokenizer)
    else:
        model = load_language_model(
            context.models["model"], dtype=weights_dtype(config, context), lora=config.lora, tokenizer=tokenizer, dropout=True
        )
    longest = model_length(model.config)  # blocks are cut from a token stream, so the tokenizer's limit does not apply
    if longest is not None and config.block_size > longest:
        raise ModelError(f"block_size={config.block_size} is longer than the model's {longest} positions; lower it to {longest}")
    return model


def _make_trainer(config: PretrainingConfig, context: StepContext, model: TransformersModel, blocks: torch.Tensor) -> StepTrainer:
    arguments = training_arguments(config.training, context, precision=config.precision, remove_unused_columns=False)
    trainer = reproducible(Trainer)(model=model, args=arguments, train_dataset=_Blocks(blocks), data_collator=_collate)
    if not trainer.model_accepts_loss_kwargs:  # Gemma 3n and Gemma 4 for text and images divide by the number of tokens of a pass
        trainer.compute_loss_func = next_token_loss
    return trainer


# Data


class _Blocks:
    """A data set over the rows of a tensor."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._blocks[index]}


def _collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    input_ids = torch.stack([row["input_ids"] for row in rows])
    labels = input_ids.clone()
    labels[:, 0] = IGNORED  # nothing predicts it, but for some classes (GPT-2) the Trainer counts every label
    return {"input_ids": input_ids, "labels": labels}


# Measurement


def _measured(context: StepContext, likelihood: Likelihood, num_bytes: int, *, step: int, when: str) -> dict[str, float]:
    """Log held-out perplexity and bits per byte; returns them as metrics. End tokens are predicted as well and count in both."""
    perplexity, bits = likelihood.perplexity, likelihood.bits_per_byte(num_bytes)
    context.log(step, {HELDOUT_LOG_PERPLEXITY: perplexity, HELDOUT_LOG_BITS_PER_BYTE: bits})
    shown = f"perplexity {perplexity:.4g}, {bits:.4g} bits per byte"
    context.runtime.console.print(f"{context.name}: held-out {when} training: {shown}")
    return {f"{HELDOUT_PERPLEXITY}_{when}": perplexity, f"{HELDOUT_BITS_PER_BYTE}_{when}": bits}
