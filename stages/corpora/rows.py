"""A row of data with its location, and its columns."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any, Protocol

from stages.errors import DataError


class Row(dict[str, Any]):
    """A row of a table with its location (``file:line`` or ``source, row N``).

    ``columnar``: the row comes from a Parquet or Arrow table, where objects hold None for fields that only other rows have.
    """

    location: str = ""
    columnar: bool = False

    def with_values(self, values: Mapping[str, object]) -> Row:
        """A row with other values at the same location."""
        made = Row(values)
        made.location, made.columnar = self.location, self.columnar
        return made


def column_of(name: str, columns: Container[str]) -> str:
    """The column of a path: ``completions`` of ``completions[].response``. A column whose name equals ``name`` takes precedence."""
    return name if name in columns else re.split(r"\[\]|\.", name, maxsplit=1)[0]


def text_of(row: Row, column: str, *, empty: bool = False) -> str:
    """The text in ``column``. Raises DataError if it is missing, not text, or empty (unless ``empty`` is True)."""
    if column not in row:
        near = difflib.get_close_matches(column, row, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{row.location}: no column {column!r}; the row has {', '.join(row) or 'none'}{hint} (to rename: columns: {{{column}: THEIRS}})"
        )
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{row.location}: {column} is {type(value).__name__} ({value!r:.60}); expected text")
    if not empty and not value.strip():
        raise DataError(f"{row.location}: {column} is empty; expected text")
    return value


class RowFilter(Protocol):
    """The interface of filters that leave rows out before they are used; corpora/curation.py has the implementation."""

    left_out: Counter[str]
    """How many rows were left out, by reason."""

    def training(self, rows: Iterable[Row]) -> list[Row]:
        """The rows to train on."""

    def heldout(self, rows: Iterable[Row]) -> list[Row]:
        """The rows to hold out."""
