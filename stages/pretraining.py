"""Self-supervised causal language modelling on a text corpus: from random weights with a tokenizer of its own, or continuing a model.

Documents are joined by the end token and cut into blocks; every token of a block counts in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stages.config import (
    DataInput,
    DataSource,
    ModelField,
    ModelInput,
    OptimizerSettings,
    Strict,
    TrainingStepConfig,
    check_architecture,
    ref_shorthand,
)
from stages.corpora.packing import encode_documents, overlapping_windows, pack_blocks
from stages.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.models.likelihood import Likelihood
    from stages.step import StepContext, StepResult

END, PAD = "<|endoftext|>", "<|pad|>"


class TokenizerSettings(Strict):
    """A byte-level BPE tokenizer trained on the step's training corpus, with an end and a pad token."""

    vocab_size: int = Field(1024, ge=258, description="Number of tokens: 256 bytes, the special tokens, and merges.")
    special_tokens: list[str] = Field([], description="Tokens to keep whole besides the end and pad tokens, e.g. role marks of a template.")


class PretrainingOptimizer(OptimizerSettings):
    """As ``OptimizerSettings``, with the customary decay of a pretraining run."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    final_learning_rate_fraction: float = Field(0.1, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    warmup_fraction: float = Field(0.02, ge=0, lt=1, description="Share of the optimizer steps used for linear warmup.")
    weight_decay: float = Field(0.1, ge=0)
    adam_beta2: float = Field(0.95, ge=0, lt=1)


class PretrainingConfig(TrainingStepConfig):
    """Either ``model`` (continued pretraining) or ``architecture`` (random weights)."""

    stage: Literal["pretraining"] = "pretraining"
    model: ModelField | None = Field(None, description="Model to continue; it brings its own tokenizer.")
    architecture: dict[str, Any] | None = Field(
        None, description="Random weights: {type: llama | gpt2 | ..., and fields of that transformers config, e.g. hidden_size: 128}."
    )
    tokenizer: Annotated[TokenizerSettings | ModelInput | None, BeforeValidator(ref_shorthand)] = Field(
        None, description="With architecture: {vocab_size: 1024} trains one on the corpus (default); a reference takes a model's."
    )
    block_size: int = Field(256, ge=2, description="Tokens per training sequence.")
    data: DataInput
    training: PretrainingOptimizer = PretrainingOptimizer()

    @model_validator(mode="after")
    def _one_origin(self) -> PretrainingConfig:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either model (continued pretraining) or architecture (random weights), and not both")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("tokenizer goes with architecture; a model brings its own")
        if self.architecture is not None:
            check_architecture(self.architecture)
            if self.lora is not None:
                raise ValueError("lora needs a model to adapt; with architecture every weight is random and must be trained")
        if self.model is not None and self.model.quantization != "none" and self.lora is None:
            raise ValueError(f"model.quantization={self.model.quantization!r} needs lora: quantized weights cannot be trained themselves")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        if self.model is not None:
            return {"model": self.model}
        return {"tokenizer": self.tokenizer} if isinstance(self.tokenizer, ModelInput) else {}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data.train": self.data.train}
        return inputs if self.data.validation is None else {**inputs, "data.validation": self.data.validation}

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        from stages.corpora.text import load_text

        load_text(self.data)


def run(config: PretrainingConfig, context: StepContext) -> StepResult:
    """Train on packed blocks; publish the language model with its held-out perplexity and bits per byte before and after."""
    from transformers import Trainer

    from stages.corpora.text import load_text
    from stages.models.loading import save_model
    from stages.step import StepResult
    from stages.training.trainer import exact, gathered_weights, publish_best, train, training_arguments

    corpus = load_text(config.data)
    tokenizer = _tokenizer(config, context, corpus.train)
    model = _model(config, context, tokenizer)
    train_tokens = encode_documents(tokenizer, corpus.train)
    heldout_tokens = encode_documents(tokenizer, corpus.validation)
    blocks = pack_blocks(train_tokens, config.block_size)
    heldout_bytes = sum(len(text.encode()) for text in corpus.validation)

    arguments = training_arguments(config.training, context, precision=config.precision, remove_unused_columns=False)
    trainer = exact(Trainer)(model=model, args=arguments, train_dataset=_Blocks(blocks), data_collator=_collate)
    before = _measure(trainer, config, context, tokenizer, heldout_tokens, heldout_bytes, "before")
    trained = train(
        trainer,
        context,
        f"{context.name}: pretraining",
        rule=config,
        measure=lambda: _likelihood(trainer, config, context, tokenizer, heldout_tokens).loss,
    )
    after = _measure(trainer, config, context, tokenizer, heldout_tokens, heldout_bytes, "after")

    metrics = {
        **before,
        **after,
        **trained,
        "train_tokens": len(train_tokens),
        "heldout_tokens": len(heldout_tokens),
        "tokens_per_second": trained["steps_per_second"] * config.training.batch_size * config.block_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    kind: dict[str, Any] = {"role": "language_model", "base": context.models["model"] if config.lora is not None else None}
    shown = [heldout_tokens[: config.block_size]]  # what was saved is compared with the model in memory on its beginning
    publish_best(trainer, context, lambda folder, weights: save_model(model, tokenizer, folder, state_dict=weights, rows=shown), **kind)
    weights = gathered_weights(trainer)
    record = context.publish(lambda folder: save_model(model, tokenizer, folder, state_dict=weights, rows=shown), metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


# Tokenizer and model


def train_tokenizer(texts: Sequence[str], settings: TokenizerSettings) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of ``settings.vocab_size`` tokens; equal texts make equal tokenizers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END, PAD, *settings.special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=settings.special_tokens,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer(config: PretrainingConfig, context: StepContext, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    from stages.models.loading import load_tokenizer

    if config.model is not None:
        return load_tokenizer(context.models["model"])
    if isinstance(config.tokenizer, ModelInput):
        return load_tokenizer(context.models["tokenizer"])
    return train_tokenizer(texts, config.tokenizer or TokenizerSettings())


def _model(config: PretrainingConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers import AutoModelForCausalLM

    from stages.models.architectures import random_model
    from stages.models.loading import load_language_model
    from stages.tokens.positions import model_length
    from stages.training.trainer import weights_dtype

    context.runtime.seed_everything(context.seed)  # reading the data must not decide the weights
    if config.architecture is not None:
        model = random_model(AutoModelForCausalLM, config.architecture, tokenizer)
    else:
        model = load_language_model(
            context.models["model"], dtype=weights_dtype(config, context), lora=config.lora, tokenizer=tokenizer, dropout=True
        )
    longest = model_length(model.config)  # blocks are cut from the stream of tokens, so the tokenizer's own limit says nothing here
    if longest is not None and config.block_size > longest:
        raise ModelError(f"block_size={config.block_size} is longer than the model's {longest} positions; lower it to {longest}")
    return model


# Data


class _Blocks:
    """A data set over the rows of a tensor."""

    def __init__(self, blocks: Any) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._blocks[index]}


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


# Measuring


def _measure(
    trainer: Any,
    config: PretrainingConfig,
    context: StepContext,
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    num_bytes: int,
    when: str,
) -> dict[str, float]:
    """Held-out perplexity and bits per byte of the text; end tokens are predicted, too, and add to both."""
    likelihood = _likelihood(trainer, config, context, tokenizer, tokens)
    measured = {"heldout_perplexity": likelihood.perplexity, "heldout_bits_per_byte": likelihood.bits_per_byte(num_bytes)}
    context.log(0 if when == "before" else trainer.state.global_step, {f"heldout/{name[8:]}": value for name, value in measured.items()})
    shown = f"perplexity {likelihood.perplexity:.4g}, {measured['heldout_bits_per_byte']:.4g} bits per byte"
    context.runtime.console.print(f"{context.name}: held-out {when}: {shown}")
    return {f"{name}_{when}": value for name, value in measured.items()}


def _likelihood(
    trainer: Any, config: PretrainingConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase, tokens: list[int]
) -> Likelihood:
    from stages.training.trainer import heldout_likelihood

    return heldout_likelihood(trainer, context, tokenizer, overlapping_windows(tokens, config.block_size), config.precision)
