"""Demonstrations for supervised fine-tuning: a prompt and the completion to learn.

    prompt + completion                  text, or messages
    messages                             a conversation; its last assistant turn is the completion, the turns before it are the prompt
    conversations                        the same in ShareGPT's form, {from, value}; a column ``system`` has the first turn
    conversations + chosen               a conversation that ends with a user turn, and the preferred answer to it
    instruction + input + output         Alpaca's columns; the input follows the instruction after an empty line. ``system`` is the first
                                         turn, ``history`` has earlier [question, reply] pairs, as in LLaMA-Factory's form
    subreddit + title + post + summary   Reddit's TL;DR as published
    prompt + chosen                      the preferred side of a comparison (also hh-rlhf's dialogues without a prompt column)

``completion`` and ``chosen`` may also be several turns that follow the prompt, or a conversation that includes the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.config import DataInput
from stages.corpora.conversations.messages import (
    Completion,
    Prompt,
    conversation_column,
    holds_turns,
    open_conversation,
    prompt_of,
    split_answers,
    split_dialogue,
    split_messages,
    text_prompt,
)
from stages.corpora.files import read_splits
from stages.corpora.rows import Row, renaming, text_of
from stages.corpora.splits import say_shared
from stages.corpora.summaries import is_post, post_prompt
from stages.errors import DataError

if TYPE_CHECKING:
    from stages.corpora.rows import RowFilter


class Demonstration(dict[str, Any]):
    """A dict with ``prompt`` and ``completion``.

    ``location``: where the row is in its file, such as ``file:line``. ``is_full_conversation``: the row is one conversation, so the earlier
    replies inside the prompt are demonstrations, too.
    """

    __slots__ = ("is_full_conversation", "location")  # see Row

    def __init__(self, *columns: Mapping[str, object], **named: object) -> None:
        super().__init__(*columns, **named)
        self.location: str = ""
        self.is_full_conversation: bool = False

    def with_prompt(self, prompt: Prompt) -> Demonstration:
        """The same demonstration with a different prompt."""
        made = Demonstration(self, prompt=prompt)
        made.location, made.is_full_conversation = self.location, self.is_full_conversation
        return made


@dataclass(frozen=True)
class Demonstrations:
    """Training demonstrations and held-out demonstrations."""

    train: list[Demonstration]
    validation: list[Demonstration]


def load_demonstrations(data: DataInput, curator: RowFilter | None = None) -> Demonstrations:
    """Load both splits. Raises DataError with the row's location, its columns and the expected columns."""
    train, validation = read_splits(data, curator)
    loaded = Demonstrations([demonstration(row) for row in train], [demonstration(row) for row in validation])
    say_shared(*(((repr(tuple(row.values())), row.location) for row in split) for split in (loaded.train, loaded.validation)))
    return loaded


def demonstration(row: Row) -> Demonstration:
    """Convert one row to a prompt and a completion."""
    prompt, completion = _prompt_and_completion(row)
    made = Demonstration(prompt=prompt, completion=completion)
    made.location = row.location
    made.is_full_conversation = _is_full_conversation(row)
    return made


def _is_full_conversation(row: Row) -> bool:
    """Whether a single column contains the full conversation."""
    if "completion" in row or open_conversation(row) is not None:
        return False
    return conversation_column(row) is not None or (isinstance(row.get("chosen"), list) and "prompt" not in row)


def _prompt_and_completion(row: Row) -> tuple[Prompt, Completion]:
    if "completion" in row:
        return _answered(row, "completion")
    if open_conversation(row) is not None:
        return _answered(row, "chosen")
    if (column := conversation_column(row)) is not None:
        return split_messages(row, column)
    if "instruction" in row:
        extra = text_of(row, "input", empty=True) if "input" in row else ""
        instruction = text_of(row, "instruction")
        return text_prompt(row, f"{instruction}\n\n{extra}" if extra.strip() else instruction), text_of(row, "output")
    if is_post(row):
        return post_prompt(row), text_of(row, "summary")
    if "chosen" in row:
        if "prompt" in row:
            return _answered(row, "chosen")
        if isinstance(row["chosen"], list):
            return split_messages(row, "chosen")
        return split_dialogue(text_of(row, "chosen"), row, "chosen")
    raise DataError(
        f"{row.location}: columns {', '.join(row)} are not a demonstration; expected prompt + completion, messages, conversations, "
        "instruction (+ input) + output, subreddit + title + post + summary, or (prompt +) chosen"
        + renaming(row, "prompt completion", "messages", "conversations", "instruction output", "prompt chosen")
    )


def _answered(row: Row, column: str) -> tuple[Prompt, Completion]:
    """A row with a prompt, and its answer in ``column``."""
    if not holds_turns(row.get(column)) and open_conversation(row) is None:
        return prompt_of(row), text_of(row, column)
    prompt, completions = split_answers(row, {column: row[column]})
    return prompt, completions[0]
