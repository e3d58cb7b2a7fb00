"""Demonstrations for supervised fine-tuning: a prompt and the completion to learn.

    prompt + completion                  text, or messages
    messages                             a conversation; its last assistant turn is the completion
    instruction + input + output         Alpaca's columns; the input follows the instruction after an empty line
    subreddit + title + post + summary   Reddit's TL;DR as published
    prompt + chosen                      of a comparison, the preferred side (also hh-rlhf's dialogues without a prompt column)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.config import DataInput
from stages.corpora.files import Row, read_splits, text_of
from stages.corpora.messages import messages_of, prompt_of, reply_of, split_dialogue
from stages.corpora.summaries import is_post, post_prompt
from stages.errors import DataError

if TYPE_CHECKING:
    from stages.corpora.curation import Curator

Demonstration = dict[str, Any]  # prompt: text or messages; completion: text


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
    if "completion" in row:
        return {"prompt": prompt_of(row), "completion": reply_of(row, "completion")}
    if "messages" in row:
        messages = messages_of(row, "messages")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise DataError(f"{row.place}: messages must end with an assistant turn that follows something")
        return {"prompt": messages[:-1], "completion": messages[-1]["content"]}
    if "instruction" in row:
        extra = text_of(row, "input", empty=True) if "input" in row else ""
        instruction = text_of(row, "instruction")
        return {"prompt": f"{instruction}\n\n{extra}" if extra.strip() else instruction, "completion": text_of(row, "output")}
    if is_post(row):
        return {"prompt": post_prompt(row), "completion": text_of(row, "summary")}
    if "chosen" in row:
        if "prompt" in row:
            return {"prompt": prompt_of(row), "completion": reply_of(row, "chosen")}
        prompt, reply = split_dialogue(text_of(row, "chosen"), row, "chosen")
        return {"prompt": prompt, "completion": reply}
    raise DataError(
        f"{row.place}: columns {', '.join(row)} make no demonstration; expected prompt + completion, messages, "
        "instruction (+ input) + output, subreddit + title + post + summary, or (prompt +) chosen"
    )
