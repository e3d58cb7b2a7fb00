"""Analyse a chat template by rendering test conversations.

This gives the end of a reply, and the forms of content and tool calls that the template accepts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast
from weakref import WeakKeyDictionary

from stages.errors import DataError, ModelError
from stages.tokens.continuation import plain_ids, segment_ids
from stages.tokens.dates import give_date
from stages.tokens.plain import template_to_apply
from stages.tokens.template_arguments import NONE, Arguments, used_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Messages = Sequence[Mapping[str, object]]
"""Messages of a conversation, each with at least ``role`` and ``content``."""
Read = TypeVar("Read")
_ASKED, _ANSWERED = "tristageasks", "tristageanswers"
_KEY, _VALUE, _CALLED = "tristagekey", "tristagevalue", "tristagecalls"


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    generation_prompt: bool,
    tools: Sequence[Mapping[str, object]] = (),
    arguments: Arguments = NONE,
    location: str = "",
) -> str:
    """Apply the tokenizer's chat template to ``messages``. Raises DataError with ``location`` if the template rejects them."""
    template = template_for(tokenizer, tools)
    try:
        give_date(template)
        text = tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", list(messages)),  # the annotation of transformers omits parts and tool calls
            tools=[dict(tool) for tool in tools] or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **used_arguments(tokenizer, template, arguments),
        )
    except Exception as error:  # a template is a program and can raise any exception
        roles = ", ".join(str(message["role"]) for message in messages)
        token = re.match(r"'(\w+_token)' is undefined", str(error))
        move = f"set {token[1]} in its tokenizer_config.json" if token else "change the rows, or use another template"
        raise DataError(
            f"{location}{': ' if location else ''}the model's chat template rejects the conversation ({roles}): {error}; {move}"
        ) from error
    return str(text)


def template_for(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, object]]) -> str:
    """The template that renders a conversation with ``tools``.

    Raises ModelError if the tokenizer has several named templates and no default one.
    """
    listed, own = [dict(tool) for tool in tools] or None, tokenizer.chat_template
    if isinstance(own, dict) and "default" not in own:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has the chat templates {', '.join(own)}, but none with the name "
            "default; save one as chat_template.jinja in its folder, or set template in the sft step"
        )
    return template_to_apply(tokenizer) or str(tokenizer.get_chat_template(None, listed))


@dataclass(frozen=True)
class TurnForm:
    """How a chat template frames a reply.

    ``opening``: text that the generation prompt writes and a reply does not repeat, e.g. ``<think>`` and a line end. ``closing``: the tag
    that closes this block. ``ending``: the text after the last reply. ``turn_end``: the ending up to its first special token and following
    white space, without text that only closes the conversation. ``end_ids``: the first special token after a reply, where generation stops;
    empty if there is none. ``parts``, ``texts``: whether a message's content may be a list of text parts, or a text. ``surplus``: a
    generation prompt that the template writes after the last reply although none is asked for; it is no part of ``ending``. ``reasoning``:
    how a reply must give its reasoning, ``field`` (``reasoning_content``) or ``text`` (a think block); empty if the template reads the data
    as they are. ``borrowed``: the part of the ending that the template writes only if a user turn follows. GLM's replies end where the next
    turn begins.
    """

    opening: str
    closing: str
    ending: str
    turn_end: str
    end_ids: tuple[int, ...]
    parts: bool
    texts: bool
    surplus: str = ""
    borrowed: str = ""
    reasoning: str = ""


@dataclass(frozen=True)
class ArgumentForm:
    """The forms of tool call arguments that a chat template renders correctly: an object, or a text with JSON.

    Both are False if the template renders no tool calls.
    """

    objects: bool
    texts: bool


MOST_FORMS = 256  # rows may have arguments with long texts

_turn_forms: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, dict[str, TurnForm]]] = WeakKeyDictionary()
_argument_forms: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, dict[str, ArgumentForm]]] = WeakKeyDictionary()


def turn_form(tokenizer: PreTrainedTokenizerBase, arguments: Arguments = NONE) -> TurnForm:
    """The form of the tokenizer's chat template with these arguments."""
    return _read_once(_turn_forms, tokenizer, lambda tokenizer: _read_form(tokenizer, arguments), repr(dict(arguments)))


def argument_form(tokenizer: PreTrainedTokenizerBase) -> ArgumentForm:
    """The forms of tool call arguments that the tokenizer's chat template accepts."""
    return _read_once(_argument_forms, tokenizer, _read_argument_form)


def _read_once(
    known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, dict[str, Read]]],
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[PreTrainedTokenizerBase], Read],
    key: str = "",
) -> Read:
    """The cached result of ``read`` for the tokenizer and ``key``; recomputed if its template changed."""
    entry = known.get(tokenizer)
    if entry is None or entry[0] != tokenizer.chat_template or len(entry[1]) == MOST_FORMS:
        entry = known[tokenizer] = (tokenizer.chat_template, {})
    if key not in entry[1]:
        entry[1][key] = read(tokenizer)
    return entry[1][key]


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends an assistant turn in the chat template: the first special token after a reply.

    If the template writes none at the end of a conversation, the first token of the next turn is used. Empty without a template.
    """
    return list(turn_form(tokenizer).end_ids) if tokenizer.chat_template else []


def first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """The first index where two texts (or lists) differ; the shorter length if one is a prefix of the other."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)


def _read_form(tokenizer: PreTrainedTokenizerBase, arguments: Arguments) -> TurnForm:
    texts, parts = _probe(tokenizer, _as_text, arguments), _probe(tokenizer, _as_parts, arguments)
    chosen = texts or parts
    if chosen is None:  # the template expects different conversations; it will raise its own errors
        return TurnForm("", "", "", "", (), parts=False, texts=True)
    shown, full_text = chosen
    opened = re.search(r"<(\w+)>\s*$", shown)
    if opened and full_text.startswith(shown) and f"</{opened[1]}>" not in full_text[len(shown) :]:
        opened = None  # the mark of a turn
    opening = opened[0] if opened and not full_text.startswith(shown) else shown[first_difference(shown, full_text) :]
    _say_missing_prompt(tokenizer, shown, full_text)
    ending = full_text.rpartition(_ANSWERED)[2]
    first = _first_special(tokenizer, full_text)
    surplus = "" if first is None else ending.removeprefix(_through(ending, str(tokenizer.convert_ids_to_tokens(first))))
    surplus = surplus if shown.endswith(surplus) else ""
    ending = ending.removesuffix(surplus)
    turn_end = ending if first is None else _through(ending, str(tokenizer.convert_ids_to_tokens(first)))
    following, borrowed = first, ""
    if first is None:
        after = _followed(tokenizer, _as_text if texts else _as_parts, arguments)
        following = _first_special(tokenizer, after)
        borrowed = up_to(after.rpartition(_ANSWERED)[2].removeprefix(ending), tokenizer, following)
        ending = turn_end = ending + borrowed
    return TurnForm(
        opening=opening,
        closing=f"</{opened[1]}>" if opened else "",
        ending=ending,
        turn_end=turn_end,
        end_ids=() if following is None else (following,),
        parts=parts is not None and parts == chosen,
        texts=texts is not None,
        surplus=surplus,
        borrowed=borrowed,
        reasoning=_reasoning_form(tokenizer, arguments, opens=opened is not None) if texts else "",
    )


def _reasoning_form(tokenizer: PreTrainedTokenizerBase, arguments: Arguments, *, opens: bool) -> str:
    """The form of reasoning that the template needs: ``field`` if it writes its own block before one in the text (Qwen 3.8), ``text`` if
    its generation prompt opens a block (``opens``) and it ignores the field (DeepSeek R1).
    """
    question = {"role": "user", "content": _ASKED}

    def written(**reply: str) -> str:
        try:
            return apply_template(tokenizer, [question, {"role": "assistant", **reply}], generation_prompt=False, arguments=arguments)
        except DataError:
            return ""

    in_field = written(content=_ANSWERED, reasoning_content=_KEY)
    if _KEY not in in_field:
        return "text" if opens else ""
    in_text = written(content=f"<think>\n{_KEY}\n</think>\n\n{_ANSWERED}")
    return "field" if 0 < in_field.count("</think>") < in_text.count("</think>") else ""


def _say_missing_prompt(tokenizer: PreTrainedTokenizerBase, shown: str, full_text: str) -> None:
    """Warn about a template without a generation prompt whose replies begin with the name of their role."""
    before = full_text.removeprefix(shown).partition(_ANSWERED)[0]
    if full_text.startswith(shown) and any(role in before.lower() for role in ("assistant", "model", "gpt")):
        logger.warning(
            "the chat template of %s ignores add_generation_prompt: the model itself must write %r, and its completions begin with these "
            "words. Set a template with a generation prompt (template: chatml) in the sft step",
            tokenizer.name_or_path or "the tokenizer",
            before,
        )


def up_to(text: str, tokenizer: PreTrainedTokenizerBase, token: int | None) -> str:
    """The beginning of ``text`` through the first ``token``; empty if it does not occur."""
    before, mark, _ = text.partition(str(tokenizer.convert_ids_to_tokens(token))) if token is not None else ("", "", "")
    return before + mark if mark else ""


def first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The first special token of ``text``; None if there is none."""
    return _first_of(plain_ids(tokenizer, text), tokenizer)


def _first_of(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    return next((token for token in ids if token in special), None)


def _through(ending: str, token: str) -> str:
    """``ending`` up to the first ``token`` and the white space after it."""
    before, mark, after = ending.partition(token)
    return before + mark + after[: len(after) - len(after.lstrip())]


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The first special token after the reply of a test conversation; None if there is none."""
    head, answered, after = text.rpartition(_ANSWERED)
    return _first_of(segment_ids(tokenizer, [head + answered, after])[1], tokenizer)


def _followed(tokenizer: PreTrainedTokenizerBase, content: Callable[[str], object], arguments: Arguments) -> str:
    """The test conversation with another question after the reply; empty if the template rejects it."""
    said = [("user", _ASKED), ("assistant", _ANSWERED), ("user", _ASKED)]
    turns = [{"role": role, "content": content(text)} for role, text in said]
    try:
        return apply_template(tokenizer, turns, generation_prompt=False, arguments=arguments)
    except DataError:
        return ""


def _probe(tokenizer: PreTrainedTokenizerBase, content: Callable[[str], object], arguments: Arguments) -> tuple[str, str] | None:
    """Render a test conversation as (prompt, full text); None if the template does not support this form of content."""
    messages = [{"role": "user", "content": content(_ASKED)}, {"role": "assistant", "content": content(_ANSWERED)}]
    try:
        shown = apply_template(tokenizer, messages[:1], generation_prompt=True, arguments=arguments)
        full_text = apply_template(tokenizer, messages, generation_prompt=False, arguments=arguments)
    except DataError:
        return None
    written = _ASKED in shown and _ANSWERED in full_text and "'type'" not in full_text  # reject a Python-formatted list
    return (shown, full_text) if written else None


def _read_argument_form(tokenizer: PreTrainedTokenizerBase) -> ArgumentForm:
    return ArgumentForm(
        objects=_writes_arguments(tokenizer, {_KEY: _VALUE}),
        texts=_writes_arguments(tokenizer, f'{{"{_KEY}": "{_VALUE}"}}'),
    )


def _writes_arguments(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, str] | str) -> bool:
    """Whether the template writes a call with these arguments correctly: not escaped inside a JSON string, not as a Python dict."""
    content = _as_text if turn_form(tokenizer).texts else _as_parts
    call = {"id": "tristage1", "type": "function", "function": {"name": _CALLED, "arguments": arguments}}  # Mistral's ids: 9 characters
    parameters: dict[str, object] = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": _CALLED, "description": _CALLED, "parameters": parameters}}
    for said in (content(""), None):
        for tools in ([], [tool]):
            turns: Messages = [{"role": "user", "content": content(_ASKED)}, {"role": "assistant", "content": said, "tool_calls": [call]}]
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
