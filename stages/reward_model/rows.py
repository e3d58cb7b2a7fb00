"""Tokenize comparisons, report what the length limit removed, and make batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from stages.corpora.comparisons import Comparison
from stages.corpora.conversations.messages import Completion, Prompt, errors_at
from stages.corpora.templates import encode_pair
from stages.errors import DataError
from stages.reward_model.preferences import EncodedComparison
from stages.sampling.padding import right_pad
from stages.step import StepContext


def encode(comparison: Comparison, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedComparison:
    """Encode prompt and completion as one row per completion, including the chat template's ending. Rows are truncated at the beginning."""
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
    """Effects of the length limit on comparisons: ``cut`` of ``rows`` were truncated, ``equal`` of ``pairs`` became equal texts."""

    rows: int
    cut: int
    pairs: int
    equal: int

    def as_metrics(self) -> dict[str, float]:
        """The effects as step metrics."""
        return {"cut_share": self.cut / max(1, self.rows), "equal_pairs": self.equal}


def usable(comparisons: list[EncodedComparison]) -> tuple[list[EncodedComparison], Lost]:
    """Return (comparisons with at least one pair of different rows, the effects of the length limit)."""
    pairs = [item.pairs for item in comparisons]
    lost = Lost(
        rows=sum(len(item.rows) for item in comparisons),
        cut=sum(item.cut for item in comparisons),
        pairs=sum(different + equal for different, equal in pairs),
        equal=sum(equal for _, equal in pairs),
    )
    return [item for item, (different, _) in zip(comparisons, pairs, strict=True) if different], lost


def say_lost(context: StepContext, which: str, lost: Lost, max_length: int) -> None:
    """Print what the length limit removed. ``which``: ``"held-out "``, or empty. Raises DataError if no comparison is left."""
    console = context.runtime.console
    if lost.cut:
        console.print(f"{context.name}: truncated the beginning of {lost.cut} of {lost.rows} {which}texts to {max_length} tokens")
    if lost.equal:
        console.print(f"{context.name}: left out {lost.equal} of {lost.pairs} {which}pairs, because their two texts have equal tokens")
    if lost.equal == lost.pairs:
        if not lost.cut:
            raise DataError(
                f"no {which}comparison is left: the two texts of all {lost.pairs} pairs have equal tokens; add other comparisons"
            )
        raise DataError(f"no {which}comparison is left: truncated to {max_length} tokens, the completions are equal; raise max_length")


def encode_pairs(pairs: Sequence[tuple[Prompt, Completion]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    # Collected and sampled completions may be truncated; completions from data were checked before.
    return [encode_pair(tokenizer, prompt, completion, sampled=True)[0][-max_length:] for prompt, completion in pairs]


def collate(comparisons: Sequence[EncodedComparison], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Batch all completions of a few prompts: input_ids and attention_mask [N, T]; ranks, prompt_index, text_index [N]."""
    rows = [torch.tensor(row) for item in comparisons for row in item.rows]
    lengths = torch.tensor([len(row) for row in rows])
    ids = right_pad(rows, pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "ranks": torch.tensor([rank for item in comparisons for rank in item.ranks]),
        "prompt_index": torch.tensor([index for index, item in enumerate(comparisons) for _ in item.ranks]),
        "text_index": torch.tensor([text_index for item in comparisons for text_index in item.texts]),
    }
