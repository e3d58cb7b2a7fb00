"""Multiple-choice rows for small tasks: columns ``context``, ``choices`` (texts that may follow it) and ``answer``.

``answer`` is the number of the right choice (from 0), or the choice itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.config import DataSource
from stages.corpora.files import Row, read_rows, text_of
from stages.errors import DataError


@dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of that is right."""

    context: str
    choices: list[str]
    answer: int


def load_questions(sources: Sequence[DataSource]) -> list[Question]:
    """The questions of ``sources``. Raises DataError with the place of a row that is none."""
    return [question(row) for row in read_rows(sources, split="test")]


def question(row: Row) -> Question:
    """One row as a question."""
    context = text_of(row, "context", empty=True)
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{row.place}: choices is {choices!r:.80}; expected a list of texts. The row has {', '.join(row)}")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise DataError(f"{row.place}: choices is {choices!r:.80}; expected at least two texts, all different")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"{row.place}: answer is {answer!r:.80}; expected one of the choices, or its number from 0 to {len(choices) - 1}")
    return Question(context, choices, answer)
