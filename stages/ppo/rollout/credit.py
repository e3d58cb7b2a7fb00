"""Assign scores with a text position (spans) to the tokens at that position. B sequences, R response tokens."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.rewards.source import Spans
from stages.tokens.continuation import continuation_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_scores(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    spans: Spans,
    width: int,
) -> Tensor:
    """Scores [B, width] of the response tokens (ids, one list per row). A span's score goes to the token that wrote the character at its
    position, or to the last token if the position is the end of the text.

    Positions count from the first non-white-space character, because completions are stripped. Responses are decoded as continuations of
    their prompts, as the completions are: some tokenizers decode a word differently at the beginning of a text.
    """
    paid = torch.zeros(len(responses), width)
    for row, (prompt, ids, row_spans) in enumerate(zip(prompt_ids, responses, spans, strict=True)):
        if not row_spans:
            continue
        ends = _ends(tokenizer, prompt, ids)
        for position, score in row_spans:
            paid[row, min(bisect.bisect_right(ends, position), len(ids) - 1)] += score
    return paid


def _ends(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> list[int]:
    """For each token of a response, the position in the stripped text where the token ends. It never decreases."""
    # Prefixes are decoded instead of single tokens: a character may take several tokens, and a space may belong to either side.
    written = [continuation_text(tokenizer, prompt, ids[: end + 1]) for end in range(len(ids))]
    stripped = len(written[-1]) - len(written[-1].lstrip())
    ends = [len(text) - stripped for text in written]
    for end in range(len(ends) - 2, -1, -1):  # an incomplete character decodes to a placeholder that may be longer
        ends[end] = min(ends[end], ends[end + 1])
    return ends
