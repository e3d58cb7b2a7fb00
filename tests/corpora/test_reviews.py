"""Labels by number or by name. Any other label is an error with its location."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from stages.api.inputs import as_field
from stages.config import DataInput
from stages.corpora.reviews import load_reviews
from stages.errors import DataError

LABELS = ["negative", "positive"]


def load(tmp_path: Path, text: str):
    path = tmp_path / "reviews.csv"
    path.write_text(text)
    return load_reviews(DataInput.model_validate({"train": str(path), "validation_fraction": 0.34}), LABELS)


def test_labels_are_read_as_numbers_and_as_names(tmp_path) -> None:
    reviews = load(tmp_path, "text,label\nfine,1\nbad,negative\nawful,0\n")
    assert [(review.text, review.label) for review in reviews.train] == [("fine", 1), ("bad", 0)]
    assert reviews.validation[0].label == 0


@pytest.mark.parametrize(("label", "shown"), [("2", "'2'"), ("great", "'great'"), ("", "''")])
def test_unknown_labels_are_refused(tmp_path, label, shown) -> None:
    with pytest.raises(DataError, match=rf"reviews.csv:3: label is {shown}; expected one of 0 \(negative\), 1 \(positive\)"):
        load(tmp_path, f"text,label\nfine,1\nbad,{label}\nawful,0\n")


def test_training_rows_with_one_label_are_refused(tmp_path) -> None:
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


def test_held_out_rows_with_one_label_give_a_warning(tmp_path, caplog) -> None:
    rows = [("good", 1)] * 10 + [("bad", 0)] * 20  # sorted by label; the last third is held out
    load(tmp_path, "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    assert "all 10 held-out rows" in caplog.text and "have the label negative" in caplog.text


@pytest.mark.parametrize(
    ("names", "labels", "expected", "warning"),
    [
        (["positive", "negative"], LABELS, [1, 0, 1], ""),  # the names decide, not the numbers 0, 1, 0
        (["NEG", "POS"], ["pos", "neg"], [1, 0, 1], ""),
        (["bad", "good"], LABELS, [0, 1, 0], "the classes bad, good of the data"),
    ],
)
@pytest.mark.parametrize("stored", ["parquet", "save_to_disk", "memory"])
def test_class_names_of_a_data_set_decide_the_labels(tmp_path, caplog, names, labels, expected, warning, stored) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}, features=features)
    path = str(tmp_path / "reviews.parquet")
    if stored == "parquet":
        table.to_parquet(path)
    elif stored == "save_to_disk":
        path = str(tmp_path / "saved")
        table.save_to_disk(path)
    else:
        path = str(as_field("train", table, tmp_path / "inputs"))
    reviews = load_reviews(DataInput.model_validate({"train": path, "validation": path}), labels)
    assert [review.label for review in reviews.train] == expected
    assert warning in caplog.text and bool(warning) == ("the classes" in caplog.text)


def test_a_named_class_without_a_label_is_refused(tmp_path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "neutral", "positive"])}
    )
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "reviews.parquet")
    with pytest.raises(DataError, match=r"row 2: label is 1 \(neutral\); expected one of 0 \(negative\), 1 \(positive\), or its name"):
        load_reviews(DataInput.model_validate({"train": str(tmp_path / "reviews.parquet"), "validation_fraction": 0.5}), LABELS)
