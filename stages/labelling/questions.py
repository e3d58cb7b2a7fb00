"""Validation of answers. The server checks every answer, even if the page already did."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypedDict

from stages.corpora.labels import LabelTask
from stages.json_types import JsonObject
from stages.labelling.config import Questions

LONGEST_TEXT = 4000


class AnswerError(ValueError):
    """An invalid answer. The page shows the message."""


class CheckedAnswer(TypedDict):
    """The valid fields of an answer that the page sent, as ``LabelAnswer`` takes them."""

    id: str
    seconds: float
    order: list[int]
    skipped: str | None
    flagged: str | None
    notes: str
    ranks: list[int] | None
    ratings: dict[str, list[int | None]]
    checks: dict[str, list[bool]]


def checked_answer(content: Mapping[str, object], task: LabelTask, questions: Questions) -> CheckedAnswer:
    """Validate the fields of an answer that the page sent. Lists are in the order of the task's completions. Raises AnswerError."""
    number = len(task.completions)
    skipped, flagged = _reason(content, "skipped"), _reason(content, "flagged")
    checked: CheckedAnswer = {
        "id": _id(content.get("id")),
        "seconds": _seconds(content.get("seconds")),
        "order": _order(content.get("order"), number),
        "skipped": skipped,
        "flagged": flagged,
        "notes": _text(content.get("notes", ""), "notes"),
        "ranks": None if skipped is not None else _ranks(content.get("ranks"), number, questions.ties),
        "ratings": {},
        "checks": {},
    }
    if skipped is not None:
        return checked
    ratings = _answers_to(content.get("ratings"), [rating.name for rating in questions.ratings], "rating")
    checks = _answers_to(content.get("checks"), [check.name for check in questions.checks], "check box")
    for rating in questions.ratings:
        values = ratings.get(rating.name, [None] * number)
        if (
            not isinstance(values, list)
            or len(values) != number
            or any(not _in_scale(value, rating.lowest, rating.highest) for value in values)
        ):
            raise AnswerError(f"{rating.text}: expected {number} numbers from {rating.lowest} to {rating.highest}, got {values!r:.60}")
        if rating.required and None in values:
            raise AnswerError(f"{rating.text}: an answer has no rating yet")
        checked["ratings"][rating.name] = values
    for check in questions.checks:
        values = checks.get(check.name, [False] * number)
        if not isinstance(values, list) or len(values) != number or not all(isinstance(value, bool) for value in values):
            raise AnswerError(f"{check.text}: expected {number} times true or false, got {values!r:.60}")
        checked["checks"][check.name] = values
    return checked


def _answers_to(given: object, names: Sequence[str], what: str) -> JsonObject:
    """The answers to some questions by name. Raises AnswerError for an unknown name."""
    answers = given or {}
    if not isinstance(answers, dict) or set(answers) - set(names):
        raise AnswerError(f"unknown {what}: {answers!r:.80}")
    return answers


def _in_scale(value: object, lowest: int, highest: int) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest)


def _id(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w-]{8,64}", value):
        raise AnswerError(f"id is {value!r:.40}; expected 8 to 64 letters, digits or hyphens")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e7:
        raise AnswerError(f"seconds is {value!r:.40}; expected the time during which the task was visible")
    return round(float(value), 2)


def _order(value: object, number: int) -> list[int]:
    if not isinstance(value, list) or any(type(item) is not int for item in value) or sorted(value) != list(range(number)):
        raise AnswerError(f"order is {value!r:.60}; expected the numbers 0 to {number - 1} in display order")
    return value


def _ranks(value: object, number: int, ties: bool) -> list[int]:
    """Convert ranks (any integers, lowest is best) to the number of better completions. Raises AnswerError."""
    if not isinstance(value, list) or len(value) != number or any(type(item) is not int for item in value):
        raise AnswerError(f"expected {number} ranks, got {value!r:.60}; every answer needs one")
    if not ties and len(set(value)) < number:
        raise AnswerError("two answers share a rank; give each one a different rank")
    return [sum(other < own for other in value) for own in value]


def _reason(content: Mapping[str, object], name: str) -> str | None:
    value = content.get(name)
    if value is None:
        return None
    text = _text(value, name).strip()
    if not text:
        raise AnswerError(f"{'a skipped' if name == 'skipped' else 'a flagged'} task needs a reason")
    return text


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise AnswerError(f"{name}: expected a text of at most {LONGEST_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise AnswerError(f"{name}: contains half a surrogate pair, which is not valid text") from error
    return value.replace("\0", "")
