"""An unexpected exception: one message with step, activity and file, exit status 1, no traceback on the screen. Lost processes."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from stages.errors import DataError, MemoryExhausted, UnexpectedError, doing
from stages.process.ending import explain, lost_the_others, was_in_step


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def raised(error: BaseException, folder: Path | None = None) -> BaseException:
    """``error`` after it left two nested notes."""
    with pytest.raises(type(error)) as caught, doing("step 'sft' (sft)", folder), doing("loading the model"):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first line\nsecond line"), "unexpected ValueError: first line. The"),
        (KeyError("hidden_size"), "unexpected KeyError: 'hidden_size'. The"),
        (AssertionError(), "unexpected AssertionError. The"),
        (SystemExit(3), "unexpected SystemExit: 3. The"),
        (KeyboardInterrupt(), "unexpected KeyboardInterrupt. The"),
        (RecursionError("x" * 1000), "x... "),
        (Unprintable(), "unexpected Unprintable: (its message cannot be printed). The"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "unexpected UnicodeEncodeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_unexpected_exception_gives_one_message_and_a_file(tmp_path: Path, error: BaseException, said: str) -> None:
    explained = explain(raised(error, tmp_path / "run" / "sft"), "stages run", tmp_path)
    file = tmp_path / "run" / "sft" / "traceback.txt"
    message = str(explained)
    assert isinstance(explained, UnexpectedError) and explained.exit_status == 1
    assert message.startswith("step 'sft' (sft), loading the model: unexpected "), message
    assert (said if said != "x... " else "x...") in message and message.endswith(f"The traceback is in {file}; --debug shows it")
    assert "\n" not in message and len(message) < 700 + len(str(file))
    assert file.read_text().startswith("Traceback (most recent call last)") and Path(__file__).name in file.read_text()


class OutOfMemoryError(RuntimeError):
    """As torch's error of a GPU."""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemoryError("CUDA")])
def test_memory_that_runs_out_outside_of_passes_gives_a_message_with_the_next_move(tmp_path: Path, error: BaseException) -> None:
    """For example in a test pass over ten tokens, or while a model is moved to the GPU."""
    explained = explain(raised(error, tmp_path / "run" / "sft"), "stages run", tmp_path)
    assert isinstance(explained, MemoryExhausted) and explained.exit_status == 2
    assert str(explained).startswith(f"step 'sft' (sft), loading the model: memory ran out, {type(error).__name__}")
    assert "quantize it (quantization: nf4)" in str(explained) and "unexpected" not in str(explained)
    assert (tmp_path / "run" / "sft" / "traceback.txt").exists()


def test_without_a_step_the_file_is_below_the_home(tmp_path: Path) -> None:
    explained = explain(ValueError("odd"), "stages plan", tmp_path)
    file = tmp_path / "errors" / "traceback.txt"
    assert str(explained) == f"stages plan: unexpected ValueError: odd. The traceback is in {file}; --debug shows it"


def test_a_home_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    explained = explain(ValueError("odd"), "stages plan", tmp_path / "file")
    named = Path(str(explained).partition("traceback is in ")[2].partition("; ")[0])
    assert named.read_text().endswith("ValueError: odd\n")
    named.unlink()

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    assert str(explain(ValueError("odd"), "stages plan", tmp_path / "file")).endswith("ValueError: odd. --debug shows the traceback")


def test_stages_errors_keep_their_message(tmp_path: Path) -> None:
    own = DataError("a.jsonl:1: no text")
    assert explain(raised(own), "stages run", tmp_path) is own
    assert explain(PermissionError(errno.EACCES, "denied", "/x"), "stages run", tmp_path).exit_status == 2
    assert not (tmp_path / "errors").exists()


def test_secrets_do_not_reach_the_file(tmp_path: Path) -> None:
    secret = "hf_" + "a" * 30
    explain(ValueError(f"token {secret}"), "stages run", tmp_path)
    assert secret not in (tmp_path / "errors" / "traceback.txt").read_text()


def test_was_in_step_is_true_only_for_exceptions_of_a_step(tmp_path: Path) -> None:
    assert was_in_step(raised(KeyboardInterrupt(), tmp_path))
    assert not was_in_step(raised(KeyboardInterrupt()))  # Ctrl-C while `stages generate` loads a model


def test_lost_peers_are_distinguished_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3421")
    assert not lost_the_others(closed)  # one process has no others
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_the_others(closed)
    assert not lost_the_others(RuntimeError("a bug")) and not lost_the_others(ValueError())
