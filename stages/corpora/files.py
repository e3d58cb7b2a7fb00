"""Tables from files, folders, hub data sets and the embedded world, as lists of rows; and fingerprints of their content.

A row read from a file remembers where it stands (``Row.place``), so that an error found later names the file and the line.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import DataInput, DataSource
from stages.corpora.labels import ANSWERS, TASKS, labelled_rows, labelling_folder_of
from stages.corpora.world.lexicon import world_files
from stages.corpora.world.parts import PREFIX, world_rows
from stages.errors import DataError
from stages.registry.contents import file_sha256

if TYPE_CHECKING:
    from stages.corpora.curation import Curator

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


class Row(dict[str, Any]):
    """A row of a table and its place (``file:line`` or ``source, row N``)."""

    place: str = ""


def read_rows(sources: Sequence[DataSource], *, split: str = "train") -> list[Row]:
    """All rows of ``sources`` in order, columns renamed, ``skip`` and ``limit`` applied per source.

    ``split`` is the hub split to read where a source names none. Raises DataError with the place of what is wrong.
    """
    return [row for source in sources for row in _read_source(source, split)]


def read_splits(data: DataInput, curator: Curator | None = None) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, less what ``curator`` leaves out. Without a validation source some of the training rows are held out."""
    from stages.corpora.splits import hold_out

    train = read_rows(data.train)
    if data.validation is not None:
        heldout = read_rows(data.validation, split="validation")
    else:
        train, heldout = hold_out(train, data, _names(data.train))
    if curator is not None:
        train, heldout = curator.training(train), curator.heldout(heldout)
        for rows, which in ((train, "training"), (heldout, "held-out")):
            if not rows:
                raise DataError(f"{_names(data.train)}: curation leaves no {which} row ({dict(curator.left_out)})")
    return train, heldout


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
    path = Path(source.path)
    if (labels := labelling_folder_of(path)) is not None:
        return (_row(row, place) for place, row in labelled_rows(labels))
    if path.is_dir() or path.is_file():
        return (row for file in _files(path) for row in _read_file(file))
    if path.is_absolute() or path.suffix in (*SUFFIXES, ".gz"):
        raise DataError(f"{source.path}: no such file; expected {', '.join(SUFFIXES)} (also .gz), a folder, a hub id or world:PART")
    return _read_hub(source, split)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.removesuffix(".gz").endswith(SUFFIXES))
    if not found:
        raise DataError(f"{path}: the folder holds no data file; expected {', '.join(SUFFIXES)} (also .gz)")
    return found


def _read_file(path: Path) -> Iterator[Row]:
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet,
    }  # fmt: skip
    if suffix not in readers:
        raise DataError(f"{path}: cannot read {suffix or 'a file without a suffix'}; expected {', '.join(SUFFIXES)} (also .gz)")
    return readers[suffix](path)


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _text(path: Path) -> str:
    data = _bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}: holds a NUL byte; expected text")
    return text


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends of JSON Lines.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line, parse_constant=_refused)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: bad JSON at column {error.colno} ({error.msg}); expected an object per line") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: bad JSON ({error}); expected an object per line") from error
        yield _row(value, place, has_escapes="\\u" in line)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(_text(path), parse_constant=_refused)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: bad JSON at column {error.colno} ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: bad JSON ({error})") from error
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, got {type(value).__name__}; one object per line is .jsonl")
    for number, item in enumerate(value, 1):
        yield _row(item, f"{path}, row {number}", has_escapes=True)


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


def _read_txt(path: Path) -> Iterator[Row]:
    """A text file is one document."""
    yield _row({"text": _text(path)}, str(path))


def _read_csv(path: Path) -> Iterator[Row]:
    tab = path.name.removesuffix(".gz").endswith(".tsv")
    csv.field_size_limit(2**31 - 1)  # a field may be a document
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t" if tab else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}:{reader.line_num}: the row's columns do not match the header {reader.fieldnames}")
            yield _row(row, f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not readable as CSV ({error}); is a quotation mark not closed?") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.read_table(path)
    except ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error})") from error
    return _placed(table.to_pylist(), str(path))


def _read_hub(source: DataSource, split: str) -> Iterator[Row]:
    """A data set of the hub. Raises DataError where it cannot be had; the message tells the split names where they are the reason."""
    from datasets import load_dataset

    wanted = source.split or split
    try:
        table = load_dataset(source.path, source.name, split=wanted)
    except Exception as error:  # datasets raises a dozen kinds, hub and network errors among them
        reason = str(error).strip().split("\n")[0][:300]
        raise DataError(
            f"{source.path}: there is no such file or folder here, and the hub did not give split {wanted!r} "
            f"({type(error).__name__}: {reason}). Check the path, the id, the split and the connection"
        ) from error
    return _placed(table, source.path)


def _renamed(row: Row, source: DataSource) -> Row:
    for column, theirs in source.columns.items():
        if theirs not in row:
            near = difflib.get_close_matches(theirs, row, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{row.place}: columns names {theirs!r} for {column!r}, and the row has {', '.join(row)}{hint}")
    values = {column: row[theirs] for column, theirs in source.columns.items()}
    renamed = Row({**{name: value for name, value in row.items() if name not in source.columns.values()}, **values})
    renamed.place = row.place
    return renamed


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
    """Hash of what ``sources`` hold: the bytes of files (wherever they lie), the world's files and code, id and revision of hub data."""
    hashes = hashlib.sha256()
    for source in sources:
        hashes.update(_source_fingerprint(source).encode() + b"\n")
    return hashes.hexdigest()


def _source_fingerprint(source: DataSource) -> str:
    if source.path.startswith(PREFIX):
        code = sorted((Path(__file__).parent / "world").glob("*.py"))
        return " ".join([source.path, *(file_sha256(file) for file in [*world_files(), *code])])
    path = Path(source.path)
    if (labels := labelling_folder_of(path)) is not None:
        return " ".join(file_sha256(labels / name) for name in (TASKS, ANSWERS) if (labels / name).exists())
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        return " ".join(f"{file.relative_to(path).as_posix()} {file_sha256(file)}" for file in _files(path))
    return f"hub {source.path} {source.name} {source.split}"
