"""Upper bounds on the lengths of a step's texts, in tokens. Reads the step's data, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.corpora.files import Row, read_rows
from stages.corpora.messages import completion_text
from stages.corpora.prompts import plain_text

CHARACTERS_PER_TOKEN = 3.0
"""Used without a tokenizer. Low enough for the small vocabularies of models trained from scratch."""
SAMPLE = 2000  # rows read
LONGEST = 20  # number of longest texts (in characters) that are tokenized


@dataclass(frozen=True)
class Lengths:
    """Longest texts in tokens; 512 is assumed if the data is not downloaded. ``completions``: the most completions of one comparison."""

    prompt: int = 512
    demonstration: int = 512
    comparison: int = 512
    text: int = 512
    completions: int = 2


class Counter:
    """Counts tokens with the tokenizer of a model folder, if there is one."""

    def __init__(self, folder: Path | None) -> None:
        self._tokenizer: Any = None
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


def lengths_of(config: Any, folder: Path | None) -> Lengths:
    """The lengths of a step's data. Lengths that its stage does not need keep their defaults. ``folder``: a model folder, if any."""
    counter = Counter(folder)
    if config.stage in ("ppo", "evaluation"):
        return Lengths(prompt=counter.longest(_prompts(config)))
    if config.stage == "sft":
        return Lengths(demonstration=counter.longest(_demonstrations(config)))
    if config.stage in ("reward_model", "dpo"):
        texts, most = _comparisons(config)
        return Lengths(comparison=counter.longest(texts), completions=most)
    if config.stage == "sentiment":
        return Lengths(text=counter.longest(str(row.get("text", "")) for row in _sample(config.data.train)))
    return Lengths()


def _sample(sources: Sequence[Any]) -> list[Row]:
    limited = [source if source.limit is not None else source.model_copy(update={"limit": SAMPLE}) for source in sources]
    return read_rows([source for source in limited if not source.on_hub])


def _prompts(config: Any) -> list[str]:
    from stages.corpora.prompts import load_prompts

    sources = [source for source in config.data if not source.on_hub]
    if not sources:
        return []
    split = "test" if config.stage == "evaluation" else "train"
    return [plain_text(prompt) for prompt in load_prompts(sources, prompt_words=config.prompt_words, limit=SAMPLE, split=split)]


def _demonstrations(config: Any) -> list[str]:
    from stages.corpora.demonstrations import demonstration

    rows = [demonstration(row) for row in _sample(config.data.train)]
    return [f"{plain_text(row['prompt'])} {completion_text(row['completion'])}" for row in rows]


def _comparisons(config: Any) -> tuple[list[str], int]:
    from stages.corpora.comparisons import comparison

    items = [comparison(row, preferred=config.preferred) for row in _sample(config.data.train)]
    texts = [f"{plain_text(item.prompt)} {completion_text(answer)}" for item in items for answer in item.completions]
    return texts, max((len(item.completions) for item in items), default=2)
