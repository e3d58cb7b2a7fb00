"""Shorten prompts that are too long: a chosen part of the text is cut at its last line end, repeatedly, until the prompt fits.

As openai/summarize-from-feedback and Huang et al. 2024, ``process_query``: the post loses its last lines, but the final "TL;DR:" stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.config import Strict
from stages.corpora.conversations.messages import Prompt, errors_at, location_of
from stages.corpora.templates import encode_prompt
from stages.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptFit(Strict):
    """How to shorten prompts that are too long. The text between ``after`` and ``before`` is cut."""

    max_tokens: int = Field(512, ge=1, description="Maximum tokens of a prompt, template included.")
    after: str = Field(
        "", description="The part that may be cut starts after the first occurrence of this text; empty: at the start of the prompt."
    )
    before: str = Field(
        "", description="The part that may be cut ends before the last occurrence of this text; empty: at the end of the prompt."
    )
    at: str = Field(
        "\n",
        min_length=1,
        description="Remove the end of the part, from the last occurrence of this text, until the prompt fits; without an occurrence, "
        "remove one character at a time.",
    )


def fit_prompt(prompt: Prompt, fit: PromptFit, tokenizer: PreTrainedTokenizerBase, location: str = "") -> Prompt:
    """Return ``prompt``, shortened to at most ``fit.max_tokens`` tokens if needed.

    Raises DataError (with the row's ``location`` if it is known) if the part to cut is missing or too short, or if a conversation
    is too long.
    """
    with errors_at(location or location_of(prompt)):
        return _fitted(prompt, fit, tokenizer)


def _fitted(prompt: Prompt, fit: PromptFit, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if len(encode_prompt(tokenizer, prompt)) <= fit.max_tokens:
        return prompt
    if not isinstance(prompt, str):
        raise DataError(f"prompt_fit: the conversation has more than {fit.max_tokens} tokens, and only plain text can be shortened")
    begin, end = prompt.find(fit.after), prompt.rfind(fit.before)
    if begin < 0 or end < begin + len(fit.after):
        raise DataError(f"prompt_fit: {prompt[:60]!r}... has no text between {fit.after!r} and {fit.before!r} to shorten")
    head, part, tail = prompt[: begin + len(fit.after)], prompt[begin + len(fit.after) : end], prompt[end:]
    while part:
        cut = part.rfind(fit.at)
        part = part[: cut if cut >= 0 else -1]
        if len(encode_prompt(tokenizer, head + part + tail)) <= fit.max_tokens:
            return head + part + tail
    raise DataError(f"prompt_fit: {prompt[:60]!r}... has more than {fit.max_tokens} tokens even without the part that may be cut")
