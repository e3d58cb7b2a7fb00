"""The sentiment classifier: a sequence classifier trained on labelled reviews, measured on held-out ones before and after.

The logits or probabilities of its classes can also be reward sources for PPO and judges in an evaluation.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import Trainer

from stages.corpora.reviews import load_reviews
from stages.json_types import JsonObject
from stages.metric_names import (
    HELDOUT_ACCURACY_BEFORE,
    HELDOUT_LOG_ACCURACY,
    HELDOUT_LOG_LOSS,
    HELDOUT_LOSS_BEFORE,
    NUM_REVIEWS,
    heldout_names,
)
from stages.models.classifiers.inputs import Padding, arguments_of, padding_of
from stages.sentiment.config import SentimentConfig
from stages.sentiment.measuring import examples_of, measure, predict, show
from stages.sentiment.model import tokenizer_and_model
from stages.sentiment.rows import Collator, EncodedReview, encode
from stages.step import Publication, StepContext, StepResult
from stages.training.arguments import training_arguments
from stages.training.best import publish_trained
from stages.training.reproducible import counted_loss, reproducible
from stages.training.running import train
from stages.training.step_trainer import StepTrainer

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)


def run(config: SentimentConfig, context: StepContext) -> StepResult:
    """Train; publish the classifier with accuracy, F1, confusion matrix and calibration on held-out reviews, before and after."""
    reviews = load_reviews(config.data, config.labels)
    tokenizer, model = tokenizer_and_model(config, context, [review.text for review in reviews.train])
    arguments, padding = arguments_of(model), padding_of(model, tokenizer)
    (rows, cut), (heldout, heldout_cut) = (encode(part, tokenizer, arguments) for part in (reviews.train, reviews.validation))
    _say_padding(padding, model, context)
    if cut or heldout_cut:
        context.runtime.console.print(
            f"{context.name}: {cut} of {len(rows)} reviews and {heldout_cut} of {len(heldout)} held-out ones are truncated: they are "
            f"longer than the {tokenizer.model_max_length} tokens that max_length, the model and its tokenizer allow"
        )

    trainer = _make_trainer(config, context, model, rows, Collator(tokenizer.pad_token_id, padding))
    truth = [row["labels"] for row in heldout]
    model = model.to(context.runtime.device)  # type: ignore[arg-type]  # transformers wraps `to` without its self

    def predicted() -> Tensor:
        return predict(model, heldout, tokenizer.pad_token_id, padding=padding, dtype=context.runtime.dtype(config.precision))

    before = predicted()
    label = f"{context.name}: sentiment"
    trained = train(trainer, context, label, rule=config, measure=lambda: measure(predicted(), truth)["loss"])
    after = predicted()

    measured, measured_before = measure(after, truth), measure(before, truth)
    examples = examples_of(reviews.validation, before, after, config)
    show(examples, measured, measured_before, context)
    context.log(trainer.state.global_step, {HELDOUT_LOG_ACCURACY: measured["accuracy"], HELDOUT_LOG_LOSS: measured["loss"]})
    metrics: JsonObject = {
        **heldout_names(measured),
        HELDOUT_ACCURACY_BEFORE: measured_before["accuracy"],
        "heldout_f1_before": measured_before["f1"],
        HELDOUT_LOSS_BEFORE: measured_before["loss"],
        **trained,
        NUM_REVIEWS: len(rows),
        "heldout_reviews": len(heldout),
        "cut_share": cut / len(rows),
        "heldout_cut_share": heldout_cut / len(heldout),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples": examples,
    }
    kind: Publication = {
        "role": "classifier",
        "base": context.models["model"] if config.lora is not None else None,
        "extra": {"labels": config.labels},
    }
    shown = [row["input_ids"] for row in heldout]  # rows on which the saved model is compared with the model in memory
    record = publish_trained(trainer, context, model, tokenizer, rows=shown, metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


def _make_trainer(
    config: SentimentConfig, context: StepContext, model: TransformersModel, rows: list[EncodedReview], collator: Collator
) -> StepTrainer:
    """The Trainer of the classifier. Its passes have rows of similar length."""
    settings = training_arguments(
        config.training, context, precision=config.precision, remove_unused_columns=False, train_sampling_strategy="group_by_length"
    )
    return reproducible(Trainer)(model=model, args=settings, train_dataset=rows, data_collator=collator, compute_loss_func=counted_loss)


def _say_padding(padding: Padding, model: TransformersModel, context: StepContext) -> None:
    """Warn about a family in which padding changes the outputs."""
    if padding == "none":
        logger.warning(
            "%s: padding changes the outputs of %s models. Passes of the training pad rows of similar length, as usual for this family; "
            "measurements and scores use rows of one length per pass",
            context.name,
            model.config.model_type,
        )
