"""Conversations: a prompt is a text, or a list of messages that ends with the user's turn."""

from __future__ import annotations

from typing import Any

from stages.corpora.files import Row, text_of
from stages.errors import DataError

Message = dict[str, str]
Prompt = str | list[Message]
ROLES = ("system", "user", "assistant", "tool")
LAST_REPLY = "\n\nAssistant:"  # how Anthropic's dialogues mark a reply


def messages_of(row: Row, column: str) -> list[Message]:
    """The conversation in ``column``. Raises DataError naming the message that is wrong."""
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.place}: {column} is {type(value).__name__}; expected a list of messages {{role, content}}")
    for number, message in enumerate(value, 1):
        good = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not good:
            raise DataError(f"{row.place}: {column}, message {number}: {message!r:.80}; expected a role ({', '.join(ROLES)}) and content")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def prompt_of(row: Row, column: str = "prompt") -> Prompt:
    """A prompt: text, or messages."""
    return messages_of(row, column) if isinstance(row.get(column), list) else text_of(row, column)


def reply_of(row: Row, column: str) -> str:
    """A completion: text, or a list of one assistant message."""
    value: Any = row.get(column)
    if isinstance(value, str):
        return text_of(row, column)
    messages = messages_of(row, column)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{row.place}: {column} ends with the role {messages[-1]['role']!r}; expected the assistant's reply")
    return messages[-1]["content"]


def split_dialogue(text: str, row: Row, column: str) -> tuple[str, str]:
    """A whole dialogue (Anthropic's hh-rlhf) as prompt, ending with its last ``Assistant:``, and reply."""
    head, mark, reply = text.rpartition(LAST_REPLY)
    if not mark:
        raise DataError(f"{row.place}: no prompt column, and {column} is no dialogue with {LAST_REPLY!r} to take the prompt from")
    return head + mark, reply
