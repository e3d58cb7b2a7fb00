"""Paths that are not a model: one message with the next move."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import ModelError
from stages.importing.source import find_source, no_weights, read_json


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.zip", "unpack it"),
        ("model.safetensors", "import the folder that contains it"),
        ("notes.md", "expected a folder"),
        ("big-00001-of-00003.gguf", "one of 3 parts"),
    ],
)
def test_a_file_that_is_not_a_model_is_refused_with_the_next_move(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=words):
        find_source(tmp_path / name)


@pytest.mark.parametrize("name", ["one.gguf", "ONE.GGUF", "one-00001-of-00001.gguf"])
def test_a_complete_gguf_file_is_a_source(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert find_source(tmp_path / name) == tmp_path / name


def test_a_missing_path_is_distinguished_from_an_id_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hf download org/model --local-dir"):
        find_source("https://huggingface.co/org/model")
    with pytest.raises(ModelError, match="no such folder or file"):
        find_source(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is empty"):
        find_source("")


def test_a_folder_without_weights_names_what_to_import_instead(tmp_path: Path) -> None:
    assert "expected model.safetensors" in str(no_weights(tmp_path))
    (tmp_path / "reward.safetensors").touch()
    assert "Its files reward.safetensors have other names" in str(no_weights(tmp_path))
    (tmp_path / "zero_to_fp32.py").touch()
    assert "DeepSpeed" in str(no_weights(tmp_path))
    (tmp_path / "model-Q4_0.gguf").touch()
    assert str(no_weights(tmp_path)).endswith(f"Import the file: {tmp_path / 'model-Q4_0.gguf'}")
    for name in ("checkpoint-20", "checkpoint-100"):
        (tmp_path / name).mkdir()
    assert str(no_weights(tmp_path)).endswith(f"Import one of them: {tmp_path / 'checkpoint-100'}")


@pytest.mark.parametrize("content", [b"{bad", b"[1]", b"\xff\xfe\x00"])
def test_a_json_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json (cannot be read|contains a list)"):
        read_json(tmp_path / "config.json")
