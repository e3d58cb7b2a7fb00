"""Classification statistics: calibration, F1, confusion matrix. N examples, C classes. Results are floats."""

from __future__ import annotations

import torch
from torch import Tensor


def calibration_bins(confidence: Tensor, correct: Tensor) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count in ten bins of equal width over confidence in [0, 1]. Empty bins are left out. Inputs [N]."""
    bins = []
    bin_index = (confidence * 10).long().clamp(max=9)
    for index in range(10):
        inside = bin_index == index
        if inside.any():
            bins.append(
                {
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(correct[inside].double().mean()),
                    "count": int(inside.sum()),
                }
            )
    return bins


def expected_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Mean absolute difference of confidence and accuracy over the bins, weighted by count (Guo et al. 2017). Inputs [N]."""
    bins = calibration_bins(confidence, correct)
    return sum(item["count"] * abs(item["confidence"] - item["accuracy"]) for item in bins) / max(1, len(confidence))


def confusion_matrix(truth: Tensor, predicted: Tensor, num_classes: int) -> list[list[int]]:
    """Counts [C][C]: row = true class, column = predicted class. Inputs [N] int."""
    flat = torch.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return [[int(count) for count in row] for row in flat.reshape(num_classes, num_classes)]


def f1_scores(confusion: list[list[int]]) -> list[float]:
    """F1 of each class, 2 TP / (2 TP + FP + FN); 0 for a class that neither occurs nor is predicted."""
    scores = []
    for index, row in enumerate(confusion):
        hits = row[index]
        misses = sum(row) - hits
        false = sum(other[index] for other in confusion) - hits
        scores.append(2 * hits / (2 * hits + false + misses) if hits + false + misses else 0.0)
    return scores
