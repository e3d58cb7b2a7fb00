"""TL;DR data in the original format (Stiennon et al. 2020) and in TRL's format, as small local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config import DataInput, DataSource
from stages.corpora.comparisons import load_comparisons
from stages.corpora.demonstrations import load_demonstrations
from stages.corpora.prompts import load_prompts
from stages.errors import DataError

POST = {"id": "t3_1", "subreddit": "tifu", "title": "I {post} too much", "post": "Line one.\nLine {two}.", "summary": "I write too much."}
PROMPT = "SUBREDDIT: r/tifu\n\nTITLE: I {post} too much\n\nPOST: Line one.\nLine {two}.\n\nTL;DR:"
COMPARISON = {
    "info": {"id": "t3_1", "post": POST["post"], "title": POST["title"], "subreddit": "tifu", "site": None, "article": None},
    "summaries": [
        {"text": " Too long.", "policy": "sup1", "note": None},
        {"text": " I write too much.", "policy": "ref", "note": None},
    ],
    "choice": 1,
    "worker": "worker-7",
    "batch": "batch3",
    "split": "train",
    "extra": {"confidence": 6},
}


def source(tmp_path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def data(tmp_path: Path, *rows: dict[str, Any]) -> DataInput:
    return DataInput.model_validate({"train": source(tmp_path, *rows), "validation": source(tmp_path, *rows)})


def test_posts_are_demonstrations_and_prompts(tmp_path: Path) -> None:
    assert load_demonstrations(data(tmp_path, POST)).train == [{"prompt": PROMPT, "completion": "I write too much."}]
    assert load_prompts([DataSource(**source(tmp_path, POST, COMPARISON))]) == [PROMPT]


def test_comparisons_keep_the_better_summary_and_its_annotator(tmp_path: Path) -> None:
    article = {**COMPARISON, "info": {"article": "News {of} today.", "post": None}, "choice": 0, "batch": "cnndm2"}
    first, second = load_comparisons(data(tmp_path, COMPARISON, article)).train
    assert (first.prompt, first.ranks, first.annotator, first.best) == (PROMPT, [1, 0], "worker-7", " I write too much.")
    assert (second.prompt, second.ranks) == ("Article:\nNews {of} today.\n\nTL;DR:", [0, 1])


def test_summaries_equal_those_published_by_trl(tmp_path: Path) -> None:
    rows = data(tmp_path, {"prompt": PROMPT, "completion": " I write too much."})
    pairs = data(tmp_path, {"prompt": PROMPT, "chosen": " I write too much.", "rejected": " Too long."})
    assert load_demonstrations(rows).train[0]["prompt"] == load_comparisons(pairs).train[0].prompt == PROMPT
    dialogue = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "I write too much."}]
    other = [dialogue[0], {"role": "assistant", "content": "Too long."}]
    assert load_comparisons(data(tmp_path, {"prompt": PROMPT, "chosen": dialogue, "rejected": other})).train[0].completions == [
        "I write too much.",
        "Too long.",
    ]


def test_both_formats_of_summaries_give_the_same_tokens(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from stages.corpora.templates import encode_pair

    published = load_demonstrations(data(tmp_path, POST)).train[0]
    again = load_demonstrations(data(tmp_path, {"prompt": PROMPT, "completion": " I write too much."})).train[0]
    assert encode_pair(tiny_tokenizer, **published) == encode_pair(tiny_tokenizer, **again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": 2}, "0.jsonl:1: choice is 2; expected the index of the better summary, from 0 to 1"),
        ({"choice": None}, "choice is None"),
        ({"summaries": [{"text": "one"}]}, "expected a list of at least two objects with a text"),
        ({"summaries": ["one", "two"]}, "expected a list of at least two objects with a text"),
        ({"info": "t3_1"}, "info is str; expected an object"),
        ({"info": {"post": "p", "title": "t"}}, "0.jsonl:1, info: no column 'subreddit'"),
        ({"info": {"post": None}}, "0.jsonl:1, info: no column 'article'"),
    ],
)
def test_bad_comparisons_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_comparisons(data(tmp_path, {**COMPARISON, **change}))


def test_post_without_a_summary_is_not_a_demonstration(tmp_path: Path) -> None:
    row = {key: value for key, value in POST.items() if key != "summary"}
    with pytest.raises(DataError, match="no column 'summary'"):
        load_demonstrations(data(tmp_path, row))
