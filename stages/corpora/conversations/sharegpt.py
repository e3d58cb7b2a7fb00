"""ShareGPT's form of turns, ``{from: human, value: ...}``, converted to ``{role: user, content: ...}``."""

from __future__ import annotations

import json

from stages.errors import DataError
from stages.json_types import JsonObject

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}


def is_sharegpt(entry: object) -> bool:
    """Whether a conversation entry names its speaker in ``from`` and has no ``role``."""
    return isinstance(entry, dict) and entry.get("from") is not None and entry.get("role") is None


def as_message(entry: JsonObject) -> JsonObject:
    """Convert an entry to a message with ``role`` and ``content``. Other fields are kept.

    The value of a ``function_call`` becomes ``tool_calls``.

    Raises DataError for an unknown speaker and for a function call that is not JSON.
    """
    speaker = entry["from"]
    name = speaker.lower() if isinstance(speaker, str) else None
    if name not in SPEAKERS:
        raise DataError(f"the speaker is {speaker!r:.60}; expected one of {', '.join(SPEAKERS)}")
    role = SPEAKERS[name]
    rest = {field: item for field, item in entry.items() if field not in ("from", "value", "role", "content") and item is not None}
    content = entry.get("value") if entry.get("content") is None else entry["content"]
    if name == "function_call":
        return {"role": role, "content": None, **rest, "tool_calls": _calls(content)}
    return {"role": role, "content": content, **rest}


def _calls(value: object) -> list[JsonObject]:
    """Parse the JSON value of a ``function_call``: an object ``{name, arguments}`` or a list of them."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"the function call is {value!r:.80}; expected JSON: an object {{name, arguments}}, or a list of them")
    return [{"type": "function", "function": call} for call in calls]
