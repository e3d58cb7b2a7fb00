"""Labels by number or by name. Any other label is an error with its location."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.config import DataInput
from stages.corpora.reviews import load_reviews
from stages.errors import DataError

LABELS = ["negative", "positive"]


def load(tmp_path: Path, text: str):
    path = tmp_path / "reviews.csv"
    path.write_text(text)
    return load_reviews(DataInput.model_validate({"train": str(path), "validation_fraction": 0.34}), LABELS)


def test_numbers_and_names(tmp_path) -> None:
    reviews = load(tmp_path, "text,label\nfine,1\nbad,negative\nawful,0\n")
    assert [(review.text, review.label) for review in reviews.train] == [("fine", 1), ("bad", 0)]
    assert reviews.validation[0].label == 0


@pytest.mark.parametrize(("label", "shown"), [("2", "'2'"), ("great", "'great'"), ("", "''")])
def test_unknown_labels(tmp_path, label, shown) -> None:
    with pytest.raises(DataError, match=rf"reviews.csv:3: label is {shown}; expected one of 0 \(negative\), 1 \(positive\)"):
        load(tmp_path, f"text,label\nfine,1\nbad,{label}\nawful,0\n")


def test_one_label_only(tmp_path) -> None:
    with pytest.raises(DataError, match="have one label"):
        load(tmp_path, "text,label\nfine,1\ngood,1\nbad,0\n")


STARS = ["1", "2", "3"]


@pytest.mark.parametrize(
    ("labels", "value", "index"),
    [
        (LABELS, "Positive", 1),
        (LABELS, 1.0, 1),  # pandas: a column of numbers with gaps
        (LABELS, "0.0", 0),
        (STARS, 1, 0),  # the name "1", not the index 1
        (STARS, "3", 2),
        (["1", "0"], 1, 0),
        (["False", "True"], True, 1),
        (["no", "No way"], "No", 0),
    ],
)
def test_a_label_is_a_name_before_it_is_an_index(tmp_path, labels, value, index) -> None:
    path = tmp_path / "reviews.json"
    others = [{"text": f"text {name}", "label": name} for name in [*labels, labels[0]]]
    path.write_text(json.dumps([{"text": "asked", "label": value}, *others]))
    reviews = load_reviews(DataInput.model_validate({"train": str(path), "validation_fraction": 0.1}), labels)
    assert reviews.train[0].label == index


@pytest.mark.parametrize("value", [4, True, 1.5, "²", None, ["1"]])
def test_numbers_outside_of_the_names_are_refused(tmp_path, value) -> None:
    path = tmp_path / "reviews.json"
    path.write_text(json.dumps([{"text": "a", "label": "1"}, {"text": "b", "label": value}, {"text": "c", "label": "2"}]))
    with pytest.raises(DataError, match="row 2: label is .*expected one of the names 1, 2, 3"):
        load_reviews(DataInput.model_validate({"train": str(path), "validation_fraction": 0.1}), STARS)


def test_held_out_rows_with_one_label_are_said(tmp_path, caplog) -> None:
    rows = [("good", 1)] * 10 + [("bad", 0)] * 20  # sorted by label; the last third is held out
    load(tmp_path, "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    assert "all 10 held-out rows" in caplog.text and "have the label negative" in caplog.text
