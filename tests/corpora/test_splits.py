"""Held-out groups: no user is on both sides, and the folds together hold out every group once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.config import DataInput, DataSource
from stages.corpora.comparisons import load_comparisons
from stages.corpora.demonstrations import load_demonstrations
from stages.corpora.files import read_splits
from stages.corpora.reviews import load_reviews
from stages.corpora.text import load_text
from stages.errors import DataError


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{number}", "user": f"user-{number % 12}"}) + "\n" for number in range(60)))
    return str(path)


def split(table: str, **fields: object) -> tuple[list[dict], list[dict]]:
    return read_splits(DataInput.model_validate({"train": table, **fields}))


@pytest.mark.detail("D3")
def test_no_user_is_on_both_sides(table: str) -> None:
    train, heldout = split(table, split_by="user", validation_fraction=0.25)
    users = [{row["user"] for row in side} for side in (train, heldout)]
    assert not users[0] & users[1] and (len(users[0]), len(users[1])) == (9, 3)
    numbers = [int(row["text"][1:]) for row in train]
    assert len(train) + len(heldout) == 60 and numbers == sorted(numbers)
    assert {row["user"] for row in split(table)[1]} & {row["user"] for row in split(table)[0]}  # split by row: users on both sides


@pytest.mark.detail("R19")
def test_folds_hold_out_every_group_once(table: str) -> None:
    seen: list[str] = []
    for fold in range(5):
        train, heldout = split(table, split_by="user", folds=5, fold=fold)
        users = {row["user"] for row in heldout}
        assert not users & {row["user"] for row in train} and len(users) in (2, 3)
        seen += sorted(users)
    assert sorted(seen) == sorted(f"user-{number}" for number in range(12))


def test_side_of_a_group_does_not_depend_on_other_rows(table: str) -> None:
    first = {row["user"] for row in split(table, split_by="user", folds=3, fold=1)[1]}
    path = Path(table)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert {row["user"] for row in split(table, split_by="user", folds=3, fold=1)[1]} == first


@pytest.mark.detail("R19")
def test_annotators_of_the_embedded_world_are_folds() -> None:
    groups = []
    for fold in range(5):
        train = {"path": "world:comparisons", "limit": 200}
        loaded = load_comparisons(DataInput.model_validate({"train": train, "split_by": "annotator", "folds": 5, "fold": fold}))
        heldout = {item.annotator for item in loaded.validation}
        assert not heldout & {item.annotator for item in loaded.train}
        groups += sorted(heldout)
    assert len(groups) == len(set(groups)) == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folds": 5}, "folds needs split_by"),
        ({"split_by": "user", "folds": 5, "fold": 5}, "fold=5 must be below folds=5; folds are counted from 0"),
        ({"split_by": "user", "validation": "x"}, "remove one of them"),
    ],
)
def test_contradictions_are_refused(table: str, fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataInput.model_validate({"train": table, **fields})


def test_unsplittable_data_is_refused(table: str) -> None:
    with pytest.raises(DataError, match="split_by: author needs that column in every row; the row has text, user"):
        split(table, split_by="author")
    with pytest.raises(DataError, match="12 different user are too few for 13 folds; lower folds to 12 or less"):
        split(table, split_by="user", folds=13)
    with pytest.raises(DataError, match="all rows have one user"):
        Path(table).write_text(json.dumps({"text": "t", "user": "u"}) + "\n")
        split(table, split_by="user")


ROWS: dict[str, tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "demonstrations": (
        load_demonstrations,
        [{"prompt": "p", "completion": "a", "id": 1}, {"prompt": "p", "completion": "b", "id": 2}],
        [{"prompt": "p", "completion": "c", "id": 3}, {"prompt": "p", "completion": "b", "id": 4}],
    ),
    "comparisons in another order": (
        load_comparisons,
        [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}],
        [{"prompt": "r", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "b", "rejected": "a"}],
    ),
    "reviews": (
        lambda data: load_reviews(data, ["bad", "good"]),
        [{"text": "a", "label": 0}, {"text": "b", "label": 1}],
        [{"text": "c", "label": 0}, {"text": "b", "label": 1}],
    ),
    "texts": (load_text, [{"text": "a"}, {"text": "b"}], [{"text": "c"}, {"text": "b"}]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_held_out_rows_that_equal_training_rows_are_counted(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load, *splits = ROWS[kind]
    paths = [tmp_path / "train.jsonl", tmp_path / "other.jsonl"]
    for path, rows in zip(paths, splits, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataInput(train=[DataSource(path=str(paths[0]))], validation=[DataSource(path=str(paths[1]))])
    load(data)
    assert f"1 of 2 held-out rows are also training rows (the first: {paths[1]}:2 equals {paths[0]}:2)" in caplog.text
    caplog.clear()
    paths[1].write_text(json.dumps(splits[1][0]) + "\n")
    load(data)
    assert "also training rows" not in caplog.text
