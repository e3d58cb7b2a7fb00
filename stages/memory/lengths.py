"""The lengths of a step's texts in tokens: the longest, and those of a sample of its examples. Reads the step's data, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stages.config import DataSource
from stages.corpora.comparisons import comparison
from stages.corpora.conversations.messages import completion_text
from stages.corpora.demonstrations import demonstration
from stages.corpora.files import WORLD_ROWS, first_rows_of_world, read_rows
from stages.corpora.prompts import load_prompts, plain_text
from stages.corpora.rows import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Item = TypeVar("Item")

CHARACTERS_PER_TOKEN = 3.0
"""Used without a tokenizer. Low enough for the small vocabularies of models trained from scratch."""
SAMPLE = 2000  # rows read
LONGEST = 20  # number of longest texts (in characters) that are tokenized
PIECES, PIECE = 16, 1000  # a longer text than all pieces together is counted by this number of pieces of this number of characters
TYPICAL = 256  # number of examples whose lengths decide how full the passes of a Trainer are


@dataclass(frozen=True)
class Lengths:
    """Longest texts in tokens; 512 is assumed if the data is not downloaded. ``completions``: the most of one comparison.

    ``examples``: of some examples of a Trainer's step, the number of texts and the tokens of the longest one; empty if they are unknown.
    """

    prompt: int = 512
    demonstration: int = 512
    comparison: int = 512
    text: int = 512
    completions: int = 2
    examples: tuple[tuple[int, int], ...] = ()


class Counter:
    """Counts tokens with the tokenizer of a model folder, if there is one."""

    def __init__(self, folder: Path | None) -> None:
        self._tokenizer: Tokenizer | None = None
        if folder is not None and (folder / "tokenizer.json").exists():
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def longest(self, texts: Iterable[str]) -> int:
        """Tokens of the longest text, including an end token."""
        chosen = sorted(texts, key=len, reverse=True)[:LONGEST]
        if not chosen:
            return Lengths.prompt
        return max(self.each(chosen))

    def each(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text, including an end token. Those of a very long text are estimated from pieces of it."""
        if self._tokenizer is None:
            return [int(len(text) / CHARACTERS_PER_TOKEN) + 2 for text in texts]
        pieces = [_pieces(text) for text in texts]
        counts = iter([len(encoding.ids) for encoding in self._tokenizer.encode_batch([piece for own in pieces for piece in own])])
        tokens = [sum(next(counts) for _ in own) for own in pieces]
        read = [sum(map(len, own)) for own in pieces]
        return [count * len(text) // max(1, part) + 1 for count, text, part in zip(tokens, texts, read, strict=True)]

    def examples(self, texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
        """``Lengths.examples`` for examples of one text."""
        return tuple((1, tokens) for tokens in self.each(spread(texts)))


def _pieces(text: str) -> list[str]:
    """The text, or evenly spread pieces of a very long one: tokenizing megabytes would take seconds."""
    if len(text) <= PIECES * PIECE:
        return [text]
    step = (len(text) - PIECE) // (PIECES - 1)
    return [text[start : start + PIECE] for start in range(0, PIECES * step, step)]


def sample(sources: Sequence[DataSource]) -> list[Row]:
    """The first rows of the local data. Hub data sets are skipped."""
    limited = [source if source.limit is not None else source.model_copy(update={"limit": SAMPLE}) for source in sources]
    with first_rows_of_world(WORLD_ROWS):
        return read_rows([source for source in limited if not source.on_hub])


def prompt_texts(data: Sequence[DataSource], prompt_words: int | None, *, split: str) -> list[str]:
    """Prompts of the local data, each as one text."""
    sources = [source for source in data if not source.on_hub]
    if not sources:
        return []
    with first_rows_of_world(WORLD_ROWS):
        return [plain_text(prompt) for prompt in load_prompts(sources, prompt_words=prompt_words, limit=SAMPLE, split=split)]


def spread(rows: Sequence[Item]) -> Sequence[Item]:
    """Up to TYPICAL of ``rows``, evenly spread."""
    return rows[:: max(1, len(rows) // TYPICAL)][:TYPICAL]


def demonstration_lengths(data: Sequence[DataSource], counter: Counter) -> Lengths:
    """The lengths of prompts with their completions."""
    rows = [demonstration(row) for row in sample(data)]
    texts = [f"{plain_text(row['prompt'])} {completion_text(row['completion'])}" for row in rows]
    return Lengths(demonstration=counter.longest(texts), examples=counter.examples(texts))


def comparison_lengths(data: Sequence[DataSource], preferred: str | None, counter: Counter, *, pairs: bool) -> Lengths:
    """The lengths of prompts with each of their completions.

    An example is a prompt with all its completions or, with ``pairs``, with two of them.
    """
    items = [comparison(row, preferred=preferred) for row in sample(data)]
    texts = [[f"{plain_text(item.prompt)} {completion_text(answer)}" for answer in item.completions] for item in items]
    examples: list[tuple[int, int]] = []
    for own in spread(texts):
        lengths = counter.each(own)
        examples += [(2, max(pair)) for pair in combinations(lengths, 2)] if pairs else [(len(lengths), max(lengths))]
    most = max((len(item.completions) for item in items), default=2)
    return Lengths(comparison=counter.longest(text for own in texts for text in own), completions=most, examples=tuple(examples))
