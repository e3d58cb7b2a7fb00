"""Files that are there whole or not at all, and what a user is told where the disk refuses."""

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
    errno.EIO: "the device has an input/output error",
    errno.EMFILE: "too many files are open",
    errno.ENOLCK: "the file system offers no locks",
}


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one and nothing between."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(error: BaseException) -> StorageError | None:
    """What to tell of an error that the disk made; None for any other. safetensors and torch wrap the system's error in text."""
    found: BaseException | None = error
    while found is not None:
        number = found.errno if isinstance(found, OSError) else _errno_in_text(found)
        if number in STORAGE:
            place = f" ({found.filename})" if isinstance(found, OSError) and found.filename else ""
            return StorageError(
                f"{STORAGE[number]}{place}. Mend that, or choose another --home, and start the same command again; what was made before "
                "is whole, and checkpoints are kept"
            )
        found = found.__cause__ or found.__context__
    return None


def _errno_in_text(error: BaseException) -> int | None:
    if type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError):
        text = str(error)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            if f"code: {number}," in text or f"os error {number}" in text:
                return number
        if "file write failed" in text or "failed writing file" in text:
            return errno.ENOSPC
    return None
