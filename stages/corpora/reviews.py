"""Labelled texts for the sentiment classifier: columns ``text`` and ``label``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.config import DataInput
from stages.corpora.files import read_splits
from stages.corpora.rows import Row, text_of
from stages.errors import DataError


@dataclass(frozen=True)
class Review:
    """A text and the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Reviews:
    """Training reviews and held-out reviews."""

    train: list[Review]
    validation: list[Review]


def load_reviews(data: DataInput, labels: Sequence[str]) -> Reviews:
    """Load both splits. A label is an index below ``len(labels)`` or one of the names. Raises DataError with the row's location."""
    train, validation = read_splits(data)
    reviews = Reviews([_review(row, labels) for row in train], [_review(row, labels) for row in validation])
    if len({review.label for review in reviews.train}) < 2:
        raise DataError(f"all {len(train)} training rows (first {train[0].location}) have one label; a classifier needs at least two")
    return reviews


def _review(row: Row, labels: Sequence[str]) -> Review:
    value = row.get("label")
    if isinstance(value, str) and value in labels:
        return Review(text_of(row, "text"), list(labels).index(value))
    if isinstance(value, str) and value.isdigit():  # CSV has no numbers
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(labels):
        names = ", ".join(f"{index} ({name})" for index, name in enumerate(labels))
        raise DataError(f"{row.location}: label is {value!r}; expected one of {names}, or its name. The row has {', '.join(row)}")
    return Review(text_of(row, "text"), value)
