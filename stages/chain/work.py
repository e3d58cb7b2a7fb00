"""The work folder of a step: its checkpoints while it runs, and notes that must outlive an interruption.

<home>/work/<fingerprint>/                checkpoints; removed when the step is done
<home>/work/<fingerprint>.lock            locked by the process that runs the step
<home>/work/<fingerprint>.began           when the step began for the first time
<home>/work/<fingerprint>.precision.json  the meaning of ``precision: auto`` at that time
<home>/work/<fingerprint>.step.json       name and fingerprint parts of the step
"""

from __future__ import annotations

import fcntl
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from stages.labelling.waiting import WAITING
from stages.process.storage import write_json
from stages.registry.record import FingerprintParts


def work_folder(home: Path, fingerprint: str) -> Path:
    """The folder for the checkpoints of the step with this fingerprint."""
    return home / "work" / fingerprint


def beside(work: Path, suffix: str) -> Path:
    """A file next to a step's work folder: a work folder with files means that there is something to resume."""
    return work.with_suffix(suffix)


def is_begun(work: Path) -> bool:
    """Whether an earlier run left something to resume."""
    return work.is_dir() and any(work.iterdir())


def clear(work: Path) -> None:
    """Remove the work folder of a step that is done, and the files next to it."""
    shutil.rmtree(work, ignore_errors=True)
    # A process that waits for the lock will find the step done, so removing the lock file is safe.
    for suffix in (".lock", ".precision.json", ".began", ".step.json"):
        beside(work, suffix).unlink(missing_ok=True)


def first_start_time(work: Path) -> datetime:
    """The time at which a step began for the first time, for chat templates that write the date."""
    kept = beside(work, ".began")
    with suppress(OSError, ValueError):
        return datetime.fromisoformat(kept.read_text(encoding="utf-8"))
    now = datetime.now().replace(microsecond=0)
    kept.write_text(now.isoformat(), encoding="utf-8")
    return now


@dataclass(frozen=True)
class OtherAttempt:
    """An interrupted run of a step with other settings, inputs, data or code. Its checkpoints are not used."""

    work: Path
    parts: FingerprintParts

    def size(self) -> int:
        """Bytes of the work folder."""
        return sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())


def note_step(work: Path, name: str, parts: FingerprintParts) -> None:
    """Store what ``other_attempt`` needs."""
    write_json(beside(work, ".step.json"), {"name": name, "fingerprint_parts": parts})


def other_attempt(work: Path, name: str) -> OtherAttempt | None:
    """The most recent interrupted run of the step ``name`` with another work folder than ``work``.

    A run that a process continues now, or that only waits for annotators, does not count.
    """
    notes = {path: path.stat().st_mtime for path in work.parent.glob("*.step.json")}
    for path in sorted(notes, key=notes.__getitem__, reverse=True):
        other = path.with_name(path.name.removesuffix(".step.json"))
        with suppress(OSError, ValueError, KeyError):
            note = json.loads(path.read_text(encoding="utf-8"))
            if note["name"] == name and other != work and is_begun(other) and not (other / WAITING).exists() and not _is_locked(other):
                return OtherAttempt(other, note["fingerprint_parts"])
    return None


def _is_locked(work: Path) -> bool:
    try:
        with beside(work, ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
