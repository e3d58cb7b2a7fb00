"""A labelling folder: questions for annotators and their answers. Data readers see the answers as ranked completions.

    labelling.json    settings and questions
    tasks.jsonl       one task per line: a prompt and 2 to 9 completions
    gold.jsonl        tasks with known answers for screening annotators (optional)
    answers.jsonl     one answer per line, append-only; the last answer of an annotator to a task counts

``stages label`` writes the answers. ``labelled_rows`` returns the rows for training and evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Required, TypedDict

from stages.corpora.conversations.messages import ARGUMENTS, Conversation, as_turns, columns_beside, completion_text
from stages.errors import DataError
from stages.json_types import JsonObject

SETTINGS, TASKS, GOLD, ANSWERS = "labelling.json", "tasks.jsonl", "gold.jsonl", "answers.jsonl"
MOST_COMPLETIONS = 9

Prompt = str | list[JsonObject]
Completion = str | list[JsonObject]


class Gold(TypedDict, total=False):
    """The known answer of a screening task."""

    ranks: Required[list[int]]
    checks: dict[str, list[bool]]


@dataclass(frozen=True)
class LabelTask:
    """A prompt (with the tools that the assistant may call) and K completions to rank.

    ``authors`` and ``digests`` list, per completion, the names and content digests of the models that wrote it (several if models wrote the
    same text). Annotators see neither. ``sample`` distinguishes the samples of one prompt. ``gold`` is the known answer of a screening
    task: ``ranks``, and ``checks`` by name.
    """

    id: str
    prompt: Prompt
    completions: list[Completion]
    authors: list[list[str]]
    digests: list[list[str]]
    sample: int = 0
    gold: Gold | None = None
    tools: list[JsonObject] = field(default_factory=list)
    chat_template_kwargs: JsonObject = field(default_factory=dict)

    @property
    def asked(self) -> Prompt:
        """The prompt with its tools and template arguments, as models receive it."""
        if isinstance(self.prompt, str):
            return self.prompt
        return Conversation(self.prompt, tools=self.tools, arguments=self.chat_template_kwargs)

    @property
    def texts(self) -> list[str]:
        """The completions as text for readers, with tool calls and further turns written out."""
        return [completion_text(completion) for completion in self.completions]

    def as_line(self) -> str:
        """One line of tasks.jsonl, without the line end."""
        content = {name: getattr(self, name) for name in LabelTask.__dataclass_fields__}
        for name in ("gold", "tools", ARGUMENTS):
            if not content[name]:
                del content[name]
        return json.dumps(content, ensure_ascii=False)


@dataclass(frozen=True)
class LabelAnswer:
    """One annotator's answer to one task. All lists are in the order of the task's completions.

    ``ranks``: number of better completions (0 is best, equal ranks tie); None if the task was skipped. ``order``: the indices of the
    completions in display order. ``ratings`` and ``checks``: one list per question. ``seconds``: how long the task was visible.
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
        """Whether the answer is a usable ranking: neither skipped nor flagged."""
        return self.ranks is not None and self.flagged is None

    def as_line(self) -> str:
        """One line of answers.jsonl, without the line end."""
        return json.dumps(asdict(self), ensure_ascii=False)


def is_labelling_folder(path: Path) -> bool:
    """Whether ``stages label`` can serve the folder ``path``."""
    return (path / SETTINGS).is_file() and (path / TASKS).is_file()


def labelling_folder_of(path: Path) -> Path | None:
    """The labelling folder for ``path``, which is the folder itself or its answers file. None for any other path."""
    if path.name == ANSWERS and is_labelling_folder(path.parent):
        return path.parent
    return path if is_labelling_folder(path) else None


def read_tasks(path: Path) -> dict[str, LabelTask]:
    """Read the tasks of a file by id, in order. Raises DataError with the location of a malformed line."""
    tasks: dict[str, LabelTask] = {}
    for location, content in _lines(path, path.read_bytes()):
        try:
            task = LabelTask(**content)
        except TypeError as error:
            raise DataError(f"{location}: not a task of a labelling folder ({error})") from error
        if task.id in tasks:
            raise DataError(f"{location}: task {task.id} occurs twice")
        tasks[task.id] = task
    return tasks


def read_answers(path: Path) -> list[tuple[str, LabelAnswer]]:
    """Read (location, answer) for every complete line. A last line without a line end was never acknowledged, so it does not count.

    Raises DataError for any other line that is not an answer.
    """
    if not path.exists():
        return []
    complete_lines, _, _ = path.read_bytes().rpartition(b"\n")
    answers = []
    for location, content in _lines(path, complete_lines):
        try:
            answers.append((location, LabelAnswer(**content)))
        except TypeError as error:
            raise DataError(f"{location}: not an answer of a labelling folder ({error})") from error
    return answers


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for line_number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{line_number}: bad JSON ({error}); expected an object per line") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{line_number}: expected an object, got {type(value).__name__}")
        yield f"{path}:{line_number}", value


def latest(answers: list[tuple[str, LabelAnswer]]) -> list[tuple[str, LabelAnswer]]:
    """The last answer of each annotator to each task, in file order."""
    last = {(answer.annotator, answer.task): answer for _, answer in answers}
    return [(location, answer) for location, answer in answers if last[answer.annotator, answer.task] is answer]


def labelled_rows(folder: Path) -> Iterator[tuple[str, JsonObject]]:
    """Yield (location, row) for every usable ranking. Skipped, flagged and screening tasks are left out.

    A row has prompt, completions, ranks, annotator, authors, digests, sample and task.
    """
    tasks = read_tasks(folder / TASKS)
    for location, answer in latest(read_answers(folder / ANSWERS)):
        task = tasks.get(answer.task)
        if task is None or not answer.is_used:
            continue
        yield (
            location,
            {
                "prompt": task.prompt,
                "completions": _alike(task.completions),
                "ranks": answer.ranks,
                "annotator": answer.annotator,
                "authors": task.authors,
                "digests": task.digests,
                "sample": task.sample,
                "task": task.id,
                **columns_beside(task.asked),
            },
        )


def _alike(completions: list[Completion]) -> list[Completion]:
    """Convert the completions to one type: all texts, or all lists of messages."""
    are_texts = all(isinstance(completion, str) for completion in completions)
    return completions if are_texts else [as_turns(completion) for completion in completions]
