"""Completions made elsewhere: ``prompt`` + ``completion``, ``instruction`` (+ ``input``) + ``output`` (AlpacaEval's), or ``messages``."""

from __future__ import annotations

from collections.abc import Sequence

from stages.config import DataSource
from stages.corpora.files import Row, read_rows, text_of
from stages.corpora.messages import Prompt, messages_of, reply_of
from stages.corpora.prompts import prompt_in
from stages.errors import DataError


def load_completions(sources: Sequence[DataSource]) -> dict[str, list[str]]:
    """The completions of each prompt (by ``prompt_key``) in the order of the data; an empty one is an answer, too."""
    found: dict[str, list[str]] = {}
    for row in read_rows(sources, split="test"):
        prompt, completion = _pair(row)
        found.setdefault(prompt_key(prompt), []).append(completion)
    return found


def prompt_key(prompt: Prompt) -> str:
    """What two equal prompts have in common."""
    return repr(prompt)


def _pair(row: Row) -> tuple[Prompt, str]:
    if "messages" in row:
        messages = messages_of(row, "messages")
        if len(messages) < 2:
            raise DataError(f"{row.place}: messages must end with an assistant turn that follows something")
        return messages[:-1], reply_of(row, "messages")
    column = next((column for column in ("completion", "output") if column in row), None)
    if column is None:
        raise DataError(
            f"{row.place}: columns {', '.join(row)} hold no completion; expected prompt + completion, instruction (+ input) + output, "
            "or messages"
        )
    value = row[column]
    return prompt_in(row), reply_of(row, column) if isinstance(value, list) else text_of(row, column, empty=True)
