"""Every form of a ranked comparison is converted to ranks (0 is best). A malformed row is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config import DataInput, DataSource
from stages.corpora.comparisons import comparison, load_comparisons
from stages.corpora.files import read_rows
from stages.corpora.rows import Row
from stages.errors import DataError


def row(**columns: Any) -> Row:
    made = Row(columns)
    made.location = "pairs.jsonl:7"
    return made


@pytest.mark.parametrize(
    ("columns", "completions", "ranks"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ["a", "b"], [0, 1]),
        ({"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 1]}, ["a", "b", "c"], [1, 0, 0]),
        ({"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.5, 3, 3]}, ["a", "b", "c"], [1, 0, 0]),
        ({"prompt": "p", "responses": ["a", "b", "c"]}, ["a", "b", "c"], [0, 1, 2]),
    ],
)
def test_every_form_of_a_comparison_is_read(columns, completions, ranks) -> None:
    made = comparison(row(**columns))
    assert (made.prompt, made.completions, made.ranks) == ("p", completions, ranks)


def test_messages_and_named_preferred() -> None:
    prompt = [{"role": "user", "content": "hi"}]
    made = comparison(row(prompt=prompt, chosen=[{"role": "assistant", "content": "a"}], rejected=[{"role": "assistant", "content": "b"}]))
    assert made.prompt == prompt and made.completions == ["a", "b"]
    named = comparison(row(prompt="p", responses={"x": "one", "y": "two", "z": "three"}), preferred="y")
    assert named.ranks == [1, 0, 1] and named.num_pairs == 2 and named.best == "two"


def test_hh_dialogues_are_split_at_the_last_reply() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    made = comparison(row(chosen=f"{start} good", rejected=f"{start} bad"))
    assert made.prompt == start and made.completions == [" good", " bad"]
    parted = comparison(row(chosen=f"{start} d", rejected="\n\nHuman: a\n\nAssistant: x"))
    assert parted.prompt == "\n\nHuman: a\n\nAssistant:" and parted.completions == [" b\n\nHuman: c\n\nAssistant: d", " x"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "x"}, "columns text are not a comparison"),
        (
            {"prompt": "p", "response": "a", "rating": 4},
            r"Ratings: put all completions of a prompt into one row, as prompt \+ responses \+ scores$",
        ),
        ({"prompt": "p", "completions": ["a", "b"]}, "completions without ranks"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [0]}, r"expected 2 numbers in ranks, got \[0\]"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0, float("nan")]}, r"expected 2 numbers in scores, got \[1.0, nan\]"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [10**400, 1]}, "expected 2 numbers in scores, got"),
        ({"prompt": "p", "responses": ["a"]}, r"1 completion\(s\); a comparison needs at least 2"),
        ({"prompt": "p", "responses": ["a", 3]}, "responses, entry 2 is int; expected text"),
        ({"prompt": "p", "responses": {"x": "a", "y": "b"}}, "set preferred to one of x, y"),
        ({"prompt": "p", "responses": "['a', 'b']"}, r"responses is str \(\"\['a', 'b'\]\"\); expected a list of texts, or its JSON text"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, r"chosen is empty \(null\); expected text. Fill it in, or remove the row"),
    ],
)
def test_malformed_rows_are_named(columns, message) -> None:
    with pytest.raises(DataError, match=f"pairs.jsonl:7: .*{message}"):
        comparison(row(**columns))


@pytest.mark.parametrize(
    "columns",
    [
        {"completions": ["a", "b", "c"], "ranks": [1, 0, 1]},
        {"responses": ["a", "b", "c"], "scores": [2.5, 4, 2.5]},
        {"responses": {"x": "b", "y": "a", "z": "c"}},
    ],
)
def test_lists_may_be_json_text_as_in_a_table_of_texts(columns: dict[str, Any]) -> None:
    plain = comparison(row(prompt="p", **columns), preferred="x")
    assert comparison(row(prompt="p", **{name: json.dumps(value) for name, value in columns.items()}), preferred="x") == plain
    assert plain.best == "b"


def test_a_split_of_ties_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ties.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 0]}) + "\n" for _ in range(9)))
    with pytest.raises(DataError, match="the training comparisons .* are all ties"):
        load_comparisons(DataInput.model_validate({"train": str(path)}))


def test_real_preference_pairs(shared_data: Path) -> None:
    for folder in ("hh_harmless", "hh_helpful"):
        files = sorted((shared_data / folder).glob("*.jsonl*"))
        made = load_comparisons(DataInput.model_validate({"train": [str(file) for file in files]}))
        assert len(made.train) > 100 and all(len(item.completions) == 2 for item in made.train)


def test_a_list_of_objects_is_read_by_the_path_to_its_fields(tmp_path: Path) -> None:
    """UltraFeedback's format: each completion is an object with its text and its grades."""
    row = {
        "instruction": "Name a colour.",
        "completions": [
            {"response": "Loud.", "fine-grained_score": 1.5, "annotations": {"honesty": {"Rating": "1"}}},
            {"response": "Red.", "fine-grained_score": 4.75, "annotations": {"honesty": {"Rating": "5"}}},
            {"response": "Blue.", "fine-grained_score": 4.75, "annotations": {"honesty": {"Rating": "5"}}},
        ],
    }
    path = tmp_path / "rankings.jsonl"
    path.write_text(json.dumps(row) + "\n")
    columns = {"prompt": "instruction", "responses": "completions[].response", "scores": "completions[].fine-grained_score"}
    source = DataSource(path=str(path), columns=columns)
    (read,) = [comparison(one) for one in read_rows([source])]
    assert (read.prompt, read.completions, read.ranks) == ("Name a colour.", ["Loud.", "Red.", "Blue."], [1, 0, 0])
    graded = DataSource(path=str(path), columns={"grades": "completions[].annotations.honesty.Rating"})
    assert read_rows([graded])[0]["grades"] == ["1", "5", "5"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "completions[].rank",
            r"rankings.jsonl:1: columns names 'completions\[\].rank' for 'ranks', and completions, entry 2 is an object "
            r"of text; expected an object with 'rank'",
        ),
        ("completions.rank", r"completions is list; expected an object with 'rank'"),
        ("prompt[].rank", r"prompt is str; expected a list"),
        ("answers[].rank", r"columns names 'answers\[\].rank' for 'ranks', and the row has prompt, completions"),
    ],
)
def test_wrong_column_path_names_the_location(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completions": [{"text": "a", "rank": 1}, {"text": "b"}]}) + "\n")
    with pytest.raises(DataError, match=message):
        read_rows([DataSource(path=str(path), columns={"ranks": name})])


def test_contradictory_comparisons_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1, 2]},
        {"prompt": "p", "chosen": "c", "rejected": "b"},  # against the first
        {"prompt": "q", "chosen": "c", "rejected": "b"},  # another prompt
        {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 0]},  # a tie is not against a preference
        {"prompt": "r", "chosen": "x", "rejected": "y"},  # held out
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_comparisons(DataInput(train=[DataSource(path=str(path))]))
    expected = f"2 of 4 training comparisons contradict another one: same prompt, same two texts, other order (the first: {path}:1)"
    assert caplog.messages == [expected]
