"""Objects in Parquet and Arrow tables: parse JSON columns, and drop the None fields that only the table schema added."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


class JsonObject(dict[str, object]):
    """An object that the table stores as JSON text. Its None values come from the data."""


def plain_rows(batch: pyarrow.RecordBatch) -> list[dict[str, object]]:
    """Convert a batch to rows. Parses values of type ``arrow.json``, which ``datasets`` writes for objects of mixed types."""
    rows: list[dict[str, object]] = batch.to_pylist()
    for column in batch.schema:
        if _holds_json(column.type):
            for row in rows:
                row[column.name] = _parsed(row[column.name], column.type)
    return rows


def _is_json(kind: pyarrow.DataType) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"


def _holds_json(kind: pyarrow.DataType) -> bool:
    return _is_json(kind) or any(_holds_json(kind.field(index).type) for index in range(kind.num_fields))


def _parsed(value: object, kind: pyarrow.DataType) -> object:
    """Parse the JSON inside ``value``. A text that is not valid JSON is returned unchanged."""
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
