"""The episodes of a rollout before they are sampled, and the share of each process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.corpora.conversations.messages import Prompt
from stages.ppo.data import EncodedPrompt
from stages.rewards.details import NOTHING, Details, columns_of
from stages.sampling.generation import episode_seed


@dataclass(frozen=True)
class Episodes:
    """N prompts with their token ids, the random seed of each completion, and further columns of their rows for reward functions."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[list[int]]
    seeds: Sequence[int]
    details: Details = NOTHING

    @classmethod
    def of(cls, chosen: Sequence[EncodedPrompt], seed: int, iteration: int) -> Episodes:
        """The episodes of an iteration. Their seeds depend only on ``seed``, the iteration and the index of the episode."""
        seeds = [episode_seed(seed, iteration, row) for row in range(len(chosen))]
        details = Details(columns_of([one.columns for one in chosen]))
        return cls([one.prompt for one in chosen], [one.ids for one in chosen], seeds, details)

    def share(self, index: int, count: int) -> Episodes:
        """The episodes of process ``index`` of ``count``: every ``count``-th."""
        own = range(index, len(self.prompts), count)
        return Episodes(self.prompts[index::count], self.prompt_ids[index::count], self.seeds[index::count], self.details.rows(own))
