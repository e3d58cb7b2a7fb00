"""Completions made elsewhere: ``prompt`` + ``completion``, ``instruction`` (+ ``input``) + ``output`` (AlpacaEval's), ``messages``, or
ShareGPT's ``conversations``.

Several completions of a prompt are its samples, in the order of the data; a column ``sample`` (from 0) says which one a row is, where
some are missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.config import DataSource
from stages.corpora.files import Row, read_rows, text_of
from stages.corpora.messages import Prompt, completion_text, conversation_column, holds_turns, split_answers, split_messages
from stages.corpora.prompts import prompt_in
from stages.errors import DataError


def load_completions(sources: Sequence[DataSource]) -> dict[str, dict[int, str]]:
    """The completions of each prompt (by ``prompt_key``) by their sample number; an empty one is an answer, too.

    Raises DataError for a sample that is there twice.
    """
    found: dict[str, dict[int, str]] = {}
    for row in read_rows(sources, split="test"):
        prompt, completion = completion_in(row)
        samples = found.setdefault(prompt_key(prompt), {})
        sample = sample_number(row, default=len(samples))
        if sample in samples:
            raise DataError(f"{row.place}: sample {sample} of this prompt is there already; number the samples of a prompt apart")
        samples[sample] = completion
    return found


def sample_number(row: Row, *, default: int = 0) -> int:
    """The row's column ``sample``. Raises DataError where it is no whole number from 0."""
    value = row.get("sample", default)
    if isinstance(value, str) and value.isdigit():  # csv has no numbers
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{row.place}: sample is {value!r}; expected a whole number from 0")
    return value


def prompt_key(prompt: Prompt) -> str:
    """What two equal prompts have in common."""
    return repr(prompt)


def completion_in(row: Row) -> tuple[Prompt, str]:
    """The prompt of a row and its completion as a text. Raises DataError with the row's place where it holds none."""
    if (whole := conversation_column(row)) is not None:
        asked, reply = split_messages(row, whole)
        return asked, completion_text(reply)
    column = next((column for column in ("completion", "output") if column in row), None)
    if column is None:
        raise DataError(
            f"{row.place}: columns {', '.join(row)} hold no completion; expected prompt + completion, instruction (+ input) + output, "
            "messages or conversations"
        )
    if not holds_turns(row[column]):
        return prompt_in(row), text_of(row, column, empty=True)
    prompt, answers = split_answers(row, {column: row[column]})
    return prompt, completion_text(answers[0])
