"""Rows that curation removes: near-copies, prompts above the limit per user, personal data, texts of the wrong length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.config import DataInput
from stages.corpora.comparisons import load_comparisons
from stages.corpora.curation import Curation, Curator, mask_pii
from stages.corpora.demonstrations import load_demonstrations
from stages.corpora.files import read_splits
from stages.corpora.prompts import load_prompts
from stages.corpora.rows import Row
from stages.errors import DataError


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value) for value in values]


def write(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def count_words(text: str) -> int:
    return len(text.split())


@pytest.mark.detail("D1")
def test_prompts_with_the_same_prefix_are_deduplicated() -> None:
    table = rows(
        {"prompt": "Write a poem about the sea, please"},
        {"prompt": "write a poem about THE SEA and the sky"},
        {"prompt": "Write a poem"},
        {"prompt": "Write a poem"},
        {"instruction": "Write a poem about the hills", "output": "x"},
    )
    curator = Curator(Curation(prefix_words=5))
    assert [row.get("prompt", "") for row in curator.training(table)] == [table[0]["prompt"], "Write a poem"]
    assert curator.left_out == {"prefix": 3}
    assert len(Curator(Curation(prefix_words=6)).training(table)) == 4  # "the sea," and "the sea" differ; so do "the hills" and "the sea"


@pytest.mark.detail("D2")
def test_the_two_hundred_and_first_prompt_of_a_user_is_dropped() -> None:
    table = rows(*({"prompt": f"question {number}", "user": "ann"} for number in range(201)), {"prompt": "mine", "user": "bob"})
    kept = Curator(Curation(max_per_user=200)).training(table)
    assert len(kept) == 201 and kept[-2]["prompt"] == "question 199" and kept[-1]["prompt"] == "mine"
    with pytest.raises(DataError, match="max_per_user needs the column 'author'; the row has prompt, user"):
        Curator(Curation(max_per_user=200, user_column="author")).training(table)


@pytest.mark.detail("D4")
@pytest.mark.parametrize(
    "text",
    [
        "write to ann.b-c+d@mail.example.org today",
        "call +1 555-123-4567",
        "call (030) 1234 5678 now",
        "ssn 078-05-1120",
        "card 4111 1111 1111 1111",
        "server 192.168.10.254 is down",
    ],
)
def test_personal_data_is_dropped_or_masked(text: str) -> None:
    table = rows({"prompt": "fine"}, {"prompt": text}, {"messages": [{"role": "user", "content": text}]})
    assert Curator(Curation(pii="drop")).training(table) == [{"prompt": "fine"}]
    assert len(Curator(Curation(pii="drop")).heldout(table)) == 3  # only the training split
    masked = Curator(Curation(pii="mask")).training(table)
    assert len(masked) == 3 and "[" in masked[1]["prompt"] and masked[2]["messages"][0]["content"] == masked[1]["prompt"]
    assert table[1]["prompt"] == text, "the table itself stays as it was"


@pytest.mark.parametrize("text", ["in 1984 and 2001", "12 of 24, 3.14159", "version 2.0.1", "from 10-20 to 30", "a year 2024-2025", "x@y"])
def test_ordinary_numbers_are_not_personal(text: str) -> None:
    assert mask_pii(text) == text


def test_masking_names_the_kind() -> None:
    assert mask_pii("ann@example.org or 555-123-4567") == "[email] or [phone]"


@pytest.mark.detail("D10")
def test_lengths_are_counted_in_tokens() -> None:
    table = rows(*({"prompt": "p", "completion": "word " * number} for number in (23, 24, 48, 49)))
    curator = Curator(Curation(tokens={"completion": [24, 48]}), count_words)
    assert [count_words(row["completion"]) for row in curator.training(table)] == [24, 48]
    assert curator.left_out == {"length": 2}
    assert len(Curator(Curation(tokens={"completion": [24, 48]})).training(table)) == 4  # no tokenizer yet: no length is checked
    lists = rows({"completions": ["a b", "a b c"]}, {"completions": ["a b", "a"]})
    assert len(Curator(Curation(tokens={"completions": [2, 9]}), count_words).training(lists)) == 1
    with pytest.raises(DataError, match="names the column 'completion'"):
        curator.training(rows({"prompt": "p"}))
    with pytest.raises(ValidationError, match="expected .minimum, maximum."):
        Curation(tokens={"completion": [48, 24]})


def test_ranking_may_drop_texts_of_the_wrong_length_instead_of_the_row() -> None:
    table = rows(
        {"responses": ["one two three", "one", "one two", "one two"], "scores": [0.9, 0.5, 0.2, 0.2]},
        {"responses": ["one two three", "one"], "ranks": [0, 1]},
        {"responses": ["one", "two"], "ranks": [1, 0]},
    )
    curator = Curator(Curation(tokens={"responses": [1, 2]}, of_lists="entries"), count_words)
    kept = curator.training(table)
    assert kept == [{"responses": ["one", "one two", "one two"], "scores": [0.5, 0.2, 0.2]}, {"responses": ["one", "two"], "ranks": [1, 0]}]
    assert curator.left_out == {"entries": 1, "length": 1}
    assert table[0]["scores"] == [0.9, 0.5, 0.2, 0.2]  # the table itself is not changed


def test_every_schema_is_curated(tmp_path: Path) -> None:
    pairs = [{"prompt": f"tell me {number}", "chosen": "yes", "rejected": "no", "completion": "yes", "user": "u"} for number in range(9)]
    pairs.append({**pairs[0], "prompt": "mail me at a@b.example"})
    data = DataInput.model_validate({"train": write(tmp_path / "rows.jsonl", pairs), "validation": write(tmp_path / "v.jsonl", pairs)})
    curation = Curation(pii="drop", max_per_user=4)
    for load in (load_demonstrations, load_comparisons):
        loaded = load(data, curator=Curator(curation))
        assert len(loaded.train) == 4 and len(loaded.validation) == 4
    assert len(load_prompts(data.train, curator=Curator(curation))) == 4
    assert read_splits(data, Curator(Curation(pii="drop")))[1][-1]["prompt"] == "mail me at a@b.example"
    with pytest.raises(DataError, match=r"curation leaves no training row \(all rows left out: length 20\); relax its limits"):
        load_demonstrations(data, curator=Curator(Curation(tokens={"completion": [5, 6]}), count_words))
