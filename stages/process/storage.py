"""Atomic file writes, and messages for disk errors."""

from __future__ import annotations

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from stages.errors import StorageError

STORAGE = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOTDIR: "a part of the path is a file and not a folder",
    errno.EIO: "the device has an input/output error",
    errno.EMFILE: "too many files are open",
    errno.ENOLCK: "the file system offers no locks",
}


def check_home(home: Path) -> None:
    """Raise StorageError if results cannot be stored in the folder ``home``, because it or a folder above it is not a folder."""
    try:
        existing = next(path for path in (home, *home.parents) if path.is_symlink() or path.exists())
        if existing.is_dir():
            return
        reason = f"{existing} is not a folder"
    except (OSError, ValueError) as error:  # a name that is too long, a symbolic link to itself, a NUL byte
        reason = getattr(error, "strerror", None) or str(error)
    raise StorageError(f"results cannot be stored in {str(home)!r}: {reason}. Choose another --home (or STAGES_HOME)")


def make_home(folder: Path) -> None:
    """Create a folder of the home. Raises StorageError if the system refuses, as for a path below /proc."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error) or StorageError(
            f"results cannot be stored: {folder} cannot be created ({error.strerror}). Choose another --home (or STAGES_HOME)"
        ) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file (a text in UTF-8) atomically: a reader, or a crash, sees either the old or the new file."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: object) -> None:
    """Write JSON as ``write_file`` does."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def point_to(link: Path, target: str) -> None:
    """Atomically make ``link`` a symbolic link to ``target``."""
    partial = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    partial.symlink_to(target)
    os.replace(partial, link)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Empty if the file is missing or contains something else; for content that can be made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(error: BaseException) -> StorageError | None:
    """Convert a disk error to a message; None for any other error. safetensors and torch wrap the system error in text."""
    current: BaseException | None = error
    while current is not None:
        code = current.errno if isinstance(current, OSError) else _errno_in_text(current)
        if code in STORAGE:
            path = f" ({current.filename})" if isinstance(current, OSError) and current.filename else ""
            return StorageError(
                f"{STORAGE[code]}{path}. Fix this or choose another --home, and run the same command again. Earlier results are "
                "intact, and checkpoints are kept"
            )
        current = current.__cause__ or current.__context__
    return None


def _errno_in_text(error: BaseException) -> int | None:
    if type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError):
        text = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            if f"code: {code}," in text or f"os error {code}" in text:
                return code
        if "file write failed" in text or "failed writing file" in text:
            return errno.ENOSPC
    return None
