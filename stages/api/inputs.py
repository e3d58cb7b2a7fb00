"""Convert objects in memory to recipe values: a model becomes a folder, a data set a file, a function an address.

They are stored in ``<home>/inputs`` under a hash of their content, so that a step with equal inputs can be reused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from stages.api.functions import address_of, shown_name
from stages.api.results import Model
from stages.errors import DataError, ModelError
from stages.registry.contents import digest_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCES = ("reward", "monitors", "judges", "ensemble")
"""Fields whose entries are reward sources or judges. There, a function or a model can replace a complete entry."""


def as_field(name: str, value: object, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> object:
    """Convert ``value`` of the field ``name`` to plain recipe values. ``folder`` stores files; ``tokenizer`` is used for models without
    one.

    Raises ModelError for a model that cannot be saved, and DataError for data that is not a table.
    """
    if name in SOURCES:
        entries = value if isinstance(value, list | tuple) and not _is_pair(value) else [value]
        return [_as_source(entry, folder, tokenizer) for entry in entries]
    if isinstance(value, Model):
        return value.ref
    if isinstance(value, Path):
        return str(value)
    if _is_pair(value):
        return _save_model(value[0], value[1], folder)
    if _is_model(value):
        return _save_model(value, tokenizer, folder)
    if _is_table(value) or _are_rows(value):
        return _save_rows(value, folder)
    if isinstance(value, Mapping):
        return {key: as_field(str(key), item, folder, tokenizer) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_field(name, item, folder, tokenizer) for item in value]
    if callable(value):
        return address_of(value)
    return value


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


def _is_table(value: object) -> TypeGuard[Iterable[Mapping[str, object]]]:
    return hasattr(value, "column_names") and hasattr(value, "__iter__") and hasattr(value, "features")


def _are_rows(value: object) -> TypeGuard[Iterable[Mapping[str, object]]]:
    """Whether the value is a list of data rows, as opposed to data sources (which have a path)."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) and "path" not in row for row in value)


def _save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> str:
    """Save model and tokenizer. Returns the folder."""
    if tokenizer is None:
        raise ModelError(f"the {type(model).__name__} in memory has no tokenizer; pass (model, tokenizer), or tokenizer=...")
    if hasattr(model, "peft_config"):
        raise ModelError("a PeftModel in memory does not name its base; pass its merge_and_unload(), or save it and pass its folder")

    def write(made: Path) -> None:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)

    return str(_keep(write, folder, f"model-{getattr(model.config, 'model_type', 'model')}"))


def _save_rows(rows: Iterable[Mapping[str, object]], folder: Path) -> str:
    """Write rows as JSON Lines. Returns the file."""
    lines = []
    for row_number, row in enumerate(rows, 1):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False))
        except (TypeError, ValueError) as error:
            reason = f"row {row_number} of the data in memory cannot be written as JSON ({error})"
            raise DataError(f"{reason}; expected texts, numbers, lists and mappings") from error
    if not lines:
        raise DataError("the data in memory has no rows")
    content = ("\n".join(lines) + "\n").encode()
    path = folder / f"rows-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    return str(path)


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
