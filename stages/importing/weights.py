"""Read the tensors of a folder written by another library: safetensors, or pickle files if the user allows them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages.errors import ModelError

SAFE = ("model.safetensors.index.json", "model.safetensors")
PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")
HEAD_FILES = ("value_head.safetensors", "value_head.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def read_weights(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of the model in ``folder`` by name, without those of an adapter or a separate head file.

    Empty if there are none. Raises ModelError for pickle files without ``allow_pickle``, and for unreadable files.
    """
    for name in SAFE if any((folder / name).exists() for name in SAFE) else PICKLED:
        if (folder / name).exists():
            return _read_sharded(folder / name, allow_pickle) if name.endswith(".json") else read_file(folder / name, allow_pickle)
    return {}


def read_head_file(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Tensors of a value head in a separate file (LLaMA-Factory, ms-swift); empty if there is none."""
    for name in HEAD_FILES:
        if (folder / name).exists():
            return read_file(folder / name, allow_pickle)
    return {}


def read_file(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of one file. A pickle file is read with ``weights_only=True``, which runs no code from the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if not allow_pickle:
            raise ModelError(
                f"{path.name} is a pickle file, which can run code when it is read; expected safetensors. If you trust its source, add "
                "--pickle: the file is then read with weights_only=True and saved as safetensors"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]})") from error
    content = content.get("state_dict", content.get("module", content)) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ModelError(f"{path} contains a {type(content).__name__}; expected a mapping of names to tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _read_sharded(index: Path, allow_pickle: bool) -> dict[str, Tensor]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of weights ({type(error).__name__}: {error})") from error
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ModelError(f"{index} names the file {name!r}, which is not in the folder; copy it there")
        tensors |= read_file(index.parent / name, allow_pickle)
    return tensors
