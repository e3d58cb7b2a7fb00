"""PPO's data: prompts with token ids, their maximum lengths, and pretraining rows to mix in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from stages.corpora import prompts as corpus
from stages.corpora.conversations.messages import Prompt
from stages.corpora.curation import Curator
from stages.corpora.encoding.blocks import encode_documents, pack_blocks
from stages.corpora.encoding.fitting import fit_prompt
from stages.corpora.files import read_rows
from stages.corpora.rows import text_of
from stages.corpora.templates import check_rendering, count_tokens, encode_prompt
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.models.loading import load_tokenizer
from stages.process.console import made_of_each
from stages.rewards.signature import columns_asked_for
from stages.sampling.generation import episode_seed, require_room
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from stages.model_types import TransformersModel
    from stages.ppo.config import PPOStepConfig
    from stages.step import StepContext

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
    encoded = made_of_each("encoding prompts", lambda row: encode_prompt(tokenizer, row.prompt), rows)
    return [EncodedPrompt(row.prompt, ids, row.columns) for row, ids in zip(rows, encoded, strict=True)]


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


def check_prompts(config: PPOStepConfig, context: StepContext) -> None:
    """Raise DataError with the row's location for a conversation that a chat template rejects, before weights are loaded."""
    prompts = corpus.load_prompts(config.data, prompt_words=config.prompt_words)
    check_rendering(load_tokenizer(context.models["policy"]), ((prompt, [], "") for prompt in prompts))
    corpus.check_readers(context.models.values(), prompts)
    corpus.compare_template_arguments(context.models.values())


def load_prompts(
    config: PPOStepConfig, context: StepContext, policy: TransformersModel, tokenizer: PreTrainedTokenizerBase
) -> list[EncodedPrompt]:
    """Load prompts with token ids. Prompts that are too long are left out, because truncation would change the question.

    Raises DataError if none is left.
    """
    longest = prompt_room(config, policy.config, tokenizer)
    curator = Curator(config.curation, count_tokens(tokenizer))
    encoded = encoded_prompts(config, tokenizer, curator)
    if curator.left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(curator.left_out.items()))
        context.runtime.console.print(f"{context.name}: curation left out {sum(curator.left_out.values())} prompts ({reasons})")
    kept = [one for one in encoded if 0 < len(one.ids) <= longest]
    if not kept:
        raise DataError(
            f"none of {len(encoded)} prompts has at most {longest} tokens (max_prompt_tokens, or the context length minus "
            f"generation.max_new_tokens={config.generation.max_new_tokens}); raise it, or use shorter prompts"
        )
    if len(kept) < len(encoded):
        left_out = len(encoded) - len(kept)
        context.runtime.console.print(f"{context.name}: left out {left_out} of {len(encoded)} prompts longer than {longest} tokens")
    require_room(policy, [one.ids for one in kept], config.generation)  # fail now instead of in a later iteration
    return kept


class PretrainingRows:
    """Blocks of the pretraining mix (Ouyang et al. 2022, equation 2), drawn with replacement; each draw depends only on seed and
    ``draws``.
    """

    def __init__(self, blocks: torch.Tensor, seed: int) -> None:
        self.blocks, self.seed = blocks, seed  # (blocks, block_size)
        self.draws = 0  # number of draws; set it to resume

    def draw(self, count: int) -> torch.Tensor:
        """The next ``count`` blocks [count, block_size]."""
        generator = torch.Generator().manual_seed(episode_seed(self.seed, -2, self.draws))
        self.draws += 1
        return self.blocks[torch.randint(len(self.blocks), (count,), generator=generator)]


def load_pretraining_rows(config: PPOStepConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PretrainingRows | None:
    """The packed texts of the pretraining mix; None if the step has none."""
    mix = config.pretraining_mix
    if mix is None:
        return None

    tokens = encode_documents(tokenizer, [text_of(row, "text") for row in read_rows(mix.data)])
    return PretrainingRows(pack_blocks(tokens, mix.block_size), seed)
