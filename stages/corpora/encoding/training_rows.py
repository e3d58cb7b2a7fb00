"""Convert demonstrations to training rows: tokens, and a mask of the tokens that count in the loss.

The trained tokens are what the chat template writes for assistant turns: from the end of the generation prompt to the start of the next
turn, including the end-of-turn marker and a line end after it. If the template has generation markers, they define the trained tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stages.corpora.conversations.messages import (
    Conversation,
    Message,
    arguments_of,
    as_question,
    as_turns,
    errors_at,
    simplified,
    tools_of,
)
from stages.corpora.demonstrations import Demonstration
from stages.corpora.templates import encode_pair, encode_segments, in_template_form, render_pair, rendered
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.tokens.continuation import plain_ids, shared_ids
from stages.tokens.dates import give_date
from stages.tokens.template_arguments import used_arguments
from stages.tokens.turns import first_difference, template_for, turn_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all_assistant_turns", "last_reply"]
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TrainingRow:
    """Token ids [T], loss mask [T] (1 = trained), and the number of tokens before the first one that may be trained."""

    ids: list[int]
    prompt_length: int
    trained: list[int]

    @property
    def trains_all(self) -> bool:
        """Whether every token after the first ``prompt_length`` is trained."""
        return all(self.trained[self.prompt_length :])


def training_rows(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration, *, train_on: TrainOn) -> list[TrainingRow]:
    """The training rows of one demonstration: usually one row with all trained assistant turns.

    Some templates write a reply differently when other turns follow it (they drop earlier think blocks). Such a reply gets its own row,
    which ends with it, so the model learns it in the form that it must generate. A reply with ``weight: 0`` is context only; the list is
    empty if all replies are. Raises DataError with the row's location.
    """
    with errors_at(demonstration.location):
        messages, replies = _trained_turns(demonstration, train_on)
        if not replies:
            return []
        if not tokenizer.chat_template:
            ids, length = encode_pair(tokenizer, demonstration["prompt"], demonstration["completion"])
            return [_completion_row(ids, length)]
        if _has_markers(tokenizer, messages.tools):
            return _by_markers(tokenizer, messages, replies)
        return _by_prefixes(tokenizer, messages, replies)


def _trained_turns(demonstration: Demonstration, train_on: TrainOn) -> tuple[Conversation, list[int]]:
    """Return (full conversation, indices of the trained turns)."""
    prompt = demonstration["prompt"]
    opening = as_question(prompt) if isinstance(prompt, str) else list(prompt)
    messages = Conversation(
        [*opening, *as_turns(demonstration["completion"])],
        tools=tools_of(prompt),
        arguments=arguments_of(prompt),
        location=demonstration.location,
    )
    first = len(messages) - 1 if train_on == "last_reply" else 0 if demonstration.is_full_conversation else len(opening)
    first = max(first, 1)  # an assistant turn at index 0 answers nothing, so it is not trained on
    replies = [turn for turn in range(first, len(messages)) if messages[turn]["role"] == "assistant"]
    return messages, [turn for turn in replies if messages[turn].get("weight") != 0]


def has_untrained_reply(demonstration: Demonstration) -> bool:
    """Whether a reply has ``weight: 0``."""
    turns = [*(demonstration["prompt"] if isinstance(demonstration["prompt"], list) else []), *as_turns(demonstration["completion"])]
    return any(turn["role"] == "assistant" and turn.get("weight") == 0 for turn in turns)


def _completion_row(ids: list[int], length: int) -> TrainingRow:
    return TrainingRow(ids, length, [0] * length + [1] * (len(ids) - length))


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: Conversation, replies: Sequence[int]) -> list[TrainingRow]:
    """Build rows by comparing the full conversation with what the template writes up to each reply."""
    if list(replies) == [len(messages) - 1]:
        return [_completion_row(*encode_pair(tokenizer, messages.part(replies[0]), simplified(messages[-1:])))]
    full_text = rendered(tokenizer, messages, messages, generation_prompt=False)
    form = turn_form(tokenizer, messages.arguments)
    cuts, apart = [0], []
    for turn in replies:
        prompt, reply = messages.part(turn), simplified(messages[turn : turn + 1])
        shown, written = render_pair(tokenizer, prompt, reply)
        if not full_text.startswith(shown + written):  # some templates write more than an end of turn after the last reply
            written = written.removesuffix(form.ending) + form.turn_end
        if full_text.startswith(shown + written) and len(shown) >= cuts[-1]:
            cuts += [len(shown), len(shown) + len(written)]
        else:
            apart.append(_completion_row(*encode_pair(tokenizer, prompt, reply)))
    if len(cuts) == 1:
        return apart
    parts = encode_segments(tokenizer, [full_text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)])
    trained = [index % 2 for index, part in enumerate(parts) for _ in part]
    return [TrainingRow([token for part in parts for token in part], len(parts[0]), trained), *apart]


def _has_markers(tokenizer: PreTrainedTokenizerBase, tools: Sequence[JsonObject]) -> bool:
    return bool(tokenizer.is_fast and _MARKER.search(template_for(tokenizer, tools)))


def _by_markers(tokenizer: PreTrainedTokenizerBase, messages: Conversation, replies: Sequence[int]) -> list[TrainingRow]:
    """Build rows whose trained tokens are enclosed by the template's generation markers. Rewritten replies get their own rows."""
    full_text = rendered(tokenizer, messages, messages, generation_prompt=False)
    apart = [turn for turn in replies if not _is_unchanged(tokenizer, messages, turn, full_text)]
    kept = [turn for turn in replies if turn not in apart]
    rows = [_marked_row(tokenizer, messages, kept)] if kept else []
    return rows + [_marked_row(tokenizer, messages.part(turn + 1), [turn]) for turn in apart]


def _is_unchanged(tokenizer: PreTrainedTokenizerBase, messages: Conversation, turn: int, full_text: str) -> bool:
    """Whether the template writes the conversation up to ``turn`` in the same way if other turns follow it."""
    if turn == len(messages) - 1:
        return True
    form = turn_form(tokenizer, messages.arguments)
    until = rendered(tokenizer, messages.part(turn + 1), messages, generation_prompt=False).removesuffix(form.surplus)
    return full_text.startswith(until) or full_text.startswith(until.removesuffix(form.ending) + form.turn_end)


def _marked_row(tokenizer: PreTrainedTokenizerBase, messages: Conversation, replies: Sequence[int]) -> TrainingRow:
    """One row of a conversation. Only tokens of ``replies`` that the generation markers enclose are trained."""
    contents: list[Message] = in_template_form(tokenizer, messages, messages.arguments)
    template = template_for(tokenizer, messages.tools)
    give_date(template)
    encoded: Any = tokenizer.apply_chat_template(
        contents,
        tools=[*messages.tools] or None,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **used_arguments(tokenizer, template, messages.arguments),
    )
    ids, marked = shared_ids(encoded["input_ids"]), list(encoded["assistant_masks"])
    before = rendered(tokenizer, messages[: replies[0]], messages, generation_prompt=False)
    length = first_difference(plain_ids(tokenizer, before), ids)
    trained = [0] * length + marked[length:]
    for turn in range(replies[0] + 1, len(messages)):
        if messages[turn]["role"] == "assistant" and turn not in replies:  # a reply with weight 0, or one with its own row
            start, end = (
                first_difference(plain_ids(tokenizer, rendered(tokenizer, messages[:cut], messages, generation_prompt=False)), ids)
                for cut in (turn, turn + 1)
            )
            trained[start:end] = [0] * (end - start)
    if not any(trained):
        raise DataError("the generation markers of the model's chat template enclose none of the trained replies")
    return TrainingRow(ids, length, trained)
