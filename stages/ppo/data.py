"""PPO's data: prompts with token ids, and pretraining rows to mix in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.corpora import prompts as corpus
from stages.corpora.curation import Curator
from stages.corpora.files import read_rows
from stages.corpora.packing import encode_documents, pack_blocks
from stages.corpora.rows import text_of
from stages.corpora.templates import check_rendering, count_tokens
from stages.errors import DataError
from stages.models.loading import load_tokenizer
from stages.ppo.encoding import EncodedPrompt, encoded_prompts, prompt_room
from stages.sampling.generation import episode_seed, require_room

if TYPE_CHECKING:
    from stages.ppo.config import PPOStepConfig
    from stages.ppo.roles import Roles
    from stages.step import StepContext


def check_prompts(config: PPOStepConfig, context: StepContext) -> None:
    """Raise DataError with the row's location for a conversation that a chat template rejects, before weights are loaded."""
    prompts = corpus.load_prompts(config.data, prompt_words=config.prompt_words)
    check_rendering(load_tokenizer(context.models["policy"]), ((prompt, [], "") for prompt in prompts))
    corpus.check_readers(context.models.values(), prompts)


def load_prompts(config: PPOStepConfig, context: StepContext, roles: Roles) -> list[EncodedPrompt]:
    """Load prompts with token ids. Prompts that are too long are left out, because truncation would change the question."""
    longest = prompt_room(config, roles.policy.model.config, roles.tokenizer)
    curator = Curator(config.curation, count_tokens(roles.tokenizer))
    encoded = encoded_prompts(config, roles.tokenizer, curator)
    if curator.left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(curator.left_out.items()))
        context.runtime.console.print(f"{context.name}: curation left out {sum(curator.left_out.values())} prompts ({reasons})")
    kept = [one for one in encoded if 0 < len(one.ids) <= longest]
    if not kept:
        raise DataError(
            f"none of {len(encoded)} prompts has at most {longest} tokens (max_prompt_tokens, or the context length minus "
            f"generation.max_new_tokens={config.generation.max_new_tokens})"
        )
    if len(kept) < len(encoded):
        left_out = len(encoded) - len(kept)
        context.runtime.console.print(f"{context.name}: left out {left_out} of {len(encoded)} prompts ({longest} tokens at most)")
    require_room(roles.policy.model, [one.ids for one in kept], config.generation)  # fail now instead of in a later iteration
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


def load_pretraining_rows(config: PPOStepConfig, context: StepContext, roles: Roles) -> PretrainingRows | None:
    """The packed texts of the pretraining mix; None if the step has none."""
    mix = config.pretraining_mix
    if mix is None:
        return None

    tokens = encode_documents(roles.tokenizer, [text_of(row, "text") for row in read_rows(mix.data)])
    return PretrainingRows(pack_blocks(tokens, mix.block_size), context.seed)
