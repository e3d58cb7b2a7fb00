"""Labelled texts for the sentiment classifier: columns ``text`` and ``label``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from stages.config import DataInput
from stages.corpora.files import read_splits
from stages.corpora.rows import Row, text_of
from stages.corpora.splits import say_shared
from stages.corpora.tables.columnar import ClassIndex
from stages.errors import DataError

logger = logging.getLogger(__name__)
MANY = 8  # held-out rows; fewer may have one label by chance


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
    """Load both splits. A label is one of the names, or an index below ``len(labels)``. Raises DataError with the row's location."""
    train, validation = read_splits(data)
    reviews = Reviews([_review(row, labels) for row in train], [_review(row, labels) for row in validation])
    _say_other_names(train, labels)
    read = ((train, reviews.train), (validation, reviews.validation))
    say_shared(*(((review.text, row.location) for row, review in zip(rows, made, strict=True)) for rows, made in read))
    if len({review.label for review in reviews.train}) < 2:
        raise DataError(f"all {len(train)} training rows (first {train[0].location}) have one label; a classifier needs at least two")
    if len(reviews.validation) >= MANY and len(held := {review.label for review in reviews.validation}) == 1:
        logger.warning(
            "all %d held-out rows (first %s) have the label %s, so the measurements say nothing about the other classes; shuffle the rows, "
            "or name a validation source",
            len(reviews.validation),
            validation[0].location,
            labels[held.pop()],
        )
    return reviews


def _review(row: Row, labels: Sequence[str]) -> Review:
    index = _index_of(row.get("label"), labels)
    if index is None:
        names = ", ".join(f"{index} ({name})" for index, name in enumerate(labels))
        expected = f"one of the names {', '.join(labels)}" if _are_numbers(labels) else f"one of {names}, or its name"
        value = row.get("label")
        shown = f"{value} ({value.names[value]})" if isinstance(value, ClassIndex) else f"{value!r:.60}"
        raise DataError(f"{row.location}: label is {shown}; expected {expected}. The row has {', '.join(row)}")
    return Review(text_of(row, "text"), index)


def _index_of(value: object, labels: Sequence[str]) -> int | None:
    """The index of the class that a row's label means; None if there is none.

    Names come first, also those that a data set has for its numbers (``ClassLabel``), unless none of them is in ``labels``. A number is an
    index, unless names of the classes are numbers (stars from 1 to 5): then it is a name. Tables store numbers as text (CSV) or as floats
    (a column with gaps), and truth values as ``true``.
    """
    if isinstance(value, ClassIndex) and _share_a_name(value.names, labels):
        value = value.names[value]
    elif isinstance(value, bool):
        value = str(value)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, str | int) else ""
    named = [index for index, name in enumerate(labels) if name == text]
    named = named or [index for index, name in enumerate(labels) if name.casefold() == text.casefold()]
    if len(named) == 1:
        return named[0]
    if _are_numbers(labels) or not (text.isascii() and text.removesuffix(".0").isdigit()):
        return None
    number = int(text.removesuffix(".0"))
    return number if number < len(labels) else None


def _share_a_name(names: Sequence[str], labels: Sequence[str]) -> bool:
    return not {name.casefold() for name in names}.isdisjoint(label.casefold() for label in labels)


def _say_other_names(rows: Sequence[Row], labels: Sequence[str]) -> None:
    """Warn if the data set has other names for its classes, because then only the user knows whether the numbers correspond."""
    names = next((value.names for row in rows if isinstance(value := row.get("label"), ClassIndex)), ())
    if names and not _share_a_name(names, labels):
        logger.warning(
            "the classes %s of the data (%s) are called %s, in this order; change the order of labels if it is wrong",
            ", ".join(names),
            rows[0].location,
            ", ".join(labels),
        )


def _are_numbers(labels: Sequence[str]) -> bool:
    """Whether a class is named by a number."""
    return any(name.strip().removeprefix("-").isdigit() for name in labels)
