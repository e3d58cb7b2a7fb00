"""Which rows are used: near-copies, users with too many prompts, personal data and texts of the wrong length are left out.

As Ouyang et al. 2022, section 3.2 (prompts) and Stiennon et al. 2020, appendix A (lengths). Every filter is off until a recipe sets it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from stages.config import Strict
from stages.corpora.files import Row
from stages.errors import DataError

CountTokens = Callable[[str], int]

# Deliberately broad: a row lost costs little, a leaked address much. Digits in groups of a phone number's size, with the usual separators.
PII = {
    "email": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "phone": re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?|\d{2,4}[ .-])\d{3,4}[ .-]?\d{2,4}(?![\w-])"),
    "number": re.compile(r"(?<![\w-])(?:\d{3}-\d{2}-\d{4}|\d{4}(?:[ -]?\d{4}){3})(?![\w-])"),  # social security, credit card
    "address": re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.])"),  # IPv4
}


class Curation(Strict):
    """Filters on the rows of a step, in this order. Counts of what is left out are said, and kept as metrics."""

    pii: Literal["keep", "drop", "mask"] = Field(
        "keep",
        description="Training rows with an e-mail address, a phone number or the like: left out, or the place masked. Held-out rows stay.",
    )
    tokens: dict[str, tuple[int, int]] = Field(
        {}, description="Least and most tokens of a column, e.g. {completion: [24, 48]}; of a list, of each of its texts."
    )
    prefix_words: int | None = Field(
        None, ge=1, description="Of prompts that begin with the same so many words only the first is used (the paper tells no number)."
    )
    max_per_user: int | None = Field(None, ge=1, description="Most prompts of one user; the paper's is 200.")
    user_column: str = Field("user", description="The column that names the user.")

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """YAML has no tuples."""
        if isinstance(value, dict) and isinstance(value.get("tokens"), dict):
            pairs = {name: tuple(pair) if isinstance(pair, list) else pair for name, pair in value["tokens"].items()}
            return {**value, "tokens": pairs}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Curation:
        for name, (least, most) in self.tokens.items():
            if not 0 <= least <= most:
                raise ValueError(f"tokens.{name}=[{least}, {most}]: expected the least and then the most number of tokens")
        return self


class Curator:
    """Applies a step's filters to one table after another, and counts what they leave out.

    ``count_tokens`` is the step's tokenizer; without one (before any model is loaded) lengths are not looked at.
    """

    def __init__(self, curation: Curation, count_tokens: CountTokens | None = None) -> None:
        self.curation, self.count_tokens = curation, count_tokens
        self.left_out: Counter[str] = Counter()

    def training(self, rows: Iterable[Row]) -> list[Row]:
        """The training rows that are used."""
        return self._apply(self._without_pii(rows))

    def heldout(self, rows: Iterable[Row]) -> list[Row]:
        """The held-out rows that are used: the same filters, but what is personal stays (it is not learned)."""
        return self._apply(rows)

    def _apply(self, rows: Iterable[Row]) -> list[Row]:
        kept = [row for row in rows if self._fits(row)]
        return self._capped(self._distinct(kept))

    def _without_pii(self, rows: Iterable[Row]) -> list[Row]:
        if self.curation.pii == "keep":
            return list(rows)
        kept = []
        for row in rows:
            if not any(_holds_pii(text) for text in _texts(row)):
                kept.append(row)
            elif self.curation.pii == "mask":
                kept.append(_masked_row(row))
                self.left_out["masked"] += 1
            else:
                self.left_out["pii"] += 1
        return kept

    def _fits(self, row: Row) -> bool:
        if self.count_tokens is None:
            return True
        for column, (least, most) in self.curation.tokens.items():
            if column not in row:
                raise DataError(f"{row.place}: curation.tokens names the column {column!r}, and the row has {', '.join(row)}")
            value = row[column]
            texts = value if isinstance(value, list) else [value]
            if not all(least <= self.count_tokens(text) <= most for text in texts if isinstance(text, str)):
                self.left_out["length"] += 1
                return False
        return True

    def _distinct(self, rows: list[Row]) -> list[Row]:
        words = self.curation.prefix_words
        if words is None:
            return rows
        kept, seen = [], set()
        for row in rows:
            beginning = tuple(_prompt_text(row).lower().split()[:words])
            # A prompt shorter than that is a copy only of one that is the same whole.
            if beginning in seen:
                self.left_out["prefix"] += 1
                continue
            seen.add(beginning)
            kept.append(row)
        return kept

    def _capped(self, rows: list[Row]) -> list[Row]:
        most = self.curation.max_per_user
        if most is None:
            return rows
        kept, counts = [], Counter[str]()
        for row in rows:
            if self.curation.user_column not in row:
                raise DataError(f"{row.place}: max_per_user needs the column {self.curation.user_column!r}; the row has {', '.join(row)}")
            user = str(row[self.curation.user_column])
            counts[user] += 1
            if counts[user] > most:
                self.left_out["user"] += 1
            else:
                kept.append(row)
        return kept


def _prompt_text(row: Row) -> str:
    from stages.corpora.prompts import plain_text, prompt_in

    return plain_text(prompt_in(row))


def _holds_pii(text: str) -> bool:
    return any(pattern.search(text) for pattern in PII.values())


def _texts(value: Any) -> Iterable[str]:
    """Every text in a row, however deep (messages, lists of completions)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def mask_pii(text: str) -> str:
    """``text`` with every e-mail address, phone number and the like replaced by its kind in brackets."""
    for kind, pattern in PII.items():
        text = pattern.sub(f"[{kind}]", text)
    return text


def _masked_row(row: Row) -> Row:
    return row.with_values({name: _masked(value) for name, value in row.items()})


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask_pii(value)
    if isinstance(value, dict):
        return type(value)({name: _masked(item) for name, item in value.items()})
    return [_masked(item) for item in value] if isinstance(value, list) else value
