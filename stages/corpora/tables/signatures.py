"""What the first bytes of a file say about its format. The messages about an unreadable file name it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from stages.corpora.tables.layout import PACKED
from stages.errors import DataError

SUFFIX = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\0": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", ".zst"),
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("Arrow", ".arrow"),
    b"\xff\xff\xff\xff": ("Arrow", ".arrow"),
}
CONVERTED = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet; unpack it, or save the sheet as CSV",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"\x89HDF": "HDF5; save it as Parquet",
    b"SQLite format 3\0": "an SQLite database; export the table as Parquet or CSV",
    b"\x80\x04": "a Python pickle; save it as Parquet or JSON Lines",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def other_content(path: Path, shown: str) -> DataError | None:
    """The error for a file whose content is of another format than its name says; None if the content is not recognised.

    Call it only for a file that could not be read: a text may begin with ``PAR1``. ``shown`` is the file's name in messages.
    """
    begin = _begin(path)
    for signature, (kind, suffix) in SUFFIX.items():
        if begin.startswith(signature):
            return _wrong_name(shown, kind, suffix)
    for signature, content in CONVERTED.items():
        if begin.startswith(signature):
            return DataError(f"{shown}: the content is {content}")
    name = PurePosixPath(shown)
    if begin and name.suffix.lower() in PACKED:
        reason = f"the content is not packed as {name.suffix} says"
        return DataError(f"{shown}: cannot be read, because {reason}; if it is plain text, rename the file to {name.stem}")
    return None


def refuse_pointer(path: Path, shown: str) -> None:
    """Raise DataError for a pointer of Git LFS. It is a text, so it would be read as data."""
    if _begin(path).startswith(LFS_POINTER):
        raise DataError(f"{shown}: this is a pointer of Git LFS and not the data; run `git lfs pull` in its folder")


def _begin(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER))
    except OSError:  # the reader reports it
        return b""


def _wrong_name(shown: str, kind: str, suffix: str) -> DataError | None:
    path = PurePosixPath(shown)
    if path.suffix.lower() == suffix:
        return None
    kept = path.name.removesuffix(path.suffix) if path.suffix.lower() in PACKED else path.name if suffix in PACKED else path.stem
    return DataError(f"{shown}: the content is {kind}; rename the file to {kept}{suffix}")
