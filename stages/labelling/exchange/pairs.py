"""Pairs with a preference: annotations of AlpacaEval, and the test set of PandaLM."""

from __future__ import annotations

from itertools import combinations

from stages.corpora.labels import LabelAnswer, LabelTask
from stages.corpora.prompts import plain_text
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.labelling.exchange.rankings import Incoming, answers_of, given_answers, list_in, objects_in
from stages.labelling.store import Labels


def _author(task: LabelTask, index: int) -> str:
    """Names of the models that wrote a completion, or ``completion_N`` if none is known."""
    return "+".join(task.authors[index]) or f"completion_{index + 1}"


def alpaca_eval_rows(labels: Labels) -> tuple[object, dict[str, int]]:
    rows = []
    for task, answer in given_answers(labels):
        assert answer.ranks is not None
        for i, j in combinations(range(len(task.completions)), 2):
            rows.append(
                {
                    "instruction": plain_text(task.asked),
                    "output_1": task.texts[i],
                    "output_2": task.texts[j],
                    "generator_1": _author(task, i),
                    "generator_2": _author(task, j),
                    "annotator": answer.annotator,
                    "preference": 1.5 - 0.5 * ((answer.ranks[i] < answer.ranks[j]) - (answer.ranks[i] > answer.ranks[j])),
                }
            )
    return rows, {}


def read_alpaca_eval(content: object, labels: Labels, incoming: Incoming) -> None:
    for number, row in enumerate(objects_in(content), 1):
        preference = row.get("preference")
        if preference is None:
            incoming.skip("rows without a preference")
            continue
        if isinstance(preference, bool) or not isinstance(preference, int | float) or not (1 <= preference <= 2 or preference == 0):
            raise DataError(f"row {number}: preference is {preference!r:.40}; expected 1, 2, 1.5 (a tie) or a number between")
        side = 0 if preference in (0, 1.5) else 1 if preference < 1.5 else -1
        _take_pair(incoming, row.get("instruction"), row.get("output_1"), row.get("output_2"), side, row.get("annotator") or "alpaca-eval")


def pandalm_rows(labels: Labels) -> tuple[object, dict[str, int]]:
    rows: list[JsonObject] = []
    for task in labels.tasks.values():
        answers = answers_of(labels, task)
        for i, j in combinations(range(len(task.completions)), 2):
            if answers:
                votes = {f"annotator{number}": _vote(answer, i, j) for number, answer in enumerate(answers, 1)}
                rows.append(
                    {
                        "idx": len(rows),
                        "instruction": plain_text(task.asked),
                        "input": "",
                        "response1": task.texts[i],
                        "response2": task.texts[j],
                        **votes,
                        "cmp_key": f"{_author(task, i)}_{_author(task, j)}",
                    }
                )
    return rows, {}


def _vote(answer: LabelAnswer, i: int, j: int) -> int:
    assert answer.ranks is not None
    return 0 if answer.ranks[i] == answer.ranks[j] else 1 if answer.ranks[i] < answer.ranks[j] else 2


def read_pandalm(content: object, labels: Labels, incoming: Incoming) -> None:
    for number, row in enumerate(objects_in(content), 1):
        prompt = "\n".join(str(part) for part in (row.get("instruction"), row.get("input")) if part)
        texts = [row.get(f"response{side_number}", row.get(f"response_{side_number}")) for side_number in (1, 2)]
        votes = {name: vote for name, vote in row.items() if name.startswith("annotator") and name != "annotators"}
        listed = list_in(row.get("annotators"), f"row {number}: annotators")
        votes |= {f"annotator{side_number}": vote for side_number, vote in enumerate(listed, 1)}
        for name, vote in votes.items():
            if not isinstance(vote, int | float) or vote not in (0, 1, 2) or isinstance(vote, bool):
                raise DataError(f"row {number}: {name} is {vote!r:.40}; expected 1, 2, or 0 for a tie")
            _take_pair(incoming, prompt, texts[0], texts[1], {0: 0, 1: 1, 2: -1}[int(vote)], name)


def _take_pair(incoming: Incoming, prompt: object, first: object, second: object, side: int, annotator: object) -> None:
    """Add a vote if a task has exactly these two completions.

    ``side``: 1 if the first is better, -1 if the second is better, 0 for a tie.
    """
    task = incoming.pairs.get((str(prompt), frozenset((str(first), str(second)))))
    if task is None:
        incoming.skip("pairs that match no task with these two completions")
        return
    incoming.take(task.id, annotator, [0, 0] if side == 0 else [0, 1] if (side == 1) == (task.texts[0] == first) else [1, 0])
