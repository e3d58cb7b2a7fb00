"""Conversations as data sets hold them: messages with roles, tools and tool calls, and how they are split into prompt and completion.

A prompt is a text or a conversation that the assistant answers next. A completion is a text or, where it holds more than one plain reply
(further turns, tool calls, reasoning), a list of messages that ends with the assistant's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from stages.corpora.columnar import without_missing
from stages.corpora.files import Row, text_of
from stages.corpora.sharegpt import as_message, is_sharegpt
from stages.corpora.tool_calls import with_objects
from stages.errors import DataError

Message = dict[str, Any]
"""``role`` and ``content``; where the data has them also ``name``, ``tool_calls``, ``tool_call_id``, ``reasoning_content`` and others."""


class Conversation(list[Message]):
    """Messages, the tools that the assistant may call, and where the row stands in the data.

    Two conversations with the same messages and different tools are different prompts; the place does not count.
    """

    def __init__(self, messages: Iterable[Message] = (), *, tools: Sequence[dict[str, Any]] = (), place: str = "") -> None:
        super().__init__(messages)
        self.tools = list(tools)
        self.place = place

    def __repr__(self) -> str:
        messages = super().__repr__()
        return f"{messages} with tools {self.tools!r}" if self.tools else messages

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.tools == tools_of(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


Prompt = str | list[Message]
Completion = str | list[Message]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
REASONING = ("reasoning_content", "reasoning", "thinking")  # names under which data sets keep what the assistant thought before its reply
COLUMNS = ("messages", "conversations")  # that hold a whole conversation; the second is ShareGPT's
LAST_REPLY = "\n\nAssistant:"  # how Anthropic's dialogues mark a reply


# Reading


def messages_of(row: Row, column: str) -> Conversation:
    """The conversation in ``column``, with the row's tools. Every field of a message is kept.

    Messages are {role, content}, or {from, value} as ShareGPT has them; a column ``system`` beside the latter is their first turn. Raises
    DataError naming the message.
    """
    value = row.get(column)
    if not isinstance(value, list) or not value:
        expected = "expected a list of messages {role, content} or {from, value}"
        raise DataError(f"{row.place}: {column} is {type(value).__name__}; {expected}")
    messages = []
    for number, entry in enumerate(value, 1):
        with naming(f"{row.place}: {column}, message {number}"):
            messages.append(_message(entry, columnar=row.columnar))
    if column == "conversations" or is_sharegpt(value[0]):
        messages = _after_system(row, column, messages)
    return Conversation(messages, tools=_tools(row), place=row.place)


def _message(entry: Any, *, columnar: bool) -> Message:
    """An entry of a conversation as a message, without the fields that are None. Raises DataError for what is no message."""
    message = as_message(entry) if is_sharegpt(entry) else entry
    if isinstance(message, dict) and isinstance(message.get("tool_calls"), str):
        message = {**message, "tool_calls": _read_json(message["tool_calls"])}
    problem = _problem(message)
    if problem:
        raise DataError(f"{entry!r:.80}; {problem}")
    fields = {name: item for name, item in message.items() if item is not None or name == "content"}
    if not fields.get("tool_calls", True):
        del fields["tool_calls"]
    return {name: without_missing(item) for name, item in fields.items()} if columnar else fields


def _read_json(text: str) -> Any:
    """What ``text`` holds as JSON; the text itself where it is none, None where it is blank."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text


def _after_system(row: Row, column: str, messages: list[Message]) -> list[Message]:
    """``messages`` after the system turn that the column ``system`` holds, if any. Replies that follow a prompt get none."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise DataError(f"{row.place}: system is {type(system).__name__}; expected a text")
    first = messages[0]
    if first["role"] in ("system", "developer"):
        if content_text(first).strip() != system.strip():
            raise DataError(f"{row.place}: the column system and the first turn of {column} are two system turns; keep one of them")
        return messages
    follows = first["role"] == "assistant" and column not in (*COLUMNS, "prompt")
    return messages if follows else [{"role": "system", "content": system}, *messages]


def conversation_column(row: Row) -> str | None:
    """The column that holds the row's whole conversation; None where it has none."""
    return next((column for column in COLUMNS if column in row), None)


def open_conversation(row: Row) -> Conversation | None:
    """The conversation in ``conversations`` that ``chosen`` goes on with, instead of a column ``prompt``; None in rows of another form."""
    if "prompt" in row or "chosen" not in row or "conversations" not in row:
        return None
    messages = messages_of(row, "conversations")
    return None if messages[-1]["role"] == "assistant" else messages


def holds_turns(value: Any) -> bool:
    """Whether an answer is given as turns: a list of messages, or one message alone."""
    return isinstance(value, list | dict)


def _problem(message: Any) -> str:
    """What is wrong with a message; empty where nothing is."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return f"expected a role ({', '.join(ROLES)}) and content"
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return "expected tool_calls, a list of objects {type: function, function: {name, arguments}}"
    content = message.get("content")
    if isinstance(content, str):
        return ""
    if isinstance(content, list):
        good = all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content)
        return "" if good and content else "expected content of text parts {type: text, text}; images and sounds cannot be read"
    if content is None and message["role"] == "assistant" and calls:
        return ""
    return "expected content, a text (only an assistant's message with tool_calls may have none)"


def _tools(row: Row) -> list[dict[str, Any]]:
    """The column ``tools``: descriptions of functions, as a list or as JSON. Raises DataError for anything else."""
    value = row.get("tools")
    if not value:
        return []
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{row.place}: tools is {value!r:.80}; expected a list of JSON descriptions of functions")
    return without_missing(tools) if row.columnar and tools is value else tools


def prompt_of(row: Row, column: str = "prompt") -> Prompt:
    """A prompt: text, or messages that the assistant answers next. Raises DataError where the assistant has the last word in it."""
    prompt = _any_prompt(row, column)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(f"{row.place}: {column} ends with an assistant turn; expected a turn that the assistant answers (user or tool)")
    return prompt


def _any_prompt(row: Row, column: str) -> Prompt:
    """The prompt in ``column``, whoever speaks last in it. A text with tools is a conversation of one user turn."""
    if isinstance(row.get(column), list):
        return messages_of(row, column)
    text, tools = text_of(row, column), row.get("tools")
    if isinstance(tools, list) and tools:
        return Conversation([{"role": "user", "content": text}], tools=_tools(row), place=row.place)
    return text


def simplified(messages: Sequence[Message]) -> Completion:
    """A single plain assistant message as its text; anything else as it is."""
    only = messages[0]
    plain = len(messages) == 1 and only.keys() == {"role", "content"} and isinstance(only["content"], str)
    return only["content"] if plain else list(messages)


def as_turns(completion: Completion) -> list[Message]:
    """A completion as messages."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)


def tools_of(prompt: object) -> list[dict[str, Any]]:
    """The tools that come with a prompt; none for a text."""
    return list(getattr(prompt, "tools", ()))


def place_of(prompt: object) -> str:
    """Where the row of a conversation stands in the data; empty where that is not known."""
    return str(getattr(prompt, "place", ""))


def content_text(message: Message) -> str:
    """The text of a message's content: empty where there is none, the parts joined where there are several."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Within it, a DataError that does not name ``place`` (where a row stands in the data) gets it put first."""
    try:
        yield
    except DataError as error:
        if not place or place in str(error):
            raise
        raise DataError(f"{place}: {error}") from error


# Splitting


def split_messages(row: Row, column: str = "messages") -> tuple[Conversation, Completion]:
    """A whole conversation as (all before the last reply, the last reply). Raises DataError where the assistant does not speak last."""
    messages = messages_of(row, column)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise DataError(f"{row.place}: {column} must end with an assistant turn that follows something")
    prompt = Conversation(messages[:-1], tools=messages.tools, place=messages.place)
    return prompt, simplified(messages[-1:])


def split_answers(row: Row, answers: Mapping[str, Any]) -> tuple[Prompt, list[Completion]]:
    """(prompt, completions) of a row with one or several ``answers``, by the names that messages give them.

    An answer is a text, the turns that follow the prompt, or a whole conversation that begins with it. The prompt stands in the column
    ``prompt``, or is an ``open_conversation``. What several answers have in common belongs to the prompt, and every completion begins with
    an assistant turn. Raises DataError where an answer does not end with an assistant turn, or where no common turn is left for the prompt.
    """
    given = _any_prompt(row, "prompt") if "prompt" in row else open_conversation(row)
    sides = [_turns_in(row, name, answer) for name, answer in answers.items()]
    opening, sides = _opened(row, given, sides, next(iter(answers)))
    if len(sides) == 1:
        cut = _next_reply(sides[0], len(opening)) if given is not None else len(sides[0]) - 1
    else:
        cut = _last_common_reply(sides)
    if cut == 0:
        raise DataError(f"{row.place}: {' and '.join(answers)} have no first turn in common that the assistant answers")
    completions = [simplified(side[cut:]) for side in sides]
    if isinstance(given, str) and sides[0][:cut] == as_question(given):
        return given, completions
    return Conversation(sides[0][:cut], tools=_tools(row), place=row.place), completions


def as_question(text: str) -> list[Message]:
    """A text prompt as a conversation of one user turn."""
    return [{"role": "user", "content": text}]


def _turns_in(row: Row, name: str, answer: Any) -> list[Message]:
    """An answer as turns. Raises DataError where it is no text and does not end with an assistant turn."""
    alone = row.with_values({name: [answer] if isinstance(answer, dict) else answer, "system": row.get("system")})
    if not holds_turns(answer):
        return as_turns(text_of(alone, name))
    messages = messages_of(alone, name)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{row.place}: {name} ends with the role {messages[-1]['role']!r}; expected the assistant's reply")
    return list(messages)


def _opened(row: Row, given: Prompt | None, sides: list[list[Message]], name: str) -> tuple[list[Message], list[list[Message]]]:
    """(the prompt's turns, whole conversations that begin with them). Conversations that hold the prompt already are left as they are.

    Raises DataError for a conversation of its own beside a text prompt that does not occur in it.
    """
    if given is None:
        return [], sides
    opening = as_question(given) if isinstance(given, str) else list(given)
    if all(side[: len(opening)] == opening for side in sides):
        return opening, sides
    if isinstance(given, str) and all(side[0]["role"] in ("system", "developer", "user") for side in sides):
        users = [turn for turn, message in enumerate(sides[0]) if message["role"] == "user"]
        asked = next((turn for turn in users if content_text(sides[0][turn]).strip() == given.strip()), None)
        if asked is None:
            raise DataError(f"{row.place}: {name} begins with a {sides[0][0]['role']} turn and does not hold the prompt {given!r:.60}")
        return sides[0][: asked + 1], sides
    return opening, [[*opening, *side] for side in sides]


def _next_reply(side: Sequence[Message], start: int) -> int:
    """The first assistant turn from ``start`` on."""
    return next(turn for turn in range(start, len(side)) if side[turn]["role"] == "assistant")


def _last_common_reply(sides: Sequence[Sequence[Message]]) -> int:
    """The last turn up to which all sides are equal and which is an assistant turn in each of them; 0 where there is none."""
    longest = min(len(side) for side in sides) - 1
    turn = next((turn for turn in range(longest) if any(side[turn] != sides[0][turn] for side in sides)), longest)
    while turn > 0 and any(side[turn]["role"] != "assistant" for side in sides):
        turn -= 1
    return turn


def split_dialogue(text: str, row: Row, column: str) -> tuple[str, str]:
    """A whole dialogue (Anthropic's hh-rlhf) as prompt, ending with its last ``Assistant:``, and reply."""
    head, mark, reply = text.rpartition(LAST_REPLY)
    if not mark:
        raise DataError(f"{row.place}: no prompt column, and {column} is no dialogue with {LAST_REPLY!r} to take the prompt from")
    return head + mark, reply


# For readers that are no chat models


def transcript(prompt: Prompt) -> str:
    """A prompt as one text in which every turn names its speaker: ``user: ...``, ``assistant: ...``, an empty line between turns.

    A text prompt, and a conversation of one plain user turn, is that text alone. Tools stand first, reasoning and tool calls in their turn.
    """
    if isinstance(prompt, str):
        return prompt
    tools = tools_of(prompt)
    if len(prompt) == 1 and not tools and prompt[0]["role"] == "user" and "name" not in prompt[0]:
        return content_text(prompt[0])
    listed = [f"tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    return "\n\n".join([*listed, *(f"{_speaker(message)}: {_said(message)}" for message in prompt)])


def completion_text(completion: Completion) -> str:
    """A completion as one text: its first reply, then any further turns with their speakers."""
    if isinstance(completion, str):
        return completion
    first, *others = completion
    return "\n\n".join([_said(first), *(f"{_speaker(message)}: {_said(message)}" for message in others)])


def _speaker(message: Message) -> str:
    return f"{message['role']} ({message['name']})" if message.get("name") else str(message["role"])


def _said(message: Message) -> str:
    """What a turn holds: reasoning between think marks, the content, the tool calls as JSON."""
    reasoning = next((message[name] for name in REASONING if message.get(name)), None)
    parts = [f"<think>\n{reasoning}\n</think>"] if reasoning else []
    parts += [text] if (text := content_text(message)) else []
    calls = with_objects(message).get("tool_calls") or ()
    parts += [f"[tool call] {json.dumps(call.get('function', call), ensure_ascii=False)}" for call in calls]
    return "\n".join(parts)
