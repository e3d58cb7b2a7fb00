"""Comparisons as rows of tokens, what the length limit took from them, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.corpora.comparisons import Comparison
from stages.corpora.messages import errors_at
from stages.corpora.templates import encode_pair
from stages.errors import DataError
from stages.reward_model.preferences import EncodedComparison
from stages.sampling.generation import right_pad
from stages.step import StepContext


def encode(comparison: Comparison, tokenizer: Any, max_length: int) -> EncodedComparison:
    """Prompt and completion as one row per completion, as the chat template ends it; what is too long loses its beginning."""
    with errors_at(comparison.location):
        pairs = [encode_pair(tokenizer, comparison.prompt, completion) for completion in comparison.completions]
    return EncodedComparison(
        [ids[-max_length:] for ids, _ in pairs],
        comparison.ranks,
        comparison.groups,
        pairs[0][1],
        lengths=[len(ids) - prompt_length for ids, prompt_length in pairs],
        cut=sum(len(ids) > max_length for ids, _ in pairs),
    )


@dataclass(frozen=True)
class Lost:
    """What the length limit took from a list of comparisons: ``cut`` of ``rows``, and ``equal`` of ``pairs`` that are one text then."""

    rows: int
    cut: int
    pairs: int
    equal: int

    def as_metrics(self) -> dict[str, float]:
        """For the step's metrics."""
        return {"cut_share": self.cut / max(1, self.rows), "equal_pairs": self.equal}


def usable(comparisons: list[EncodedComparison]) -> tuple[list[EncodedComparison], Lost]:
    """(comparisons with at least one pair of different rows, what was lost of all of them)."""
    pairs = [item.pairs for item in comparisons]
    lost = Lost(
        rows=sum(len(item.rows) for item in comparisons),
        cut=sum(item.cut for item in comparisons),
        pairs=sum(different + equal for different, equal in pairs),
        equal=sum(equal for _, equal in pairs),
    )
    return [item for item, (different, _) in zip(comparisons, pairs, strict=True) if different], lost


def say_lost(context: StepContext, which: str, lost: Lost, max_length: int) -> None:
    console = context.runtime.console
    if lost.cut:
        console.print(f"{context.name}: {lost.cut} of {lost.rows} {which}texts lost their beginning to the limit of {max_length} tokens")
    if lost.equal:
        console.print(f"{context.name}: left out {lost.equal} of {lost.pairs} {which}pairs, whose two texts are the same tokens")
    if lost.equal == lost.pairs:
        raise DataError(
            f"no {which}comparison is left: the completions of each are the same tokens after the limit of {max_length}; raise max_length"
        )


def encode_pairs(pairs: Sequence[tuple[Any, Any]], tokenizer: Any, max_length: int) -> list[list[int]]:
    # Collected and sampled completions may be cut; what the data holds was checked before.
    return [encode_pair(tokenizer, prompt, completion, sampled=True)[0][-max_length:] for prompt, completion in pairs]


def collate(comparisons: Sequence[EncodedComparison], pad_token_id: int) -> dict[str, torch.Tensor]:
    """All completions of a few prompts as one batch: input_ids and attention_mask [N, T]; ranks, prompt_index, text_index [N]."""
    rows = [torch.tensor(row) for item in comparisons for row in item.rows]
    lengths = torch.tensor([len(row) for row in rows])
    ids = right_pad(rows, pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "ranks": torch.tensor([rank for item in comparisons for rank in item.ranks]),
        "prompt_index": torch.tensor([index for index, item in enumerate(comparisons) for _ in item.ranks]),
        "text_index": torch.tensor([number for item in comparisons for number in item.texts]),
    }
