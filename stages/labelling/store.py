"""The answers of a labelling folder: an append-only file. Each answer is flushed to disk before it is acknowledged.

Only one server at a time can hold a folder. The page gives each answer an id. The store keeps an answer once, even if the page sends it
twice, so the page can send it again if it gets no acknowledgement.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import TypedDict

from stages.corpora.labels import ANSWERS, GOLD, TASKS, LabelAnswer, LabelTask, latest, read_answers, read_tasks
from stages.errors import DataError, StorageError
from stages.labelling.assignment import Assignment, overlap_tasks, shown_order
from stages.labelling.publishing import SCORES, SETTINGS, LabelSettings, read_settings
from stages.labelling.questions import AnswerError, checked_answer
from stages.process.storage import STORAGE, read_json, sync

OPEN = "open.json"  # annotator -> the task that they have open


@dataclass(frozen=True)
class Screening:
    """An annotator's results on the gold tasks. A share is None if no gold task measures it."""

    answered: int
    of: int
    ranking_agreement: float | None
    check_agreement: float | None
    passed: bool | None  # None until all gold tasks are answered


class StoredScores(TypedDict):
    """Scores of the last round's reward model: its reference and content digest, and by task a score per completion."""

    model: str
    digest: str
    scores: dict[str, list[float]]


@dataclass(frozen=True)
class Labels:
    """The content of a labelling folder, as reports read it. ``answers``: annotator -> task -> the answer that counts.

    ``scores``: scores of the last round's reward model, with ``model`` (its reference) and ``scores`` (task -> list of scores). None if
    there are no scores.
    """

    settings: LabelSettings
    tasks: dict[str, LabelTask]
    gold: dict[str, LabelTask]
    answers: dict[str, dict[str, LabelAnswer]]
    scores: StoredScores | None


def read_labels(folder: Path) -> Labels:
    """Read a folder from disk. A server may hold it at the same time."""
    answers: dict[str, dict[str, LabelAnswer]] = {}
    for _, answer in latest(read_answers(folder / ANSWERS)):
        answers.setdefault(answer.annotator, {})[answer.task] = answer
    gold = read_tasks(folder / GOLD) if (folder / GOLD).exists() else {}
    return Labels(read_settings(folder), read_tasks(folder / TASKS), gold, answers, read_scores(folder))


def read_scores(folder: Path) -> StoredScores | None:
    """The last round's reward model scores of the completions. None if there are none."""
    path = folder / SCORES
    if not path.exists():
        return None
    scores: StoredScores = json.loads(path.read_text(encoding="utf-8"))
    return scores


@dataclass
class Log:
    """An append-only file of lines. ``append`` returns after the line is flushed to disk.

    Lines written during a flush share the next flush, so a writer waits for at most two flushes.
    """

    path: Path
    _file: int = -1
    _size: int = 0
    _written: int = 0
    _flushed: int = 0
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _flushing: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> int:
        """Open the file. Removes an incomplete last line, which a crash may leave. Returns the number of removed bytes."""
        is_new = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if is_new:
            sync(self.path.parent)
        content = self.path.read_bytes()
        self._size = content.rfind(b"\n") + 1
        if self._size < len(content):
            os.ftruncate(self._file, self._size)
        return len(content) - self._size

    def append(self, line: str) -> None:
        """Write one line and flush it to disk. Raises StorageError if that fails. A line that is only partly written is removed."""
        data = line.encode() + b"\n"
        try:
            with self._writing:
                try:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[os.write(self._file, rest) :]
                except OSError:
                    os.ftruncate(self._file, self._size)
                    raise
                self._size += len(data)
                self._written += 1
                ticket = self._written
            with self._flushing:
                if self._flushed < ticket:
                    upto = self._written
                    os.fsync(self._file)
                    self._flushed = upto
        except OSError as error:
            reason = STORAGE.get(error.errno or 0, str(error))
            raise StorageError(
                f"{self.path}: the answer could not be stored ({reason}). Free some space; the page sends it again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Store:
    """Tasks and answers of a folder, and the assignment of tasks to annotators.

    Thread-safe. Raises DataError if another server uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _state_of(folder)
        self.settings: LabelSettings = read_settings(folder)
        self._lock = threading.Lock()
        self._writers: dict[str, threading.Lock] = {}  # by annotator: two simultaneous copies of an answer are stored once
        self._hold = self._take_hold()
        self.tasks: dict[str, LabelTask] = read_tasks(folder / TASKS)
        self.gold = _read_gold(folder)
        self._assignment = self._new_assignment()
        self.answers: dict[str, dict[str, LabelAnswer]] = {}  # annotator -> task -> the answer that counts, in file order
        self._ids: dict[str, LabelAnswer] = {}
        for _, answer in read_answers(folder / ANSWERS):
            self._take(answer)
        self._hold_open(read_json(folder / OPEN))
        self._log = Log(folder / ANSWERS)
        self.cut_off = self._log.open()

    def _take_hold(self) -> int:
        lock = os.open(self.folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise DataError(
                f"{self.folder}: another `stages label` serves these tasks. Open its address (one server handles many annotators), or stop "
                "it"
            ) from error
        return lock

    def refresh(self) -> list[str]:
        """Load settings and gold tasks again if their files changed. Returns the names of the changed settings.

        The tasks of a folder never change. All answers are kept. The assignment of tasks follows the new settings. Raises DataError if the
        files cannot be read; in that case the old settings stay in use.
        """
        with self._lock:
            files = _state_of(self.folder)
            if files == self._files:
                return []
            try:
                settings, gold = read_settings(self.folder), _read_gold(self.folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.folder}: the changed settings cannot be read ({type(error).__name__}: {error})") from error
            names = [name for name in LabelSettings.__dataclass_fields__ if getattr(settings, name) != getattr(self.settings, name)]
            changed = [*names, *(["gold"] if gold != self.gold else [])]
            self._files, self.settings, self.gold = files, settings, gold
            if {"overlap", "annotators", "seed"} & set(changed):
                self._assign_again()
            return changed

    def _assign_again(self) -> None:
        """Assign the tasks by the present settings, from the answers so far."""
        held = self._assignment.held
        self._assignment = self._new_assignment()
        for annotator, own in self.answers.items():
            for task, answer in own.items():
                if task in self.tasks:
                    self._assignment.answered(task, annotator, is_ranked=answer.is_used)
        self._hold_open(held)

    def _new_assignment(self) -> Assignment:
        """An assignment without any answers."""
        overlap = overlap_tasks(list(self.tasks), self.settings.overlap, self.settings.seed)
        return Assignment(list(self.tasks), {name: self.settings.annotators if name in overlap else 1 for name in self.tasks})

    def _hold_open(self, held: dict[str, str]) -> None:
        """Lease to each annotator the task that they have open."""
        for annotator, task in held.items():
            if task not in self.answers.get(annotator, {}):
                self._assignment.hold(annotator, task)

    def close(self) -> None:
        """Release the folder, so that another server can use it."""
        self._log.close()
        os.close(self._hold)

    def _take(self, answer: LabelAnswer) -> None:
        self._ids[answer.id] = answer
        own = self.answers.setdefault(answer.annotator, {})
        own.pop(answer.task, None)
        own[answer.task] = answer
        if answer.task in self.tasks:
            self._assignment.answered(answer.task, answer.annotator, is_ranked=answer.is_used)

    # Requests of the pages

    def next_task(self, annotator: str, wish: str | None = None) -> LabelTask | None:
        """The annotator's next task. None if no task is left, or if the annotator did not pass the screening."""
        with self._lock:
            answered = self.answers.get(annotator, {})
            for name in shown_gold(list(self.gold), annotator, self.settings.seed):
                if name not in answered:
                    return self.gold[name]
            if self.gold and not self._screening(annotator).passed:
                return None
            before = self._assignment.held.get(annotator)
            task_id = self._assignment.next(annotator, answered, wish)
            if task_id != before:
                self._note_open()
            return None if task_id is None else self.tasks[task_id]

    def _note_open(self) -> None:
        """Save which task each annotator has open, for the next server. The file contains no answers, so it is not flushed to disk."""
        partial = self.folder / f".{OPEN}"
        try:
            partial.write_text(json.dumps(self._assignment.held), encoding="utf-8")
            os.replace(partial, self.folder / OPEN)
        except OSError:
            partial.unlink(missing_ok=True)  # if the disk is full, the next answer raises StorageError

    def task(self, name: str) -> LabelTask | None:
        """A task by its id."""
        return self.tasks.get(name) or self.gold.get(name)

    def order(self, task: LabelTask, annotator: str) -> list[int]:
        """Indices of the completions in the order in which this annotator sees them."""
        return shown_order(task.id, annotator, len(task.completions), self.settings.seed)

    def answer_of(self, annotator: str, task: str) -> LabelAnswer | None:
        """The annotator's answer to ``task`` that counts, or None."""
        with self._lock:
            return self.answers.get(annotator, {}).get(task)

    def history(self, annotator: str, limit: int = 50) -> list[LabelAnswer]:
        """The annotator's most recent answers, newest first, without screening tasks."""
        with self._lock:
            return [answer for name, answer in reversed(self.answers.get(annotator, {}).items()) if name in self.tasks][:limit]

    def record(self, annotator: str, content: object) -> LabelAnswer:
        """Store an answer. It is flushed to disk when this returns.

        Raises AnswerError for an invalid answer, StorageError if the disk is full.
        """
        if not isinstance(content, dict):
            raise AnswerError(f"expected an object, got {type(content).__name__}")
        task = self.task(str(content.get("task")))
        if task is None:
            raise AnswerError(f"there is no task {content.get('task')!r:.40}; load the page again")
        with self._lock:
            writer = self._writers.setdefault(annotator, threading.Lock())
        with writer:
            return self._record(annotator, task, content)

    def _record(self, annotator: str, task: LabelTask, content: Mapping[str, object]) -> LabelAnswer:
        with self._lock:
            if (known := self._ids.get(str(content.get("id")))) is not None:
                if (known.annotator, known.task) != (annotator, task.id):
                    raise AnswerError("this id belongs to another answer; load the page again")
                return known
            before = self.answers.get(annotator, {}).get(task.id)
        if before is not None and task.id in self.gold:
            raise AnswerError("a screening task can be answered only once")
        answer = LabelAnswer(
            annotator=annotator,
            task=task.id,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            digests=task.digests,
            replaces=before.id if before is not None else None,
            **checked_answer(content, task, self.settings.questions),
        )
        self._log.append(answer.as_line())
        with self._lock:
            self._take(answer)
        return answer

    def knows(self, number: str) -> bool:
        """Whether an answer with the id ``number`` is stored."""
        return number in self._ids

    def store_imported(self, number: str, annotator: str, task: str, ranks: list[int], note: str) -> bool:
        """Store an imported ranking. It has no ratings and no time, and its display order is not known.

        Returns False if the annotator's answer has this ranking already: it may have ratings and notes, and stays as it is.
        """
        ranks = [sum(other < own for other in ranks) for own in ranks]
        before = self.answers.get(annotator, {}).get(task)
        if before is not None and before.ranks == ranks:
            return False
        answer = LabelAnswer(
            id=number,
            task=task,
            annotator=annotator,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=0.0,
            order=list(range(len(ranks))),
            digests=self.tasks[task].digests,
            ranks=ranks,
            notes=note,
            replaces=before.id if before is not None else None,
        )
        self._log.append(answer.as_line())
        self._take(answer)
        return True

    # Progress

    def screening(self, annotator: str) -> Screening:
        """The annotator's results on the gold tasks."""
        with self._lock:
            return self._screening(annotator)

    def _screening(self, annotator: str) -> Screening:
        own = self.answers.get(annotator, {})
        return screen([(task, own[name]) for name, task in self.gold.items() if name in own], len(self.gold), self.settings.pass_mark)

    def labels(self) -> Labels:
        """A copy of all data that reports need."""
        with self._lock:
            answers = {annotator: dict(answers) for annotator, answers in self.answers.items()}
        return Labels(self.settings, self.tasks, self.gold, answers, read_scores(self.folder))

    def num_ranked(self) -> int:
        """Number of tasks with at least one ranking."""
        with self._lock:
            return self._assignment.num_ranked

    def num_begun(self) -> int:
        """Number of overlap tasks that have at least one ranking and need more."""
        with self._lock:
            return self._assignment.num_begun()

    def counts(self, annotator: str) -> dict[str, int]:
        """The counts that the page shows to an annotator."""
        with self._lock:
            own = self.answers.get(annotator, {})
            ranked = self._assignment.num_ranked
            mine = sum(name in self.tasks for name in own)
        return {"mine": mine, "ranked": ranked, "target": self.settings.target, "tasks": len(self.tasks)}


def _read_gold(folder: Path) -> dict[str, LabelTask]:
    return read_tasks(folder / GOLD) if (folder / GOLD).exists() else {}


def _state_of(folder: Path) -> list[tuple[int, int, int] | None]:
    """Modification time, size and inode of the settings file and the gold file, to detect changes. None for a missing file."""
    states: list[tuple[int, int, int] | None] = []
    for name in (SETTINGS, GOLD):
        try:
            state = (folder / name).stat()
            states.append((state.st_mtime_ns, state.st_size, state.st_ino))
        except FileNotFoundError:
            states.append(None)
    return states


def shown_gold(names: list[str], annotator: str, seed: int) -> list[str]:
    """The screening tasks in the order of this annotator."""
    order = shown_order("gold", annotator, len(names), seed)
    return [names[index] for index in order]


def screen(answers: list[tuple[LabelTask, LabelAnswer]], of: int, pass_mark: float) -> Screening:
    """Agreement with the gold answers, over the pairs of completions that the gold answer does not tie, and over check boxes.

    A skipped task or a tie counts as disagreement. Both shares must reach the pass mark (Ouyang et al. 2022, B.1: 75 %).
    """
    pairs = right_pairs = boxes = right_boxes = 0
    for task, answer in answers:
        assert task.gold is not None
        known, said = task.gold["ranks"], answer.ranks
        for i, j in combinations(range(len(known)), 2):
            if known[i] != known[j]:
                pairs += 1
                right_pairs += said is not None and said[i] != said[j] and (said[i] < said[j]) == (known[i] < known[j])
        for name, values in task.gold.get("checks", {}).items():
            ticked = answer.checks.get(name, [None] * len(values))
            boxes += len(values)
            right_boxes += sum(a == b for a, b in zip(values, ticked, strict=True)) if answer.ranks is not None else 0
    ranking = right_pairs / pairs if pairs else None
    checks = right_boxes / boxes if boxes else None
    passed = all(share is None or share >= pass_mark for share in (ranking, checks)) if len(answers) >= of else None
    return Screening(len(answers), of, ranking, checks, passed)
