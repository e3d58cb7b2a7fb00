"""Demonstrations for supervised fine-tuning: a prompt and the completion to learn.

    prompt + completion                  text, or messages
    messages                             a conversation; its last assistant turn is the completion, the turns before it are the prompt
    conversations                        the same as ShareGPT has it, {from, value}; a column system holds the first turn
    conversations + chosen               a conversation that the user ends, and the preferred answer to it
    instruction + input + output         Alpaca's columns; the input follows the instruction after an empty line
    subreddit + title + post + summary   Reddit's TL;DR as published
    prompt + chosen                      of a comparison, the preferred side (also hh-rlhf's dialogues without a prompt column)

``completion`` and ``chosen`` may be several turns that follow the prompt, or a conversation with the prompt in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.config import DataInput
from stages.corpora.files import Row, read_splits, text_of
from stages.corpora.messages import (
    Completion,
    Prompt,
    conversation_column,
    holds_turns,
    open_conversation,
    prompt_of,
    split_answers,
    split_dialogue,
    split_messages,
)
from stages.corpora.summaries import is_post, post_prompt
from stages.errors import DataError

if TYPE_CHECKING:
    from stages.corpora.curation import Curator


class Demonstration(dict[str, Any]):
    """``prompt`` and ``completion``.

    ``place``: where the row stands in the data. ``whole``: the row is one conversation, whose earlier replies, which are in the prompt,
    are demonstrations as well.
    """

    place: str = ""
    whole: bool = False

    def with_prompt(self, prompt: Prompt) -> Demonstration:
        """The same demonstration with another form of its prompt."""
        made = Demonstration(self, prompt=prompt)
        made.place, made.whole = self.place, self.whole
        return made


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations to train on, and demonstrations held out."""

    train: list[Demonstration]
    validation: list[Demonstration]


def load_demonstrations(data: DataInput, curator: Curator | None = None) -> Demonstrations:
    """Demonstrations of both splits. Raises DataError naming the place, the columns found and those expected."""
    train, validation = read_splits(data, curator)
    return Demonstrations([demonstration(row) for row in train], [demonstration(row) for row in validation])


def demonstration(row: Row) -> Demonstration:
    """One row as a prompt and a completion."""
    prompt, completion = _prompt_and_completion(row)
    made = Demonstration(prompt=prompt, completion=completion)
    made.place = row.place
    made.whole = _is_whole(row)
    return made


def _is_whole(row: Row) -> bool:
    """Whether one column holds all of the demonstration."""
    if "completion" in row or open_conversation(row) is not None:
        return False
    return conversation_column(row) is not None or (isinstance(row.get("chosen"), list) and "prompt" not in row)


def _prompt_and_completion(row: Row) -> tuple[Prompt, Completion]:
    if "completion" in row:
        return _answered(row, "completion")
    if open_conversation(row) is not None:
        return _answered(row, "chosen")
    if (whole := conversation_column(row)) is not None:
        return split_messages(row, whole)
    if "instruction" in row:
        extra = text_of(row, "input", empty=True) if "input" in row else ""
        instruction = text_of(row, "instruction")
        return (f"{instruction}\n\n{extra}" if extra.strip() else instruction), text_of(row, "output")
    if is_post(row):
        return post_prompt(row), text_of(row, "summary")
    if "chosen" in row:
        if "prompt" in row:
            return _answered(row, "chosen")
        if isinstance(row["chosen"], list):
            return split_messages(row, "chosen")
        return split_dialogue(text_of(row, "chosen"), row, "chosen")
    raise DataError(
        f"{row.place}: columns {', '.join(row)} make no demonstration; expected prompt + completion, messages, conversations, "
        "instruction (+ input) + output, subreddit + title + post + summary, or (prompt +) chosen"
    )


def _answered(row: Row, column: str) -> tuple[Prompt, Completion]:
    """A row with a prompt and its answer in ``column``."""
    if not holds_turns(row.get(column)) and open_conversation(row) is None:
        return prompt_of(row), text_of(row, column)
    prompt, completions = split_answers(row, {column: row[column]})
    return prompt, completions[0]
