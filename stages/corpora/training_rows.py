"""Demonstrations as rows to train on: their tokens, and which of them count in the loss.

What trains is what the chat template writes for the assistant's turns: all from the end of the generation prompt to where the next turn
begins, so the turn end and a line end after it, too. A template with generation markers says itself which tokens those are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stages.corpora.demonstrations import Demonstration
from stages.corpora.messages import Conversation, Message, as_question, as_turns, naming, simplified, tools_of
from stages.corpora.templates import encode_pair, encode_segments, in_its_form, render_pair, rendered
from stages.errors import DataError
from stages.tokens.continuation import plain_ids
from stages.tokens.turns import first_difference, turn_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all_assistant_turns", "last_reply"]
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TrainingRow:
    """Tokens [T] of a demonstration, 1 where a token trains and 0 elsewhere [T], and how many stand before the first that may train."""

    ids: list[int]
    prompt_length: int
    trained: list[int]


def training_rows(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration, *, train_on: TrainOn) -> list[TrainingRow]:
    """The rows of one demonstration: usually one, with every assistant turn that trains.

    A reply that the template writes differently once other turns follow it, as those do that drop earlier think blocks, gets a row of its
    own, which ends with it: so the model learns it where it will have to say it. Raises DataError with the row's place.
    """
    with naming(demonstration.place):
        messages, replies = _trained_turns(demonstration, train_on)
        if not tokenizer.chat_template:
            ids, length = encode_pair(tokenizer, demonstration["prompt"], demonstration["completion"])
            return [_whole_completion(ids, length)]
        if _has_markers(tokenizer, messages.tools):
            return [_by_markers(tokenizer, messages, replies)]
        return _by_prefixes(tokenizer, messages, replies)


def _trained_turns(demonstration: Demonstration, train_on: TrainOn) -> tuple[Conversation, list[int]]:
    """(the whole conversation, the numbers of the turns that train)."""
    prompt = demonstration["prompt"]
    opening = as_question(prompt) if isinstance(prompt, str) else list(prompt)
    messages = Conversation([*opening, *as_turns(demonstration["completion"])], tools=tools_of(prompt), place=demonstration.place)
    if train_on == "last_reply":
        return messages, [len(messages) - 1]
    first = 0 if demonstration.whole else len(opening)
    # A conversation that the assistant begins has nothing to answer there.
    return messages, [turn for turn in range(max(first, 1), len(messages)) if messages[turn]["role"] == "assistant"]


def _before(messages: Conversation, turn: int) -> Conversation:
    return Conversation(messages[:turn], tools=messages.tools, place=messages.place)


def _whole_completion(ids: list[int], length: int) -> TrainingRow:
    return TrainingRow(ids, length, [0] * length + [1] * (len(ids) - length))


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: Conversation, replies: Sequence[int]) -> list[TrainingRow]:
    """Rows by comparing the whole conversation with what the template writes up to each reply."""
    if list(replies) == [len(messages) - 1]:
        return [_whole_completion(*encode_pair(tokenizer, _before(messages, replies[0]), simplified(messages[-1:])))]
    whole = rendered(tokenizer, messages, messages, generation_prompt=False)
    form = turn_form(tokenizer)
    cuts, apart = [0], []
    for turn in replies:
        prompt, reply = _before(messages, turn), simplified(messages[turn : turn + 1])
        shown, written = render_pair(tokenizer, prompt, reply)
        if not whole.startswith(shown + written):  # some templates close a conversation with more than a turn
            written = written.removesuffix(form.ending) + form.turn_end
        if whole.startswith(shown + written) and len(shown) >= cuts[-1]:
            cuts += [len(shown), len(shown) + len(written)]
        else:
            apart.append(_whole_completion(*encode_pair(tokenizer, prompt, reply)))
    if len(cuts) == 1:
        return apart
    parts = encode_segments(tokenizer, [whole[start:end] for start, end in zip(cuts, cuts[1:], strict=False)])
    trained = [number % 2 for number, part in enumerate(parts) for _ in part]
    return [TrainingRow([token for part in parts for token in part], len(parts[0]), trained), *apart]


def _has_markers(tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]]) -> bool:
    template = tokenizer.get_chat_template(None, tools or None)
    return bool(tokenizer.is_fast and _MARKER.search(template))


def _by_markers(tokenizer: PreTrainedTokenizerBase, messages: Conversation, replies: Sequence[int]) -> TrainingRow:
    """The row whose trained tokens are those that the template's generation markers enclose, after the turns before the first reply."""
    rendered(tokenizer, messages, messages, generation_prompt=False)  # raises for what the template refuses or drops
    contents: list[Message] = in_its_form(tokenizer, messages)
    encoded: Any = tokenizer.apply_chat_template(
        contents, tools=messages.tools or None, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marked = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    before = rendered(tokenizer, messages[: replies[0]], messages, generation_prompt=False)
    length = first_difference(plain_ids(tokenizer, before), ids)
    trained = [0] * length + marked[length:]
    if not any(trained):
        raise DataError("the generation markers of the model's chat template enclose none of the replies that train")
    return TrainingRow(ids, length, trained)
