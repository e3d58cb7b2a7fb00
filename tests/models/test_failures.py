"""Every loading error names its cause. Only an incomplete folder gives the advice about ``save_pretrained``."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from stages.errors import ModelError
from stages.models.loading import config_of, load_classifier, load_language_model, load_tokenizer

ADVICE = "expected a folder written by save_pretrained"


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in {**config, **fields}.items() if value is not None}))


def message(folder: Path) -> str:
    with pytest.raises(ModelError) as raised:
        load_language_model(str(folder), dtype=torch.float32)
    return str(raised.value)


def test_a_folder_without_a_config_names_what_is_absent(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"has no config.json; {ADVICE}" in message(folder)


def test_weights_that_were_cut_off_are_called_damaged(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = message(folder)
    assert "damaged or truncated" in said and ADVICE not in said


def test_config_that_is_not_json_is_reported(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')
    said = message(folder)
    assert "not valid JSON" in said and ADVICE not in said


@pytest.mark.parametrize("kind", ["llama17", None])
def test_an_unknown_model_type_is_named(folder: Path, kind: str | None) -> None:
    change(folder, model_type=kind)
    said = message(folder)
    assert (f"names model_type {kind!r}" if kind else "names no model_type") in said and ADVICE not in said


def test_a_model_without_a_class_of_the_kind_names_its_type(folder: Path) -> None:
    change(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(ModelError, match="names model_type 'mamba', and transformers has no class of this kind") as raised:
        load_classifier(str(folder), dtype=torch.float32)
    assert ADVICE not in str(raised.value)


def test_a_field_with_a_wrong_value_is_named(folder: Path) -> None:
    change(folder, hidden_size="wide")
    said = message(folder)
    assert "hidden_size" in said and "correct that field" in said and ADVICE not in said


def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer file"):
        load_tokenizer(str(folder))


@pytest.mark.skipif(any(map(find_spec, ("sentencepiece", "tiktoken"))), reason="a package that reads the file is installed")
def test_a_vocabulary_that_needs_other_packages_names_them(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    change(folder, tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="install what reads them: pip install sentencepiece tiktoken"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0}), models.WordPiece({"a": 0}), models.Unigram([("a", 0.0)])])
def test_a_tokenizer_that_fails_at_an_unknown_character_is_refused(folder: Path, model: Any) -> None:
    Tokenizer(model).save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match="cannot encode characters outside its vocabulary; name an unknown token in the model of its"):
        load_tokenizer(str(folder))


def test_damaged_files_of_a_tokenizer_are_not_blamed_on_the_weights(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="its files are damaged or inconsistent; copy or download them again"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": "two"}, "num_labels in its config.json is 'two'; expected the number of classes"),
        ({"id2label": ["a", "b"]}, r"id2label in its config.json is \['a', 'b'\]; expected names by index"),
        ({"id2label": {"a": "x"}}, "expected names by index.*Correct its config.json"),
    ],
)
def test_wrong_classes_in_a_config_are_named_also_if_the_tokenizer_reads_them_first(folder: Path, fields: Any, message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    for load in (load_tokenizer, config_of):
        with pytest.raises(ModelError, match=message):
            load(str(folder))
