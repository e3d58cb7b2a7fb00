"""Accuracy, F1, confusion matrix and calibration of a classifier, and examples of held-out reviews."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from rich.markup import escape

from stages.config import SCORING_ROWS
from stages.corpora.reviews import Review
from stages.kernels.transfers import moved_together
from stages.models.classifiers.inputs import Padding, same_length_groups
from stages.models.parts import evaluation_mode
from stages.models.passes.budget import each_group
from stages.models.sharding import unsharded
from stages.process.tables import Table
from stages.sentiment.config import SentimentConfig
from stages.sentiment.rows import Collator, EncodedReview
from stages.stats.classification import calibration_bins, confusion_matrix, expected_calibration_error, f1_scores
from stages.stats.intervals import wilson_interval
from stages.step import StepContext

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


class Measured(TypedDict):
    """Measurements of a classifier on held-out reviews. ``confusion_matrix``: rows are the true classes."""

    accuracy: float
    accuracy_ci_low: float
    accuracy_ci_high: float
    f1: float
    f1_macro: float
    confusion_matrix: list[list[int]]
    calibration_error: float
    calibration: list[dict[str, float]]
    loss: float


def predict(
    model: TransformersModel,
    rows: Sequence[EncodedReview],
    pad_token_id: int,
    *,
    padding: Padding = "right",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Class probabilities [N, C] on the CPU. Passes compute in ``dtype``, as in training. The model's mode is restored.

    ``padding``: the side on which the model allows it; ``none``: the rows of a pass have one length.
    """
    collate = Collator(pad_token_id, padding)
    lengths = [len(row["input_ids"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: lengths[index])
    groups = [order[start : start + SCORING_ROWS] for start in range(0, len(order), SCORING_ROWS)]
    if padding == "none":
        groups = same_length_groups(lengths, SCORING_ROWS)
    probabilities: list[torch.Tensor] = [torch.empty(0)] * len(rows)

    def measure_rows(indices: Sequence[int]) -> None:
        batch = {name: value for name, value in collate([rows[index] for index in indices]).items() if name != "labels"}
        batch = dict(zip(batch, moved_together(list(batch.values()), model.device), strict=True))
        for index, row in zip(indices, model(**batch).logits.float().softmax(dim=-1).cpu(), strict=True):
            probabilities[index] = row

    autocast = torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with evaluation_mode(model), unsharded(model), torch.inference_mode(), autocast:
        each_group("measuring the classifier", groups, measure_rows, known_by=model, advice="Lower max_length, or use a smaller model")
    return torch.stack(probabilities)


def measure(probabilities: torch.Tensor, truth: Sequence[int]) -> Measured:
    """Accuracy with its 95 % interval, F1 (of the last class; mean over classes), confusion matrix (rows: truth), calibration, loss."""
    labels = torch.tensor(list(truth))
    confidence, predicted = probabilities.max(dim=1)
    correct = predicted == labels
    confusion = confusion_matrix(labels, predicted, probabilities.shape[1])
    f1 = f1_scores(confusion)
    low, high = wilson_interval(int(correct.sum()), len(labels))
    return {
        "accuracy": float(correct.double().mean()),
        "accuracy_ci_low": low,
        "accuracy_ci_high": high,
        "f1": f1[-1],
        "f1_macro": sum(f1) / len(f1),
        "confusion_matrix": confusion,
        "calibration_error": expected_calibration_error(confidence, correct),
        "calibration": calibration_bins(confidence, correct),
        "loss": float(-probabilities[torch.arange(len(labels)), labels].clamp(min=1e-12).log().double().mean()),
    }


def examples_of(reviews: Sequence[Review], before: torch.Tensor, after: torch.Tensor, config: SentimentConfig) -> list[dict[str, str]]:
    """Evenly spaced held-out reviews with label and prediction."""
    step = max(1, len(reviews) // max(1, config.num_examples))
    shown = []
    for index in range(0, len(reviews), step)[: config.num_examples]:
        row = {"text": reviews[index].text[:200], "truth": config.labels[reviews[index].label]}
        for when, probabilities in (("before", before[index]), ("after", after[index])):
            row[when] = config.labels[int(probabilities.argmax())]
            row[f"{when}_probability"] = f"{float(probabilities.max()):.3f}"
        shown.append(row)
    return shown


def show(examples: list[dict[str, str]], after: Measured, before: Measured, context: StepContext) -> None:
    """Print the examples, and the held-out measures before and after training."""
    table = Table("review", "truth", "before", "after", title=f"{context.name}: held-out reviews", title_justify="left")
    for row in examples:
        right = "green" if row["after"] == row["truth"] else "red"
        cells = [f"{row[when]} {float(row[f'{when}_probability']):.2f}" for when in ("before", "after")]
        table.add_row(escape(row["text"][:80].replace("\n", " ")), row["truth"], cells[0], f"[{right}]{cells[1]}[/]")
    console = context.runtime.console
    if examples:
        console.print(table)
    console.print(
        f"{context.name}: held-out accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f} "
        f"(95 % {after['accuracy_ci_low']:.3f} to {after['accuracy_ci_high']:.3f}), F1 {after['f1']:.3f}, "
        f"calibration error {after['calibration_error']:.3f}, confusion {after['confusion_matrix']}"
    )
