"""Convert the arguments of tool calls to the form that a chat template accepts."""

from __future__ import annotations

import json
from collections.abc import Callable

from stages.errors import DataError
from stages.json_types import JsonObject
from stages.tokens.turns import ArgumentForm

Message = JsonObject


def in_argument_form(message: Message, form: ArgumentForm) -> Message:
    """Convert the arguments of a message's tool calls for the template: objects if it accepts both forms.

    Raises DataError for arguments that are not a JSON object if the template accepts only objects.
    """
    return _with_arguments(message, lambda function: _in_form(function, form))


def with_objects(message: Message) -> Message:
    """Convert the arguments of a message's tool calls to objects. A text that is not a JSON object is unchanged."""
    return _with_arguments(message, lambda function: _in_form(function, ArgumentForm(objects=True, texts=True)))


def _with_arguments(message: Message, convert: Callable[[JsonObject], object]) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return message
    converted = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict):
            converted.append({**call, "function": {**function, **_arguments(function, convert)}})
        else:
            converted.append({**call, **_arguments(call, convert)})
    return {**message, "tool_calls": converted}


def _arguments(function: JsonObject, convert: Callable[[JsonObject], object]) -> JsonObject:
    return {"arguments": convert(function)} if "arguments" in function else {}


def _in_form(function: JsonObject, form: ArgumentForm) -> object:
    """The arguments of a called function in a form that the template accepts."""
    arguments = function["arguments"]
    if isinstance(arguments, str) and form.objects:
        parsed = _json_object(arguments)
        if parsed is None and not form.texts:
            call = f"the arguments of the tool call {function.get('name')} are {arguments!r:.80}"
            raise DataError(f"{call}; the model's chat template needs a JSON object")
        return arguments if parsed is None else parsed
    if isinstance(arguments, dict) and form.texts and not form.objects:
        return json.dumps(arguments, ensure_ascii=False)
    return arguments


def _json_object(text: str) -> JsonObject | None:
    """Parse ``text`` as a JSON object. A blank text is an empty object (a call without arguments); anything else is None."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
