"""Render prompts and completions with a model's chat template, and encode them as tokens.

The template is the tokenizer's ``chat_template``, so it is stored with the model. A completion is what the template writes after the
rendered prompt: the reply, its end-of-turn marker and anything around them. A model without a template gets the plain text: a space is
inserted before the completion if neither side has one, and the end token is appended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from stages.corpora.conversations.messages import (
    ARGUMENTS,
    REASONING,
    Completion,
    Conversation,
    Message,
    Prompt,
    arguments_of,
    as_question,
    as_turns,
    columns_beside,
    content_text,
    errors_at,
    in_reasoning_form,
    location_of,
    tools_of,
)
from stages.corpora.conversations.tool_calls import in_argument_form
from stages.errors import DataError, ModelError
from stages.json_types import JsonObject
from stages.tokens.continuation import CONTEXT, beginning_ids, continued, plain_ids, segment_ids
from stages.tokens.plain import is_begun, is_plain, plain_template
from stages.tokens.template_arguments import template_variables, used_arguments
from stages.tokens.turns import TurnForm, apply_template, argument_form, first_difference, first_special, template_for, turn_form, up_to

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
PLAIN_TEMPLATES = {
    "plain": "{prompt}",
    "instruction": "### Instruction:\n{prompt}\n\n### Response:\n",
    "dialogue": "\n\nHuman: {prompt}\n\nAssistant:",
    "question": "Question: {prompt}\nAnswer:",
    "tldr": "{prompt}\n\nTL;DR:",
}
SHORT = 12  # characters; the text of a shorter turn may also be a part of other words
NAMED_ROLES = ("system", "developer", "user", "assistant")  # the name of a tool's result is known from its call
OTHER_WORDS = "tristage asks for something else"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat format of SmolLM and Qwen. It adds no system turn."""


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Set the tokenizer's template: ``chat`` (keep its own), ``chatml``, a name of PLAIN_TEMPLATES, or a text with ``{prompt}``.

    A plain template begins with the tokens that the tokenizer puts before every text. Raises ModelError for ``chat`` if the tokenizer has
    no template, for ``chatml`` if the tokenizer lacks its tokens, and for a text without ``{prompt}``.
    """
    if template == "chatml":
        _set_chatml(tokenizer)
        return
    if template == "chat":
        if not tokenizer.chat_template:
            names = ", ".join(PLAIN_TEMPLATES)
            raise ModelError(
                f"template: chat, but the tokenizer has no chat template; set chatml, one of {names}, or a text with {{prompt}}"
            )
        return
    text = PLAIN_TEMPLATES.get(template, template)
    if text.count("{prompt}") != 1:
        raise ModelError(
            f"template {template!r}: expected chat, chatml, one of {', '.join(PLAIN_TEMPLATES)}, or a text with {{prompt}} once"
        )
    before, after = text.split("{prompt}")
    tokenizer.chat_template = plain_template(_beginning_text(tokenizer), before, after)


def _set_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set ChatML. Both marks must be tokens of the vocabulary: generation stops at ``<|im_end|>``."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CHATML_TOKENS if token not in vocabulary]
    if missing:
        raise ModelError(
            f"template: chatml, and the tokenizer has no token {', '.join(missing)}; name a plain template ({', '.join(PLAIN_TEMPLATES)})"
        )
    tokenizer.chat_template = CHATML


def _beginning_text(tokenizer: PreTrainedTokenizerBase) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(beginning_ids(tokenizer)))


# Rendering


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the model sees before it answers.

    Raises DataError (with the row's location if known) for a conversation that the template rejects, for tools or tool calls that it would
    drop, and for a conversation if the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        return _bare(prompt)
    messages = as_question(prompt) if isinstance(prompt, str) else prompt
    return rendered(tokenizer, messages, prompt, generation_prompt=True)


def render_pair(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion, *, sampled: bool = False) -> tuple[str, str]:
    """Return (prompt text, completion text). Together they are what the template writes for the full conversation.

    Some generation prompts open a think block, while the template drops think blocks from replies. Such a prompt is followed by the reply
    unchanged, if the reply closes the block. ``sampled=True`` also accepts a reply that never closes it (a truncated sample).

    Raises DataError as ``render_prompt`` does, and if the full conversation does not begin with the rendered prompt.
    """
    shown = render_prompt(tokenizer, prompt)
    if not tokenizer.chat_template:
        return shown, joined(tokenizer, prompt, _bare_completion(prompt, completion))
    form = turn_form(tokenizer, arguments_of(prompt))
    turns = [in_reasoning_form(turn, form.reasoning) for turn in as_turns(completion)]
    messages = [*(as_question(prompt) if isinstance(prompt, str) else prompt), *turns]
    reply = content_text(turns[-1])
    closes = bool(form.closing) and (form.closing in reply or any(turns[-1].get(name) for name in REASONING))
    if len(turns) == 1 and form.closing and sampled and not closes:
        return shown, reply + form.ending
    full_text = rendered(tokenizer, messages, prompt, generation_prompt=False).removesuffix(form.surplus)
    if full_text.startswith(shown):
        return shown, full_text[len(shown) :]
    if len(turns) == 1 and closes and turns[0].keys() <= {"role", "content"}:
        return shown, reply.removeprefix(form.opening).removeprefix(form.opening.strip()) + form.ending
    if not isinstance(prompt, str) and len(prompt) > 1 and len(turns) == 1:
        opening = shown.removeprefix(rendered(tokenizer, prompt, prompt, generation_prompt=False))
        written = after_a_question(tokenizer, turns, arguments_of(prompt))
        if written and opening and full_text.endswith(opening + written):
            return shown, written
    raise DataError(_at(prompt) + _unstable(tokenizer, shown, full_text, form))


def after_a_question(tokenizer: PreTrainedTokenizerBase, turns: list[Message], arguments: JsonObject) -> str:
    """The text that the template writes for a reply to a single question; empty if it does not continue the rendered question."""
    try:
        return render_pair(tokenizer, Conversation(as_question(OTHER_WORDS), arguments=arguments), turns)[1]
    except DataError:
        return ""


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: Prompt, *, generation_prompt: bool) -> str:
    """Apply the chat template to ``messages`` with tools and arguments of ``prompt``. Raises DataError as ``render_prompt`` does."""
    tools, arguments = tools_of(prompt), arguments_of(prompt)
    with errors_at(location_of(prompt)):
        contents = in_template_form(tokenizer, messages, arguments)
    if unused := sorted(arguments.keys() - used_arguments(tokenizer, template_for(tokenizer, tools), arguments).keys()):
        logger.warning("the model's chat template does not use %s of %s; the values are ignored", ", ".join(unused), ARGUMENTS)
    write = partial(apply_template, tokenizer, arguments=arguments)
    text = write(contents, generation_prompt=generation_prompt, tools=tools, location=location_of(prompt))
    lost = _lost(tokenizer, write, contents, tools, text, generation_prompt=generation_prompt)
    if lost:
        raise DataError(
            f"{_at(prompt)}the model's chat template drops {lost}; use a model whose template keeps it, or remove it from the data"
        )
    named = [turn for turn, message in enumerate(contents) if message.get("name") and message["role"] in NAMED_ROLES]
    if named:
        bare = [_without(contents, turn, ("name",))[turn] if turn in named else message for turn, message in enumerate(contents)]
        if write(bare, generation_prompt=generation_prompt, tools=tools) == text:
            logger.warning("the model's chat template does not write the field name of messages, so the model does not see who speaks")
    if messages and messages[-1]["role"] == "assistant" and not generation_prompt:
        return text + _borrowed(tokenizer, write, contents, tools, arguments, text)
    return text


def check_rendering(tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[Prompt, Sequence[Completion], str]]) -> None:
    """Render every conversation and the first text of the rows (prompt, completions, location). Needs only the tokenizer.

    Raises DataError with the location of the first row that the chat template rejects, truncates, or does not write as a continuation of
    its prompt.
    """
    seen_text = False
    for prompt, completions, location in rows:
        if isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions):
            if seen_text:
                continue
            seen_text = True
        with errors_at(location):
            render_prompt(tokenizer, prompt)
            for completion in completions:
                render_pair(tokenizer, prompt, completion)


def _at(prompt: object) -> str:
    location = location_of(prompt)
    return f"{location}: " if location else ""


def _bare(prompt: Prompt) -> str:
    """The prompt for a model without a template: it must be a text."""
    if isinstance(prompt, str):
        return prompt
    columns = " and ".join(columns_beside(prompt))
    reason, move = (f"the row has {columns}", f", or remove {columns} from the data") if columns else ("the prompt is a conversation", "")
    raise DataError(f"{_at(prompt)}{reason}, but the model has no chat template; set template in its sft step{move}")


def _bare_completion(prompt: Prompt, completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    raise DataError(f"{_at(prompt)}the completion has several turns, but the model has no chat template; set template in its sft step")


def _borrowed(
    tokenizer: PreTrainedTokenizerBase,
    write: Callable[..., str],
    messages: Sequence[Message],
    tools: Sequence[JsonObject],
    arguments: JsonObject,
    text: str,
) -> str:
    """The end of the last reply if the template writes it only before the next turn: after tool calls that of a tool's result."""
    form = turn_form(tokenizer, arguments)
    if not form.borrowed or not messages[-1].get("tool_calls"):
        return form.borrowed
    try:
        after = write([*messages, {"role": "tool", "content": OTHER_WORDS}], generation_prompt=False, tools=tools)
    except DataError:
        return ""
    following = after.removeprefix(text) if after.startswith(text) else ""
    return up_to(following, tokenizer, first_special(tokenizer, following))


def _lost(
    tokenizer: PreTrainedTokenizerBase,
    write: Callable[..., str],
    messages: Sequence[Message],
    tools: Sequence[JsonObject],
    text: str,
    *,
    generation_prompt: bool,
) -> str:
    """Describe what the template drops from a conversation; empty if nothing is missing from ``text``.

    ``write``: ``apply_template`` with the tokenizer and the arguments of the row.

    Reasoning before the last reply may be missing, because many templates drop it on purpose. A template may write a turn in another form
    (without its line breaks, or without a mark such as /no_think): the turn is dropped if other words in it would change nothing.
    """

    def makes_no_difference(others: Sequence[Message], tools: Sequence[JsonObject]) -> bool:
        try:
            return write(others, generation_prompt=generation_prompt, tools=tools) == text
        except DataError:
            return False

    asked = [] if is_plain(tokenizer) else [turn for turn, message in enumerate(messages) if message["role"] != "assistant"]
    contents = {turn: content_text(messages[turn]).strip() for turn in asked}
    for turn, content in contents.items():
        needed = sum(content in other for other in contents.values())
        is_doubtful = len(content) < SHORT or text.count(content) < needed
        if content and is_doubtful and makes_no_difference(_with_content(messages, turn, OTHER_WORDS), tools):
            return f"the {messages[turn]['role']} turn {content!r:.60}"
    if tools and makes_no_difference(messages, ()):
        return f"the tools of the row ({', '.join(map(_name, tools))})"
    for turn, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        missing = calls if calls and makes_no_difference(_without(messages, turn, ("tool_calls",)), tools) else []
        if len(calls) > 1 and not missing:  # gpt-oss writes only the first one
            others = ([*calls[:index], *calls[index + 1 :]] for index in range(len(calls)))
            missing = [
                call for call, kept in zip(calls, others, strict=True) if makes_no_difference(_with(messages, turn, tool_calls=kept), tools)
            ]
        if missing:
            return f"tool calls ({', '.join(map(_name, missing))})"
        if calls and (beside := _lost_beside_calls(write, messages[: turn + 1], tools, text)):
            return f"the text {beside!r:.60} beside tool calls"
    last = len(messages) - 1
    thought = messages[last]["role"] == "assistant" and any(messages[last].get(name) for name in REASONING)
    return "the reasoning of the last reply" if thought and makes_no_difference(_without(messages, last, REASONING), tools) else ""


def _lost_beside_calls(write: Callable[..., str], until: Sequence[Message], tools: Sequence[JsonObject], text: str) -> str:
    """The text of the last turn of ``until``, which has tool calls, if the template drops it; else empty.

    Later turns may remove it from ``text`` on purpose: gpt-oss takes it for reasoning.
    """
    content = content_text(until[-1]).rpartition("</think>")[2].strip()
    if not content or content in text:
        return ""
    said = (until, _with_content(until, len(until) - 1, OTHER_WORDS))
    return content if len({write(one, generation_prompt=False, tools=tools) for one in said}) == 1 else ""


def _with_content(messages: Sequence[Message], turn: int, text: str) -> list[Message]:
    """The messages, with another text in one of them, in the form of its content."""
    content = [{"type": "text", "text": text}] if isinstance(messages[turn].get("content"), list) else text
    return _with(messages, turn, content=content)


def _with(messages: Sequence[Message], turn: int, **fields: object) -> list[Message]:
    """The messages, with other values of some fields in one of them."""
    return [*messages[:turn], {**messages[turn], **fields}, *messages[turn + 1 :]]


def _without(messages: Sequence[Message], turn: int, fields: Sequence[str]) -> list[Message]:
    """The messages, with some fields removed from one of them."""
    bare = {name: value for name, value in messages[turn].items() if name not in fields}
    return [*messages[:turn], bare, *messages[turn + 1 :]]


def _name(tool: JsonObject) -> str:
    inner = tool.get("function")
    return str((inner if isinstance(inner, dict) else tool).get("name"))


def _unstable(tokenizer: PreTrainedTokenizerBase, shown: str, full_text: str, form: TurnForm) -> str:
    switch = next((name for name in ("enable_thinking", "thinking") if name in template_variables(tokenizer)), "")
    same = first_difference(shown, full_text)
    if form.closing:
        opening = form.opening.strip()
        advice = f"the generation prompt opens {opening}: end the reasoning in each reply with {form.closing}. A reply without reasoning "
        advice += f"begins with {opening}{form.closing}{f', or set template_arguments: {{{switch}: false}} of the model' if switch else ''}"
    elif shown.rstrip().endswith("</think>"):
        advice = "the generation prompt has an empty think block: remove the reasoning from the replies"
        advice += f", or set template_arguments: {{{switch}: true}} of the model" if switch else ""
    else:
        advice = "use a chat template that begins each reply with its generation prompt"
    return (
        "the full conversation, as the chat template writes it, does not begin with the rendered prompt: "
        f"...{shown[max(0, same - 10) : same + 30]!r} as a prompt, ...{full_text[max(0, same - 10) : same + 30]!r} with the reply; {advice}"
    )


def in_template_form(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], arguments: JsonObject) -> list[Message]:
    """Convert ``messages`` to the form that the template accepts with the ``arguments`` of the row.

    Content becomes a text, or a list with one text part; tool call arguments become objects, or JSON text. Raises DataError for arguments
    that are not a JSON object if the template needs one.
    """
    form = turn_form(tokenizer, arguments)
    messages = [in_reasoning_form(message, form.reasoning) for message in messages]
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
    """Token ids of a prompt, template included.

    A chat template writes all its special tokens itself. A plain text gets the tokens that the tokenizer puts before every text.
    """
    ids, text = _begun(tokenizer, render_prompt(tokenizer, prompt))
    return _not_empty(tokenizer, ids + plain_ids(tokenizer, text))


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion, *, eos: bool = True, sampled: bool = False
) -> tuple[list[int], int]:
    """Return (token ids of prompt and completion, number of prompt tokens).

    The text is what the template writes, up to its end, including the end-of-turn marker and a line end after it. The prompt's tokens are
    the same as those of the prompt alone. ``eos=False`` leaves out the end of the reply. ``sampled`` and errors: as in ``render_pair``.
    """
    shown, written = render_pair(tokenizer, prompt, completion, sampled=sampled)
    if not eos and tokenizer.chat_template:
        written = written.removesuffix(turn_form(tokenizer, arguments_of(prompt)).ending)
    ids, text = _begun(tokenizer, shown)
    prompt_ids = _not_empty(tokenizer, ids + plain_ids(tokenizer, text))
    completion_ids = continued(tokenizer, text, prompt_ids[len(ids) :] if text else [], written)
    if eos and not tokenizer.chat_template and tokenizer.eos_token_id is not None:
        completion_ids = [*completion_ids, tokenizer.eos_token_id]
    return prompt_ids + completion_ids, len(prompt_ids)


def encode_segments(tokenizer: PreTrainedTokenizerBase, segments: Sequence[str]) -> list[list[int]]:
    """Token ids of each part of a rendered text. Later parts do not change the tokens of earlier ones."""
    ids, first = _begun(tokenizer, segments[0])
    parts = segment_ids(tokenizer, [first, *segments[1:]])
    return [ids + parts[0], *parts[1:]]


def encode_plain_pair(tokenizer: PreTrainedTokenizerBase, text: str, addition: str) -> tuple[list[int], list[int]]:
    """Return (ids of a text, ids of its continuation) without a template. A space is inserted if neither side has one."""
    gap = " " if text and not text[-1].isspace() and not addition[:1].isspace() else ""
    ids = plain_ids(tokenizer, text) if text else []
    return _not_empty(tokenizer, beginning_ids(tokenizer) + ids), continued(tokenizer, text, ids, gap + addition)


def _begun(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], str]:
    """Split a plain text into (ids of its prefix tokens, the rest). For a chat template: no ids and the full text."""
    if not is_plain(tokenizer):
        return [], text
    if not tokenizer.chat_template:
        return list(beginning_ids(tokenizer)), text
    written = _beginning_text(tokenizer)
    begins = bool(written) and is_begun(tokenizer) and text.startswith(written)
    return (list(beginning_ids(tokenizer)), text[len(written) :]) if begins else ([], text)


def _not_empty(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """``ids``, or one start token for an empty prompt, because the model needs at least one token of context."""
    if ids:
        return ids
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [begin] if begin is not None else []


def joined(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> str:
    """Add a space before the completion if the rendered prompt does not end with white space and the completion does not begin with it.

    Only for plain texts; a chat template writes its own separator.
    """
    if not is_plain(tokenizer):
        return completion
    shown = render_prompt(tokenizer, prompt)
    if shown and completion and not shown[-1].isspace() and not completion[0].isspace():
        return " " + completion
    return completion


def token_starts(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """For every token of a completion (encoded by ``encode_pair``), the index of the character of ``completion`` where it begins.

    Tokens before the first character have index 0; tokens after the last one (end of turn) have the completion's length.
    """
    ids, length = encode_pair(tokenizer, prompt, completion, sampled=True)
    _, written = render_pair(tokenizer, prompt, completion, sampled=True)
    own = completion.strip()
    shift = max(written.rfind(own), 0) - (len(completion) - len(completion.lstrip()))
    context = ids[max(0, length - CONTEXT) : length]
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    start = len(decode(context))
    starts = [len(decode(ids[max(0, length - CONTEXT) : end])) - start - shift for end in range(length, len(ids))]
    for index in range(len(starts) - 2, -1, -1):  # an incomplete character decodes to a placeholder that may be longer
        starts[index] = min(starts[index], starts[index + 1])
    return [min(max(0, index), len(completion)) for index in starts]


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """A function that counts the tokens of a text, without template tokens."""
    return lambda text: len(plain_ids(tokenizer, text))
