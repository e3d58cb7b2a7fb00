"""Convert objects in memory to recipe values: a model becomes a folder, a data set a file, a function an address.

They are stored in ``<home>/inputs`` under a hash of their content, so that a step with equal inputs can be reused.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from stages.api.functions import address_of, shown_name
from stages.api.results import Model
from stages.errors import DataError, ModelError, RecipeError
from stages.process.storage import write_file
from stages.registry.contents import digest_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCES = ("reward", "monitors", "judges", "ensemble")
"""Fields whose entries are reward sources or judges. There, a function or a model can replace a complete entry."""


def as_field(name: str, value: object, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> object:
    """Convert ``value`` of the field ``name`` to plain recipe values. ``folder`` stores files; ``tokenizer`` is used for models without
    one.

    Raises ModelError for a model that cannot be used, DataError for rows that cannot be stored, and RecipeError for any other object.
    """
    if name in SOURCES:
        entries = value if isinstance(value, list | tuple) and not _is_pair(value) else [value]
        return [_as_source(entry, folder, tokenizer) for entry in entries]
    if isinstance(value, Model):
        return _reference(value, folder)
    if isinstance(value, Path):
        return str(value)
    if _is_pair(value):
        return _save_model(value[0], value[1], folder)
    if _is_model(value):
        return _save_model(value, tokenizer, folder)
    if (rows := _rows_in(value)) is not None:
        return _save_table(value, folder) if _has_classes(value) else _save_rows(rows, folder)
    if isinstance(value, Mapping):
        return {key: as_field(str(key), item, folder, tokenizer) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_field(name, item, folder, tokenizer) for item in value]
    if callable(value) and not isinstance(value, type):
        return address_of(value)
    return _plain(name, value)


def _plain(name: str, value: object) -> object:
    """A value that YAML can express; a scalar of numpy or torch becomes a number."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    expected = "a text, a number, a list, a mapping, a model with its tokenizer, a function, or a table (a data set, a DataFrame, rows)"
    raise RecipeError(f"{name} is an object of the class {type(value).__name__}; expected {expected}")


def _reference(model: Model, folder: Path) -> str:
    """The reference of a model in the registry of this home. Raises ModelError if the model is in another home."""
    registry = folder.parent / "registry"
    if model.path.resolve().is_relative_to(registry.resolve()):
        return model.ref
    theirs = next((str(path.parent) for path in model.path.parents if path.name == "registry"), str(model.path))
    raise ModelError(
        f"the model {model.ref} is in the home {theirs}, and this call has the home {folder.parent}; pass home={theirs!r}, or the "
        "folder of an exported model"
    )


def _as_source(entry: object, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> object:
    """Convert one reward source or judge."""
    if isinstance(entry, Mapping):
        return {key: as_field(str(key), item, folder, tokenizer) for key, item in entry.items()}
    if isinstance(entry, str | Path | Model) or _is_pair(entry) or _is_model(entry):
        return {"model": as_field("model", entry, folder, tokenizer)}
    if callable(entry):
        return {"function": address_of(entry), "name": shown_name(entry)}
    return entry


def _is_model(value: object) -> TypeGuard[PreTrainedModel]:
    return hasattr(value, "save_pretrained") and hasattr(value, "parameters")


def _is_pair(value: object) -> TypeGuard[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """Whether the value is a model with its tokenizer."""
    return isinstance(value, tuple) and len(value) == 2 and _is_model(value[0])


def _rows_in(value: Any) -> Iterable[Mapping[str, object]] | None:
    """The rows of a table in memory; None for anything else (also for data sources, which have a path).

    Tables are data sets, DataFrames, tables of pyarrow, lists, tuples and generators of rows. A missing value of a DataFrame is None.
    """
    if isinstance(value, Mapping | str):
        return None
    if hasattr(value, "column_names") and hasattr(value, "features") and hasattr(value, "__iter__"):
        rows: Iterable[Mapping[str, object]] = value
        return rows
    if hasattr(value, "iloc") and hasattr(value, "to_dict"):  # pandas
        return _without_gaps(value)
    for convert in ("to_pylist", "to_dicts"):  # pyarrow, polars
        if hasattr(value, convert) and hasattr(value, "columns"):
            return getattr(value, convert)()
    if isinstance(value, Iterator):
        value = list(value)
        if not value:
            raise DataError("the iterator with the data in memory has no rows; an iterator gives its rows only once, so pass a list")
    if isinstance(value, list | tuple) and value and all(isinstance(row, Mapping) and "path" not in row for row in value):
        return value
    return None


def _without_gaps(frame: Any) -> list[Mapping[str, object]]:
    """The rows of a DataFrame of pandas."""
    gaps = frame.isna().to_dict("records")
    return [
        {str(name): None if gap[name] is True else value for name, value in row.items()}
        for row, gap in zip(frame.to_dict("records"), gaps, strict=True)
    ]


def _save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> str:
    """Save model and tokenizer. Returns the folder."""
    if tokenizer is None:
        raise ModelError(f"the {type(model).__name__} in memory has no tokenizer; pass (model, tokenizer), or tokenizer=...")
    if hasattr(model, "peft_config"):
        raise ModelError("a PeftModel in memory does not name its base; pass its merge_and_unload(), or save it and pass its folder")

    def write(made: Path) -> None:
        from stages.models.quiet import quiet_transformers
        from stages.models.saving import save_tokenizer

        with quiet_transformers():
            model.save_pretrained(made)
            save_tokenizer(tokenizer, made)

    return str(_keep(write, folder, f"model-{getattr(model.config, 'model_type', 'model')}"))


def _save_rows(rows: Iterable[Mapping[str, object]], folder: Path) -> str:
    """Write rows as JSON Lines. Returns the file."""
    lines = [_line(row, row_number) for row_number, row in enumerate(rows, 1)]
    if not lines:
        raise DataError("the data in memory has no rows")
    return _store(("\n".join(lines) + "\n").encode(), folder, "jsonl")


def _has_classes(value: object) -> bool:
    """Whether a data set has a column whose numbers have names (``ClassLabel``). JSON Lines cannot store them."""
    features = getattr(value, "features", None)
    return isinstance(features, Mapping) and any(type(feature).__name__ == "ClassLabel" for feature in features.values())


def _save_table(dataset: Any, folder: Path) -> str:
    """Write a data set as a Parquet file with the names of its classes. Returns the file."""
    import pyarrow
    from pyarrow import parquet

    rows = list(dataset.with_format(None))
    if not rows:
        raise DataError("the data in memory has no rows")
    content = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=dataset.features.arrow_schema), content)
    return _store(content.getvalue().to_pybytes(), folder, "parquet")


def _store(content: bytes, folder: Path, suffix: str) -> str:
    """Write a file of rows under the digest of its content. Returns the file."""
    path = folder / f"rows-{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    return str(path)


def _line(row: Mapping[str, object], row_number: int) -> str:
    """A row as JSON. Raises DataError that names the column of a value that JSON cannot express."""
    if not isinstance(row, Mapping):
        raise DataError(f"row {row_number} of the data in memory is {type(row).__name__}; expected a mapping of columns to values")
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False, default=_json_value)
    except (TypeError, ValueError, RecursionError):
        for column, value in row.items():
            try:
                json.dumps({column: value}, allow_nan=False, default=_json_value)
            except (TypeError, ValueError, RecursionError) as error:
                reason = (
                    f"row {row_number} of the data in memory, column {column!r}: {reprlib.repr(value)} cannot be written as JSON ({error})"
                )
                raise DataError(f"{reason}; expected texts, finite numbers, lists and mappings") from error
        raise


def _json_value(value: object) -> object:
    """Values of numpy, torch and pandas, and dates. Raises TypeError for any other object."""
    if hasattr(value, "tolist"):
        plain: object = value.tolist()
        return plain
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"an object of the class {type(value).__name__}")


def _keep(write: Callable[[Path], None], folder: Path, name: str) -> Path:
    """Let ``write`` fill a folder, and store it under the digest of its content."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        write(made)
        kept = folder / f"{name}-{digest_folder(made).removeprefix('sha256:')[:16]}"
        if not kept.exists():
            made.rename(kept)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return kept
