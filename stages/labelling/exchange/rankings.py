"""Rankings that go to another tool or come from one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from stages.corpora.labels import LabelAnswer, LabelTask
from stages.corpora.prompts import plain_text
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.labelling.store import Labels

RANKING = "ranking"


@dataclass
class Taken:
    """One imported ranking: its task, its annotator, and the ranks in the order of the task's completions."""

    task: str
    annotator: str
    ranks: list[int]


@dataclass
class Incoming:
    """The rankings in an imported file, and the number of skipped rows by reason."""

    labels: Labels
    rankings: list[Taken] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count one skipped row under ``reason``."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    @cached_property
    def pairs(self) -> dict[tuple[str, frozenset[str]], LabelTask]:
        """Tasks with two completions, by (prompt, set of the two texts)."""
        tasks = (task for task in self.labels.tasks.values() if len(task.completions) == 2)
        return {(plain_text(task.asked), frozenset(task.texts)): task for task in tasks}

    def take(self, task: str, annotator: object, ranks: list[int]) -> None:
        """Add a ranking. The lowest rank is the best."""
        self.rankings.append(Taken(task, str(annotator), ranks))


def objects_in(content: object) -> list[JsonObject]:
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise DataError(f"expected a JSON list of objects, got {type(content).__name__}")
    return content


def given_answers(labels: Labels) -> Iterator[tuple[LabelTask, LabelAnswer]]:
    """All rankings that count, with their tasks, in the order of the tasks."""
    for name, task in labels.tasks.items():
        for annotator in sorted(labels.answers):
            answer = labels.answers[annotator].get(name)
            if answer is not None and answer.is_used:
                yield task, answer


def answers_of(labels: Labels, task: LabelTask) -> list[LabelAnswer]:
    """The rankings of one task that count, sorted by annotator."""
    return [
        answer for annotator in sorted(labels.answers) if (answer := labels.answers[annotator].get(task.id)) is not None and answer.is_used
    ]


def best_first(ranks: list[int]) -> list[int]:
    return sorted(range(len(ranks)), key=lambda index: (ranks[index], index))


def ranks_of_order(order: list[int]) -> list[int]:
    return [order.index(index) for index in range(len(order))]


def without_ties(answers: Iterable[LabelAnswer], lost: dict[str, int], reason: str) -> Iterator[tuple[LabelAnswer, list[int]]]:
    """The answers without ties, with their ranks. The answers with ties are counted in ``lost`` under ``reason``."""
    for answer in answers:
        assert answer.ranks is not None
        if len(set(answer.ranks)) < len(answer.ranks):
            lost[reason] = lost.get(reason, 0) + 1
        else:
            yield answer, answer.ranks


def list_in(value: object, name: str) -> list[object]:
    """The list in the field ``name``; empty if the field is empty. Raises DataError for another value."""
    if not value:
        return []
    if not isinstance(value, list):
        raise DataError(f"{name} is {value!r:.60}; expected a list")
    return value
