"""Folders in shared memory. A killed run cannot remove its folder, so the next run removes it."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path("/dev/shm")
PREFIX, MARK = "tristage-", ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep ``folder`` (its name begins with ``PREFIX``) for this process during the context, and remove it at the end.

    First, the folders beside it are removed whose processes have ended. A process marks its folder by a locked file beside it; the system
    unlocks this file when the process ends, also when it is killed.
    """
    for mark in folder.parent.glob(f"{PREFIX}*{MARK}"):
        _remove_if_abandoned(mark)
    mark = folder.with_name(folder.name + MARK)
    with mark.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            mark.unlink(missing_ok=True)


def _remove_if_abandoned(mark: Path) -> None:
    try:
        with mark.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(mark.with_suffix(""), ignore_errors=True)
            mark.unlink(missing_ok=True)
    except OSError:  # in use, removed meanwhile, or of another user
        pass
