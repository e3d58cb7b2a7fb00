"""Plain documents for pretraining and for measuring perplexity: column ``text``."""

from __future__ import annotations

from dataclasses import dataclass

from stages.config import DataInput
from stages.corpora.files import Row, read_splits, text_of


@dataclass(frozen=True)
class TextCorpus:
    """Documents to train on, and documents held out."""

    train: list[str]
    validation: list[str]


def load_text(data: DataInput) -> TextCorpus:
    """Documents of both splits; empty ones are left out. Raises DataError where the column is missing or no text."""
    train, validation = read_splits(data)
    return TextCorpus(_documents(train), _documents(validation))


def _documents(rows: list[Row]) -> list[str]:
    return [text for row in rows if (text := text_of(row, "text", empty=True)).strip()]
