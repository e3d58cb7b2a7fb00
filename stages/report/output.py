"""Write a page: check the output path before the work starts, and write the file atomically."""

from __future__ import annotations

import os
from pathlib import Path

from stages.errors import StorageError
from stages.process.storage import write_file

GENERATOR = "tristage"
"""The generator that a page names. It distinguishes a report from other files."""


def check_output(path: Path) -> None:
    """Raise StorageError unless ``path`` is a new file in an existing, writable folder, or an earlier report."""
    if path.is_dir():
        raise StorageError(f"{path} is a folder; expected a file for the page, for example {path / 'page.html'}")
    if not path.parent.is_dir():
        what = "a file" if path.parent.exists() else "not there"
        raise StorageError(f"{path} cannot be written: {path.parent} is {what}; expected a folder. Make it, or choose another path")
    if path.exists() and not _is_report(path):
        raise StorageError(f"{path} exists, but `stages report` did not write it. Choose another path, or remove the file first")
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path} cannot be written: no permission to write in the folder {path.parent}. Choose another path")


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(2000)
    except OSError:
        return False


def write_page(html: str, path: Path) -> int:
    """Write a page atomically and return its size in bytes. Raises StorageError."""
    content = html.encode()
    try:
        write_file(path, content)
    except OSError as error:
        raise StorageError(
            f"the page cannot be written to {path}: {error.strerror or error}; free some space, or choose another file "
            "(stages report RUN --out FILE)"
        ) from error
    return len(content)
