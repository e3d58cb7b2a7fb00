"""Long prompts made to fit without harming their form: a part of the text is cut at its last line end, again and again.

openai/summarize-from-feedback and Huang et al. 2024, ``process_query``: the post loses its last lines, and never the "TL;DR:" behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.config import Strict
from stages.corpora.messages import Prompt, naming, place_of
from stages.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptFit(Strict):
    """Shorten prompts that are too long. The part that is cut lies between ``after`` and ``before``."""

    max_tokens: int = Field(512, ge=1, description="Most tokens of a prompt, as the model is shown it.")
    after: str = Field("", description="The part begins behind the first occurrence of this text; empty: with the prompt.")
    before: str = Field("", description="The part ends before the last occurrence of this text; empty: with the prompt.")
    at: str = Field("\n", min_length=1, description="Cut at the last of these; where none is left, by one character.")


def fit_prompt(prompt: Prompt, fit: PromptFit, tokenizer: PreTrainedTokenizerBase, place: str = "") -> Prompt:
    """``prompt``, or its shortened form with at most ``fit.max_tokens`` tokens.

    Raises DataError, with the row's ``place`` where it is known, where the part that may be cut is not there or not long enough, and for a
    conversation that is too long.
    """
    with naming(place or place_of(prompt)):
        return _fitted(prompt, fit, tokenizer)


def _fitted(prompt: Prompt, fit: PromptFit, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    from stages.corpora.templates import encode_prompt

    if len(encode_prompt(tokenizer, prompt)) <= fit.max_tokens:
        return prompt
    if not isinstance(prompt, str):
        raise DataError(f"prompt_fit: a conversation of more than {fit.max_tokens} tokens; only a prompt of plain text can be shortened")
    begin, end = prompt.find(fit.after), prompt.rfind(fit.before)
    if begin < 0 or end < begin + len(fit.after):
        raise DataError(f"prompt_fit: {prompt[:60]!r}... has no part between {fit.after!r} and {fit.before!r} that could be shortened")
    head, part, tail = prompt[: begin + len(fit.after)], prompt[begin + len(fit.after) : end], prompt[end:]
    while part:
        place = part.rfind(fit.at)
        part = part[: place if place >= 0 else -1]
        if len(encode_prompt(tokenizer, head + part + tail)) <= fit.max_tokens:
            return head + part + tail
    raise DataError(f"prompt_fit: {prompt[:60]!r}... is longer than {fit.max_tokens} tokens even without the part that may be cut")
