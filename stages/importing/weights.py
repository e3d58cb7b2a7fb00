"""Read the tensors of a folder written by another library: safetensors, or pickle files if the user allows them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages.errors import ModelError, is_out_of_memory
from stages.importing.source import read_json
from stages.json_types import JsonObject
from stages.models.adapters.saved import WRAPPERS

SAFE = ("model.safetensors.index.json", "model.safetensors")
PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")
HEAD_FILES = ("value_head.safetensors", "value_head.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FULL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTIZED = (".absmax", ".SCB", ".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
"""Endings of tensors that bitsandbytes, GPTQ, AWQ, compressed-tensors and fp8 save with quantized weights."""
LFS = b"version https://git-lfs"
NESTED = ("state_dict", "module", "model")
"""Keys under which trainers save the tensors in a pickle file."""


def read_weights(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of the model in ``folder`` by name, without those of an adapter or a separate head file.

    Empty if there are none. Raises ModelError for pickle files without ``allow_pickle``, and for unreadable files.
    """
    for name in SAFE if any((folder / name).exists() for name in SAFE) else PICKLED:
        if (folder / name).exists():
            return _read_sharded(folder / name, allow_pickle) if name.endswith(".json") else read_file(folder / name, allow_pickle)
    return {}


def unread_files(folder: Path) -> list[str]:
    """Weight files that ``read_weights`` passes over, because the folder also has safetensors."""
    return [name for name in PICKLED if (folder / name).exists()] if any((folder / name).exists() for name in SAFE) else []


def unquantized(config: JsonObject, weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Remove ``quantization_config`` from ``config`` and return a note on it, if the weights are not quantized.

    Merging an adapter of a quantized base leaves such an entry. Raises ModelError for quantized weights.
    """
    settings = config.get("quantization_config")
    packed = [name for name, value in weights.items() if name.endswith(QUANTIZED) or (name.endswith(".weight") and value.dtype not in FULL)]
    if packed:
        kind = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
        raise ModelError(
            f"the weights in {folder} are quantized ({kind}; {packed[0]}). Import the model that was quantized, or dequantize it with "
            "transformers: model.dequantize().save_pretrained(FOLDER)"
        )
    if config.pop("quantization_config", None) is None:
        return []
    return ["quantization_config was removed from config.json, because the weights are not quantized"]


def read_head_file(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Tensors of a value head in a separate file (LLaMA-Factory, ms-swift); empty if there is none."""
    for name in HEAD_FILES:
        if (folder / name).exists():
            return read_file(folder / name, allow_pickle)
    return {}


def read_file(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of one file. A pickle file is read with ``weights_only=True``, which runs no code from the file.

    If a wrapper (DDP, FSDP, torch.compile) prefixed all names, the prefix is removed. Raises ModelError for an unreadable file.
    """
    if path.suffix != ".safetensors" and not allow_pickle:
        raise ModelError(
            f"{path.name} is a pickle file, which can run code when it is read; expected safetensors. If you trust its source, add "
            "--pickle: the file is then read with weights_only=True and saved as safetensors"
        )
    _refuse_placeholder(path)
    content = _load(path)
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ModelError(f"{path} contains a {type(content).__name__}; expected a mapping of names to tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(
            f"{path} contains no tensors, only {', '.join(map(str, list(content)[:4])) or 'nothing'}; expected the model's weights"
        )
    return _without_wrapper(tensors)


def _refuse_placeholder(path: Path) -> None:
    """Raise ModelError for an empty file, and for a pointer of Git LFS in the place of the weights."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(LFS))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if not begin:
        raise ModelError(f"{path} is empty; copy or download it again")
    if begin == LFS:
        raise ModelError(f"{path} is a pointer of Git LFS and not the weights; run `git lfs pull` in its folder")


def _load(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged or truncated ({_line(error)}); copy or download it again") from error
    except Exception as error:  # a damaged pickle raises errors of any kind
        if is_out_of_memory(error):
            raise
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ModelError(
                f"{path} was refused: it contains {match[1]}, which is not a tensor, and reading it can run code. Save the state_dict() "
                "of the model with the library that wrote it, or better safetensors"
            ) from error
        raise ModelError(
            f"{path} is not a pickle file of tensors, or it is damaged ({type(error).__name__}: {_line(error)}); copy or download it again"
        ) from error


def _line(error: BaseException) -> str:
    """The reason in a message, shortened. torch's advice to read the file without protection is left out."""
    if match := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):
        return match[1][:200]
    return next(iter(str(error).strip().splitlines()), "no reason given")[:200]


def _without_wrapper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            return _without_wrapper({name.removeprefix(wrapper): value for name, value in tensors.items()})
    return tensors


def _read_sharded(index: Path, allow_pickle: bool) -> dict[str, Tensor]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{index} is not an index of weights; expected weight_map: a mapping of tensor names to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in shards.values()}):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ModelError(f"{index} names the file {name!r}, which is not in the folder; copy it there")
        tensors |= read_file(index.parent / name, allow_pickle)
    return tensors
