"""Demonstrations for supervised fine-tuning: a prompt and the completion to learn.

    prompt + completion                  text, or messages
    messages                             a conversation; its last assistant turn is the completion, the turns before it are the prompt
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
from stages.corpora.messages import Completion, Prompt, prompt_of, split_answers, split_dialogue, split_messages
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
    made.whole = "completion" not in row and ("messages" in row or (isinstance(row.get("chosen"), list) and "prompt" not in row))
    return made


def _prompt_and_completion(row: Row) -> tuple[Prompt, Completion]:
    if "completion" in row:
        return _answered(row, "completion")
    if "messages" in row:
        return split_messages(row)
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
        f"{row.place}: columns {', '.join(row)} make no demonstration; expected prompt + completion, messages, "
        "instruction (+ input) + output, subreddit + title + post + summary, or (prompt +) chosen"
    )


def _answered(row: Row, column: str) -> tuple[Prompt, Completion]:
    """A row with a column ``prompt`` and its answer in ``column``."""
    if not isinstance(row.get(column), list):
        return prompt_of(row), text_of(row, column)
    prompt, completions = split_answers(row, {column: row[column]})
    return prompt, completions[0]
