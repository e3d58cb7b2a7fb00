"""The cached hashes of large files for planning, and when they are not trusted."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from stages.registry import contents
from stages.registry.contents import file_sha256, remembered_hashes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order; every file counts as large."""
    monkeypatch.setattr(contents, "LARGE_BYTES", 0)
    done: list[Path] = []
    original = contents._sha256
    monkeypatch.setattr(contents, "_sha256", lambda path: (done.append(path), original(path))[1])
    return done


def settled(path: Path, text: str) -> Path:
    path.write_text(text)
    past = time.time() - 100
    os.utime(path, (past, past))
    return path


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is ten seconds ahead, so files that a test has just written count as old."""
    now = time.time
    monkeypatch.setattr(contents.time, "time", lambda: now() + 10)


def test_an_unchanged_file_is_read_once(tmp_path: Path, reads: list[Path], later: None) -> None:
    file = settled(tmp_path / "weights", "abc")
    for _ in range(3):
        with remembered_hashes(tmp_path / "cache" / "plan.json"):
            assert file_sha256(file) == hashlib.sha256(b"abc").hexdigest()
    assert reads == [file]
    assert file_sha256(file) and reads == [file, file]  # outside of the context, every byte is read


def test_change_with_equal_size_and_time_is_detected(tmp_path: Path, reads: list[Path], later: None) -> None:
    file = settled(tmp_path / "weights", "abc")
    with remembered_hashes(tmp_path / "cache" / "plan.json"):
        file_sha256(file)
    times = file.stat()
    file.write_text("abd")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the file system's time of the change (ctime) cannot be set
    with remembered_hashes(tmp_path / "cache" / "plan.json"):
        assert file_sha256(file) == hashlib.sha256(b"abd").hexdigest()


def test_a_file_just_written_or_from_the_future_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    young = tmp_path / "young"
    young.write_text("abc")
    future = tmp_path / "future"
    future.write_text("abc")
    os.utime(future, (time.time() + 10**6,) * 2)
    for file in (young, future):
        for _ in range(2):
            with remembered_hashes(tmp_path / "cache" / "plan.json"):
                file_sha256(file)
    assert reads == [young, young, future, future]


def test_passed_checks_are_not_repeated(tmp_path: Path) -> None:
    made: list[str] = []

    def fails() -> None:
        made.append("fails")
        raise ValueError("no")

    for _ in range(2):
        with remembered_hashes(tmp_path / "cache" / "plan.json") as memo:
            memo.check_once("a", lambda: made.append("a"))
            with pytest.raises(ValueError, match="no"):
                memo.check_once("b", fails)
    assert made == ["a", "fails", "fails"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"hashes": 3, "passed": []}', "\x00"])
def test_damaged_hash_cache_is_discarded(tmp_path: Path, content: str, later: None, reads: list[Path]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "plan.json").write_text(content)
    file = settled(tmp_path / "weights", "abc")
    with remembered_hashes(tmp_path / "cache" / "plan.json"):
        assert file_sha256(file) == hashlib.sha256(b"abc").hexdigest()
    with remembered_hashes(tmp_path / "cache" / "plan.json"):
        file_sha256(file)
    assert len(reads) == 1


def test_hash_cache_without_home_or_disk_space_does_nothing(tmp_path: Path, later: None, reads: list[Path]) -> None:
    file = settled(tmp_path / "weights", "abc")
    with remembered_hashes(tmp_path / "nowhere" / "cache" / "plan.json"):
        file_sha256(file)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "cache").write_text("a file where a folder should be")
    with remembered_hashes(tmp_path / "cache" / "plan.json"):
        file_sha256(file)
