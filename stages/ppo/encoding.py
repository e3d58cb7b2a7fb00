"""Prompts as token ids, and the maximum lengths of prompts and sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stages.corpora import prompts as corpus
from stages.corpora.curation import Curator
from stages.corpora.fitting import fit_prompt
from stages.corpora.messages import Prompt
from stages.corpora.templates import encode_prompt
from stages.json_types import JsonObject
from stages.ppo.config import PPOStepConfig
from stages.rewards.signature import columns_asked_for
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

UNLIMITED = 1_000_000  # prompt tokens if neither model nor tokenizer has a limit


class EncodedPrompt(NamedTuple):
    """A prompt, its token ids, and the columns that reward functions request."""

    prompt: Prompt
    ids: list[int]
    columns: JsonObject


def encoded_prompts(config: PPOStepConfig, tokenizer: PreTrainedTokenizerBase, curator: Curator | None = None) -> list[EncodedPrompt]:
    """All prompts of the step, shortened if requested, with token ids and the columns that its rewards request."""
    columns = columns_asked_for([*config.reward, *config.monitors])
    rows = corpus.load_prompt_rows(config.data, prompt_words=config.prompt_words, curator=curator, columns=columns)
    if config.prompt_fit is not None:
        rows = [corpus.PromptRow(fit_prompt(row.prompt, config.prompt_fit, tokenizer), row.columns) for row in rows]
    return [EncodedPrompt(row.prompt, encode_prompt(tokenizer, row.prompt), row.columns) for row in rows]


def prompt_room(config: PPOStepConfig, policy: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The maximum prompt length in tokens that leaves room for ``max_new_tokens``. ``policy`` is the policy's config."""
    readable = readable_length(policy, tokenizer)
    room = UNLIMITED if readable is None else readable - config.generation.max_new_tokens
    return room if config.max_prompt_tokens is None else min(room, config.max_prompt_tokens)


def longest_sequence(config: PPOStepConfig, policy: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The maximum number of tokens, prompt and completion, that the networks of this step read."""
    room = prompt_room(config, policy, tokenizer)
    lengths = [len(one.ids) for one in encoded_prompts(config, tokenizer) if len(one.ids) <= room]
    return max(lengths, default=0) + config.generation.max_new_tokens
