"""Which files belong to which split: the same as in ``datasets``, without leaks and without files that are not data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.corpora.tables.layout import Layout, find_split, is_data, layout_of, parts_of
from stages.errors import DataError


def layout(*names: str, texts: dict[str, str] | None = None, **choice: Any) -> Layout:
    """The layout of files with these names. ``texts``: the content of some of them."""
    contents = texts or {}
    return layout_of([*names, *(name for name in contents if name not in names)], lambda name: contents.get(name, ""), **choice)


NAMED = {
    "folders": (
        ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
        {"train": ["train/a.jsonl", "train/b.jsonl"], "test": ["test/a.jsonl"]},
    ),
    "folders below a folder": (
        ["x/data/train/a.csv", "x/data/dev/a.csv"],
        {"train": ["x/data/train/a.csv"], "validation": ["x/data/dev/a.csv"]},
    ),
    "file names": (
        ["train.jsonl", "val.jsonl", "eval.jsonl"],
        {"train": ["train.jsonl"], "validation": ["val.jsonl"], "test": ["eval.jsonl"]},
    ),
    "packed": (
        ["harmless/train.jsonl.gz", "harmless/test.jsonl.gz"],
        {"train": ["harmless/train.jsonl.gz"], "test": ["harmless/test.jsonl.gz"]},
    ),
    "shards, any split": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/hard-00000-of-00001.parquet"],
        {"train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], "hard": ["data/hard-00000-of-00001.parquet"]},
    ),
    "shards elsewhere": (
        ["parts/train-00000-of-00001.parquet", "parts/test-00000-of-00001.parquet"],
        {"train": ["parts/train-00000-of-00001.parquet"], "test": ["parts/test-00000-of-00001.parquet"]},
    ),
    "words within names": (["my_train_set.csv", "my_testing_set.csv"], {"train": ["my_train_set.csv"], "test": ["my_testing_set.csv"]}),
    "nothing named": (["a.jsonl", "b/c.jsonl", "latest.jsonl"], {"train": ["a.jsonl", "b/c.jsonl", "latest.jsonl"]}),
}


@pytest.mark.parametrize(("names", "splits"), NAMED.values(), ids=NAMED)
def test_names_define_splits_as_in_datasets(names: list[str], splits: dict[str, list[str]], tmp_path: Path) -> None:
    assert layout(*names).splits == splits
    from datasets.data_files import DataFilesDict, get_data_patterns

    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    theirs = DataFilesDict.from_local_or_remote(get_data_patterns(str(tmp_path)), base_path=str(tmp_path))
    assert {split: sorted(str(Path(file).relative_to(tmp_path)) for file in files) for split, files in theirs.items()} == splits


def test_names_in_capitals_define_splits() -> None:
    assert layout("Train/a.csv", "Test/a.csv").splits == {"train": ["Train/a.csv"], "test": ["Test/a.csv"]}


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "Licence.txt",
        "README.txt",
        "requirements.txt",
        "NOTICE.txt",
        "dataset_info.json",
        "dataset_infos.json",
        "state.json",
        ".hidden.jsonl",
        ".cache/x.jsonl",
        "__pycache__/x.json",
        "load.py",
        "notes.md",
        "picture.png",
    ],
)
def test_files_without_data_are_ignored(name: str) -> None:
    assert not is_data(name)
    assert layout("a.jsonl", name).splits == {"train": ["a.jsonl"]}


def test_file_without_data_defines_no_split() -> None:
    assert layout("rows.jsonl", "train.py", "test.md").splits == {"train": ["rows.jsonl"]}


CARD = """---
configs:
- config_name: easy
  default: true
  data_files:
  - split: train
    path: "easy/*.csv"
  - split: held
    path: ["other/held.csv"]
- config_name: hard
  data_dir: hard
- config_name: plain
  data_files: easy/b.csv
---
# About
"""
CARD_FILES = ("easy/a.csv", "easy/b.csv", "other/held.csv", "hard/train.csv", "hard/test.csv", "hard/README.md")


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        (None, {"train": ["easy/a.csv", "easy/b.csv"], "held": ["other/held.csv"]}),
        ("easy", {"train": ["easy/a.csv", "easy/b.csv"], "held": ["other/held.csv"]}),
        ("hard", {"train": ["hard/train.csv"], "test": ["hard/test.csv"]}),
        ("plain", {"train": ["easy/b.csv"]}),
    ],
)
def test_a_readme_declares_configs(name: str | None, splits: dict[str, list[str]]) -> None:
    assert layout(*CARD_FILES, texts={"README.md": CARD}, name=name).splits == splits


def test_folders_and_files_are_chosen() -> None:
    names = ("README.md", "base/train.jsonl", "base/test.jsonl", "online/train.jsonl", "red/attempts.jsonl")
    assert layout(*names, data_dir="base").splits == {"train": ["base/train.jsonl"], "test": ["base/test.jsonl"]}
    assert layout(*names, data_dir="./base/").splits == {"train": ["base/train.jsonl"], "test": ["base/test.jsonl"]}
    assert layout(*names, data_files=["*/train.jsonl"]).splits == {"train": ["base/train.jsonl", "online/train.jsonl"]}
    assert layout(*names, data_files=["red/*"]).splits == {"train": ["red/attempts.jsonl"]}
    assert layout(*names, data_files=["train.jsonl"], data_dir="online").splits == {"train": ["online/train.jsonl"]}


WRONG: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "no such config": (CARD_FILES, {"name": "esy", "texts": {"README.md": CARD}}, "there is no config 'esy'; did you mean 'easy'"),
    "a folder is no config": (("base/train.jsonl",), {"name": "base"}, "the data set has no configs; write data_dir: base"),
    "several configs": (("a.csv",), {"texts": {"README.md": "---\nconfigs:\n- config_name: a\n- config_name: b\n---\n"}}, "name: a, b"),
    "no such folder": (("base/train.jsonl",), {"data_dir": "bse"}, "data_dir: bse contains no data file; did you mean 'base'"),
    "no such file": (("base/train.jsonl",), {"data_files": ["base/trian.jsonl"]}, "no data file matches 'base/trian.jsonl'; did you mean"),
    "no pattern": (("a.jsonl",), {"data_files": ["a**b"]}, "not a valid file name pattern"),
    "both": (("base/train.jsonl",), {"data_dir": "base", "name": "base"}, "both select a part"),
    "in two splits": (("train-test.jsonl",), {}, "the file name train-test.jsonl matches the splits train and test"),
}


@pytest.mark.parametrize(("names", "choice", "message"), WRONG.values(), ids=WRONG)
def test_selection_without_a_match_is_refused(names: tuple[str, ...], choice: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        layout(*names, **choice)
    assert message in str(caught.value)


def saved(*files: str) -> str:
    return json.dumps({"_data_files": [{"filename": name} for name in files], "_split": None})


def test_folders_of_save_to_disk() -> None:
    """Splits with any name, and only the files that state.json lists. Cache files of map() are not data."""
    texts = {
        "dataset_dict.json": '{"splits": ["train", "hard"]}',
        "train/state.json": saved("data-00000-of-00001.arrow"),
        "hard/state.json": saved("data-00000-of-00001.arrow"),
    }
    names = ("train/data-00000-of-00001.arrow", "train/cache-1f.arrow", "hard/data-00000-of-00001.arrow", "train/dataset_info.json")
    assert layout(*names, texts=texts).splits == {"train": ["train/data-00000-of-00001.arrow"], "hard": ["hard/data-00000-of-00001.arrow"]}
    single = layout("data-00000-of-00001.arrow", "cache-1f.arrow", texts={"state.json": saved("data-00000-of-00001.arrow")})
    assert single.splits == {"train": ["data-00000-of-00001.arrow"]}
    with pytest.raises(DataError, match=r"state.json lists data-00001-of-00002.arrow, which is missing"):
        layout("data-00000-of-00002.arrow", texts={"state.json": saved("data-00000-of-00002.arrow", "data-00001-of-00002.arrow")})


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("test", "test"), ("eval", "test"), ("valid", "dev"), ("validation", "dev"), ("dev", "dev"), ("train", "train")],
)
def test_split_is_found_by_the_meaning_of_its_name(wanted: str, expected: str) -> None:
    assert find_split(Layout({"train": ["a"], "dev": ["b"], "test": ["c"]}, True), wanted) == expected


def test_a_split_expression_chooses_rows() -> None:
    three = Layout({"train": ["a"], "test": ["b"], "extra": ["c"]}, True)
    assert [(part.split, list(part.rows(10))) for part in parts_of(three, "train[:3]+test[80%:]", "train")] == [
        ("train", [0, 1, 2]),
        ("test", [8, 9]),
    ]
    assert [part.split for part in parts_of(three, "all", "train")] == ["train", "test", "extra"]
    assert [part.split for part in parts_of(three, None, "test")] == ["test"]
    for written, message in (("trian", "did you mean 'train'"), ("train[:", "cannot be read"), ("train[x:]", "cannot"), ("", "cannot")):
        with pytest.raises(DataError, match=message):
            [part.rows(10) for part in parts_of(three, written, "train")]
    with pytest.raises(DataError, match="there is no split 'validation' \\(the default here; set split to read another\\); its splits"):
        parts_of(three, None, "validation")


def test_without_named_splits_all_rows_are_read() -> None:
    plain = layout("a.jsonl", "b.jsonl")
    for default in ("train", "validation", "test"):
        assert [part.split for part in parts_of(plain, None, default)] == ["train"]
    assert [part.split for part in parts_of(plain, "train", "train")] == ["train"]
    with pytest.raises(DataError, match="there is no split 'test': the file names contain no splits"):
        parts_of(plain, "test", "train")


@pytest.mark.parametrize("folder", ["data/", "", "other/"])
def test_missing_file_of_a_series_is_named(folder: str) -> None:
    incomplete = layout(f"{folder}train-00000-of-00003.parquet", f"{folder}train-00002-of-00003.parquet")
    assert incomplete.lost == f"1 of 3 files are missing, e.g. {folder}train-00001-of-00003.parquet"
    complete = layout(*(f"{folder}train-0000{number}-of-00003-{number}f.parquet" for number in range(3)))  # each with another hash
    assert complete.lost == ""
