"""Create labelling folders. Tasks are written once, settings can change later, and this module never changes answers.

<home>/labelling/<recipe>/<step>/<key>/    tasks of a step; the link ``latest`` next to it points to the newest folder
<home>/labelling/files/<name>-<digest>/    tasks of a file
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stages.corpora.labels import GOLD, SETTINGS, TASKS, LabelTask, is_labelling_folder, read_tasks
from stages.errors import DataError
from stages.labelling.config import People, Questions, load_instructions, load_questions
from stages.labelling.tasks import file_tasks, read_gold
from stages.process.storage import sync, write_file, write_json

SCORES = "scores.json"  # scores of a reward model: {"model": ref, "digest": ..., "scores": {task: [...]}}


@dataclass(frozen=True)
class LabelSettings:
    """The content of labelling.json. ``target`` is a number of tasks. ``seed`` decides which tasks overlap, and all display orders."""

    name: str
    seed: int
    questions: Questions
    instructions: str
    annotators: int
    overlap: float
    target: int
    pass_mark: float


def step_folder(home: Path, name: str, key: Mapping[str, object]) -> Path:
    """The folder for the tasks of a step. ``key`` contains everything that decides the tasks.

    A later run with the same key finds the existing answers, even if other settings changed.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
    return home / "labelling" / name / digest


def publish_tasks(folder: Path, tasks: Sequence[LabelTask]) -> None:
    """Write the tasks of a new folder atomically. Raises DataError if there are none."""
    if not tasks:
        raise DataError(f"{folder}: nothing to rank: no prompt has two different completions")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TASKS, tasks)


def publish_settings(folder: Path, name: str, seed: int, people: People, only: Collection[str] | None = None) -> LabelSettings:
    """Write or update the settings of a folder of tasks. ``only`` names the fields of ``people`` to change; None changes all.

    Raises DataError if a file cannot be used, or if the target is larger than the number of tasks.
    """
    before = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if (folder / SETTINGS).exists() else None
    number = len(read_tasks(folder / TASKS))
    target = number if people.target is None else people.target
    if target > number:
        raise DataError(f"{name}: target is {target}, but there are only {number} tasks. Lower the target, or collect for more prompts")
    questions = load_questions(people.questions)
    content = {
        "version": 1,
        "name": name,
        "seed": seed,
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "annotators": people.annotators,
        "overlap": people.overlap,
        "target": target,
        "pass_mark": people.pass_mark,
        "questions": questions.model_dump(mode="json"),
        "instructions": load_instructions(people.instructions),
    }
    changed = set(content) if only is None or before is None else set(only)
    content = {field: value if before is None or field in changed else before[field] for field, value in content.items()}
    if only is None or before is None or "gold" in changed:
        gold = [] if people.gold is None else read_gold(people.gold, Questions.model_validate(content["questions"]).check_names)
        if gold:
            _write(folder / GOLD, gold)
        else:
            (folder / GOLD).unlink(missing_ok=True)
    write_json(folder / SETTINGS, content)
    return read_settings(folder)


def read_settings(folder: Path) -> LabelSettings:
    """Read the settings of a labelling folder."""
    content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    fields = {name: content[name] for name in LabelSettings.__dataclass_fields__}
    return LabelSettings(**{**fields, "questions": Questions.model_validate(content["questions"])})


def scored_by(folder: Path) -> str | None:
    """Digest of the reward model whose scores are stored with the tasks. None if there are no scores."""
    path = folder / SCORES
    return json.loads(path.read_text(encoding="utf-8"))["digest"] if path.exists() else None


def publish_scores(folder: Path, ref: str, digest: str, scores: dict[str, list[float]]) -> None:
    """Store the last round's reward model scores of the completions of every task. Annotators never see them."""
    write_json(folder / SCORES, {"model": ref, "digest": digest, "scores": scores})


def _write(path: Path, tasks: Sequence[LabelTask]) -> None:
    write_file(path, "".join(task.as_line() + "\n" for task in tasks))
    sync(path.parent)


def publish_file(path: Path, home: Path, people: People, given: Collection[str]) -> Path:
    """The labelling folder of a file of completions. Created if it does not exist. ``given``: the fields of ``people`` to change."""
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    folder = home / "labelling" / "files" / f"{path.name.split('.')[0]}-{content}"
    if not (folder / TASKS).exists():
        publish_tasks(folder, file_tasks(path))
    if given or not (folder / SETTINGS).exists():
        publish_settings(folder, path.name, 0, people, given)
    return folder


def find_folder(what: str, home: Path) -> Path | None:
    """Find a labelling folder by its path, by RECIPE/STEP, or by STEP alone. Returns None if nothing matches.

    Raises DataError if several recipes have the step.
    """
    root = home / "labelling"
    for path in (Path(what), Path(what).parent if what.endswith(".jsonl") else Path(what)):
        if is_labelling_folder(path):
            return path.resolve()
    steps = sorted(path.parent for path in root.glob("*/*/latest") if is_labelling_folder(path))
    named = [step for step in steps if what in (step.name, step.relative_to(root).as_posix())]
    if len(named) > 1:
        choices = ", ".join(step.relative_to(root).as_posix() for step in named)
        raise DataError(f"{what!r} is a step of several recipes: {choices}; name one of them")
    return (named[0] / "latest").resolve() if named else None


def known_steps(home: Path) -> list[str]:
    """The steps with published tasks, as RECIPE/STEP."""
    root = home / "labelling"
    return sorted(path.parent.relative_to(root).as_posix() for path in root.glob("*/*/latest"))
