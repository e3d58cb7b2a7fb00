"""Damaged, empty and dangerous weight files: one message each, and no code is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stages.errors import ModelError
from stages.importing.weights import read_file, read_weights, unquantized


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("model.safetensors", lambda path: path.write_bytes(b""), "is empty"),
        ("model.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        ("model.safetensors", lambda path: path.write_bytes(b"12345678901234"), "damaged or truncated"),
        ("model.bin", lambda path: path.write_bytes(b""), "is empty"),
        ("model.bin", lambda path: path.write_bytes(b"\x80\x02junk"), "not a pickle file of tensors"),
        ("model.bin", lambda path: path.write_bytes(pickle.dumps({"a": _RunsCode()})), "not a pickle file of tensors"),
        ("model.bin", lambda path: torch.save({"a": _RunsCode()}, path), r"it contains posix\.system"),
        ("model.bin", lambda path: torch.save([1, 2], path), "contains a list"),
        ("model.bin", lambda path: torch.save({"step": 3}, path), "contains no tensors, only step"),
    ],
)
def test_an_unreadable_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path], object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(ModelError, match=words):
        read_file(tmp_path / name, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_the_prefix_of_a_wrapper_is_removed(tmp_path: Path, prefix: str) -> None:
    save_file({f"{prefix}lm_head.weight": torch.ones(2), f"{prefix}model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert set(read_weights(tmp_path, allow_pickle=False)) == {"lm_head.weight", "model.norm.weight"}


def test_tensors_below_a_key_of_a_trainer_are_read(tmp_path: Path) -> None:
    torch.save({"module": {"module.a": torch.ones(2), "module.b": torch.ones(1)}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert set(read_weights(tmp_path, allow_pickle=True)) == {"a", "b"}


@pytest.mark.parametrize("index", [[1], {"weight_map": {"a": 3}}, {"weight_map": {"a": "../other.safetensors"}}, {"weight_map": 1}])
def test_a_wrong_index_is_refused(tmp_path: Path, index: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="index"):
        read_weights(tmp_path, allow_pickle=False)


def test_a_config_of_quantized_weights_is_removed_only_if_the_weights_are_not_quantized(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}
    plain = {"model.q_proj.weight": torch.ones(2, 2).bfloat16(), "h.0.attn.bias": torch.ones(1, 1, 2, 2).bool()}
    for packed in ({"model.q_proj.weight": torch.ones(2, 1, dtype=torch.uint8)}, {"model.q_proj.SCB": torch.ones(2)}):
        with pytest.raises(ModelError, match=r"are quantized \(bitsandbytes"):
            unquantized(config, {**plain, **packed}, tmp_path)
    assert unquantized(config, plain, tmp_path) == [
        "quantization_config was removed from config.json, because the weights are not quantized"
    ]
    assert config == {"model_type": "llama"}
    assert unquantized(config, plain, tmp_path) == []
