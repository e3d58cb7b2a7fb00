"""Agreement between scores and preferences: accuracy with intervals, calibration, and accuracy by margin, group and length.

Reward models often have a length bias (Stiennon et al. 2020, section 4.3), so accuracy is also reported by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from stages.errors import DataError
from stages.rl.ranking import ranking_loss, ranking_pairs
from stages.stats.classification import calibration_bins, expected_calibration_error
from stages.stats.comparing import prompt_means
from stages.stats.intervals import share_interval, wilson_interval

MARGINS = (0.25, 0.5, 1.0, 2.0)  # edges of the margin bins
EQUAL_LENGTH = 0.1  # relative difference below which lengths count as equal
NO_PREFERENCE = "no held-out comparison has a preference; use validation data with pairs that are not ties"


@dataclass(frozen=True, slots=True)
class EncodedComparison:
    """The completions of one prompt as token rows (prompt included), their ranks, and the groups of the comparison.

    ``lengths``: tokens of each completion before truncation; if empty, the row length minus ``prompt_length``. ``cut``: number of rows that
    were truncated at the beginning.
    """

    rows: list[list[int]]
    ranks: list[int]
    groups: dict[str, str] = field(default_factory=dict)
    prompt_length: int = 0
    lengths: list[int] = field(default_factory=list)
    cut: int = 0

    @property
    def texts(self) -> list[int]:
        """An index for each row; equal rows have the same index."""
        return [self.rows.index(row) for row in self.rows]

    @property
    def pairs(self) -> tuple[int, int]:
        """(number of ranked pairs with different rows, number of ranked pairs with equal rows)."""
        texts = self.texts
        ranked = [(a, b) for b in range(len(self.ranks)) for a in range(b) if self.ranks[a] != self.ranks[b]]
        equal = sum(texts[a] == texts[b] for a, b in ranked)
        return len(ranked) - equal, equal


class AccuracyByLength(TypedDict):
    """Accuracy of the pairs whose better completion is longer, shorter or about as long."""

    better_is: str
    accuracy: float
    pairs: int


class AccuracyOfGroup(TypedDict):
    """Accuracy of the pairs with one value in a column, with its 95 % interval."""

    value: str
    accuracy: float
    ci_low: float
    ci_high: float
    pairs: int


class LengthAgreement(TypedDict):
    """Accuracy by length, and how often the longer completion scores higher, and is the better one."""

    accuracy_by_length: list[AccuracyByLength]
    prefers_longer: NotRequired[float]  # missing if all lengths are equal
    longer_is_better: NotRequired[float]


class GroupAgreement(TypedDict, total=False):
    """Accuracy by group; missing without groups."""

    accuracy_by_group: dict[str, list[AccuracyOfGroup]]  # by column


class Agreement(LengthAgreement, GroupAgreement):
    """How well scores agree with preferences. Intervals are at 95 %; ``pairs`` counts ranked pairs."""

    accuracy: float
    ci_low: float
    ci_high: float
    accuracy_by_prompt: float
    accuracy_by_prompt_ci_low: float
    accuracy_by_prompt_ci_high: float
    pairs: int
    loss: float
    calibration_error: float
    calibration: list[dict[str, float]]
    accuracy_by_margin: list[dict[str, float | None]]
    score_mean: float
    score_std: float


def agreement(scores: Tensor, comparisons: Sequence[EncodedComparison], *, gain: float = 1.0) -> Agreement:
    """Compare the scores [N] of all completions (in the order of the comparisons) with the preferences.

    The model's probability of its preferred completion is sigmoid(margin); calibration compares it with the actual accuracy. ``gain``:
    factor by which scores were rescaled after training; margins are divided by it. Raises DataError if no comparison has a preference.
    """
    ranks = torch.tensor([rank for item in comparisons for rank in item.ranks])
    prompt_index = torch.tensor([index for index, item in enumerate(comparisons) for _ in item.ranks])
    text_index = torch.tensor([text_index for item in comparisons for text_index in item.texts])
    better, worse = ranking_pairs(ranks, prompt_index, text_index)
    if len(better) == 0:
        raise DataError(NO_PREFERENCE)
    margins = (scores[better] - scores[worse]) / gain
    correct = margins > 0
    confidence = margins.abs().sigmoid()
    low, high = wilson_interval(int(correct.sum()), len(correct))
    prompts_of_pairs = prompt_index[better]
    by_prompt = prompt_means(correct.double().tolist(), prompts_of_pairs.tolist())  # pairs of one prompt are not independent
    clustered_low, clustered_high = share_interval(by_prompt)
    return {
        "accuracy": float(correct.double().mean()),
        "ci_low": low,
        "ci_high": high,
        "accuracy_by_prompt": sum(by_prompt) / len(by_prompt),
        "accuracy_by_prompt_ci_low": clustered_low,
        "accuracy_by_prompt_ci_high": clustered_high,
        "pairs": len(correct),
        "loss": float(ranking_loss(scores / gain, ranks, prompt_index, text_index)),
        "calibration_error": expected_calibration_error(confidence, correct),
        "calibration": calibration_bins(confidence, correct),
        "accuracy_by_margin": _by_margin(margins.abs(), correct),
        "score_mean": float(scores.double().mean()),
        "score_std": float(scores.double().std(correction=0)),
        **_by_length(comparisons, better, worse, correct),
        **_by_group(comparisons, prompts_of_pairs, correct),
    }


def _by_margin(margins: Tensor, correct: Tensor) -> list[dict[str, float | None]]:
    edges = [0.0, *MARGINS, float("inf")]
    rows: list[dict[str, float | None]] = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (margins >= low) & (margins < high)
        if inside.any():
            accuracy = float(correct[inside].double().mean())
            rows.append({"from": low, "to": None if high == float("inf") else high, "accuracy": accuracy, "pairs": int(inside.sum())})
    return rows


def _by_length(comparisons: Sequence[EncodedComparison], better: Tensor, worse: Tensor, correct: Tensor) -> LengthAgreement:
    """Accuracy where the better completion is longer, shorter or about as long, and how often the longer one scores higher.

    Without a bias, ``prefers_longer`` is near ``longer_is_better``, the share of pairs in which annotators preferred the longer one.
    """
    known = [item.lengths or [len(row) - item.prompt_length for row in item.rows] for item in comparisons]
    lengths = torch.tensor([float(length) for row in known for length in row])
    difference = lengths[better] - lengths[worse]
    alike = difference.abs() < EQUAL_LENGTH * torch.maximum(lengths[better], lengths[worse])
    rows: list[AccuracyByLength] = [
        {"better_is": name, "accuracy": float(correct[chosen].double().mean()), "pairs": int(chosen.sum())}
        for name, chosen in (("longer", ~alike & (difference > 0)), ("shorter", ~alike & (difference < 0)), ("as long", alike))
        if chosen.any()
    ]
    result: LengthAgreement = {"accuracy_by_length": rows}
    unequal = ~alike
    if unequal.any():
        longer_scores_higher = (difference > 0) == correct
        result["prefers_longer"] = float(longer_scores_higher[unequal].double().mean())
        result["longer_is_better"] = float((difference > 0)[unequal].double().mean())
    return result


def _by_group(comparisons: Sequence[EncodedComparison], prompts_of_pairs: Tensor, correct: Tensor) -> GroupAgreement:
    """Accuracy for each value of each column in ``groups``, with its interval."""
    tables: dict[str, list[AccuracyOfGroup]] = {}
    for column in comparisons[0].groups:
        by_value: dict[str, list[bool]] = {}
        for row, is_correct in zip(prompts_of_pairs.tolist(), correct.tolist(), strict=True):
            by_value.setdefault(comparisons[row].groups[column], []).append(is_correct)
        rows: list[AccuracyOfGroup] = []
        for value, own in sorted(by_value.items()):
            hits, pairs = sum(own), len(own)
            low, high = wilson_interval(hits, pairs)
            rows.append({"value": value, "accuracy": hits / pairs, "ci_low": low, "ci_high": high, "pairs": pairs})
        tables[column] = rows
    return {"accuracy_by_group": tables} if tables else {}
