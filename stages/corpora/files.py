"""Read tables from files, folders, Hub data sets and the embedded world as lists of rows, and compute fingerprints of their content.

Each row keeps its location (``Row.location``), so that a later error can name the file and the line. ``layout.py`` decides which files of a
folder are read; ``hub_tables.py`` reads the Hub.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import hashlib
import io
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import HUB, DataInput, DataSource
from stages.corpora.columnar import plain_rows
from stages.corpora.labels import ANSWERS, TASKS, labelled_rows, labelling_folder_of
from stages.corpora.layout import PACKED, SUFFIXES, UNSPLIT, Layout, Part, is_data, layout_of, parts_of, suffix_of
from stages.corpora.world.lexicon import world_files
from stages.corpora.world.parts import PREFIX, world_rows
from stages.errors import DataError
from stages.registry.contents import file_sha256

if TYPE_CHECKING:
    from stages.corpora.curation import Curator

logger = logging.getLogger(__name__)
EXPECTED = f"{', '.join(SUFFIXES)} (packed: {', '.join(PACKED)})"
ROWS_AT_ONCE = 1024
DECIDE = ("README.md", "dataset_dict.json", "state.json")


class Row(dict[str, Any]):
    """A row of a table with its location (``file:line`` or ``source, row N``).

    ``columnar``: the row comes from a Parquet or Arrow table, where objects hold None for fields that only other rows have.
    """

    location: str = ""
    columnar: bool = False

    def with_values(self, values: dict[str, Any]) -> Row:
        """A row with other values at the same location."""
        made = Row(values)
        made.location, made.columnar = self.location, self.columnar
        return made


def read_rows(sources: Sequence[DataSource], *, split: str = "train") -> list[Row]:
    """Read all rows of ``sources`` in order. Renames columns, and applies ``skip`` and ``limit`` per source.

    ``split`` is the default for a folder or Hub data set whose source names none. Raises DataError with the location of the fault.
    """
    return [row for source in sources for row in _read_source(source, split)]


def read_splits(data: DataInput, curator: Curator | None = None) -> tuple[list[Row], list[Row]]:
    """Read training and held-out rows, filtered by ``curator``. Without a validation source, part of the training rows is held out."""
    from stages.corpora.splits import hold_out

    train = read_rows(data.train)
    if data.validation is not None:
        heldout = read_rows(data.validation, split="validation")
        _say_overlap(data.train, data.validation)
    else:
        train, heldout = hold_out(train, data, _names(data.train))
    if curator is not None:
        train, heldout = curator.training(train), curator.heldout(heldout)
        for rows, which in ((train, "training"), (heldout, "held-out")):
            if not rows:
                raise DataError(f"{_names(data.train)}: curation leaves no {which} row ({dict(curator.left_out)})")
    return train, heldout


def _say_overlap(train: Sequence[DataSource], validation: Sequence[DataSource]) -> None:
    """Warn if held-out rows are also training rows. Compares what the sources name; equal rows under different names are not detected."""
    for held in validation:
        for source in train:
            if _rows_named(source, "train") == _rows_named(held, "validation") and _meet(source, held):
                logger.warning("%s: held-out rows are also training rows; change split, skip or limit of one", held.path)


def _rows_named(source: DataSource, default: str) -> tuple[Any, ...]:
    """What ``source`` reads apart from skip and limit. ``default`` is the split if it names none."""
    split = source.split or default
    path = Path(source.path)
    if not source.on_hub and not (path.is_dir() and folder_layout(path, source).names_splits):
        split = UNSPLIT  # a file, a part of the embedded world, or a folder without splits
    return source.path, source.name, split, source.data_dir, str(source.data_files), source.revision


def _meet(one: DataSource, other: DataSource) -> bool:
    """Whether the ``skip`` and ``limit`` of two sources select overlapping rows."""
    ends = [float("inf") if source.limit is None else source.skip + source.limit for source in (one, other)]
    return max(one.skip, other.skip) < min(ends)


def _read_source(source: DataSource, split: str) -> list[Row]:
    rows: list[Row] = []
    stop = None if source.limit is None else source.skip + source.limit
    for index, row in enumerate(_open(source, split)):
        if stop is not None and index >= stop:
            break
        if index >= source.skip:
            rows.append(_renamed(row, source))
    if not rows:
        raise DataError(f"{source.path}: no rows{f' after skip={source.skip}' if source.skip else ''}; expected at least one")
    return rows


def _open(source: DataSource, split: str) -> Iterator[Row]:
    if source.path.startswith(PREFIX):
        return _with_locations(world_rows(source.path, None if source.limit is None else source.skip + source.limit), source.path)
    if source.on_hub:
        _refuse_file(source)
        from stages.corpora.hub_tables import read_hub

        return read_hub(source, split)
    path = Path(source.path)
    if (labels := labelling_folder_of(path)) is not None:
        return (_row(row, location) for location, row in labelled_rows(labels))
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
        raise DataError(f"{given[0]} is set, and the path is one file; leave {given[0]} out, or name the folder")
    if source.split is not None:
        parts = parts_of(layout_of([path.name], lambda name: ""), source.split, UNSPLIT)
        if any(part.written_slice for part in parts):
            raise DataError(f"split: {source.split} slices one file; choose its rows with skip and limit")


# Folders


def folder_layout(path: Path, source: DataSource) -> Layout:
    """The data files of a local folder by split. Raises DataError if there are none, or if the source selects something that is missing."""
    if source.revision is not None:
        raise DataError("revision is set, and the path is a local folder; leave revision out, or write hub:owner/name for the Hub")
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    read = partial(_folder_text, path)
    layout = layout_of(names, read, name=source.name, data_dir=source.data_dir, data_files=files)
    if not any(layout.splits.values()):
        others = f" (it holds {', '.join(sorted(names)[:5])})" if names else ""
        raise DataError(f"the folder holds no data file{others}; expected {EXPECTED}")
    return layout


def _folder_text(folder: Path, name: str) -> str:
    return _text(folder / name, name)


def _read_folder(path: Path, source: DataSource, split: str) -> Iterator[Row]:
    """Read a folder's rows: the split that the source names, else ``split``; all rows if nothing distinguishes splits."""
    layout = folder_layout(path, source)
    if layout.unread and not layout.is_declared:
        _say_unread(path, layout, source)
    if layout.lost:
        logger.warning("%s: %s; only the existing files are read", path, layout.lost)
    parts = parts_of(layout, source.split, split)
    _check_formats([name for part in parts for name in layout.splits[part.split]])
    return rows_of_parts(layout, parts, lambda name: read_file(path / name, str(path / name)))


def _say_unread(path: Path, layout: Layout, source: DataSource) -> None:
    """Warn about data files that belong to no split. Raises DataError if the source names no split, because the intent is unclear."""
    left = f"{', '.join(layout.unread[:3])}{f' and {len(layout.unread) - 3} more' if len(layout.unread) > 3 else ''}"
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


def rows_of_parts(layout: Layout, parts: Sequence[Part], read: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """The rows of ``parts`` in order. ``read`` returns the rows of one file."""
    for part in parts:
        rows = (row for name in layout.splits[part.split] for row in read(name))
        if part.written_slice:
            kept = list(rows)
            yield from (kept[index] for index in part.rows(len(kept)))
        else:
            yield from rows


# Files


def read_file(path: Path, shown: str) -> Iterator[Row]:
    """The rows of one file. ``shown`` is its name in messages. Raises DataError for an unreadable file."""
    readers: dict[str, Callable[[Path, str], Iterator[Row]]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".txt": _read_txt,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
    }
    suffix = suffix_of(shown)
    if suffix not in readers:
        raise DataError(f"{shown}: cannot read {suffix or 'a file without a suffix'}; expected {EXPECTED}")
    return readers[suffix](path, shown)


def _bytes(path: Path, shown: str) -> bytes:
    """The content of a file, decompressed according to its suffix."""
    packing = Path(shown).suffix.lower()
    try:
        data = path.read_bytes()
        if packing == ".zst":
            import pyarrow

            return pyarrow.input_stream(pyarrow.py_buffer(data), compression="zstd").read()
        unpack = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}.get(packing, bytes)
        return unpack(data)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{shown}: cannot be read ({error})") from error


def _text(path: Path, shown: str) -> str:
    data = _bytes(path, shown)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{shown}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8") from error
    if "\0" in text:
        raise DataError(f"{shown}:{text[: text.index(chr(0))].count(chr(10)) + 1}: holds a NUL byte; expected text")
    return text


def _read_jsonl(path: Path, shown: str) -> Iterator[Row]:
    yield from _json_lines(_text(path, shown), shown)


def _json_lines(text: str, shown: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may contain U+2028 and similar characters, which do not end a line in JSON Lines.
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        location = f"{shown}:{line_number}"
        try:
            value = json.loads(line, parse_constant=_refused)
        except json.JSONDecodeError as error:
            hint = "; a list of objects is .json" if line_number == 1 and line.lstrip().startswith("[") else ""
            raise DataError(f"{location}: bad JSON at column {error.colno} ({error.msg}); expected an object per line{hint}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{location}: bad JSON ({error}); expected an object per line") from error
        yield _row(value, location, has_escapes="\\u" in line)


def _read_json(path: Path, shown: str) -> Iterator[Row]:
    """A list of objects, or one object per line (JSON Lines are also published with this suffix)."""
    text = _text(path, shown)
    if _holds_lines(text):
        yield from _json_lines(text, shown)
        return
    try:
        value = json.loads(text, parse_constant=_refused)
    except json.JSONDecodeError as error:
        raise DataError(f"{shown}:{error.lineno}: bad JSON at column {error.colno} ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown}: bad JSON ({error})") from error
    if not isinstance(value, list):
        raise DataError(f"{shown}: expected a list of objects, got {type(value).__name__}; JSON Lines are also accepted")
    for index, item in enumerate(value, 1):
        yield _row(item, f"{shown}, row {index}", has_escapes=True)


def _holds_lines(text: str) -> bool:
    """Whether the text has several lines and the first one is a JSON object, as in JSON Lines."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _row(value: Any, location: str, *, has_escapes: bool = False) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected an object, got {type(value).__name__}")
    if has_escapes:
        _check_characters(value, location)
    row = Row(value)
    row.location = location
    return row


def _check_characters(value: Any, location: str) -> None:
    """Raise DataError for characters that JSON escapes can express but text cannot: NUL, and half of a surrogate pair."""
    if isinstance(value, dict | list):
        for item in value.items() if isinstance(value, dict) else value:
            _check_characters(list(item) if isinstance(item, tuple) else item, location)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{location}: holds \\u{ord(value[error.start]):04x}, half of a surrogate pair; expected valid Unicode"
            ) from error
    if isinstance(value, str) and "\0" in value:
        raise DataError(f"{location}: holds a NUL character (\\u0000); expected text")


def _with_locations(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    return (_row(row, f"{name}, row {index}") for index, row in enumerate(rows, 1))


def _columnar(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        row.columnar = True
        yield row


def _read_txt(path: Path, shown: str) -> Iterator[Row]:
    """A text file is a single document."""
    yield _row({"text": _text(path, shown)}, shown)


def _read_csv(path: Path, shown: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a field may be a document
    delimiter = "\t" if suffix_of(shown) == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(_text(path, shown), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{shown}:{reader.line_num}: the row's columns do not match the header {reader.fieldnames}")
            yield _row(row, f"{shown}:{reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{shown}:{reader.line_num}: not readable as CSV ({error}); is a quotation mark not closed?") from error


def _read_parquet(path: Path, shown: str) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (row for batch in file.iter_batches(ROWS_AT_ONCE) for row in plain_rows(batch))
            yield from _columnar(_with_locations(batches, shown))
    except (ArrowException, OSError) as error:
        raise DataError(f"{shown}: not a parquet file ({error})") from error


def _read_arrow(path: Path, shown: str) -> Iterator[Row]:
    """The rows of an Arrow file in stream format (as save_to_disk writes) or file format."""
    from pyarrow import ArrowException, ipc, memory_map

    try:
        with memory_map(str(path)) as source:
            try:
                reader = ipc.open_stream(source)
                batches: Iterator[Any] = iter(reader)
            except ArrowException:
                source.seek(0)
                file = ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            yield from _columnar(_with_locations((row for batch in batches for row in plain_rows(batch)), shown))
    except (ArrowException, OSError) as error:
        raise DataError(f"{shown}: not an Arrow file ({error})") from error


def _renamed(row: Row, source: DataSource) -> Row:
    """The row with its columns renamed as the source says. A name of the source may be a path into a column (``_at_path``)."""
    values = {column: _at_path(row, column, theirs) for column, theirs in source.columns.items()}
    replaced = {column_of(theirs, row) for theirs in source.columns.values()}
    return row.with_values({**{name: value for name, value in row.items() if name not in replaced}, **values})


def column_of(name: str, columns: Container[str]) -> str:
    """The column of a path: ``completions`` of ``completions[].response``. A column whose name equals ``name`` takes precedence."""
    return name if name in columns else re.split(r"\[\]|\.", name, maxsplit=1)[0]


def _at_path(row: Row, column: str, name: str) -> Any:
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


def _inside(value: Any, steps: Sequence[str], location: str) -> Any:
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


def _names(sources: Sequence[DataSource]) -> str:
    return ", ".join(source.path for source in sources)


# Fingerprints


def fingerprint(sources: Sequence[DataSource]) -> str:
    """Hash of the content of ``sources``: file bytes (independent of the path), the world's files and code, Hub ids and commits."""
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
        from stages.corpora.hub_tables import commit_of

        return f"hub {source.hub_id}@{commit_of(source)} {source.name} {source.split} {source.data_dir} {source.data_files}"
    path = Path(source.path)
    if (labels := labelling_folder_of(path)) is not None:
        return " ".join(file_sha256(labels / name) for name in (TASKS, ANSWERS) if (labels / name).exists())
    if path.is_file():
        return file_sha256(path)
    return " ".join(f"{file.relative_to(path).as_posix()} {file_sha256(file)}" for file in _files_that_decide(path))


def _files_that_decide(path: Path) -> list[Path]:
    """The files that determine a folder's rows: data files, and files that assign data files to splits."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return sorted(file for file in files if file.name in DECIDE or is_data(file.relative_to(path).as_posix()))
