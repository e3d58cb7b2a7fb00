"""Find the model that a path names, and read its small files. A path that is not a model folder is refused with a message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

from stages.errors import ModelError
from stages.hub.ids import is_hub_id
from stages.json_types import JsonObject

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


def find_source(source: str | Path) -> Path:
    """The folder or GGUF file that ``source`` names. Raises ModelError if it is anything else."""
    path = Path(source).expanduser()
    if not str(source).strip():
        raise ModelError("the path of the model is empty; expected a folder, or a .gguf file")
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _single_gguf(path)
    if path.is_file():
        raise ModelError(f"{source} is a file; {_move_for_file(path)}")
    identifier = re.sub(r"^https?://[^/]+/", "", str(source)).removesuffix("/")
    if is_hub_id(identifier) and path.suffix.lower() != ".gguf" and not str(source).startswith((".", "~", "/")):
        raise ModelError(
            f"{source}: no such folder. If it is a model of the Hub, download it: hf download {identifier} --local-dir FOLDER. "
            "Then import FOLDER"
        )
    raise ModelError(f"{source}: no such folder or file")


def _single_gguf(path: Path) -> Path:
    match = SHARD.search(path.name)
    if match and int(match[1]) > 1:
        raise ModelError(
            f"{path} is one of {int(match[1])} parts, and transformers reads only complete files. Join the parts with llama.cpp: "
            "llama-gguf-split --merge FIRST_PART OUT.gguf"
        )
    return path


def _move_for_file(path: Path) -> str:
    if path.suffix.lower() in ARCHIVES:
        return "unpack it, and import the folder"
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        return f"import the folder that contains it, its config.json and its tokenizer: {path.parent}"
    return "expected a folder, or a .gguf file"


def no_weights(folder: Path) -> ModelError:
    """The error for a folder without a model: it names what the folder contains instead, and what to import."""
    content = sorted(folder.iterdir())
    checkpoints = sorted((int(match[1]), path) for path in content if path.is_dir() and (match := CHECKPOINT.fullmatch(path.name)))
    ggufs = [path.name for path in content if path.suffix.lower() == ".gguf"]
    others = [path.name for path in content if path.suffix.lower() in WEIGHT_SUFFIXES and path.name not in (*ggufs, "training_args.bin")]
    begin = f"{folder} contains no weights"
    if checkpoints:
        return ModelError(f"{begin}, but {len(checkpoints)} checkpoints of a trainer. Import one of them: {checkpoints[-1][1]}")
    if ggufs:
        return ModelError(f"{begin} of transformers, but {', '.join(ggufs[:3])}. Import the file: {folder / ggufs[0]}")
    if (folder / "zero_to_fp32.py").exists():
        command = f"python {folder / 'zero_to_fp32.py'} {folder} {folder}"
        return ModelError(f"{begin}, but a checkpoint of DeepSpeed. Join its parts first: {command}")
    renamed = f". Its files {', '.join(others[:3])} have other names; rename the one with the weights" if others else ""
    return ModelError(f"{begin}; expected model.safetensors or pytorch_model.bin, and config.json{renamed}")


def read_json(path: Path) -> JsonObject:
    """The mapping in a JSON file. Raises ModelError if the file is unreadable or contains something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}: {error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} contains a {type(content).__name__}; expected a mapping. Copy or download it again")
    return cast("JsonObject", content)
