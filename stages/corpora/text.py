"""Plain documents for pretraining and for measuring perplexity: column ``text``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.config import DataInput, DataSource
from stages.corpora.files import read_rows, read_splits
from stages.corpora.rows import Row, text_of
from stages.corpora.splits import say_shared
from stages.errors import DataError


@dataclass(frozen=True)
class TextCorpus:
    """Training documents and held-out documents."""

    train: list[str]
    validation: list[str]


def load_text(data: DataInput) -> TextCorpus:
    """Load both splits without empty documents. Raises DataError if the column is missing, not text, or always empty."""
    train, validation = read_splits(data)
    corpus = TextCorpus(_documents(train, "training"), _documents(validation, "held-out"))
    say_shared(*(((row["text"], row.location) for row in rows if row["text"].strip()) for rows in (train, validation)))
    return corpus


def check_texts(sources: Sequence[DataSource]) -> None:
    """Raise DataError if a row of ``sources`` has no text."""
    for row in read_rows(sources):
        text_of(row, "text")


def _documents(rows: list[Row], which: str) -> list[str]:
    texts = [text for row in rows if (text := text_of(row, "text", empty=True)).strip()]
    if not texts:
        raise DataError(f"all {len(rows)} {which} texts (first {rows[0].location}) are empty; expected text")
    return texts
