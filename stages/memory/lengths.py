"""Upper bounds on the lengths of a step's texts, in tokens. Reads the step's data, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config import DataSource
from stages.corpora.comparisons import comparison
from stages.corpora.demonstrations import demonstration
from stages.corpora.files import read_rows
from stages.corpora.messages import completion_text
from stages.corpora.prompts import load_prompts, plain_text
from stages.corpora.rows import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARACTERS_PER_TOKEN = 3.0
"""Used without a tokenizer. Low enough for the small vocabularies of models trained from scratch."""
SAMPLE = 2000  # rows read
LONGEST = 20  # number of longest texts (in characters) that are tokenized


@dataclass(frozen=True)
class Lengths:
    """Longest texts in tokens; 512 is assumed if the data is not downloaded. ``completions``: the most of one comparison."""

    prompt: int = 512
    demonstration: int = 512
    comparison: int = 512
    text: int = 512
    completions: int = 2


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
        if self._tokenizer is None:
            return int(len(chosen[0]) / CHARACTERS_PER_TOKEN) + 2
        return max(len(encoding.ids) for encoding in self._tokenizer.encode_batch(chosen)) + 1


def sample(sources: Sequence[DataSource]) -> list[Row]:
    """The first rows of the local data. Hub data sets are skipped."""
    limited = [source if source.limit is not None else source.model_copy(update={"limit": SAMPLE}) for source in sources]
    return read_rows([source for source in limited if not source.on_hub])


def prompt_texts(data: Sequence[DataSource], prompt_words: int | None, *, split: str) -> list[str]:
    """Prompts of the local data, each as one text."""
    sources = [source for source in data if not source.on_hub]
    if not sources:
        return []
    return [plain_text(prompt) for prompt in load_prompts(sources, prompt_words=prompt_words, limit=SAMPLE, split=split)]


def demonstration_texts(data: Sequence[DataSource]) -> list[str]:
    """Prompts with their completions."""
    rows = [demonstration(row) for row in sample(data)]
    return [f"{plain_text(row['prompt'])} {completion_text(row['completion'])}" for row in rows]


def comparison_texts(data: Sequence[DataSource], preferred: str | None) -> tuple[list[str], int]:
    """(prompts with each of their completions, maximum number of completions of one prompt)."""
    items = [comparison(row, preferred=preferred) for row in sample(data)]
    texts = [f"{plain_text(item.prompt)} {completion_text(answer)}" for item in items for answer in item.completions]
    return texts, max((len(item.completions) for item in items), default=2)
