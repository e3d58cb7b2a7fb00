"""Values in Parquet and Arrow tables: JSON columns, class labels, and None fields that only the table schema added."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from stages.errors import DataError

if TYPE_CHECKING:
    import pyarrow


class JsonObject(dict[str, object]):
    """An object that the table stores as JSON text. Its None values come from the data."""


class ClassIndex(int):
    """The index of a class in a column of type ``ClassLabel``. ``names``: the names of all classes of the column."""

    names: tuple[str, ...] = ()


def plain_rows(batch: pyarrow.RecordBatch, shown: str) -> list[dict[str, object]]:
    """Convert a batch of the file ``shown`` to rows.

    Parses values of type ``arrow.json``, which ``datasets`` writes for objects of mixed types. Values of a column with named classes become
    ``ClassIndex``, and decimal numbers become floats. Raises DataError for a column name that occurs twice.
    """
    from pyarrow import types

    if twice := sorted({name for name in batch.schema.names if batch.schema.names.count(name) > 1}):
        raise DataError(f"{shown}: the table has several columns {', '.join(map(repr, twice))}; rename or remove one of them")
    rows: list[dict[str, object]] = batch.to_pylist()
    for column, names in class_names(batch.schema).items():
        for row in rows:
            value = row.get(column)
            if isinstance(value, int) and 0 <= value < len(names):
                row[column] = index = ClassIndex(value)
                index.names = names
    for column in batch.schema:
        if _holds(column.type, lambda kind: _is_json(kind) or types.is_decimal(kind)):
            for row in rows:
                row[column.name] = _parsed(row[column.name], column.type)
    return rows


def class_names(schema: pyarrow.Schema) -> dict[str, tuple[str, ...]]:
    """The names of the classes of each column of type ``ClassLabel``, which ``datasets`` stores with the schema of a table."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: tuple(map(str, kind["names"])) for column, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _is_json(kind: pyarrow.DataType) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"


def _holds(kind: pyarrow.DataType, wanted: Callable[[pyarrow.DataType], bool]) -> bool:
    """Whether ``kind`` or a type inside it is ``wanted``."""
    return wanted(kind) or any(_holds(kind.field(index).type, wanted) for index in range(kind.num_fields))


def _parsed(value: object, kind: pyarrow.DataType) -> object:
    """``value`` with its JSON parsed and its decimals as floats. A text that is not valid JSON is returned unchanged."""
    if isinstance(value, Decimal):
        return float(value)
    if _is_json(kind) and isinstance(value, str):
        try:
            return json.loads(value, object_hook=JsonObject)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict):
        return {name: _parsed(item, kind.field(name).type) for name, item in value.items()}
    if isinstance(value, list) and kind.num_fields == 1:
        return [_parsed(item, kind.field(0).type) for item in value]
    return value


def without_missing(value: Any) -> Any:
    """Remove fields that are None, at every depth except inside parsed JSON.

    All objects in a table column share one set of fields. None marks a field that the original object did not have.
    """
    if isinstance(value, JsonObject):
        return value
    if isinstance(value, dict):
        return {name: without_missing(item) for name, item in value.items() if item is not None}
    return [without_missing(item) for item in value] if isinstance(value, list) else value
