"""The folder in which new versions are written before they are published, and the lock of a registry."""

from __future__ import annotations

import fcntl
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Staging:
    """The folder tmp/ of the registry under ``root``. Processes that publish at the same time do not disturb each other."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "tmp"

    @contextmanager
    def lock(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A private folder under tmp/. A held lock file marks its owner as alive; a folder without one is left over from a crash."""
        with self.lock():
            self._path.mkdir(exist_ok=True)
            self._clean()
            staging = self._path / uuid.uuid4().hex
            owner = staging.with_suffix(".lock").open("w")
            fcntl.flock(owner, fcntl.LOCK_EX)
            staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # already moved if it was published
            Path(owner.name).unlink(missing_ok=True)
            owner.close()

    def _clean(self) -> None:
        for path in self._path.iterdir():
            if path.suffix == ".lock":
                with path.open("w") as owner:
                    try:
                        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink(missing_ok=True)  # its owner may have finished meanwhile
            elif not path.with_suffix(".lock").exists():
                shutil.rmtree(path, ignore_errors=True)
