"""Tokenize demonstrations and blocks of the pretraining mix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from stages.corpora.demonstrations import Demonstration, Demonstrations
from stages.corpora.encoding.blocks import encode_documents, pack_blocks
from stages.corpora.encoding.fitting import fit_prompt
from stages.corpora.encoding.training_rows import TrainOn, has_untrained_reply, training_rows
from stages.corpora.files import read_rows
from stages.corpora.rows import text_of
from stages.errors import DataError
from stages.process.console import in_progress
from stages.sft.config import SFTStepConfig

HELDOUT_EVERY = 20  # every n-th block of the pretraining mix is held out
MOST_HELDOUT_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A demonstration as tokens. The first ``prompt_length`` of ``ids`` are the prompt.

    ``trained``: 1 for tokens of trained replies; None: all tokens after the prompt are trained.
    """

    ids: list[int]
    prompt_length: int
    trained: list[int] | None = None

    def counted(self, completion_only: bool) -> list[int]:
        """Loss mask: 1 for counted tokens, 0 for others. The very first token is never predicted."""
        start = max(self.prompt_length, 1) if completion_only else 1
        if completion_only and self.trained is not None:
            return [0] * start + self.trained[start:]
        return [0] * start + [1] * (len(self.ids) - start)


@dataclass(frozen=True)
class Encoded:
    """Encoded demonstrations. ``separate``: rows of earlier replies; ``untrained``: demonstrations whose replies all have ``weight: 0``."""

    rows: list[EncodedRow]
    separate: int
    untrained: int


def encode(
    demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, train_on: TrainOn, *, completion_only: bool = True
) -> Encoded:
    """Encode the demonstrations.

    Raises DataError with the row's location if the chat template rejects one, and for a ``weight: 0`` without ``completion_only``.
    """
    rows: list[EncodedRow] = []
    separate = untrained = 0
    with in_progress("encoding demonstrations", len(demonstrations)) as encoded:
        for demonstration in demonstrations:
            if not completion_only and has_untrained_reply(demonstration):
                raise DataError(
                    f"{demonstration.location}: a reply has weight 0, but completion_only_loss: false trains on every token; remove one of "
                    "them"
                )
            made = training_rows(tokenizer, demonstration, train_on=train_on)
            separate += max(len(made) - 1, 0)
            untrained += not made
            for row in made:
                rows.append(EncodedRow(row.ids, row.prompt_length, None if row.trains_all else row.trained))
            encoded()
    return Encoded(rows, separate, untrained)


@dataclass(frozen=True)
class Blocks:
    """Training blocks and held-out blocks of the pretraining mix."""

    train: list[EncodedRow]
    heldout: list[EncodedRow]


def pretraining_blocks(config: SFTStepConfig, tokenizer: PreTrainedTokenizerBase, num_demonstrations: int, seed: int) -> Blocks:
    """Blocks for ``share`` of all training rows, drawn once with the seed. Raises DataError if there are too few."""
    mix = config.pretraining_mix
    if mix is None:
        return Blocks([], [])
    tokens = encode_documents(tokenizer, [text_of(row, "text") for row in read_rows(mix.data)])
    blocks = [EncodedRow(ids, 0) for ids in pack_blocks(tokens, mix.block_size).tolist()]
    heldout = blocks[HELDOUT_EVERY - 1 :: HELDOUT_EVERY][:MOST_HELDOUT_BLOCKS] or blocks[-1:]
    del blocks[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    wanted = round(num_demonstrations * mix.share / (1 - mix.share))
    if wanted > len(blocks):
        raise DataError(
            f"pretraining_mix: a share of {mix.share:g} with {num_demonstrations} demonstrations needs {wanted} blocks of "
            f"{mix.block_size} tokens, but the texts give only {len(blocks)}; add text, or lower share or block_size"
        )
    return Blocks(random.Random(f"pretraining mix {seed}").sample(blocks, wanted), heldout)


def fitted(demonstrations: Demonstrations, config: SFTStepConfig, tokenizer: PreTrainedTokenizerBase) -> Demonstrations:
    """The demonstrations with shortened prompts."""
    fit = config.prompt_fit
    if fit is None:
        return demonstrations
    sides = [
        [row.with_prompt(fit_prompt(row["prompt"], fit, tokenizer, row.location)) for row in side]
        for side in (demonstrations.train, demonstrations.validation)
    ]
    return Demonstrations(*sides)
