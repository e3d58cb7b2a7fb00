"""Tokens of a text that continues another: the tokens that come first stay as they are, and no space is made up between the two.

At sampling time the tokens of the prompt are there before those of the completion. So both are encoded as the one text that they make,
and cut at the end of the prompt. Encoding the completion by itself is not the same: SentencePiece puts a space before every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

ANCHORS = ("\n", "a", "0", ".", ":")
"""Characters after which a text is encoded where its own beginning would be merged with the end of the prompt."""
CONTEXT = 8  # tokens of the prompt before which a completion is decoded

_beginnings: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` alone: nothing that the tokenizer puts before or after every text."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def beginning_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text, such as ``<s>`` or ``<bos>``; often none."""
    if tokenizer not in _beginnings:
        alone, whole = plain_ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
        places = [place for place in range(len(whole) - len(alone) + 1) if whole[place : place + len(alone)] == alone]
        _beginnings[tokenizer] = whole[: places[0]] if places else []
    return _beginnings[tokenizer]


def segment_ids(tokenizer: Any, segments: Sequence[str]) -> list[list[int]]:
    """Token ids of every segment of one text, each encoded as the continuation of those before it."""
    text = ""
    ids: list[int] = []
    parts: list[list[int]] = []
    for segment in segments:
        parts.append(continued(tokenizer, text, ids, segment))
        text, ids = text + segment, ids + parts[-1]
    return parts


def continued(tokenizer: Any, text: str, ids: list[int], addition: str) -> list[int]:
    """Token ids of ``addition`` where it follows ``text``, whose tokens are ``ids`` and stay so.

    Where the tokenizer merges the end of ``text`` with the beginning of ``addition``, the addition is encoded after another character, so
    that it is still no beginning of a text. The candidate that decodes as the whole text does is taken.
    """
    if not addition:
        return []
    whole = plain_ids(tokenizer, text + addition)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    candidates = [found for anchor in (text[-1:], *ANCHORS) if (found := _after(tokenizer, anchor, addition)) is not None]
    candidates.append(plain_ids(tokenizer, addition))
    expected = _text(tokenizer, whole)
    return next((found for found in candidates if _text(tokenizer, ids + found) == expected), candidates[0])


def _after(tokenizer: Any, anchor: str, addition: str) -> list[int] | None:
    """Token ids of ``addition`` behind ``anchor``; None where the two are merged."""
    head, both = plain_ids(tokenizer, anchor), plain_ids(tokenizer, anchor + addition)
    return both[len(head) :] if head and both[: len(head)] == head else None


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def continuation_text(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` where they follow the tokens ``before``, without special tokens: the inverse of ``continued``."""
    context = list(before)[-CONTEXT:]
    head = tokenizer.decode(context, skip_special_tokens=True)
    both = tokenizer.decode([*context, *ids], skip_special_tokens=True)
    return str(both[len(head) :] if both.startswith(head) else tokenizer.decode(list(ids), skip_special_tokens=True))
