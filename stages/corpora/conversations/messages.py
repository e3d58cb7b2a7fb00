"""Conversations in data sets: messages with roles, tools and tool calls, and how to split them into prompt and completion.

A prompt is a text, or a conversation that the assistant answers next. A completion is a text; if it has more than one plain reply (further
turns, tool calls, reasoning), it is a list of messages that ends with an assistant turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from stages.corpora.conversations.sharegpt import as_message, is_sharegpt
from stages.corpora.conversations.tool_calls import with_objects
from stages.corpora.rows import Row, structure_in, text_of
from stages.corpora.tables.columnar import without_missing
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.tokens.template_arguments import Arguments

Message = dict[str, Any]
"""``role`` and ``content``; if the data has them also ``name``, ``tool_calls``, ``tool_call_id``, ``reasoning_content`` and others."""


class Conversation(list[Message]):
    """Messages, the tools that the assistant may call, the arguments of the chat template, and the location of the row.

    Equal messages with different tools or arguments are different prompts. The location does not affect equality.
    """

    def __init__(
        self, messages: Iterable[Message] = (), *, tools: Sequence[JsonObject] = (), arguments: Arguments | None = None, location: str = ""
    ) -> None:
        super().__init__(messages)
        self.tools = list(tools)
        self.arguments = dict(arguments or {})
        self.location = location

    def __repr__(self) -> str:
        beside = {name: value for name, value in (("tools", self.tools), ("template arguments", self.arguments)) if value}
        return " with ".join([super().__repr__(), *(f"{name} {value!r}" for name, value in beside.items())])

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.tools == tools_of(other) and self.arguments == arguments_of(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def part(self, turns: int) -> Conversation:
        """The first ``turns`` messages, with the same tools, arguments and location."""
        return Conversation(self[:turns], tools=self.tools, arguments=self.arguments, location=self.location)


Prompt = str | list[Message]
Completion = str | list[Message]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
REASONING = ("reasoning_content", "reasoning", "thinking")  # field names for the assistant's reasoning before its reply
_THOUGHT = re.compile(r"\s*(?P<opening><think>)?(?P<thought>.*?)</think>\s*", re.DOTALL)
ARGUMENTS = "chat_template_kwargs"  # TRL's name of the column
COLUMNS = ("messages", "conversations")  # columns with a full conversation; the second is ShareGPT's
LAST_REPLY = "\n\nAssistant:"  # the assistant marker in Anthropic's dialogues


# Reading


def messages_of(row: Row, column: str) -> Conversation:
    """The conversation in ``column``, with the row's tools. All fields of a message are kept.

    Messages are {role, content}, or {from, value} as in ShareGPT. A column ``system`` becomes the first turn. Raises DataError that names
    the message.
    """
    value = structure_in(row, column) if column in COLUMNS else row.get(column)
    if not isinstance(value, list) or not value:
        expected = "expected a list of messages {role, content} or {from, value}, or its JSON text"
        raise DataError(f"{row.location}: {column} is {type(value).__name__} ({value!r:.60}); {expected}")
    messages = []
    for index, entry in enumerate(value, 1):
        with errors_at(f"{row.location}: {column}, message {index}"):
            messages.append(_message(entry, columnar=row.columnar))
    messages = _after_system(row, column, messages)
    return _of_row(row, messages)


def _message(entry: object, *, columnar: bool) -> Message:
    """Convert a conversation entry to a message without None fields. Raises DataError for an invalid entry."""
    message = as_message(entry) if isinstance(entry, dict) and is_sharegpt(entry) else entry
    if isinstance(message, dict) and isinstance(message.get("tool_calls"), str):
        message = {**message, "tool_calls": _read_json(message["tool_calls"])}
    problem = _problem(message)
    if problem or not isinstance(message, dict):
        raise DataError(f"{entry!r:.80}; {problem}")
    fields = {name: item for name, item in message.items() if item is not None or name == "content"}
    if fields.get("weight") == int(fields["role"] == "assistant"):  # the default: replies train, other turns do not
        del fields["weight"]
    if not fields.get("tool_calls", True):
        del fields["tool_calls"]
    return _with_one_reasoning({name: without_missing(item) for name, item in fields.items()} if columnar else fields)


def _with_one_reasoning(message: Message) -> Message:
    """The message with its reasoning only in a field, if it is also in a think block of the text. A template would write it twice.

    A blank field gives way to the block. Raises DataError if the field and the block say different things.
    """
    names = [name for name in REASONING if isinstance(message.get(name), str)]
    block = _THOUGHT.match(content_text(message)) if names and message["role"] == "assistant" else None
    if block is None:
        return message
    fields = {" ".join(message[name].split()) for name in names} - {""}
    thought = " ".join(block["thought"].split())
    if not fields:
        return {name: item for name, item in message.items() if name not in names}
    if thought and thought not in fields:
        if not block["opening"]:  # a text that only mentions the tag
            return message
        raise DataError(
            f"the reply has the reasoning {message[names[0]]!r:.60} in {names[0]} and another think block in its text ({thought!r:.60}); "
            "keep one of them"
        )
    return {**message, "content": content_text(message)[block.end() :]}


def in_reasoning_form(message: Message, form: str) -> Message:
    """A reply with its reasoning in the field ``reasoning_content`` (``form`` is field), or in a think block of its text (text).

    Messages without reasoning, and all messages if ``form`` is empty, are unchanged.
    """
    if not form or message["role"] != "assistant":
        return message
    text = content_text(message)
    given = next((message[name] for name in REASONING if message.get(name)), None)
    if form == "text" and given is not None:
        rest = {name: item for name, item in message.items() if name not in REASONING}
        return {**rest, "content": f"<think>\n{given}\n</think>\n\n{text}"}
    block = _THOUGHT.match(text) if form == "field" and given is None else None
    return {**message, "content": text[block.end() :], REASONING[0]: block["thought"].strip("\n")} if block else message


def _read_json(text: str) -> object:
    """Parse ``text`` as JSON. Returns the text itself if it is not JSON, and None if it is blank."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text


def _after_system(row: Row, column: str, messages: list[Message]) -> list[Message]:
    """Put the turn from the column ``system``, if any, before ``messages``. Replies that follow a separate prompt get none."""
    turn = _system_turn(row)
    if not turn:
        return messages
    first = messages[0]
    if first["role"] in ("system", "developer"):
        if content_text(first).strip() != content_text(turn[0]).strip():
            raise DataError(
                f"{row.location}: the column system and the first turn of {column} are different system turns; keep one of them"
            )
        return messages
    follows = first["role"] == "assistant" and column not in (*COLUMNS, "prompt")
    return messages if follows else [*turn, *messages]


def conversation_column(row: Row) -> str | None:
    """The column with the row's full conversation; None if there is none."""
    return next((column for column in COLUMNS if column in row), None)


def open_conversation(row: Row) -> Conversation | None:
    """The conversation in ``conversations`` that ``chosen`` continues, if it replaces a column ``prompt``; None for other rows."""
    if "prompt" in row or "chosen" not in row or "conversations" not in row:
        return None
    messages = messages_of(row, "conversations")
    return None if messages[-1]["role"] == "assistant" else messages


def holds_turns(value: object) -> bool:
    """Whether an answer is given as turns: a list of messages, or a single message."""
    return isinstance(value, list | dict)


def _problem(message: object) -> str:
    """What is wrong with a message; empty if nothing is."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return f"expected a role ({', '.join(ROLES)}) and content"
    if (weight := message.get("weight")) is not None and weight not in (0, 1):
        return f"weight is {weight!r:.40}; expected 0 (do not train on this reply) or 1"
    if weight == 1 and message["role"] != "assistant":
        return f"weight is 1, but only the assistant's turns are trained on, and this is a {message['role']} turn"
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return "expected tool_calls, a list of objects {type: function, function: {name, arguments}}"
    content = message.get("content")
    if isinstance(content, str):
        return ""
    if isinstance(content, list):
        good = all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content)
        return "" if good and content else "expected content of text parts {type: text, text}; images and audio are not supported"
    if content is None and message["role"] == "assistant" and calls:
        return ""
    return "expected text content (only an assistant message with tool_calls may have none)"


def _tools(row: Row) -> list[JsonObject]:
    """The column ``tools``: function descriptions as a list or as JSON text. Raises DataError for anything else."""
    value = row.get("tools")
    if not value:
        return []
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{row.location}: tools is {value!r:.80}; expected a list of JSON descriptions of functions")
    return without_missing(tools) if row.columnar and tools is value else tools


def _arguments(row: Row) -> JsonObject:
    """The column ``chat_template_kwargs`` of TRL: arguments of the chat template for this row. Null values are not given."""
    value = row.get(ARGUMENTS)
    given = _read_json(value) if isinstance(value, str) else value
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise DataError(f"{row.location}: {ARGUMENTS} is {value!r:.80}; expected an object with arguments of the chat template")
    return {name: item for name, item in (without_missing(given) if row.columnar else given).items() if item is not None}


def _of_row(row: Row, messages: Iterable[Message]) -> Conversation:
    """The messages with the tools, the template arguments and the location of their row."""
    return Conversation(messages, tools=_tools(row), arguments=_arguments(row), location=row.location)


def prompt_of(row: Row) -> Prompt:
    """The prompt of a row: text, or messages that the assistant answers next. Raises DataError if it ends with an assistant turn."""
    prompt = _any_prompt(row)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(f"{row.location}: prompt ends with an assistant turn; expected a turn that the assistant answers (user or tool)")
    return prompt


def _any_prompt(row: Row) -> Prompt:
    """The prompt, which may end with any role."""
    return messages_of(row, "prompt") if isinstance(row.get("prompt"), list) else text_prompt(row, text_of(row, "prompt"))


def text_prompt(row: Row, text: str) -> Prompt:
    """The prompt with ``text`` as its last turn.

    It is a conversation if the row has tools, template arguments, a text in ``system`` (the first turn) or pairs of texts in ``history``
    (earlier questions and replies, as in LLaMA-Factory's data); else it is the text. Raises DataError for other values of these columns.
    """
    tools = row.get("tools") if isinstance(row.get("tools"), list) else None
    before = [*_system_turn(row), *_history(row)]
    if not tools and not before and not _arguments(row):
        return text
    return _of_row(row, [*before, *as_question(text)])


def _system_turn(row: Row) -> list[Message]:
    """The column ``system`` as a turn; none if it is missing or blank."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{row.location}: system is {type(system).__name__}; expected a text")
    return [{"role": "system", "content": system}] if system and system.strip() else []


def _history(row: Row) -> list[Message]:
    """The column ``history`` as turns; none if it is missing or empty."""
    history = row.get("history")
    if not history:
        return []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in history)
    if not pairs:
        raise DataError(f"{row.location}: history is {history!r:.60}; expected pairs [question, reply], or rename the column")
    return [turn for question, reply in history for turn in (*as_question(question), *as_turns(reply))]


def simplified(messages: Sequence[Message]) -> Completion:
    """A single plain assistant message as text; anything else unchanged."""
    only = messages[0]
    plain = len(messages) == 1 and only.keys() == {"role", "content"} and isinstance(only["content"], str)
    return only["content"] if plain else list(messages)


def as_turns(completion: Completion) -> list[Message]:
    """A completion as messages."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)


def tools_of(prompt: object) -> list[JsonObject]:
    """The tools of a prompt; none for a text."""
    return list(getattr(prompt, "tools", ()))


def arguments_of(prompt: object) -> JsonObject:
    """The template arguments of a prompt's row; none for a text."""
    return dict(getattr(prompt, "arguments", {}))


def columns_beside(prompt: object) -> JsonObject:
    """The columns of a row that belong to its prompt: its tools and its template arguments; without those that are empty."""
    columns = {"tools": tools_of(prompt), ARGUMENTS: arguments_of(prompt)}
    return {name: value for name, value in columns.items() if value}


def location_of(prompt: object) -> str:
    """The location of a conversation's row in the data; empty if unknown."""
    return str(getattr(prompt, "location", ""))


def content_text(message: Message) -> str:
    """The text of a message: empty if it has no content, joined if it has several parts."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


@contextmanager
def errors_at(location: str) -> Iterator[None]:
    """Context manager that prefixes a DataError with ``location`` (the location of a row) unless the message contains it already."""
    try:
        yield
    except DataError as error:
        if not location or location in str(error):
            raise
        raise DataError(f"{location}: {error}") from error


# Splitting


def split_messages(row: Row, column: str = "messages") -> tuple[Conversation, Completion]:
    """Split a full conversation into (everything before the last reply, the last reply).

    Raises DataError if it does not end with a reply.
    """
    messages = messages_of(row, column)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise DataError(f"{row.location}: {column} must have at least two turns and end with an assistant turn")
    return messages.part(len(messages) - 1), simplified(messages[-1:])


def split_answers(row: Row, answers: Mapping[str, object]) -> tuple[Prompt, list[Completion]]:
    """Split a row into (prompt, completions). ``answers`` maps a name, used in messages, to each answer.

    An answer is a text, the turns after the prompt, or a full conversation that includes the prompt. The prompt is in the column ``prompt``
    or in an ``open_conversation``. The common prefix of several answers becomes part of the prompt, and every completion begins with an
    assistant turn. Raises DataError if an answer does not end with an assistant turn, or if there is no common turn for the prompt.
    """
    given = _any_prompt(row) if "prompt" in row else open_conversation(row)
    sides = [_turns_in(row, name, answer) for name, answer in answers.items()]
    opening, sides = _opened(row, given, sides, next(iter(answers)))
    if len(sides) == 1:
        cut = _next_reply(sides[0], len(opening)) if given is not None else len(sides[0]) - 1
    else:
        cut = _last_common_reply(sides)
    if cut == 0:
        raise DataError(f"{row.location}: {' and '.join(answers)} share no first turn that the assistant answers")
    completions = [simplified(side[cut:]) for side in sides]
    if isinstance(given, str) and sides[0][:cut] == as_question(given):
        return given, completions
    return _of_row(row, sides[0][:cut]), completions


def as_question(text: str) -> list[Message]:
    """A text prompt as a conversation with one user turn."""
    return [{"role": "user", "content": text}]


def _turns_in(row: Row, name: str, answer: object) -> list[Message]:
    """An answer as turns. Raises DataError if it is not a text and does not end with an assistant turn."""
    alone = row.with_values({name: [answer] if isinstance(answer, dict) else answer, "system": row.get("system")})
    if not holds_turns(answer):
        return as_turns(text_of(alone, name))
    messages = messages_of(alone, name)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{row.location}: {name} ends with the role {messages[-1]['role']!r}; expected the assistant's reply")
    return list(messages)


def _opened(row: Row, given: Prompt | None, sides: list[list[Message]], name: str) -> tuple[list[Message], list[list[Message]]]:
    """Return (the prompt's turns, full conversations that begin with them). Conversations that already include the prompt are unchanged.

    Raises DataError for a conversation that does not contain the given text prompt.
    """
    if given is None:
        return [], sides
    opening = as_question(given) if isinstance(given, str) else list(given)
    if all(side[: len(opening)] == opening for side in sides):
        return opening, sides
    text = row.get("prompt")
    if isinstance(text, str) and all(side[0]["role"] in ("system", "developer", "user") for side in sides):
        users = [turn for turn, message in enumerate(sides[0]) if message["role"] == "user"]
        asked = next((turn for turn in users if content_text(sides[0][turn]).strip() == text.strip()), None)
        if asked is None:
            raise DataError(f"{row.location}: {name} begins with a {sides[0][0]['role']} turn and does not contain the prompt {text!r:.60}")
        return sides[0][: asked + 1], sides
    return opening, [[*opening, *side] for side in sides]


def _next_reply(side: Sequence[Message], start: int) -> int:
    """Index of the first assistant turn at or after ``start``."""
    return next(turn for turn in range(start, len(side)) if side[turn]["role"] == "assistant")


def _last_common_reply(sides: Sequence[Sequence[Message]]) -> int:
    """The last index where all sides have an assistant turn and are equal before it; 0 if there is none."""
    longest = min(len(side) for side in sides) - 1
    turn = next((turn for turn in range(longest) if any(side[turn] != sides[0][turn] for side in sides)), longest)
    while turn > 0 and any(side[turn]["role"] != "assistant" for side in sides):
        turn -= 1
    return turn


def split_dialogue(text: str, row: Row, column: str) -> tuple[str, str]:
    """Split a dialogue (Anthropic's hh-rlhf) into the prompt, which ends with the last ``Assistant:``, and the reply.

    Raises DataError if the text has no such line.
    """
    head, mark, reply = text.rpartition(LAST_REPLY)
    if not mark:
        raise DataError(f"{row.location}: no prompt column, and {column} has no {LAST_REPLY!r} that separates a prompt from a reply")
    return head + mark, reply


# Plain text forms, for classifiers and people


def transcript(prompt: Prompt) -> str:
    """A prompt as one text with speaker names: ``user: ...``, ``assistant: ...``, separated by empty lines.

    A text prompt, or a conversation with one plain user turn, is returned as that text. Tools come first; reasoning and tool calls are part
    of their turn.
    """
    if isinstance(prompt, str):
        return prompt
    tools = tools_of(prompt)
    if len(prompt) == 1 and not tools and prompt[0]["role"] == "user" and "name" not in prompt[0]:
        return content_text(prompt[0])
    listed = [f"tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    return "\n\n".join([*listed, *(f"{_speaker(message)}: {_text_of(message)}" for message in prompt)])


def completion_text(completion: Completion) -> str:
    """A completion as one text: the first reply, then further turns with speaker names."""
    if isinstance(completion, str):
        return completion
    first, *others = completion
    return "\n\n".join([_text_of(first), *(f"{_speaker(message)}: {_text_of(message)}" for message in others)])


def _speaker(message: Message) -> str:
    return f"{message['role']} ({message['name']})" if message.get("name") else str(message["role"])


def _text_of(message: Message) -> str:
    """The content of a turn: reasoning in think tags, the text, tool calls as JSON."""
    reasoning = next((message[name] for name in REASONING if message.get(name)), None)
    parts = [f"<think>\n{reasoning}\n</think>"] if reasoning else []
    parts += [text] if (text := content_text(message)) else []
    calls: Any = with_objects(message).get("tool_calls") or ()
    parts += [f"[tool call] {json.dumps(call.get('function', call), ensure_ascii=False)}" for call in calls]
    return "\n".join(parts)
