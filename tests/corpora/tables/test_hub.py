"""Data sets of the Hub without a connection: an incomplete cached data set is not read as a complete one."""

from __future__ import annotations

import pytest

from stages.config import DataSource
from stages.corpora.tables.hub import chosen_files, hub_layout
from stages.errors import DataError, HubUnreachable
from stages.hub.repositories import Repository

COMMIT = "0" * 40


def repository(*files: str, is_cached: bool = False) -> Repository:
    return Repository("dataset", "org/rows", COMMIT, files, is_cached)


def test_a_series_that_is_cached_in_part_is_not_read() -> None:
    files = ("data/train-00000-of-00002.parquet",)
    message = r"in part \(1 of 2 files are missing, .* hf download org/rows --repo-type dataset --revision 0"
    with pytest.raises(HubUnreachable, match=message):
        hub_layout(repository(*files, is_cached=True), DataSource(path="org/rows"))
    assert hub_layout(repository(*files), DataSource(path="org/rows")).splits == {"train": list(files)}  # as it was published


def test_default_split_applies_if_names_define_no_splits() -> None:
    """A data set without splits is read as train. An evaluation without ``split`` must not read it as a test split."""
    plain = repository("a.jsonl", "b.jsonl")
    assert chosen_files(plain, DataSource(path="org/rows"), "train") == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match=r"there is no split 'test' \(the default here; set split to read another\); its splits: train"):
        chosen_files(plain, DataSource(path="org/rows"), "test")
    assert chosen_files(plain, DataSource(path="org/rows", data_files="b.jsonl"), "test") == ["b.jsonl"]


def test_data_set_without_rows_lists_its_file_types() -> None:
    with pytest.raises(DataError, match=r"org/rows: the data set has no file in a supported format \(it has .md, .tar\)"):
        hub_layout(repository("about.md", "images.tar"), DataSource(path="org/rows"))
