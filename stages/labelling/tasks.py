"""Labelling tasks: made from a prompt and its completions, or read from files, with or without known answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stages.config import DataSource
from stages.corpora.comparisons import comparison
from stages.corpora.completions import completion_in
from stages.corpora.conversations.messages import Prompt, arguments_of, tools_of
from stages.corpora.files import read_rows
from stages.corpora.labels import MOST_COMPLETIONS, Completion, Gold, LabelTask
from stages.errors import DataError


def task_of(
    prompt: Prompt, completions: Sequence[Completion], authors: Sequence[Sequence[str]], digests: Sequence[Sequence[str]], sample: int = 0
) -> LabelTask:
    """Create a task. Its id is a hash of its content."""
    tools, arguments = tools_of(prompt), arguments_of(prompt)
    beside = [tools, arguments] if arguments else [tools] if tools else []
    content = json.dumps([prompt, list(completions), sample, *beside], ensure_ascii=False)
    number = hashlib.sha256(content.encode()).hexdigest()[:16]
    asked = prompt if isinstance(prompt, str) else list(prompt)
    return LabelTask(
        number,
        asked,
        list(completions),
        [list(one) for one in authors],
        [list(one) for one in digests],
        sample,
        tools=tools,
        chat_template_kwargs=arguments,
    )


def read_gold(sources: Sequence[DataSource], checks: Sequence[str]) -> list[LabelTask]:
    """Read screening tasks with their known answers. ``checks`` names the check boxes of the questions.

    Raises DataError with the location of an invalid row.
    """
    tasks = {}
    for row in read_rows(sources, split="test"):
        known = comparison(row)
        _check_number(row.location, len(known.completions))
        if not known.num_pairs:
            raise DataError(f"{row.location}: all completions of this gold task tie; a screening task needs at least two different ranks")
        ticked = row.get("checks") or {}
        if not isinstance(ticked, dict):
            raise DataError(f"{row.location}: checks is {type(ticked).__name__}; expected {{name: [true or false per completion]}}")
        for name, values in ticked.items():
            if name not in checks:
                raise DataError(
                    f"{row.location}: checks names {name!r}, which the questions do not have; they have {', '.join(checks) or 'none'}"
                )
            good = isinstance(values, list) and len(values) == len(known.completions) and all(isinstance(value, bool) for value in values)
            if not good:
                raise DataError(f"{row.location}: checks.{name} is {values!r:.60}; expected {len(known.completions)} times true or false")
        nobody: list[list[str]] = [[] for _ in known.completions]
        task = task_of(known.prompt, known.completions, nobody, nobody)
        gold: Gold = {"ranks": known.ranks, "checks": ticked}
        tasks[f"gold-{task.id}"] = replace(task, id=f"gold-{task.id}", gold=gold)
    return list(tasks.values())


def file_tasks(path: Path) -> list[LabelTask]:
    """Read tasks from a file: prompt + completions (or responses, or chosen + rejected), and ``models`` or ``authors`` if known.

    Rows of ``prompt + completion`` with the same prompt form one task; ``model`` or ``generator`` names the author of each completion.
    Annotators do not see ranks from the file. Raises DataError with the location of a row that gives no valid task.
    """
    tasks: dict[str, LabelTask] = {}
    single: dict[str, tuple[Prompt, list[str], list[list[str]], str]] = {}
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
    for prompt, texts, names, location in single.values():
        task = _distinct_task(location, prompt, texts, names)
        tasks[task.id] = task
    return list(tasks.values())


def _distinct_task(location: str, prompt: Prompt, completions: Sequence[Completion], names: object) -> LabelTask:
    """A task that contains each different completion once. Authors of the same text share it.

    ``names``: for each completion a name or a list of names.
    """
    if names is not None and (not isinstance(names, list) or len(names) != len(completions)):
        raise DataError(f"{location}: expected {len(completions)} names of models, got {names!r:.60}")
    distinct: dict[str, tuple[Completion, list[str]]] = {}
    for index, completion in enumerate(completions):
        name = names[index] if names is not None else []
        distinct.setdefault(repr(completion), (completion, []))[1].extend(
            [str(one) for one in name] if isinstance(name, list) else [str(name)]
        )
    _check_number(location, len(distinct))
    return task_of(prompt, [one for one, _ in distinct.values()], [who for _, who in distinct.values()], [[] for _ in distinct])


def _check_number(location: str, number: int) -> None:
    if not 2 <= number <= MOST_COMPLETIONS:
        raise DataError(f"{location}: {number} different completion(s); a task must have 2 to {MOST_COMPLETIONS}")
