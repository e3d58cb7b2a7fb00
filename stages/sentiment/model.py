"""The classifier to train: a pretrained model, or random weights that are first trained as a masked language model on the texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
)

from stages.corpora.files import read_rows
from stages.corpora.rows import text_of
from stages.json_types import JsonObject
from stages.metric_names import MASKED_PREFIX
from stages.models.architectures import random_model
from stages.models.loading import load_classifier, load_tokenizer
from stages.sentiment.config import SentimentConfig, WordPieceSettings
from stages.sentiment.tokenizer import train_wordpiece
from stages.step import StepContext
from stages.tokens.positions import readable_length
from stages.training.arguments import training_arguments, weights_dtype
from stages.training.best import gathered_weights
from stages.training.checkpoints import Checkpoints, save_tensors
from stages.training.reproducible import counted_loss, reproducible
from stages.training.running import train

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


def tokenizer_and_model(
    config: SentimentConfig, context: StepContext, texts: list[str]
) -> tuple[PreTrainedTokenizerBase, TransformersModel]:
    """The tokenizer and the classifier before training. ``texts``: those from which a new tokenizer is trained."""
    tokenizer, model = _pretrained(config, context) if config.model is not None else _random(config, context, texts)
    # Labels are mutually exclusive here, so the published config must say so even if the checkpoint was trained differently.
    model.config.problem_type = "single_label_classification"
    return tokenizer, model


def _pretrained(config: SentimentConfig, context: StepContext) -> tuple[PreTrainedTokenizerBase, TransformersModel]:
    tokenizer = load_tokenizer(context.models["model"])
    tokenizer.model_max_length = min(config.max_length, tokenizer.model_max_length)
    context.runtime.seed_everything(context.seed)  # for the new head
    model = load_classifier(
        context.models["model"],
        dtype=weights_dtype(config, context),
        labels=config.labels,
        require_head=False,
        lora=config.lora,
        tokenizer=tokenizer,
        dropout=True,
    )
    _limit_length(tokenizer, model)
    return tokenizer, model


def _random(config: SentimentConfig, context: StepContext, texts: list[str]) -> tuple[PreTrainedTokenizerBase, TransformersModel]:
    assert config.architecture is not None
    if config.masked is not None and config.masked.data is not None:
        texts = [*texts, *(text_of(row, "text") for row in read_rows(config.masked.data))]
    tokenizer = train_wordpiece(texts, config.tokenizer or WordPieceSettings(), config.max_length)
    architecture = {"max_position_embeddings": config.max_length, **config.architecture}
    body = _masked_body(config, context, architecture, tokenizer, texts) if config.masked is not None else None
    context.runtime.seed_everything(context.seed)
    labels = {"id2label": dict(enumerate(config.labels)), "label2id": {label: index for index, label in enumerate(config.labels)}}
    model = random_model(AutoModelForSequenceClassification, architecture, tokenizer, num_labels=len(config.labels), **labels)
    _limit_length(tokenizer, model)
    if body is not None:
        getattr(model, model.base_model_prefix).load_state_dict(body, strict=False)
    return tokenizer, model


def _limit_length(tokenizer: PreTrainedTokenizerBase, model: TransformersModel) -> None:
    """Make the tokenizer truncate texts at the model's maximum length if it is below the tokenizer's own limit."""
    if (length := readable_length(model.config, tokenizer)) is not None:
        tokenizer.model_max_length = length


def _masked_body(
    config: SentimentConfig, context: StepContext, architecture: JsonObject, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> dict[str, torch.Tensor]:
    """The encoder's weights after masked-language modelling. Stored in the checkpoint folder for resumed runs."""
    assert config.masked is not None
    runtime = context.runtime
    finished = Checkpoints(context.checkpoint_folder / "encoder", runtime, keep_last=1)
    if finished.newest() is None:
        runtime.seed_everything(context.seed)
        model = random_model(AutoModelForMaskedLM, architecture, tokenizer)
        _limit_length(tokenizer, model)
        rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True)["input_ids"]]
        arguments = training_arguments(
            config.masked.training,
            context,
            precision=config.precision,
            output_dir=str(context.checkpoint_folder / "masked"),
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length",
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.masked.mask_probability)
        trainer = reproducible(Trainer)(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, compute_loss_func=counted_loss
        )
        rule = config.model_copy(update={"checkpoints": config.checkpoints.model_copy(update={"keep_best": 0})})
        train(trainer, context, f"{context.name}: masked language modelling", prefix=MASKED_PREFIX, rule=rule)
        state = gathered_weights(trainer) or model.state_dict()
        prefix = f"{model.base_model_prefix}."
        body = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        finished.write(lambda folder: save_tensors(body, folder / "encoder.safetensors", write=runtime.is_main))
    encoder = finished.newest()
    assert encoder is not None
    return load_file(encoder.path / "encoder.safetensors")
