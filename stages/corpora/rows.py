"""A row of data with its location, and its columns."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any, Protocol

from stages.corpora.tables.columnar import JsonObject
from stages.errors import DataError
from stages.process.console import announce

OTHER_NAMES = {
    "prompt": ("question", "query", "problem", "user"),
    "completion": ("answer", "response", "reply", "solution", "assistant", "output"),
    "messages": ("conversation", "dialogue", "dialog", "turns", "chat"),
    "chosen": ("preferred", "better", "winner"),
    "rejected": ("dispreferred", "worse", "loser"),
    "text": ("content", "document", "sentence", "review"),
    "label": ("sentiment", "class", "target"),
}
"""Columns of other data sets that often have the meaning of ours, for the advice in messages."""


_TURNS = re.compile(r"""\[\s*\{\s*["'](role|from)["']\s*:""")


class Row(dict[str, Any]):
    """A row of a table with its location (``file:line`` or ``source, row N``).

    ``columnar``: the row comes from a Parquet or Arrow table, where objects hold None for fields that only other rows have.
    """

    __slots__ = ("columnar", "location")  # a __dict__ would need more memory than the columns of a short row

    def __init__(self, *columns: Mapping[str, object] | Iterable[tuple[str, object]], **named: object) -> None:
        super().__init__(*columns, **named)
        self.location: str = ""
        self.columnar: bool = False

    def with_values(self, values: Mapping[str, object]) -> Row:
        """A row with other values at the same location."""
        made = Row(values)
        made.location, made.columnar = self.location, self.columnar
        return made


def column_of(name: str, columns: Container[str]) -> str:
    """The column of a path: ``completions`` of ``completions[].response``. A column whose name equals ``name`` takes precedence."""
    return name if name in columns else re.split(r"\[\]|\.", name, maxsplit=1)[0]


def near_column(column: str, row: Iterable[str]) -> str | None:
    """The column of ``row`` that probably is ``column``: equal but for case and punctuation, a usual other name, or a similar name."""
    plain = {re.sub(r"[\W_]", "", name).lower(): name for name in row}
    for name in (column, *OTHER_NAMES.get(column, ())):
        if name in plain:
            return plain[name]
    near = difflib.get_close_matches(column, plain, n=1, cutoff=0.75)
    return plain[near[0]] if near else None


def renaming(row: Row, *forms: str) -> str:
    """The end of a message about a row without the expected columns: how to rename its columns to one of ``forms``.

    A form has the names of columns, as in ``prompt completion``. The result is empty if the row has no similar columns for any of them.
    """
    for form in forms:
        theirs = {column: column if column in row else near_column(column, row) for column in form.split()}
        if None not in theirs.values() and len(set(theirs.values())) == len(theirs):
            renamed = {column: name for column, name in theirs.items() if name is not None and name != column}
            return f". If {', '.join(renamed.values())} mean the same, write in the data source: {_mapping(renamed)}"
    return ""


def _mapping(columns: Mapping[str, str]) -> str:
    """The field ``columns`` of a data source as YAML."""
    quoted = {ours: name if re.fullmatch(r"\w[\w .-]*", name) else repr(name) for ours, name in columns.items()}
    return f"columns: {{{', '.join(f'{ours}: {name}' for ours, name in quoted.items())}}}"


def text_of(row: Row, column: str, *, empty: bool = False) -> str:
    """The text in ``column``. Raises DataError if it is missing, not text, or empty (unless ``empty`` is True)."""
    if column not in row:
        near = near_column(column, row)
        hint = f"; did you mean {near!r}?" if near else ""
        example = _mapping({column: near or "THEIRS"})
        raise DataError(f"{row.location}: no column {column!r}; the row has {', '.join(row) or 'none'}{hint} (to rename: {example})")
    value = row[column]
    if not isinstance(value, str):
        shown = "empty (null)" if value is None else f"{type(value).__name__} ({value!r:.60})"
        raise DataError(f"{row.location}: {column} is {shown}; expected text. Fill it in, or remove the row")
    if not empty and not value.strip():
        raise DataError(f"{row.location}: {column} is empty; expected text. Fill it in, or remove the row")
    if value.startswith("[") and _TURNS.match(value):
        said = f"{row.location}: {column} is the text of a list of messages, and the model reads it as this text"
        announce(("turns as text", column), f"{said}. For a conversation, store the list itself, e.g. in .jsonl or .parquet")
    return value


def structure_in(row: Row, column: str) -> Any:
    """The value of a column for lists or objects. A text is parsed if it is JSON, because CSV has only texts."""
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_hook=JsonObject)
    except (ValueError, RecursionError):
        return value


class RowFilter(Protocol):
    """The interface of filters that leave rows out before they are used; corpora/curation.py has the implementation."""

    left_out: Counter[str]
    """How many rows were left out, by reason."""

    def training(self, rows: Iterable[Row]) -> list[Row]:
        """The rows to train on."""

    def heldout(self, rows: Iterable[Row]) -> list[Row]:
        """The rows to hold out."""
