"""Row filters: near-duplicates, users with too many prompts, personal data, and texts that are too short or too long.

See Ouyang et al. 2022, section 3.2 (prompts) and Stiennon et al. 2020, appendix A (lengths). Every filter is off unless a recipe sets it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Literal

from pydantic import Field, model_validator

from stages.config import Strict
from stages.corpora.prompts import plain_text, prompt_in
from stages.corpora.rows import Row
from stages.errors import DataError

CountTokens = Callable[[str], int]

# Deliberately broad: a lost row costs little, a leaked address much. ``phone`` matches digit groups of a phone number's length.
PII = {
    "email": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "phone": re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?|\d{2,4}[ .-])\d{3,4}[ .-]?\d{2,4}(?![\w-])"),
    "number": re.compile(r"(?<![\w-])(?:\d{3}-\d{2}-\d{4}|\d{4}(?:[ -]?\d{4}){3})(?![\w-])"),  # social security, credit card
    "address": re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.])"),  # IPv4
}


class Curation(Strict):
    """Row filters of a step, applied in this order. The counts of dropped rows are logged and stored as metrics."""

    pii: Literal["keep", "drop", "mask"] = Field(
        "keep",
        description="Training rows with personal data (e-mail address, phone number, ...): keep or drop the row, or mask the data. "
        "Held-out rows are kept.",
    )
    tokens: dict[str, tuple[int, int]] = Field(
        {}, description="Minimum and maximum number of tokens by column, e.g. {completion: [24, 48]}; in a list, of each text."
    )
    of_lists: Literal["rows", "entries"] = Field(
        "rows",
        description="With tokens: what to drop if a text of a list does not fit. rows: the row. entries: the text with its rank or score, "
        "or the row if fewer than two texts are left.",
    )
    prefix_words: int | None = Field(
        None,
        ge=1,
        description="Of prompts with this many equal first words, only the first prompt is kept; null: all. The paper gives no number.",
    )
    max_per_user: int | None = Field(None, ge=1, description="Maximum number of prompts per user; null: no maximum. 200 in the paper.")
    user_column: str = Field("user", description="The column that names the user.")

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """Accept lists: YAML has no tuples."""
        if isinstance(value, dict) and isinstance(value.get("tokens"), dict):
            pairs = {name: tuple(pair) if isinstance(pair, list) else pair for name, pair in value["tokens"].items()}
            return {**value, "tokens": pairs}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Curation:
        for name, (least, most) in self.tokens.items():
            if not 0 <= least <= most:
                raise ValueError(f"tokens.{name}=[{least}, {most}]: expected [minimum, maximum] with 0 <= minimum <= maximum")
        return self


class Curator:
    """Applies a step's filters to tables and counts the rows that they drop.

    ``count_tokens`` counts with the step's tokenizer. Without it (before a model is loaded) lengths are not checked.
    """

    def __init__(self, curation: Curation, count_tokens: CountTokens | None = None) -> None:
        self.curation, self.count_tokens = curation, count_tokens
        self.left_out: Counter[str] = Counter()

    def training(self, rows: Iterable[Row]) -> list[Row]:
        """Filter training rows."""
        return self._apply(self._without_pii(rows))

    def heldout(self, rows: Iterable[Row]) -> list[Row]:
        """Filter held-out rows. The personal-data filter does not apply, because nothing is learned from these rows."""
        return self._apply(rows)

    def _apply(self, rows: Iterable[Row]) -> list[Row]:
        kept = [fitting for row in rows if (fitting := self._of_length(row)) is not None]
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

    def _of_length(self, row: Row) -> Row | None:
        """The row without the list entries of the wrong length (``of_lists: entries``). None if the row itself is left out."""
        if self.count_tokens is None:
            return row
        for column in self.curation.tokens:
            if column not in row:
                raise DataError(f"{row.location}: curation.tokens names the column {column!r}, and the row has {', '.join(row)}")
            value = row[column]
            fits = [self._fits(column, text) for text in (value if isinstance(value, list) else [value])]
            if all(fits):
                continue
            if not isinstance(value, list) or self.curation.of_lists == "rows" or sum(fits) < 2:
                self.left_out["length"] += 1
                return None
            self.left_out["entries"] += fits.count(False)
            row = _with_entries(row, column, fits)
        return row

    def _fits(self, column: str, text: object) -> bool:
        """Whether the number of tokens is within the limits of the column. Values that are not texts always fit."""
        least, most = self.curation.tokens[column]
        return not isinstance(text, str) or self.count_tokens is None or least <= self.count_tokens(text) <= most

    def _distinct(self, rows: list[Row]) -> list[Row]:
        words = self.curation.prefix_words
        if words is None:
            return rows
        kept, seen = [], set()
        for row in rows:
            beginning = tuple(_prompt_text(row).lower().split()[:words])
            # A prompt with fewer words counts as a duplicate only of an identical prompt.
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
                raise DataError(
                    f"{row.location}: max_per_user needs the column {self.curation.user_column!r}; the row has {', '.join(row)}"
                )
            user = str(row[self.curation.user_column])
            counts[user] += 1
            if counts[user] > most:
                self.left_out["user"] += 1
            else:
                kept.append(row)
        return kept


def _with_entries(row: Row, column: str, kept: Sequence[bool]) -> Row:
    """A copy of ``row`` with only the ``kept`` entries of the list in ``column`` and of its ranks or scores."""
    parallel = [name for name in ("ranks", "scores") if isinstance(row.get(name), list) and len(row[name]) == len(kept)]
    return row.with_values({**row, **{name: list(compress(row[name], kept)) for name in (column, *parallel)}})


def _prompt_text(row: Row) -> str:
    return plain_text(prompt_in(row))


def _holds_pii(text: str) -> bool:
    return any(pattern.search(text) for pattern in PII.values())


def _texts(value: object) -> Iterable[str]:
    """Yield every text in a row at any depth (messages, lists of completions)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def mask_pii(text: str) -> str:
    """Replace every e-mail address, phone number and similar by its kind in brackets."""
    for kind, pattern in PII.items():
        text = pattern.sub(f"[{kind}]", text)
    return text


def _masked_row(row: Row) -> Row:
    return row.with_values({name: _masked(value) for name, value in row.items()})


def _masked(value: object) -> object:
    if isinstance(value, str):
        return mask_pii(value)
    if isinstance(value, dict):
        return type(value)({name: _masked(item) for name, item in value.items()})
    return [_masked(item) for item in value] if isinstance(value, list) else value
