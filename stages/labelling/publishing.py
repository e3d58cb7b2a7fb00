"""Create labelling folders. Tasks are written once, settings can change later, and this module never changes answers.

<home>/labelling/<recipe>/<step>/<key>/    tasks of a step; the link ``latest`` next to it points to the newest folder
<home>/labelling/files/<name>-<digest>/    tasks of a file
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.config import DataSource
from stages.corpora.labels import GOLD, MOST_COMPLETIONS, SETTINGS, TASKS, Completion, LabelTask, is_labelling_folder, read_tasks
from stages.errors import DataError
from stages.labelling.config import People, Questions, load_instructions, load_questions
from stages.process.storage import sync, write_json

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


def step_folder(home: Path, name: str, key: dict[str, Any]) -> Path:
    """The folder for the tasks of a step. ``key`` contains everything that decides the tasks.

    A later run with the same key finds the existing answers, even if other settings changed.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
    return home / "labelling" / name / digest


def publish_tasks(folder: Path, tasks: Sequence[LabelTask]) -> None:
    """Write the tasks of a new folder atomically. Raises DataError if there are none."""
    if not tasks:
        raise DataError(f"{folder}: there is nothing to rank: no prompt has two different completions")
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
        raise DataError(f"{name}: target is {target}, and there are only {number} tasks; lower the target, or collect for more prompts")
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
        gold = [] if people.gold is None else read_gold(people.gold, Questions.model_validate(content["questions"]))
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


def point_latest(folder: Path) -> None:
    """Make the link ``latest`` next to a step's folder point to this folder."""
    partial = folder.parent / f".latest.{uuid.uuid4().hex}"
    partial.symlink_to(folder.name)
    os.replace(partial, folder.parent / "latest")


def _write(path: Path, tasks: Sequence[LabelTask]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(task.as_line() + "\n" for task in tasks), encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def task_of(
    prompt: Any, completions: Sequence[Completion], authors: Sequence[Sequence[str]], digests: Sequence[Sequence[str]], sample: int = 0
) -> LabelTask:
    """Create a task. Its id is a hash of its content."""
    from stages.corpora.messages import tools_of

    tools = tools_of(prompt)
    content = json.dumps([prompt, list(completions), sample, *([tools] if tools else [])], ensure_ascii=False)
    number = hashlib.sha256(content.encode()).hexdigest()[:16]
    asked = prompt if isinstance(prompt, str) else list(prompt)
    return LabelTask(number, asked, list(completions), [list(one) for one in authors], [list(one) for one in digests], sample, None, tools)


# Tasks from files


def read_gold(sources: Sequence[DataSource], questions: Questions) -> list[LabelTask]:
    """Read screening tasks with their known answers. Raises DataError with the location of an invalid row."""
    from stages.corpora.comparisons import comparison
    from stages.corpora.files import read_rows

    tasks = {}
    for row in read_rows(sources, split="test"):
        known = comparison(row)
        _check_number(row.location, len(known.completions))
        if not known.num_pairs:
            raise DataError(f"{row.location}: all completions of this gold task tie; a screening task needs a preference")
        checks = row.get("checks") or {}
        names = [check.name for check in questions.checks]
        if not isinstance(checks, dict):
            raise DataError(f"{row.location}: checks is {type(checks).__name__}; expected {{name: [true or false per completion]}}")
        for name, values in checks.items():
            if name not in names:
                raise DataError(
                    f"{row.location}: checks names {name!r}, which the questions do not have; they have {', '.join(names) or 'none'}"
                )
            good = isinstance(values, list) and len(values) == len(known.completions) and all(isinstance(value, bool) for value in values)
            if not good:
                raise DataError(f"{row.location}: checks.{name} is {values!r:.60}; expected {len(known.completions)} times true or false")
        nobody: list[list[str]] = [[] for _ in known.completions]
        task = task_of(known.prompt, known.completions, nobody, nobody)
        gold = {"ranks": known.ranks, "checks": checks}
        tasks[f"gold-{task.id}"] = replace(task, id=f"gold-{task.id}", gold=gold)
    return list(tasks.values())


def file_tasks(path: Path) -> list[LabelTask]:
    """Read tasks from a file: prompt + completions (or responses, or chosen + rejected), and ``models`` or ``authors`` if known.

    Rows of ``prompt + completion`` with the same prompt form one task; ``model`` or ``generator`` names the author of each completion.
    Annotators do not see ranks from the file. Raises DataError with the location of a row that gives no valid task.
    """
    from stages.corpora.comparisons import comparison
    from stages.corpora.completions import completion_in
    from stages.corpora.files import read_rows

    tasks: dict[str, LabelTask] = {}
    single: dict[str, tuple[Any, list[str], list[list[str]], str]] = {}
    for row in read_rows([DataSource(path=str(path))], split="test"):
        if {"completion", "output"} & set(row):
            prompt, text = completion_in(row)
            author = row.get("model") or row.get("generator")
            _, texts, names, _ = single.setdefault(repr(prompt), (prompt, [], [], row.location))
            texts.append(text)
            names.append([author] if isinstance(author, str) else [])
            continue
        column = next((name for name in ("completions", "responses") if name in row), None)
        given = row.get("authors") or row.get("models") or (list(row[column]) if column and isinstance(row[column], dict) else None)
        if column is not None and isinstance(row[column], list):
            row.setdefault("ranks", [0] * len(row[column]))
        known = comparison(row, preferred=next(iter(row[column]), None) if column and isinstance(row[column], dict) else None)
        task = _distinct_task(row.location, known.prompt, known.completions, given)
        tasks[task.id] = task
    for prompt, texts, names, place in single.values():
        task = _distinct_task(place, prompt, texts, names)
        tasks[task.id] = task
    return list(tasks.values())


def _distinct_task(place: str, prompt: Any, completions: Sequence[Completion], names: Any) -> LabelTask:
    """A task that contains each different completion once. Authors of the same text share it.

    ``names``: for each completion a name or a list of names.
    """
    if names is not None and (not isinstance(names, list) or len(names) != len(completions)):
        raise DataError(f"{place}: expected {len(completions)} names of models, got {names!r:.60}")
    found: dict[str, tuple[Completion, list[str]]] = {}
    for index, completion in enumerate(completions):
        name = names[index] if names is not None else []
        found.setdefault(repr(completion), (completion, []))[1].extend(
            [str(one) for one in name] if isinstance(name, list) else [str(name)]
        )
    _check_number(place, len(found))
    return task_of(prompt, [one for one, _ in found.values()], [who for _, who in found.values()], [[] for _ in found])


def _check_number(place: str, number: int) -> None:
    if not 2 <= number <= MOST_COMPLETIONS:
        raise DataError(f"{place}: {number} different completion(s); people rank 2 to {MOST_COMPLETIONS} at a time")


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
