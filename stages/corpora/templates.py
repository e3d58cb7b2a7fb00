"""What a model reads: prompts and completions as its chat template writes them, and their tokens.

The template is the tokenizer's ``chat_template``, so that it travels with the model that learned it. A completion is what the template
writes after the rendered prompt: the reply, its turn end, and whatever else stands around it. A model without a template gets the text as
it is, a space before the completion where neither side has one, and the end token after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.corpora.messages import (
    REASONING,
    Completion,
    Message,
    Prompt,
    as_question,
    as_turns,
    content_text,
    naming,
    place_of,
    tools_of,
)
from stages.corpora.tool_calls import in_argument_form
from stages.errors import DataError, ModelError
from stages.tokens.continuation import CONTEXT, beginning_ids, continued, plain_ids, segment_ids
from stages.tokens.plain import is_begun, is_plain, plain_template
from stages.tokens.turns import TurnForm, apply_template, argument_form, first_difference, turn_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATES = {
    "plain": "{prompt}",
    "instruction": "### Instruction:\n{prompt}\n\n### Response:\n",
    "dialogue": "\n\nHuman: {prompt}\n\nAssistant:",
    "question": "Question: {prompt}\nAnswer:",
    "tldr": "{prompt}\n\nTL;DR:",
}


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give ``tokenizer`` a template: ``chat`` (its own), a name of PLAIN_TEMPLATES, or a text with ``{prompt}``.

    A plain template begins with the tokens that the tokenizer puts before every text, if any. Raises ModelError for ``chat`` where the
    tokenizer has none, and for a text without ``{prompt}``.
    """
    if template == "chat":
        if not tokenizer.chat_template:
            names = ", ".join(PLAIN_TEMPLATES)
            raise ModelError(f"template: chat, and the tokenizer has no chat template; name a plain one ({names}) or write {{prompt}}")
        return
    text = PLAIN_TEMPLATES.get(template, template)
    if text.count("{prompt}") != 1:
        raise ModelError(f"template {template!r}: expected chat, one of {', '.join(PLAIN_TEMPLATES)}, or a text with {{prompt}} once")
    before, after = text.split("{prompt}")
    tokenizer.chat_template = plain_template(_beginning_text(tokenizer), before, after)


def _beginning_text(tokenizer: PreTrainedTokenizerBase) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(beginning_ids(tokenizer)))


# Rendering


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the model is shown before it answers.

    Raises DataError, with the row's place where it is known, for a conversation that the template refuses or of which it would drop tools
    or tool calls, and for one where the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        return _bare(prompt)
    messages = as_question(prompt) if isinstance(prompt, str) else prompt
    return rendered(tokenizer, messages, prompt, generation_prompt=True)


def render_pair(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion, *, sampled: bool = False) -> tuple[str, str]:
    """(the prompt's text, the completion's): together what the template writes for the whole conversation.

    A template whose generation prompt opens a think block, and which drops such blocks from replies, still gets a reply that closes the
    block: it follows the open block as it is. ``sampled``: also a reply that never closes it, as a sample that was cut does.

    Raises DataError as ``render_prompt`` does, and where the whole conversation does not begin with the rendered prompt.
    """
    shown = render_prompt(tokenizer, prompt)
    if not tokenizer.chat_template:
        return shown, joined(tokenizer, prompt, _bare_completion(prompt, completion))
    turns = as_turns(completion)
    messages = [*(as_question(prompt) if isinstance(prompt, str) else prompt), *turns]
    form = turn_form(tokenizer)
    reply = content_text(turns[-1])
    closes = form.closing in reply if form.closing else False
    if len(turns) == 1 and form.closing and sampled and not closes:
        return shown, reply + form.ending
    whole = rendered(tokenizer, messages, prompt, generation_prompt=False)
    if whole.startswith(shown):
        return shown, whole[len(shown) :]
    if len(turns) == 1 and closes and turns[0].keys() <= {"role", "content"}:
        return shown, reply.removeprefix(form.opening).removeprefix(form.opening.strip()) + form.ending
    raise DataError(_at(prompt) + _unstable(shown, whole, form))


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: Prompt, *, generation_prompt: bool) -> str:
    """``messages`` as the chat template writes them, with the tools of ``prompt``. Raises DataError as ``render_prompt`` does."""
    tools = tools_of(prompt)
    with naming(place_of(prompt)):
        contents = in_its_form(tokenizer, messages)
    text = apply_template(tokenizer, contents, generation_prompt=generation_prompt, tools=tools, place=place_of(prompt))
    lost = _lost(tokenizer, contents, tools, text, generation_prompt=generation_prompt)
    if lost:
        raise DataError(
            f"{_at(prompt)}the model's chat template does not write {lost}; use a model whose template does, or take that out of the data"
        )
    return text


def check_rendering(tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[Prompt, Sequence[Completion], str]]) -> None:
    """Render rows of (prompt, its completions, the row's place), which needs no model: every conversation, and the first text.

    Raises DataError with the place of the first row that the chat template refuses, drops a part of, or does not write as the
    continuation of its prompt.
    """
    seen_text = False
    for prompt, completions, place in rows:
        if isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions):
            if seen_text:
                continue
            seen_text = True
        with naming(place):
            render_prompt(tokenizer, prompt)
            for completion in completions:
                render_pair(tokenizer, prompt, completion)


def _at(prompt: object) -> str:
    place = place_of(prompt)
    return f"{place}: " if place else ""


def _bare(prompt: Prompt) -> str:
    """A text prompt for a model without a template."""
    if isinstance(prompt, str):
        return prompt
    raise DataError(f"{_at(prompt)}the prompt is a conversation, and the model has no chat template; set template in its sft step")


def _bare_completion(prompt: Prompt, completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    raise DataError(f"{_at(prompt)}the completion has several turns, and the model has no chat template; set template in its sft step")


def _lost(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any], text: str, *, generation_prompt: bool
) -> str:
    """What of a conversation the template leaves out of its ``text``; empty where nothing is missing.

    Reasoning before the last reply may be missing, as many templates drop it on purpose.
    """

    def makes_no_difference(others: Sequence[Message], tools: Sequence[Any]) -> bool:
        try:
            return apply_template(tokenizer, others, generation_prompt=generation_prompt, tools=tools) == text
        except DataError:
            return False

    for message in messages:
        if message["role"] in ("system", "developer", "user") and content_text(message).strip() not in text:
            return f"the {message['role']} turn {content_text(message).strip()!r:.60}"
    if tools and makes_no_difference(messages, ()):
        return f"the tools of the row ({', '.join(map(_name, tools))})"
    for turn, message in enumerate(messages):
        calls = message.get("tool_calls")
        if calls and makes_no_difference(_without(messages, turn, ("tool_calls",)), tools):
            return f"tool calls ({', '.join(map(_name, calls))})"
    last = len(messages) - 1
    thought = messages[last]["role"] == "assistant" and any(messages[last].get(name) for name in REASONING)
    return "the reasoning of the last reply" if thought and makes_no_difference(_without(messages, last, REASONING), tools) else ""


def _without(messages: Sequence[Message], turn: int, fields: Sequence[str]) -> list[Message]:
    """The messages, one of them without some of its fields."""
    bare = {name: value for name, value in messages[turn].items() if name not in fields}
    return [*messages[:turn], bare, *messages[turn + 1 :]]


def _name(tool: dict[str, Any]) -> str:
    inner = tool.get("function")
    return str((inner if isinstance(inner, dict) else tool).get("name"))


def _unstable(shown: str, whole: str, form: TurnForm) -> str:
    same = first_difference(shown, whole)
    advice = (
        f"the generation prompt opens {form.opening.strip()}: write replies that close it with {form.closing}"
        if form.closing
        else "use a chat template whose generation prompt is how it begins a reply"
    )
    return (
        "the chat template writes the whole conversation differently from the prompt that the model answers: "
        f"...{shown[max(0, same - 10) : same + 30]!r} as a prompt, ...{whole[max(0, same - 10) : same + 30]!r} with the reply; {advice}"
    )


def in_its_form(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """``messages`` in the forms that the template takes.

    Contents are parts joined to a text, or a text as one part; arguments of tool calls are objects, or JSON as text. Raises DataError for
    arguments that are no JSON object where the template needs one.
    """
    form = turn_form(tokenizer)
    if any(message.get("tool_calls") for message in messages):
        messages = [in_argument_form(message, argument_form(tokenizer)) for message in messages]
    if not form.texts:
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]} if isinstance(message.get("content"), str) else message
            for message in messages
        ]
    if form.parts:
        return list(messages)
    return [{**message, "content": content_text(message)} if isinstance(message.get("content"), list) else message for message in messages]


# Tokens


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as the model is shown it.

    A chat template writes all its special tokens itself; a plain text begins with the tokens that the tokenizer puts before every text.
    """
    ids, text = _begun(tokenizer, render_prompt(tokenizer, prompt))
    return _not_empty(tokenizer, ids + plain_ids(tokenizer, text))


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion, *, eos: bool = True, sampled: bool = False
) -> tuple[list[int], int]:
    """(token ids of prompt and completion, how many of them are the prompt).

    The two are one text as the template writes it, up to its very end: the turn end, and the line end that may follow. The prompt's tokens
    are those of the prompt alone. ``eos=False`` leaves out what ends the reply. ``sampled`` and errors: as in ``render_pair``.
    """
    shown, written = render_pair(tokenizer, prompt, completion, sampled=sampled)
    if not eos and tokenizer.chat_template:
        written = written.removesuffix(turn_form(tokenizer).ending)
    ids, text = _begun(tokenizer, shown)
    prompt_ids = _not_empty(tokenizer, ids + plain_ids(tokenizer, text))
    found = continued(tokenizer, text, prompt_ids[len(ids) :] if text else [], written)
    if eos and not tokenizer.chat_template and tokenizer.eos_token_id is not None:
        found = [*found, tokenizer.eos_token_id]
    return prompt_ids + found, len(prompt_ids)


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str, *, eos: bool = True) -> list[int]:
    """Token ids of a text that goes on with another, whichever that is, closed by the end token."""
    ids = continued(tokenizer, "\n", plain_ids(tokenizer, "\n"), completion)
    return [*ids, tokenizer.eos_token_id] if eos and tokenizer.eos_token_id is not None else ids


def encode_segments(tokenizer: PreTrainedTokenizerBase, segments: Sequence[str]) -> list[list[int]]:
    """Token ids of every part of one rendered text; each keeps the tokens of those before it."""
    ids, first = _begun(tokenizer, segments[0])
    parts = segment_ids(tokenizer, [first, *segments[1:]])
    return [ids + parts[0], *parts[1:]]


def encode_plain_pair(tokenizer: PreTrainedTokenizerBase, text: str, addition: str) -> tuple[list[int], list[int]]:
    """(ids of a text, ids of what follows it), without any template. A space stands between the two where neither side has one."""
    gap = " " if text and not text[-1].isspace() and not addition[:1].isspace() else ""
    ids = plain_ids(tokenizer, text) if text else []
    return _not_empty(tokenizer, beginning_ids(tokenizer) + ids), continued(tokenizer, text, ids, gap + addition)


def _begun(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], str]:
    """(the tokens that begin a plain text, the text without them); for a chat template, which writes them itself, none and the text."""
    if not is_plain(tokenizer):
        return [], text
    if not tokenizer.chat_template:
        return list(beginning_ids(tokenizer)), text
    written = _beginning_text(tokenizer)
    begins = bool(written) and is_begun(tokenizer) and text.startswith(written)
    return (list(beginning_ids(tokenizer)), text[len(written) :]) if begins else ([], text)


def _not_empty(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """``ids``, or for an empty prompt the token that a text may begin with: the model needs something to go on from."""
    if ids:
        return ids
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [begin] if begin is not None else []


def joined(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> str:
    """The completion with a leading space where the prompt as shown ends in a letter or a mark and the completion begins without one.

    Only for plain texts: a chat template itself writes what stands between a prompt and its reply.
    """
    if not is_plain(tokenizer):
        return completion
    shown = render_prompt(tokenizer, prompt)
    if shown and completion and not shown[-1].isspace() and not completion[0].isspace():
        return " " + completion
    return completion


def completion_places(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """For every token of a completion, as ``encode_pair`` encodes it, the character of ``completion`` at which it begins.

    Tokens before the completion's first character are at 0, those after its last (the turn end) at its length.
    """
    ids, length = encode_pair(tokenizer, prompt, completion, sampled=True)
    _, written = render_pair(tokenizer, prompt, completion, sampled=True)
    own = completion.strip()
    shift = max(written.rfind(own), 0) - (len(completion) - len(completion.lstrip()))
    context = ids[max(0, length - CONTEXT) : length]
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    start = len(decode(context))
    places = [len(decode(ids[max(0, length - CONTEXT) : end])) - start - shift for end in range(length, len(ids))]
    for index in range(len(places) - 2, -1, -1):  # half a character decodes to a stand-in that may be longer than what it becomes
        places[index] = min(places[index], places[index + 1])
    return [min(max(0, place), len(completion)) for place in places]


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """How many tokens a text has, without those that a template adds."""
    return lambda text: len(plain_ids(tokenizer, text))
