"""Labels by number or by name. Any other label is an error with its location."""

from __future__ import annotations

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


@pytest.mark.parametrize(("label", "shown"), [("2", "2"), ("great", "'great'"), ("", "''")])
def test_unknown_labels(tmp_path, label, shown) -> None:
    with pytest.raises(DataError, match=rf"reviews.csv:3: label is {shown}; expected one of 0 \(negative\), 1 \(positive\)"):
        load(tmp_path, f"text,label\nfine,1\nbad,{label}\nawful,0\n")


def test_one_label_only(tmp_path) -> None:
    with pytest.raises(DataError, match="have one label"):
        load(tmp_path, "text,label\nfine,1\ngood,1\nbad,0\n")
