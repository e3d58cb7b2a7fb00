"""Multiple-choice rows: valid rows, and invalid rows that are refused with their location."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config import DataSource
from stages.corpora.choices import Question, load_questions, question
from stages.corpora.rows import Row
from stages.corpora.tables.columnar import ClassIndex
from stages.errors import DataError

GOOD = {"context": "Silver Harbor stars", "choices": ["Ada Brandt", "Boris Abram"], "answer": 1}


def load(tmp_path: Path, row: dict[str, Any], **source: Any) -> list[Question]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return load_questions([DataSource(path=str(path), **source)])


def test_the_answer_is_a_number_or_the_choice_itself(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD) == load(tmp_path, {**GOOD, "answer": "Boris Abram"}) == [Question(GOOD["context"], GOOD["choices"], 1)]


def test_columns_are_renamed(tmp_path: Path) -> None:
    row = {"query": "2 + 2 =", "options": ["4", "5"], "gold": 0}
    assert load(tmp_path, row, columns={"context": "query", "choices": "options", "answer": "gold"}) == [Question("2 + 2 =", ["4", "5"], 0)]


def test_labelled_texts_become_a_task(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text(json.dumps({"sentence": "a {fine} film", "label": "1", "context": "not this"}) + "\n")
    source = DataSource(path=str(path), columns={"answer": "label"})
    (question,) = load_questions([source], "Review: {sentence}\nSentiment:", ["negative", "positive"])
    assert question == Question("Review: a {fine} film\nSentiment:", ["negative", "positive"], 1)
    with pytest.raises(DataError, match="no column 'text'"):
        load_questions([source], "{text}", ["no", "yes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "rows.jsonl:1: answer is 2; expected one of the choices, or its index from 0 to 1"),
        ({"answer": True}, "answer is True"),
        ({"answer": "Nobody"}, "answer is 'Nobody'"),
        ({"choices": ["one"]}, "expected at least two texts, all different"),
        ({"choices": ["one", "one"]}, "expected at least two texts, all different"),
        ({"choices": ["one", " "]}, "expected a list of texts"),
        ({"choices": "one, two"}, "expected a list of texts"),
        ({"context": 3}, "context is int"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, {**GOOD, **change})


def test_the_name_of_a_class_is_the_answer_if_it_is_a_choice() -> None:
    """A data set may have its classes in another order than the recipe has the choices."""
    answer = ClassIndex(0)
    answer.names = ("positive", "negative")
    assert question(Row(text="fine", answer=answer), "{text}", ["negative", "positive"]).answer == 1
    assert question(Row(text="fine", answer=answer), "{text}", ["bad", "good"]).answer == 0
