"""Rows of files and folders: every format, compressed or not. A split of a folder contains only its own rows."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from stages.config import DataInput, DataSource
from stages.corpora.files import fingerprint, read_rows
from stages.corpora.rows import Row
from stages.corpora.text import load_text
from stages.errors import DataError
from stages.process.console import announcing

Rows = list[dict[str, Any]]


def write(path: Path, *texts: str) -> Path:
    """Write a file with one row for each text, in the format of its name."""
    import pyarrow
    from pyarrow import csv, ipc, parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": list(texts)})
    if path.name.endswith(".parquet"):
        parquet.write_table(table, path)
    elif path.name.endswith(".arrow"):
        with ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif path.name.endswith((".csv", ".tsv")):
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ","))
    elif path.name.endswith(".json"):
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif path.name.endswith(".txt"):
        path.write_text(texts[0])
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda data: _zstd(path, data)}
        path.write_bytes(pack.get(path.suffix, bytes)(lines))
    return path


def _zstd(path: Path, data: bytes) -> bytes:
    import pyarrow

    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)
    return path.read_bytes()


def texts(path: Path, default: str = "train", **fields: Any) -> list[str]:
    """The texts of ``path``. ``default``: the split to read if ``fields`` name none."""
    return [row["text"] for row in read_rows([DataSource(path=str(path), **fields)], split=default)]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"],
)
def test_every_format_is_read(name: str, tmp_path: Path) -> None:
    assert texts(write(tmp_path / name, "one", "two, three")) == ["one", "two, three"]


def test_rows_share_one_json_decoder_and_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("made again for one row")

    monkeypatch.setattr(json, "JSONDecoder", refused)  # json.loads with arguments makes one for each call
    monkeypatch.setattr(Row, "with_values", refused)
    rows = read_rows([DataSource(path=str(tmp_path / "a.jsonl"))])
    assert rows == [{"text": "a"}, {"text": "b"}] and rows[1].location == f"{tmp_path / 'a.jsonl'}:2"


def test_json_file_with_json_lines_is_read_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    rows = read_rows([DataSource(path=str(tmp_path / "a.json"))])
    assert [(row["text"], row.location.rpartition(":")[2]) for row in rows] == [("one", "1"), ("two", "3")]
    (tmp_path / "b.json").write_text('{"text": "one"}\n{"text": two}\n')
    with pytest.raises(DataError, match=r"b.json:2: bad JSON"):
        texts(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{\n "text": "one"\n}\n')
    with pytest.raises(
        DataError, match="expected a list of objects, got dict; if it is one row, put it in brackets, or name the file .jsonl"
    ):
        texts(tmp_path / "c.json")
    (tmp_path / "d.jsonl").write_text('[\n{"text": "one"}\n]\n')
    with pytest.raises(DataError, match=r"d.jsonl:1: bad JSON .* a list of objects is .json"):
        texts(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/x.jsonl", "test/x.jsonl"),
        ("train.csv", "test.csv"),
        ("data/train.jsonl.gz", "data/eval.jsonl.gz"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    ],
)
def test_split_of_a_folder_contains_only_its_rows(train: str, test: str, tmp_path: Path) -> None:
    write(tmp_path / train, "learned")
    write(tmp_path / test, "held out")
    (tmp_path / "LICENSE.txt").write_text("no data")
    (tmp_path / "README.md").write_text("# about")
    assert texts(tmp_path, default="train") == texts(tmp_path, split="train") == ["learned"]
    assert texts(tmp_path, default="test") == texts(tmp_path, split="test") == ["held out"]
    for choice, fields in (("validation", {}), ("train", {"split": "validation"})):
        with pytest.raises(DataError, match="there is no split 'validation'"):
            texts(tmp_path, default=choice, **fields)


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = {split: Dataset.from_dict({"text": [split, f"{split} 2"]}) for split in ("train", "test", "hard")}
    DatasetDict(rows).save_to_disk(str(tmp_path / "all"))
    rows["hard"].map(lambda row: {"text": row["text"].upper()}).save_to_disk(str(tmp_path / "one"))
    for split in rows:
        assert texts(tmp_path / "all", split=split) == [split, f"{split} 2"]
    assert texts(tmp_path / "all", default="test") == ["test", "test 2"]
    with pytest.raises(DataError, match="there is no split 'validation' .*; its splits: train, test, hard"):
        texts(tmp_path / "all", default="validation")
    assert texts(tmp_path / "one", default="validation") == ["HARD", "HARD 2"]


def test_folder_without_splits_is_read_completely(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "one")
    write(tmp_path / "b" / "c.csv", "two")
    for split in ("train", "validation", "test"):
        assert texts(tmp_path, default=split) == ["one", "two"]
    with pytest.raises(DataError, match="there is no split 'test': the file names contain no splits"):
        texts(tmp_path, split="test")


def test_files_that_belong_to_no_split_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.jsonl", "one")
    write(tmp_path / "more.jsonl", "two")
    with pytest.raises(DataError, match=r"some file names contain a split \(train\) and others do not \(more.jsonl\)"):
        texts(tmp_path)
    assert texts(tmp_path, data_files="**") == ["two", "one"]
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path, split="train") == ["one"]
    assert "1 data files belong to no split and are not read: more.jsonl" in caplog.text


def test_one_table_in_two_formats_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", "one")
    write(tmp_path / "rows.jsonl.gz", "one")
    with pytest.raises(DataError, match="rows.csv and rows.jsonl.gz look like one table in two formats"):
        texts(tmp_path)
    assert texts(tmp_path, data_files="*.csv") == ["one"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, "there is no split 'test'"),
        ({"split": "train[:1]"}, "choose its rows with skip and limit"),
        ({"name": "x"}, "name is set, and the path is one file"),
        ({"data_dir": "x"}, "data_dir is set"),
        ({"revision": "x"}, "revision is set"),
    ],
)
def test_one_file_has_no_splits_to_choose(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "one", "two")
    with pytest.raises(DataError, match=message):
        texts(path, **fields)
    assert texts(path, default="test") == texts(path, split="train") == ["one", "two"]
    assert texts(write(tmp_path / "test.jsonl", "held"), split="test") == ["held"]


def test_folder_without_data_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# about")
    with pytest.raises(DataError, match=r"the folder contains no data file \(it contains README.md\); expected .jsonl"):
        texts(tmp_path)


def test_fingerprint_of_a_folder_depends_on_everything_that_decides_its_rows(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "one")
    sources = [DataSource(path=str(tmp_path))]
    before = fingerprint(sources)
    (tmp_path / "LICENSE").write_text("new")
    (tmp_path / "notes.py").write_text("new")
    assert fingerprint(sources) == before
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n")
    assert fingerprint(sources) != before


@pytest.mark.parametrize(
    ("train", "held", "is_said"),
    [({}, {}, True), ({"limit": 2}, {"skip": 2}, False), ({"limit": 3}, {"skip": 2}, True), ({"split": "train"}, {}, True)],
)
def test_held_out_rows_in_the_training_data_are_reported(
    train: dict[str, Any], held: dict[str, Any], is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without split names, both sources read the same rows of a folder; with split names they do not."""
    write(tmp_path / "plain" / "a.jsonl", "one", "two", "three", "four")
    plain = str(tmp_path / "plain")
    data = DataInput(train=[DataSource(path=plain, **train)], validation=[DataSource(path=plain, **held)])
    with caplog.at_level(logging.WARNING):
        load_text(data)
    assert ("held-out rows are also training rows" in caplog.text) == is_said


def test_named_splits_of_a_folder_are_separate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.jsonl", "one")
    write(tmp_path / "dev.jsonl", "two")
    source = DataSource(path=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        loaded = load_text(DataInput(train=[source], validation=[source]))
    assert (loaded.train, loaded.validation) == (["one"], ["two"])
    assert caplog.text == ""


def test_incomplete_series_is_read_and_missing_files_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", "one")
    write(tmp_path / "test-00000-of-00001.parquet", "two")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path, split="train") == ["one"]
    assert "1 of 2 files are missing, e.g. train-00001-of-00002.parquet; only the existing files are read" in caplog.text


def test_a_column_that_occurs_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label,text\na,1,b\n")
    with pytest.raises(DataError, match="rows.csv:1: the header names 'text' more than once"):
        read_rows([DataSource(path=str(tmp_path / "rows.csv"))])


def test_columns_of_a_table_with_equal_names_are_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: the table has several columns 'text'; rename or remove one of them"):
        read_rows([DataSource(path=str(tmp_path / "rows.parquet"))])


def test_decimal_numbers_of_a_table_are_floats(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    scores = [[Decimal("1.5"), Decimal("-0.25"), None]]
    parquet.write_table(pyarrow.table({"scores": scores, "price": [Decimal("2.00")]}), tmp_path / "rows.parquet")
    (row,) = read_rows([DataSource(path=str(tmp_path / "rows.parquet"))])
    assert row == {"scores": [1.5, -0.25, None], "price": 2.0} and type(row["price"]) is float


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_header_of_a_table_decides_its_separator(mark: str, name: str, tmp_path: Path) -> None:
    # Excel of a country with decimal commas writes semicolons, with a byte order mark and CRLF
    text = f'\ufeffprompt{mark}completion\r\n"a{mark} b"{mark}c, d; e\r\n'.replace("c, d; e", '"c, d; e"')
    (tmp_path / name).write_bytes(text.encode())
    said: list[str] = []
    with announcing(said.append):
        assert read_rows([DataSource(path=str(tmp_path / name))]) == [{"prompt": f"a{mark} b", "completion": "c, d; e"}]
    usual = "\t" if name == "rows.tsv" else ","
    assert said == ([] if mark == usual else [f"{tmp_path / name}: the columns are separated by {mark!r}, as in the header"])


def test_a_table_of_one_column_is_not_split_at_separators_in_its_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text\none; two\n"three, four"\n')
    assert [row["text"] for row in read_rows([DataSource(path=str(tmp_path / "rows.csv"))])] == ["one; two", "three, four"]


def test_files_of_a_folder_in_formats_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    for name in ("b.xlsx", "sub/c.tar.gz", "README.md", "plot.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PK")
    assert len(read_rows([DataSource(path=str(tmp_path))])) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 2 files are in formats that are not read: b.xlsx, sub/c.tar.gz. Save them as .csv"
    ]
    caplog.clear()
    assert len(read_rows([DataSource(path=str(tmp_path), data_files="a.jsonl")])) == 1  # the user chose the files
    assert not caplog.records
    (tmp_path / "sub" / "d.jsonl").write_text('{"text": "two"}\n')
    assert len(read_rows([DataSource(path=str(tmp_path), data_dir="sub")])) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 1 files are in formats that are not read: sub/c.tar.gz. Save them as .csv"
    ]


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n'), ("a.json", '[{"text": "b", "text": "c"}]')]
)
def test_a_key_that_occurs_twice_in_an_object_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"a.json.*the key 'text' occurs twice in one object"):
        read_rows([DataSource(path=str(tmp_path / name))])


# Files whose content is of another format than their name says


PLAIN = b'{"text": "one"}\n'
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"


CONTRADICTIONS = {
    "packed": ("a.jsonl", gzip.compress(PLAIN), "the content is gzip; rename the file to a.jsonl.gz"),
    "packed text": ("a.txt", lzma.compress(PLAIN), "the content is xz; rename the file to a.txt.xz"),
    "packed otherwise": ("a.jsonl.gz", bz2.compress(PLAIN), "the content is bzip2; rename the file to a.jsonl.bz2"),
    "not packed": ("a.jsonl.gz", PLAIN, "the content is not packed as .gz says; if it is plain text, rename the file to a.jsonl"),
    "not zstd": ("a.jsonl.zst", PLAIN, "the content is not packed as .zst says; if it is plain text, rename the file to a.jsonl"),
    "spreadsheet": ("a.csv", b"PK\x03\x04\x14\0\x06\0\x08\0\xf5", "the content is a ZIP archive or a spreadsheet; unpack it, or save"),
    "UTF-16": ("a.csv", "text\none\n".encode("utf-16"), "the content is text in UTF-16; save it as UTF-8"),
    **{f"pointer{end}": (f"a{end}", LFS_POINTER, "a pointer of Git LFS") for end in (".jsonl", ".csv", ".txt", ".parquet", ".jsonl.gz")},
    "list of objects": ("a.jsonl", b'[{"text": "one"}]', "expected an object per line, got a list; rename the file to a.json"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_file_that_contradicts_its_name_is_refused_with_the_next_move(case: str, tmp_path: Path) -> None:
    name, content, message = CONTRADICTIONS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        read_rows([DataSource(path=str(tmp_path / name))])


@pytest.mark.parametrize("names", ["a.parquet b.jsonl", "a.arrow b.csv", "a.parquet b.arrow", "a.arrow b.parquet"])
def test_a_table_with_the_name_of_another_format_is_refused(names: str, tmp_path: Path) -> None:
    written, renamed = names.split()
    write(tmp_path / written, "one").rename(tmp_path / renamed)
    with pytest.raises(DataError, match=f"rename the file to b{Path(written).suffix}"):
        read_rows([DataSource(path=str(tmp_path / renamed))])


def test_a_text_may_begin_like_another_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("PAR1 is a gene. BZh is a unit.")
    assert texts(tmp_path / "a.txt") == ["PAR1 is a gene. BZh is a unit."]
