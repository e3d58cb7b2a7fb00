"""Which token is paid what: scores with a place in the text (spans) at the tokens that wrote it. B sequences, R response tokens."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.rewards.source import Spans


def token_scores(tokenizer: Any, responses: Sequence[list[int]], spans: Spans, width: int) -> Tensor:
    """Scores [B, width] of the response tokens (ids, one list per row): a span's score goes to the token that wrote the character at its
    position, and to the last token where it stands at the text's end.

    Positions count from the first character that is no white space, as completions are stripped of it.
    """
    paid = torch.zeros(len(responses), width)
    for row, (ids, found) in enumerate(zip(responses, spans, strict=True)):
        if not found:
            continue
        # Prefixes and not tokens are decoded: one character may take several tokens, and a space may belong to either side.
        written = tokenizer.batch_decode([ids[: end + 1] for end in range(len(ids))], skip_special_tokens=True)
        stripped = len(written[-1]) - len(written[-1].lstrip())
        ends = [len(text) - stripped for text in written]
        for end in range(len(ends) - 2, -1, -1):  # half a character decodes to a stand-in that may be longer than what it becomes
            ends[end] = min(ends[end], ends[end + 1])
        for place, score in found:
            paid[row, min(bisect.bisect_right(ends, place), len(ids) - 1)] += score
    return paid
