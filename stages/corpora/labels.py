"""A labelling folder: what people are asked, and what they answered. Readers of data see its answers as ranked completions.

    labelling.json    settings and questions
    tasks.jsonl       a task per line: a prompt and 2 to 9 completions
    gold.jsonl        tasks with known answers, for screening (not there without screening)
    answers.jsonl     an answer per line, appended; the last one of an annotator on a task counts

``stages label`` writes the answers; the rows that training and evaluation read are ``labelled_rows``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import DataError

SETTINGS, TASKS, GOLD, ANSWERS = "labelling.json", "tasks.jsonl", "gold.jsonl", "answers.jsonl"
MOST_COMPLETIONS = 9

Prompt = str | list[dict[str, Any]]
Completion = str | list[dict[str, Any]]


@dataclass(frozen=True)
class LabelTask:
    """A prompt (with the tools that its assistant may call) and K completions to be ranked.

    ``authors`` and ``digests`` name, per completion, who wrote it and with which content digest (several where models wrote the same text).
    Annotators never see either. ``sample`` tells the samples of one prompt apart. ``gold`` is the known answer of a screening task:
    ``ranks``, and ``checks`` by name.
    """

    id: str
    prompt: Prompt
    completions: list[Completion]
    authors: list[list[str]]
    digests: list[list[str]]
    sample: int = 0
    gold: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def asked(self) -> Prompt:
        """The prompt with its tools, as models are asked it."""
        from stages.corpora.messages import Conversation

        return self.prompt if isinstance(self.prompt, str) else Conversation(self.prompt, tools=self.tools)

    @property
    def texts(self) -> list[str]:
        """The completions as people read them; tool calls and further turns are written out."""
        from stages.corpora.messages import completion_text

        return [completion_text(completion) for completion in self.completions]

    def as_line(self) -> str:
        """One line of tasks.jsonl, without its end."""
        content = {name: getattr(self, name) for name in LabelTask.__dataclass_fields__}
        for name in ("gold", "tools"):
            if not content[name]:
                del content[name]
        return json.dumps(content, ensure_ascii=False)


@dataclass(frozen=True)
class LabelAnswer:
    """What one annotator said of one task. All lists follow the order of the task's completions.

    ``ranks``: how many completions are better (0 is best, equal numbers tie); None where the task was skipped. ``order``: the completions'
    indices in the order in which they were shown. ``ratings`` and ``checks``: a list per question. ``seconds``: time the task was in view.
    ``replaces``: the id of the answer that this one corrects.
    """

    id: str
    task: str
    annotator: str
    time: str  # ISO 8601, UTC
    seconds: float
    order: list[int]
    digests: list[list[str]]
    ranks: list[int] | None
    ratings: dict[str, list[int | None]] = field(default_factory=dict)
    checks: dict[str, list[bool]] = field(default_factory=dict)
    notes: str = ""
    skipped: str | None = None
    flagged: str | None = None
    replaces: str | None = None

    @property
    def is_used(self) -> bool:
        """Whether it is a ranking that counts: neither skipped nor flagged."""
        return self.ranks is not None and self.flagged is None

    def as_line(self) -> str:
        """One line of answers.jsonl, without its end."""
        return json.dumps(asdict(self), ensure_ascii=False)


def is_labelling_folder(path: Path) -> bool:
    """Whether ``path`` is a folder that ``stages label`` can serve."""
    return (path / SETTINGS).is_file() and (path / TASKS).is_file()


def labelling_folder_of(path: Path) -> Path | None:
    """The labelling folder that ``path`` names, as the folder itself or as its file of answers; None for any other path."""
    if path.name == ANSWERS and is_labelling_folder(path.parent):
        return path.parent
    return path if is_labelling_folder(path) else None


def read_tasks(path: Path) -> dict[str, LabelTask]:
    """The tasks of a file by id, in their order. Raises DataError with the place of a line that is none."""
    tasks: dict[str, LabelTask] = {}
    for place, content in _lines(path, path.read_bytes()):
        try:
            task = LabelTask(**content)
        except TypeError as error:
            raise DataError(f"{place}: is no task of a labelling folder ({error})") from error
        if task.id in tasks:
            raise DataError(f"{place}: task {task.id} is there twice")
        tasks[task.id] = task
    return tasks


def read_answers(path: Path) -> list[tuple[str, LabelAnswer]]:
    """(place, answer) of every whole line. A last line without an end was never acknowledged, and does not count."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    answers = []
    for place, content in _lines(path, whole):
        try:
            answers.append((place, LabelAnswer(**content)))
        except TypeError as error:
            raise DataError(f"{place}: is no answer of a labelling folder ({error})") from error
    return answers


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: bad JSON ({error}); expected an object per line") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected an object, got {type(value).__name__}")
        yield f"{path}:{number}", value


def latest(answers: list[tuple[str, LabelAnswer]]) -> list[tuple[str, LabelAnswer]]:
    """The answers that count: the last one of each annotator on each task, in the order of the file."""
    last = {(answer.annotator, answer.task): answer for _, answer in answers}
    return [(place, answer) for place, answer in answers if last[answer.annotator, answer.task] is answer]


def labelled_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every ranking that counts; skipped, flagged and screening tasks are left out.

    A row has prompt, completions, ranks, annotator, authors, digests, sample and task.
    """
    tasks = read_tasks(folder / TASKS)
    for place, answer in latest(read_answers(folder / ANSWERS)):
        task = tasks.get(answer.task)
        if task is None or not answer.is_used:
            continue
        yield (
            place,
            {
                "prompt": task.prompt,
                "completions": _alike(task.completions),
                "ranks": answer.ranks,
                "annotator": answer.annotator,
                "authors": task.authors,
                "digests": task.digests,
                "sample": task.sample,
                "task": task.id,
                **({"tools": task.tools} if task.tools else {}),
            },
        )


def _alike(completions: list[Completion]) -> list[Completion]:
    """All as texts, or all as messages."""
    from stages.corpora.messages import as_turns

    are_texts = all(isinstance(completion, str) for completion in completions)
    return completions if are_texts else [as_turns(completion) for completion in completions]
