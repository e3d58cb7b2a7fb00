"""Describe a registry version for people: data by path and row count, non-default settings, metrics with three digits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from stages.config import DataSource, ModelInput, StepConfig
from stages.corpora.files import fingerprint, read_rows
from stages.errors import StagesError
from stages.json_types import with_values
from stages.recipe.schema import STAGES, config_class, data_inputs, model_inputs

if TYPE_CHECKING:
    from stages.registry.record import Manifest, ModelRecord

LARGEST_COUNTED = 64 * 2**20  # bytes; the rows of larger files are not counted
IDENTITY = ("name", "stage")


def describe(record: ModelRecord) -> dict[str, list[str]]:
    """Lines by heading (data, settings, metrics). The list of a heading may be empty."""
    return {
        "data": data_lines(record.manifest),
        "settings": [f"{path}: {_shown(value)}" for path, value in changed_settings(record.manifest["recipe_step"])],
        "metrics": [f"{name}  {three_digits(value)}" for name, value in _scalars(record.manifest["metrics"])],
    }


def three_digits(value: object) -> str:
    """Format a float with three significant digits. Integers and texts are unchanged."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.3g}"


def _scalars(metrics: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    """The scalars of nested metrics, by dotted name. Lists (histograms, alarms) are shown only with --all."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{before}{name}.")
        elif isinstance(value, int | float | str):
            yield f"{before}{name}", value


# Data


def data_lines(manifest: Manifest) -> list[str]:
    """One line per data input: field, path or Hub id, row count. Says which files were changed or removed since."""
    config = _config(manifest["recipe_step"])
    if config is None:  # made by an import, or by a Tristage version with different fields
        return [f"{field}: content {mark[:19]}" for field, mark in manifest["data"].items()]
    lines = []
    for field, sources in data_inputs(config).items():
        is_same = _is_unchanged(sources, manifest["data"].get(field))
        lines += [f"{field}: {_source_text(source, field, is_same)}" for source in sources]
    return lines


def _is_unchanged(sources: list[DataSource], mark: str | None) -> bool:
    if any(source.on_hub for source in sources):
        return True  # a description makes no requests
    try:
        return fingerprint(sources) == mark
    except (StagesError, OSError):
        return False


def _source_text(source: DataSource, field: str, is_same: bool) -> str:
    commit = source.revision[:12] if source.revision is not None else None
    fields = (("config", source.name), ("folder", source.data_dir), ("split", source.split), ("commit", commit))
    options = [f"{name} {value}" for name, value in fields if value is not None]
    shown = ", ".join([_path(source.path), *options])
    if source.on_hub:
        is_file = Path(source.path).is_absolute()
        return f"{shown} ({'no longer there' if is_file else 'on the Hub'})"
    if not is_same:
        return f"{shown} (changed since)"
    rows = _count(source, "validation" if "validation" in field else "train")
    return f"{shown} ({rows})"


def _count(source: DataSource, split: str) -> str:
    path = Path(source.path)
    if path.is_file() and path.stat().st_size > LARGEST_COUNTED:
        return f"{path.stat().st_size / 2**20:.0f} MiB, rows not counted"
    try:
        count = len(read_rows([source], split=split))
    except StagesError:
        return "rows not readable"
    return f"{count:,} row{'s' if count != 1 else ''}"


def _path(written: str) -> str:
    """The path relative to the current folder if it is below it; else unchanged."""
    path = Path(written)
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else written


# Settings


def changed_settings(step: Mapping[str, object]) -> list[tuple[str, object]]:
    """(dotted path, value) of each setting that differs from its default. Models and data are listed separately."""
    config = _config(step)
    if config is None:
        return [(name, value) for name, value in step.items() if name not in IDENTITY]
    shown_elsewhere = {*model_inputs(config), *data_inputs(config)}
    return [(path, value) for path, value in _changes(config, "") if path not in shown_elsewhere and path not in IDENTITY]


def _changes(block: BaseModel, before: str) -> Iterator[tuple[str, object]]:
    for name, field in type(block).model_fields.items():
        value, path = getattr(block, name), f"{before}{name}"
        default = field.get_default(call_default_factory=True, validated_data={})
        if value == default:
            continue
        if isinstance(value, BaseModel) and default is not None and not isinstance(value, ModelInput):
            yield from _changes(value, f"{path}.")
        else:
            yield path, with_values(value, _plain)


def _plain(value: object) -> object:
    """Convert a block to its recipe form."""
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, BaseModel) else value


def _shown(value: object) -> str:
    """Format a value as in a recipe."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else repr(value) if isinstance(value, str) and "\n" in value else str(value)


def _config(step: Mapping[str, object]) -> StepConfig | None:
    """The step's config; None if this version does not know the stage or its fields."""
    stage = step.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        return None
    try:
        return config_class(stage).model_validate(dict(step))
    except (ValidationError, StagesError):
        return None
