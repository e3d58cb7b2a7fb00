"""Multiple-choice rows for small tasks: columns ``context``, ``choices`` (candidate continuations) and ``answer``.

``answer`` is the index of the right choice (from 0) or its text. A recipe can build the context from a template over the row's columns,
and use the same choices for every row. In this way a table of labelled texts becomes a task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stages.config import DataSource
from stages.corpora.files import read_rows
from stages.corpora.rows import Row, text_of
from stages.corpora.tables.columnar import ClassIndex
from stages.errors import DataError


@dataclass(frozen=True)
class Question:
    """A context, its candidate continuations, and the index of the right one."""

    context: str
    choices: list[str]
    answer: int


def load_questions(sources: Sequence[DataSource], context: str | None = None, choices: Sequence[str] | None = None) -> list[Question]:
    """Read the questions of ``sources``. Raises DataError with the location of a malformed row."""
    return [question(row, context, choices) for row in read_rows(sources, split="test")]


def question(row: Row, form: str | None = None, fixed: Sequence[str] | None = None) -> Question:
    """Convert one row. ``form`` (a template with ``{column}`` slots) and ``fixed`` (choices) replace the row's own columns.

    Raises DataError if the choices are not different texts, or if the answer is none of them.
    """
    context = text_of(row, "context", empty=True) if form is None else _filled(form, row)
    choices, answer = row.get("choices") if fixed is None else list(fixed), row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{row.location}: choices is {choices!r:.80}; expected a list of texts. The row has {', '.join(row)}")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise DataError(f"{row.location}: choices is {choices!r:.80}; expected at least two texts, all different")
    if isinstance(answer, ClassIndex) and answer.names[answer] in choices:  # the names of a data set may be in another order
        answer = answer.names[answer]
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    elif isinstance(answer, str) and answer.isdigit():  # CSV has no numbers, and some data sets store them as text
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"{row.location}: answer is {answer!r:.80}; expected one of the choices, or its index from 0 to {len(choices) - 1}")
    return Question(context, choices, answer)


def _filled(form: str, row: Row) -> str:
    """Fill the slots of ``form`` from the row in one pass, so that braces inside a filled text stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda slot: text_of(row, slot[1], empty=True), form)
