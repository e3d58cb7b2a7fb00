"""What a chat template does with every turn, read from conversations that it renders.

That is where a reply ends, and which forms of contents and of tool calls it takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from stages.errors import DataError
from stages.tokens.continuation import segment_ids
from stages.tokens.plain import template_to_apply

Messages = Sequence[dict[str, Any]]
_ASKED, _ANSWERED = "tristageasks", "tristageanswers"
_KEY, _VALUE, _CALLED = "tristagekey", "tristagevalue", "tristagecalls"


def apply_template(tokenizer: Any, messages: Messages, *, generation_prompt: bool, tools: Sequence[Any] = (), location: str = "") -> str:
    """``messages`` as the tokenizer's chat template writes them. Raises DataError with ``location`` where the template refuses them."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            chat_template=template_to_apply(tokenizer),
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except Exception as error:  # a template is a program of its own, and anything may go wrong in it
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"{location}{': ' if location else ''}the model's chat template refuses the conversation ({roles}): {error}; "
            "change the rows, or use another template"
        ) from error
    return str(text)


@dataclass(frozen=True)
class TurnForm:
    """How a chat template frames a reply.

    ``opening``: what the generation prompt writes and a reply does not repeat, such as ``<think>`` and a line end; ``closing``: the mark
    that ends that block. ``ending``: the text after the last reply. ``turn_end``: the ending up to its first special token and the white
    space after it, without what only closes the conversation. ``end_ids``: the first special token after a reply, at which generation
    stops; empty where there is none. ``writes_end``: it stands in the ending, and not only at the beginning of the next turn. ``parts``,
    ``texts``: whether a message's content may be a list of text parts, or a text.
    """

    opening: str
    closing: str
    ending: str
    turn_end: str
    end_ids: tuple[int, ...]
    writes_end: bool
    parts: bool
    texts: bool


@dataclass(frozen=True)
class ArgumentForm:
    """Which forms of a tool call's arguments a chat template writes as what they mean: an object, and a text that holds it as JSON.

    Neither where the template writes no tool calls.
    """

    objects: bool
    texts: bool


_Known = WeakKeyDictionary[Any, tuple[Any, Any]]
_turn_forms: _Known = WeakKeyDictionary()
_argument_forms: _Known = WeakKeyDictionary()


def turn_form(tokenizer: Any) -> TurnForm:
    """The form of the tokenizer's chat template."""
    form: TurnForm = _read_once(_turn_forms, tokenizer, _read_form)
    return form


def argument_form(tokenizer: Any) -> ArgumentForm:
    """The forms of tool calls' arguments that the tokenizer's chat template takes."""
    form: ArgumentForm = _read_once(_argument_forms, tokenizer, _read_argument_form)
    return form


def _read_once(known: _Known, tokenizer: Any, read: Callable[[Any], Any]) -> Any:
    """What ``read`` finds in the tokenizer's template; read again once the template is another."""
    found = known.get(tokenizer)
    if found is None or found[0] != tokenizer.chat_template:
        found = known[tokenizer] = (tokenizer.chat_template, read(tokenizer))
    return found[1]


def turn_end_ids(tokenizer: Any) -> list[int]:
    """The token that ends an assistant's turn as the chat template writes it: the first special token after a reply.

    A template may write none at the end of a conversation; then the one that begins the next turn is it. Empty without a template.
    """
    return list(turn_form(tokenizer).end_ids) if tokenizer.chat_template else []


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first location at which two texts (or lists) differ, the length of the shorter one where it begins the other."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)


def _read_form(tokenizer: Any) -> TurnForm:
    texts, parts = _probe(tokenizer, _as_text), _probe(tokenizer, _as_parts)
    chosen = texts or parts
    if chosen is None:  # a template for conversations of another kind: its own messages will say what it takes
        return TurnForm("", "", "", "", (), writes_end=False, parts=False, texts=True)
    shown, whole = chosen
    opened = re.search(r"<(\w+)>\s*$", shown) if not whole.startswith(shown) else None
    opening = opened[0] if opened else shown[first_difference(shown, whole) :]
    ending = whole.rpartition(_ANSWERED)[2]
    first = _first_special(tokenizer, whole)
    following = _first_special(tokenizer, _followed(tokenizer, _as_text if texts else _as_parts)) if first is None else first
    return TurnForm(
        opening=opening,
        closing=f"</{opened[1]}>" if opened else "",
        ending=ending,
        turn_end=ending if first is None else _through(ending, tokenizer.convert_ids_to_tokens(first)),
        end_ids=() if following is None else (following,),
        writes_end=first is not None,
        parts=parts is not None and parts == chosen,
        texts=texts is not None,
    )


def _through(ending: str, token: str) -> str:
    """``ending`` up to the first ``token`` and the white space after it."""
    before, mark, after = ending.partition(token)
    return before + mark + after[: len(after) - len(after.lstrip())]


def _first_special(tokenizer: Any, text: str) -> int | None:
    """The first special token behind the reply of a probe; None where there is none."""
    head, answered, after = text.rpartition(_ANSWERED)
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    return next((token for token in segment_ids(tokenizer, [head + answered, after])[1] if token in special), None)


def _followed(tokenizer: Any, content: Any) -> str:
    """The probe's conversation with one more question behind the reply; the empty text where the template refuses it."""
    said = [("user", _ASKED), ("assistant", _ANSWERED), ("user", _ASKED)]
    try:
        return apply_template(tokenizer, [{"role": role, "content": content(text)} for role, text in said], generation_prompt=False)
    except DataError:
        return ""


def _probe(tokenizer: Any, content: Any) -> tuple[str, str] | None:
    """(prompt, whole) of a conversation with this form of content; None where the template does not write it."""
    messages = [{"role": "user", "content": content(_ASKED)}, {"role": "assistant", "content": content(_ANSWERED)}]
    try:
        shown = apply_template(tokenizer, messages[:1], generation_prompt=True)
        whole = apply_template(tokenizer, messages, generation_prompt=False)
    except DataError:
        return None
    written = _ASKED in shown and _ANSWERED in whole and "'type'" not in whole  # a list printed as Python prints it is not taken
    return (shown, whole) if written else None


def _read_argument_form(tokenizer: Any) -> ArgumentForm:
    return ArgumentForm(
        objects=_writes_arguments(tokenizer, {_KEY: _VALUE}),
        texts=_writes_arguments(tokenizer, f'{{"{_KEY}": "{_VALUE}"}}'),
    )


def _writes_arguments(tokenizer: Any, arguments: dict[str, str] | str) -> bool:
    """Whether the template writes a call with these arguments: neither escaped in a string of JSON, nor as Python prints a dictionary."""
    content = _as_text if turn_form(tokenizer).texts else _as_parts
    call = {"id": "tristage1", "type": "function", "function": {"name": _CALLED, "arguments": arguments}}  # Mistral's ids have nine signs
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": _CALLED, "description": _CALLED, "parameters": parameters}}
    for said in (content(""), None):
        for tools in ([], [tool]):
            asked = {"role": "user", "content": content(_ASKED)}
            turns: Messages = [asked, {"role": "assistant", "content": said, "tool_calls": [call]}]
            try:
                text = apply_template(tokenizer, turns, generation_prompt=False, tools=tools)
            except DataError:
                continue
            if _KEY in text and _VALUE in text and f'\\"{_KEY}' not in text and f"'{_KEY}'" not in text:
                return True
    return False


def _as_text(text: str) -> str:
    return text


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
