"""Tables from files, folders, data sets of the Hub and the embedded world, as lists of rows; and fingerprints of their content.

A row remembers where it stands (``Row.place``), so that an error found later names the file and the line. Which files of a folder are
read is decided in ``layout.py``, and how the Hub is read in ``hub_tables.py``.
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
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import HUB, DataInput, DataSource
from stages.corpora.columnar import plain_rows
from stages.corpora.labels import ANSWERS, TASKS, labelled_rows, labelling_folder_of
from stages.corpora.layout import PACKED, SUFFIXES, WHOLE, Layout, Part, is_data, layout_of, parts_of, suffix_of
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
    """A row of a table and its place (``file:line`` or ``source, row N``).

    ``columnar``: it is of a parquet or Arrow table, whose objects have None for the fields that only other rows have.
    """

    place: str = ""
    columnar: bool = False

    def with_values(self, values: dict[str, Any]) -> Row:
        """A row with other values at the same place."""
        made = Row(values)
        made.place, made.columnar = self.place, self.columnar
        return made


def read_rows(sources: Sequence[DataSource], *, split: str = "train") -> list[Row]:
    """All rows of ``sources`` in order, columns renamed, ``skip`` and ``limit`` applied per source.

    ``split`` is read of a folder or a data set of the Hub where the source names none. Raises DataError with the place of what is wrong.
    """
    return [row for source in sources for row in _read_source(source, split)]


def read_splits(data: DataInput, curator: Curator | None = None) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, less what ``curator`` leaves out. Without a validation source some of the training rows are held out."""
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
    """Warn where held-out data are also trained on, by what the sources name; equal rows under other names are not looked for."""
    for held in validation:
        for source in train:
            if _rows_named(source, "train") == _rows_named(held, "validation") and _meet(source, held):
                logger.warning("%s: rows of the held-out data are trained on, too; name other rows (split, skip, limit) for one", held.path)


def _rows_named(source: DataSource, default: str) -> tuple[Any, ...]:
    """What ``source`` reads, but for skip and limit; ``default`` is the split where it names none."""
    split = source.split or default
    path = Path(source.path)
    if not source.on_hub and not (path.is_dir() and folder_layout(path, source).names_splits):
        split = WHOLE  # a file, a part of the embedded world, or a folder that is read whole
    return source.path, source.name, split, source.data_dir, str(source.data_files), source.revision


def _meet(one: DataSource, other: DataSource) -> bool:
    """Whether skip and limit of two sources leave rows that both read."""
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
        return _placed(world_rows(source.path, None if source.limit is None else source.skip + source.limit), source.path)
    if source.on_hub:
        _refuse_file(source)
        from stages.corpora.hub_tables import read_hub

        return read_hub(source, split)
    path = Path(source.path)
    if (labels := labelling_folder_of(path)) is not None:
        return (_row(row, place) for place, row in labelled_rows(labels))
    try:
        if path.is_dir():
            return _read_folder(path, source, split)
        _check_single(path, source)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return read_file(path, str(path))


def _refuse_file(source: DataSource) -> None:
    """Raise DataError for a path that can be no id of the Hub."""
    path = Path(source.path)
    if not source.path.startswith(HUB) and (path.is_absolute() or path.suffix in (*SUFFIXES, *PACKED)):
        raise DataError(f"{source.path}: no such file; expected {EXPECTED}, a folder, a hub id or world:PART")


def _check_single(path: Path, source: DataSource) -> None:
    """Raise DataError for fields that choose among files, which one file does not have."""
    fields = {"name": source.name, "data_dir": source.data_dir, "data_files": source.data_files, "revision": source.revision}
    given = [name for name, value in fields.items() if value is not None]
    if given:
        raise DataError(f"{given[0]} is set, and the path is one file; leave {given[0]} out, or name the folder")
    if source.split is not None:
        parts = parts_of(layout_of([path.name], lambda name: ""), source.split, WHOLE)
        if any(part.written_slice for part in parts):
            raise DataError(f"split: {source.split} slices one file; choose its rows with skip and limit")


# Folders


def folder_layout(path: Path, source: DataSource) -> Layout:
    """The data files of a local folder by split. Raises DataError where there are none, or where what the source chooses is not there."""
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
    """The rows of a folder: of the split that the source names, else of ``split``; all rows where nothing tells splits apart."""
    layout = folder_layout(path, source)
    if layout.unread and not layout.is_declared:
        _say_unread(path, layout, source)
    if layout.lost:
        logger.warning("%s: %s; only those that are there are read", path, layout.lost)
    parts = parts_of(layout, source.split, split)
    _check_formats([name for part in parts for name in layout.splits[part.split]])
    return rows_of_parts(layout, parts, lambda name: read_file(path / name, str(path / name)))


def _say_unread(path: Path, layout: Layout, source: DataSource) -> None:
    """Report data files that belong to no split. Raises DataError where the source names no split: are they meant to be left out?"""
    left = f"{', '.join(layout.unread[:3])}{f' and {len(layout.unread) - 3} more' if len(layout.unread) > 3 else ''}"
    if source.split is None:
        raise DataError(
            f"some file names tell a split ({', '.join(layout.splits)}) and others do not ({left}); name a split, or all files with "
            'data_files: "**"'
        )
    logger.warning("%s: %d data files belong to no split and are not read: %s", path, len(layout.unread), left)


def _check_formats(names: Sequence[str]) -> None:
    """Raise DataError for one table in two formats: its rows would count twice."""
    seen: dict[str, str] = {}
    for name in names:
        bare = name.removesuffix(Path(name).suffix) if Path(name).suffix in PACKED else name
        stem = bare.removesuffix(Path(bare).suffix)
        if stem in seen:
            raise DataError(f"{seen[stem]} and {name} look like one table in two formats; choose one with data_files")
        seen[stem] = name


def rows_of_parts(layout: Layout, parts: Sequence[Part], read: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """The rows of ``parts`` in order; ``read`` gives those of one file."""
    for part in parts:
        rows = (row for name in layout.splits[part.split] for row in read(name))
        if part.written_slice:
            kept = list(rows)
            yield from (kept[index] for index in part.rows(len(kept)))
        else:
            yield from rows


# Files


def read_file(path: Path, shown: str) -> Iterator[Row]:
    """The rows of one file; ``shown`` names it in messages. Raises DataError for what cannot be read."""
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
    """The bytes of a file, unpacked where its name says that it is packed."""
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
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends of JSON Lines.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{shown}:{number}"
        try:
            value = json.loads(line, parse_constant=_refused)
        except json.JSONDecodeError as error:
            whole = "; a list of objects is .json" if number == 1 and line.lstrip().startswith("[") else ""
            raise DataError(f"{place}: bad JSON at column {error.colno} ({error.msg}); expected an object per line{whole}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: bad JSON ({error}); expected an object per line") from error
        yield _row(value, place, has_escapes="\\u" in line)


def _read_json(path: Path, shown: str) -> Iterator[Row]:
    """A list of objects; or an object per line, which is also published under this suffix."""
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
        raise DataError(f"{shown}: expected a list of objects, got {type(value).__name__}; several objects, one per line, are read, too")
    for number, item in enumerate(value, 1):
        yield _row(item, f"{shown}, row {number}", has_escapes=True)


def _holds_lines(text: str) -> bool:
    """Whether there are several lines and the first is an object by itself, as in JSON Lines."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _row(value: Any, place: str, *, has_escapes: bool = False) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object, got {type(value).__name__}")
    if has_escapes:
        _check_characters(value, place)
    row = Row(value)
    row.place = place
    return row


def _check_characters(value: Any, place: str) -> None:
    """Raise DataError for what JSON's escapes can write and a text cannot hold: NUL, and one half of a surrogate pair."""
    if isinstance(value, dict | list):
        for item in value.items() if isinstance(value, dict) else value:
            _check_characters(list(item) if isinstance(item, tuple) else item, place)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: holds \\u{ord(value[error.start]):04x}, one half of a surrogate pair, which is no text") from error
    if isinstance(value, str) and "\0" in value:
        raise DataError(f"{place}: holds a NUL character (\\u0000); expected text")


def _placed(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    return (_row(row, f"{name}, row {number}") for number, row in enumerate(rows, 1))


def _columnar(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        row.columnar = True
        yield row


def _read_txt(path: Path, shown: str) -> Iterator[Row]:
    """A text file is one document."""
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
            yield from _columnar(_placed(batches, shown))
    except (ArrowException, OSError) as error:
        raise DataError(f"{shown}: not a parquet file ({error})") from error


def _read_arrow(path: Path, shown: str) -> Iterator[Row]:
    """The rows of an Arrow file, in the format of streams (as save_to_disk writes) or of files."""
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
            yield from _columnar(_placed((row for batch in batches for row in plain_rows(batch)), shown))
    except (ArrowException, OSError) as error:
        raise DataError(f"{shown}: not an Arrow file ({error})") from error


def _renamed(row: Row, source: DataSource) -> Row:
    for column, theirs in source.columns.items():
        if theirs not in row:
            near = difflib.get_close_matches(theirs, row, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{row.place}: columns names {theirs!r} for {column!r}, and the row has {', '.join(row)}{hint}")
    values = {column: row[theirs] for column, theirs in source.columns.items()}
    return row.with_values({**{name: value for name, value in row.items() if name not in source.columns.values()}, **values})


def text_of(row: Row, column: str, *, empty: bool = False) -> str:
    """The text in ``column``. Raises DataError where it is missing, no text, or empty (unless ``empty`` is allowed)."""
    if column not in row:
        near = difflib.get_close_matches(column, row, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{row.place}: no column {column!r}; the row has {', '.join(row) or 'none'}{hint} (rename with columns: {{{column}: THEIRS}})"
        )
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {column} is {type(value).__name__} ({value!r:.60}); expected text")
    if not empty and not value.strip():
        raise DataError(f"{row.place}: {column} is empty; expected text")
    return value


def _names(sources: Sequence[DataSource]) -> str:
    return ", ".join(source.path for source in sources)


# Fingerprints


def fingerprint(sources: Sequence[DataSource]) -> str:
    """Hash of what ``sources`` hold: bytes of files (wherever they lie), the world's files and code, ids and commits of the Hub's data."""
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
    """The files of a folder that its rows depend on: those with data, and those that say which split they belong to."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return sorted(file for file in files if file.name in DECIDE or is_data(file.relative_to(path).as_posix()))
