"""The file formats that rows are read from: JSON, JSON Lines, CSV, text, Parquet, Arrow, also packed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from stages.corpora.rows import Row
from stages.corpora.tables.columnar import plain_rows
from stages.corpora.tables.layout import PACKED, SUFFIXES, Layout, Part, suffix_of
from stages.corpora.tables.signatures import other_content, refuse_pointer
from stages.errors import DataError
from stages.process.console import announce

if TYPE_CHECKING:
    import pyarrow

EXPECTED = f"{', '.join(SUFFIXES)} (packed: {', '.join(PACKED)})"


ROWS_AT_ONCE = 1024


def rows_of_parts(layout: Layout, parts: Sequence[Part], read: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """The rows of ``parts`` in order. ``read`` returns the rows of one file."""
    for part in parts:
        rows = (row for name in layout.splits[part.split] for row in read(name))
        if part.written_slice:
            kept = list(rows)
            yield from (kept[index] for index in part.rows(len(kept)))
        else:
            yield from rows


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
    refuse_pointer(path, shown)
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
        raise other_content(path, shown) or DataError(f"{shown}: cannot be read ({error})") from error


def file_text(path: Path, shown: str) -> str:
    """The text of a file, unpacked if it is packed. ``shown`` is its name in messages.

    Raises DataError with the line of the first byte that is not valid UTF-8, and for NUL bytes.
    """
    data = _bytes(path, shown)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise other_content(path, shown) or DataError(
            f"{shown}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise other_content(path, shown) or DataError(f"{shown}:{line}: contains a NUL byte; expected text")
    return text


def _read_jsonl(path: Path, shown: str) -> Iterator[Row]:
    yield from _json_lines(file_text(path, shown), shown)


def _json_lines(text: str, shown: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may contain U+2028 and similar characters, which do not end a line in JSON Lines.
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        location = f"{shown}:{line_number}"
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            hint = "; a list of objects is .json" if line_number == 1 and line.lstrip().startswith("[") else ""
            raise DataError(f"{location}: bad JSON at column {error.colno} ({error.msg}); expected an object per line{hint}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{location}: bad JSON ({error}); expected an object per line") from error
        if line_number == 1 and isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            raise DataError(f"{location}: expected an object per line, got a list; rename the file to {Path(shown).stem}.json")
        yield row_at(value, location, has_escapes="\\u" in line)


def _read_json(path: Path, shown: str) -> Iterator[Row]:
    """A list of objects, or one object per line (JSON Lines are also published with this suffix)."""
    text = file_text(path, shown)
    if _holds_lines(text):
        yield from _json_lines(text, shown)
        return
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{shown}:{error.lineno}: bad JSON at column {error.colno} ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown}: bad JSON ({error})") from error
    if not isinstance(value, list):
        one_row = "; if it is one row, put it in brackets, or name the file .jsonl" if isinstance(value, dict) else ""
        raise DataError(f"{shown}: expected a list of objects, got {type(value).__name__}{one_row}")
    for index, item in enumerate(value, 1):
        yield row_at(item, f"{shown}, row {index}", has_escapes=True)


def _holds_lines(text: str) -> bool:
    """Whether the text has several lines and the first one is a JSON object, as in JSON Lines."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object. Raises ValueError if a key occurs twice, because Python would silently keep the last value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return made


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refused, object_pairs_hook=_object)
"""One for all rows: ``json.loads`` with these arguments makes a new one for each call, which takes half of its time."""


def row_at(value: object, location: str, *, has_escapes: bool = False) -> Row:
    """A parsed object as a row. ``has_escapes``: its texts may have characters that are not valid. Raises DataError for anything else."""
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected an object, got {type(value).__name__}")
    if has_escapes:
        check_characters(value, location)
    row = Row(value)
    row.location = location
    return row


def check_characters(value: object, location: str) -> None:
    """Raise DataError for characters that JSON escapes can express but text cannot: NUL, and half of a surrogate pair."""
    if isinstance(value, dict | list):
        for item in value.items() if isinstance(value, dict) else value:
            check_characters(list(item) if isinstance(item, tuple) else item, location)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{location}: contains \\u{ord(value[error.start]):04x}, half of a surrogate pair; expected valid Unicode"
            ) from error
    if isinstance(value, str) and "\0" in value:
        raise DataError(f"{location}: contains a NUL character (\\u0000); expected text")


def with_locations(rows: Iterable[Mapping[str, object]], name: str) -> Iterator[Row]:
    return (row_at(row, f"{name}, row {index}") for index, row in enumerate(rows, 1))


def _columnar(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        row.columnar = True
        yield row


def _read_txt(path: Path, shown: str) -> Iterator[Row]:
    """A text file is a single document."""
    yield row_at({"text": file_text(path, shown)}, shown)


def _read_csv(path: Path, shown: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a field may be a document
    text = file_text(path, shown)

    def separated_by(delimiter: str) -> csv.DictReader[str]:
        return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    reader = separated_by("\t" if suffix_of(shown) == ".tsv" else ",")
    try:
        header = list(reader.fieldnames or ())
        if len(header) == 1 and (other := next((mark for mark in ",;\t|" if mark in header[0]), None)) is not None:
            reader = separated_by(other)  # in many countries, Excel writes semicolons
            announce(("separator", shown), f"{shown}: the columns are separated by {other!r}, as in the header")
            header = list(reader.fieldnames or ())
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(
                f"{shown}:1: the header names {', '.join(map(repr, twice))} more than once; rename or remove one of the columns"
            )
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{shown}:{reader.line_num}: the row's columns do not match the header {reader.fieldnames}")
            yield row_at(row, f"{shown}:{reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{shown}:{reader.line_num}: not readable as CSV ({error}); is a quotation mark not closed?") from error


def _read_parquet(path: Path, shown: str) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (row for batch in file.iter_batches(ROWS_AT_ONCE) for row in plain_rows(batch, shown))
            yield from _columnar(with_locations(batches, shown))
    except (ArrowException, OSError) as error:
        raise other_content(path, shown) or DataError(f"{shown}: not a parquet file ({error})") from error


def _read_arrow(path: Path, shown: str) -> Iterator[Row]:
    """The rows of an Arrow file in stream format (as save_to_disk writes) or file format."""
    from pyarrow import ArrowException, ipc, memory_map

    try:
        with memory_map(str(path)) as source:
            try:
                reader = ipc.open_stream(source)
                batches: Iterator[pyarrow.RecordBatch] = iter(reader)
            except ArrowException:
                source.seek(0)
                file = ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            yield from _columnar(with_locations((row for batch in batches for row in plain_rows(batch, shown)), shown))
    except (ArrowException, OSError) as error:
        raise other_content(path, shown) or DataError(f"{shown}: not an Arrow file ({error})") from error
