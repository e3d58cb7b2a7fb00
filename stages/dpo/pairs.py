"""Tokenize comparisons into pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from stages.corpora.comparisons import Comparison
from stages.corpora.conversations.messages import Completion, errors_at
from stages.corpora.templates import encode_pair
from stages.dpo.config import DPOStepConfig
from stages.errors import DataError
from stages.process.console import in_progress
from stages.step import StepContext
from stages.training.lengths import short_enough


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a prompt and of its better and worse completion, each with the chat template's ending."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def pairs_of(comparison: Comparison, limit: int | None, seed: int) -> list[tuple[Completion, Completion]]:
    """(better, worse) for every two completions of different rank. ``limit``: draw at most this many."""
    ranked = list(zip(comparison.completions, comparison.ranks, strict=True))
    pairs = [(better, worse) for better, rank in ranked for worse, other in ranked if rank < other]
    if limit is None or len(pairs) <= limit:
        return pairs
    return random.Random(f"pairs {seed} {comparison.prompt!r}").sample(pairs, limit)


def encode(config: DPOStepConfig, comparisons: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Pair]:
    """Encode pairs with the template that is saved with the model, so that training, sampling and scoring use the same text.

    All tokens after the prompt count. In a completion with several turns the turns of other roles also count, as in TRL. Raises DataError
    with the row's location if the chat template rejects a conversation.
    """
    rows = []
    with in_progress("encoding comparisons", len(comparisons)) as encoded:
        for comparison in comparisons:
            with errors_at(comparison.location):
                for better, worse in pairs_of(comparison, config.pairs_per_prompt, seed):
                    (chosen, length), (rejected, _) = (encode_pair(tokenizer, comparison.prompt, text) for text in (better, worse))
                    rows.append(Pair(chosen[:length], chosen[length:], rejected[length:]))
            encoded()
    return rows


def usable(rows: list[Pair], max_length: int, context: StepContext, which: str) -> tuple[list[Pair], dict[str, int]]:
    """Return (pairs with at most ``max_length`` tokens and different texts, numbers of dropped pairs by reason).

    Raises DataError if no pair is left.
    """
    fitting = short_enough(rows, lambda row: row.length, max_length, f"{which} pair", context)
    kept = [row for row in fitting if row.chosen_ids != row.rejected_ids]
    if len(kept) < len(fitting):
        equal = f"left out {len(fitting) - len(kept)} of {len(fitting)} {which} pairs, because their two texts have equal tokens"
        context.runtime.console.print(f"{context.name}: {equal}")
    if not kept:
        raise DataError(f"no {which} pair is left: the two texts of all {len(fitting)} have equal tokens; add pairs with different texts")
    return kept, {"too_long_pairs": len(rows) - len(fitting), "equal_pairs": len(fitting) - len(kept)}
