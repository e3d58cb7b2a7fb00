"""Completions from another source: ``prompt`` + ``completion``, AlpacaEval's ``instruction`` (+ ``input``) + ``output``, ``messages``, or
ShareGPT's ``conversations``.

Several completions of one prompt are its samples, in data order. Where some are missing, the column ``sample`` gives the index (from 0).
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.config import DataSource
from stages.corpora.conversations.messages import Prompt, completion_text, conversation_column, holds_turns, split_answers, split_messages
from stages.corpora.files import read_rows
from stages.corpora.prompts import prompt_in
from stages.corpora.rows import Row, renaming, text_of
from stages.errors import DataError


def load_completions(sources: Sequence[DataSource]) -> dict[str, dict[int, str]]:
    """Load completions as {``prompt_key``: {sample index: completion}}. An empty completion also counts as an answer.

    Raises DataError for a duplicate sample.
    """
    completions: dict[str, dict[int, str]] = {}
    for row in read_rows(sources, split="test"):
        prompt, completion = completion_in(row)
        samples = completions.setdefault(prompt_key(prompt), {})
        sample = sample_index(row, default=len(samples))
        if sample in samples:
            raise DataError(f"{row.location}: sample {sample} of this prompt occurs twice; give each sample of a prompt its own index")
        samples[sample] = completion
    return completions


def sample_index(row: Row, *, default: int = 0) -> int:
    """The row's column ``sample``. Raises DataError unless it is an integer >= 0."""
    value = row.get("sample", default)
    if isinstance(value, str) and value.isdigit():  # csv has no numbers
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{row.location}: sample is {value!r}; expected an integer >= 0")
    return value


def prompt_key(prompt: Prompt) -> str:
    """The key under which equal prompts are grouped."""
    return repr(prompt)


def completion_in(row: Row) -> tuple[Prompt, str]:
    """The row's prompt and its completion as text. Raises DataError with the row's location if there is no completion."""
    if (column := conversation_column(row)) is not None:
        asked, reply = split_messages(row, column)
        return asked, completion_text(reply)
    column = next((column for column in ("completion", "output") if column in row), None)
    if column is None:
        raise DataError(
            f"{row.location}: columns {', '.join(row)} have no completion; expected prompt + completion, instruction (+ input) + output, "
            "messages or conversations" + renaming(row, "prompt completion", "instruction output", "messages", "conversations")
        )
    if not holds_turns(row[column]):
        return prompt_in(row), text_of(row, column, empty=True)
    prompt, answers = split_answers(row, {column: row[column]})
    return prompt, completion_text(answers[0])
