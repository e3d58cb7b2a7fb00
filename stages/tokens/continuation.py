"""Encode a text that continues another one: the first tokens do not change, and no space is inserted between the two.

During sampling the prompt's tokens come first. So prompt and completion are encoded as one text and split at the end of the prompt.
Encoding the completion alone would give different tokens, e.g. SentencePiece puts a space before every text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", "a", "0", ".", ":")
"""Characters to put before a text if its beginning would be merged with the end of the prompt."""
CONTEXT = 8  # prompt tokens used as context to decode a completion

_objects: dict[int, int] = {}  # by token id
_beginnings: WeakKeyDictionary[PreTrainedTokenizerBase, list[int]] = WeakKeyDictionary()


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` without the tokens that the tokenizer adds before or after every text."""
    return shared_ids(tokenizer(text, add_special_tokens=False)["input_ids"])


def shared_ids(ids: list[int]) -> list[int]:
    """``ids`` with one object per token id. Those of the tokenizer are new in every text, and each needs 28 bytes."""
    return list(map(_objects.setdefault, ids, ids))


def beginning_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer adds before every text, such as ``<s>`` or ``<bos>``; often none."""
    if tokenizer not in _beginnings:
        text = _encodable(tokenizer)
        alone, full_ids = plain_ids(tokenizer, text), list(tokenizer(text)["input_ids"])
        starts = [start for start in range(len(full_ids) - len(alone) + 1) if full_ids[start : start + len(alone)] == alone]
        _beginnings[tokenizer] = full_ids[: starts[0]] if starts else []
    return _beginnings[tokenizer]


def _encodable(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text that has tokens: "a", or the first token of a vocabulary without it, if the tokenizer drops unknown characters."""
    special = set(tokenizer.all_special_ids)
    others = (str(tokenizer.decode([token])) for token in range(len(tokenizer)) if token not in special)
    return next((text for text in itertools.chain("a", others) if plain_ids(tokenizer, text)), "a")


def segment_ids(tokenizer: PreTrainedTokenizerBase, segments: Sequence[str]) -> list[list[int]]:
    """Token ids of consecutive segments of a text, each encoded as a continuation of the previous ones."""
    text = ""
    ids: list[int] = []
    parts: list[list[int]] = []
    for segment in segments:
        parts.append(continued(tokenizer, text, ids, segment))
        text, ids = text + segment, ids + parts[-1]
    return parts


def continued(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], addition: str) -> list[int]:
    """Token ids of ``addition`` after ``text``, whose tokens ``ids`` do not change.

    If the tokenizer merges the end of ``text`` with the beginning of ``addition``, the addition is encoded after a different character, so
    that it still is not encoded as the start of a text. The first candidate that decodes to the full text is used.
    """
    if not addition:
        return []
    full_ids = plain_ids(tokenizer, text + addition)
    if full_ids[: len(ids)] == ids:
        return full_ids[len(ids) :]
    candidates = [ids_after for anchor in (text[-1:], *ANCHORS) if (ids_after := _after(tokenizer, anchor, addition)) is not None]
    candidates.append(plain_ids(tokenizer, addition))
    expected = _text(tokenizer, full_ids)
    return next((ids_after for ids_after in candidates if _text(tokenizer, ids + ids_after) == expected), candidates[0])


def _after(tokenizer: PreTrainedTokenizerBase, anchor: str, addition: str) -> list[int] | None:
    """Token ids of ``addition`` after ``anchor``; None if the two are merged, also to one unknown token."""
    head, both = plain_ids(tokenizer, anchor), plain_ids(tokenizer, anchor + addition)
    return both[len(head) :] or None if head and both[: len(head)] == head else None


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def continuation_text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` after the tokens ``before``, without special tokens: the inverse of ``continued``."""
    context = list(before)[-CONTEXT:]
    if not tokenizer.is_fast:  # its decoder fails at rows of the embedding beyond its tokens; other decoders write nothing for them
        ids = [token for token in ids if token < len(tokenizer)]

    def decoded(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    head, both = decoded(context), decoded([*context, *ids])
    return both[len(head) :] if both.startswith(head) else decoded(ids)
