"""Read tables from files, folders, Hub data sets and the embedded world as lists of rows, and compute fingerprints of their content.

Each row keeps its location (``Row.location``), so that a later error can name the file and the line. ``tables/layout.py`` decides which
files of a folder are read; ``tables/hub.py`` reads the Hub.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config import HUB, DataInput, DataSource
from stages.corpora.labels import ANSWERS, TASKS, labelled_rows, labelling_folder_of
from stages.corpora.rows import Row, column_of
from stages.corpora.splits import hold_out
from stages.corpora.tables.formats import EXPECTED, file_text, read_file, row_at, rows_of_parts, with_locations
from stages.corpora.tables.hub import DECIDE, content_of, read_hub
from stages.corpora.tables.layout import PACKED, SUFFIXES, UNSPLIT, Layout, is_data, layout_of, parts_of
from stages.corpora.world.lexicon import world_files
from stages.corpora.world.parts import PREFIX, world_rows
from stages.errors import DataError, some_of
from stages.process.console import in_progress
from stages.registry.contents import file_sha256

if TYPE_CHECKING:
    from stages.corpora.rows import RowFilter

logger = logging.getLogger(__name__)

WORLD_ROWS = 512  # rows of each part of the embedded world that a plan reads; all are alike
_first_of_world: ContextVar[int | None] = ContextVar("first_of_world", default=None)


@contextmanager
def first_rows_of_world(number: int) -> Iterator[None]:
    """Context manager in which ``read_rows`` makes at most ``number`` rows of a part of the embedded world, which are all alike."""
    token = _first_of_world.set(number)
    try:
        yield
    finally:
        _first_of_world.reset(token)


def read_rows(sources: Sequence[DataSource], *, split: str = "train") -> list[Row]:
    """Read all rows of ``sources`` in order. Renames columns, and applies ``skip`` and ``limit`` per source.

    ``split`` is the default for a folder or Hub data set whose source names none. Raises DataError with the location of the fault.
    """
    return [row for source in sources for row in _read_source(source, split)]


def read_splits(data: DataInput, curator: RowFilter | None = None) -> tuple[list[Row], list[Row]]:
    """Read training and held-out rows, filtered by ``curator``. Without a validation source, part of the training rows is held out.

    Raises DataError if ``curator`` leaves no row of one of them.
    """
    train = read_rows(data.train)
    if data.validation is not None:
        heldout = read_rows(data.validation, split="validation")
    else:
        train, heldout = hold_out(train, data, _names(data.train))
    if curator is not None:
        train, heldout = curator.training(train), curator.heldout(heldout)
        for rows, which in ((train, "training"), (heldout, "held-out")):
            if not rows:
                reasons = ", ".join(f"{reason} {count}" for reason, count in curator.left_out.items())
                raise DataError(f"{_names(data.train)}: curation leaves no {which} row (all rows left out: {reasons}); relax its limits")
    return train, heldout


def _read_source(source: DataSource, split: str) -> list[Row]:
    rows: list[Row] = []
    limit = _first_of_world.get() if source.path.startswith(PREFIX) else None
    limit = min((number for number in (source.limit, limit) if number is not None), default=None)
    stop = None if limit is None else source.skip + limit
    with in_progress(f"reading {source.path}", stop) as read:
        for index, row in enumerate(_open(source, split, stop)):
            if stop is not None and index >= stop:
                break
            if index >= source.skip:
                rows.append(_renamed(row, source))
            read()
    if not rows:
        raise DataError(f"{source.path}: no rows{f' after skip={source.skip}' if source.skip else ''}; expected at least one")
    return rows


def _open(source: DataSource, split: str, stop: int | None) -> Iterator[Row]:
    """The rows of a source. The embedded world makes only the first ``stop`` rows (None: all)."""
    if source.path.startswith(PREFIX):
        return with_locations(world_rows(source.path, stop), source.path)
    if source.on_hub:
        _refuse_file(source)

        return read_hub(source, split)
    path = Path(source.path)
    if (labels := labelling_folder_of(path)) is not None:
        return (row_at(row, location) for location, row in labelled_rows(labels))
    try:
        if path.is_dir():
            return _read_folder(path, source, split)
        _check_single(path, source)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return read_file(path, str(path))


def _refuse_file(source: DataSource) -> None:
    """Raise DataError for a path that cannot be a Hub id."""
    path = Path(source.path)
    if not source.path.startswith(HUB) and (path.is_absolute() or path.suffix in (*SUFFIXES, *PACKED)):
        raise DataError(f"{source.path}: no such file; expected {EXPECTED}, a folder, a hub id or world:PART")


def _check_single(path: Path, source: DataSource) -> None:
    """Raise DataError for fields that select among files if the path is a single file."""
    fields = {"name": source.name, "data_dir": source.data_dir, "data_files": source.data_files, "revision": source.revision}
    given = [name for name, value in fields.items() if value is not None]
    if given:
        raise DataError(f"{given[0]} is set, and the path is one file; remove {given[0]}, or name the folder")
    if source.split is not None:
        parts = parts_of(layout_of([path.name], lambda name: ""), source.split, UNSPLIT)
        if any(part.written_slice for part in parts):
            raise DataError(f"split: {source.split} slices one file; choose its rows with skip and limit")


# Folders


def folder_layout(path: Path, source: DataSource) -> Layout:
    """The data files of a local folder by split. Raises DataError if there are none, or if the source selects something that is missing."""
    if source.revision is not None:
        raise DataError("revision is set, and the path is a local folder; remove revision, or write hub:owner/name for the Hub")
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    read = partial(_folder_text, path)
    layout = layout_of(names, read, name=source.name, data_dir=source.data_dir, data_files=files)
    if not any(layout.splits.values()):
        others = f" (it contains {', '.join(sorted(names)[:5])})" if names else ""
        raise DataError(f"the folder contains no data file{others}; expected {EXPECTED}")
    return layout


def _folder_text(folder: Path, name: str) -> str:
    return file_text(folder / name, name)


def _read_folder(path: Path, source: DataSource, split: str) -> Iterator[Row]:
    """Read a folder's rows: the split that the source names, else ``split``; all rows if nothing distinguishes splits."""
    layout = folder_layout(path, source)
    if layout.unread and not layout.is_declared:
        _say_unread(path, layout, source)
    if layout.other:
        left = some_of(layout.other, 3)
        logger.warning("%s: %d files are in formats that are not read: %s. Save them as .csv", path, len(layout.other), left)
    if layout.lost:
        logger.warning("%s: %s; only the existing files are read", path, layout.lost)
    parts = parts_of(layout, source.split, split)
    _check_formats([name for part in parts for name in layout.splits[part.split]])
    return rows_of_parts(layout, parts, lambda name: read_file(path / name, str(path / name)))


def _say_unread(path: Path, layout: Layout, source: DataSource) -> None:
    """Warn about data files that belong to no split. Raises DataError if the source names no split, because the intent is unclear."""
    left = some_of(layout.unread, 3)
    if source.split is None:
        raise DataError(
            f"some file names contain a split ({', '.join(layout.splits)}) and others do not ({left}); set split, or select all files with "
            'data_files: "**"'
        )
    logger.warning("%s: %d data files belong to no split and are not read: %s", path, len(layout.unread), left)


def _check_formats(names: Sequence[str]) -> None:
    """Raise DataError if one table exists in two formats, because its rows would count twice."""
    seen: dict[str, str] = {}
    for name in names:
        bare = name.removesuffix(Path(name).suffix) if Path(name).suffix in PACKED else name
        stem = bare.removesuffix(Path(bare).suffix)
        if stem in seen:
            raise DataError(f"{seen[stem]} and {name} look like one table in two formats; choose one with data_files")
        seen[stem] = name


# Files


def _renamed(row: Row, source: DataSource) -> Row:
    """The row with its columns renamed as the source says. A name of the source may be a path into a column (``_at_path``)."""
    if not source.columns:
        return row
    values = {column: _at_path(row, column, theirs) for column, theirs in source.columns.items()}
    replaced = {column_of(theirs, row) for theirs in source.columns.values()}
    return row.with_values({**{name: value for name, value in row.items() if name not in replaced}, **values})


def _at_path(row: Row, column: str, name: str) -> object:
    """The value at the path ``name``: a column, a field of an object (``turn.text``), or that field of every list entry (``turns[].text``).

    ``column`` is our name for it. Raises DataError with the row's location if a part of the path does not exist.
    """
    first = column_of(name, row)
    if first not in row:
        near = difflib.get_close_matches(name, row, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{row.location}: columns names {name!r} for {column!r}, and the row has {', '.join(row)}{hint}")
    try:
        return _inside(row[first], re.findall(r"\[\]|[^.\[\]]+", name[len(first) :]), first)
    except DataError as error:
        raise DataError(f"{row.location}: columns names {name!r} for {column!r}, and {error}") from error


def _inside(value: object, steps: Sequence[str], location: str) -> object:
    """Follow the parts of a path, ``steps``, into ``value``. ``location`` is the path so far, for the message."""
    if not steps:
        return value
    step, *rest = steps
    if step == "[]":
        if not isinstance(value, list):
            raise DataError(f"{location} is {type(value).__name__}; expected a list")
        return [_inside(entry, rest, f"{location}, entry {number}") for number, entry in enumerate(value, 1)]
    if not isinstance(value, dict) or step not in value:
        held = f"an object of {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{location} is {held}; expected an object with {step!r}")
    return _inside(value[step], rest, f"{location}.{step}")


def _names(sources: Sequence[DataSource]) -> str:
    return ", ".join(source.path for source in sources)


# Fingerprints


def fingerprint(sources: Sequence[DataSource]) -> str:
    """Hash of the content of ``sources``: file bytes (independent of the path), the world's files and code, Hub ids and their contents."""
    hashes = hashlib.sha256()
    for source in sources:
        hashes.update(_source_fingerprint(source).encode() + b"\n")
    return hashes.hexdigest()


def _source_fingerprint(source: DataSource) -> str:
    if source.path.startswith(PREFIX):
        code = sorted((Path(__file__).parent / "world").glob("*.py"))
        return " ".join([source.path, *(file_sha256(file) for file in [*world_files(), *code])])
    if source.on_hub:
        _refuse_file(source)

        return f"hub {source.hub_id} {content_of(source)} {source.name} {source.split} {source.data_dir} {source.data_files}"
    path = Path(source.path)
    if (labels := labelling_folder_of(path)) is not None:
        return " ".join(file_sha256(labels / name) for name in (TASKS, ANSWERS) if (labels / name).exists())
    if path.is_file():
        return file_sha256(path)
    return " ".join(f"{file.relative_to(path).as_posix()} {file_sha256(file)}" for file in _files_that_decide(path))


def _files_that_decide(path: Path) -> list[Path]:
    """The files that determine a folder's rows: data files, and files that assign data files to splits."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return sorted(file for file in files if file.name in ("README.md", *DECIDE) or is_data(file.relative_to(path).as_posix()))
