"""Errors of transformers, the hub and safetensors while a model is loaded, as one message that names the cause and the next move."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from stages.errors import ModelError, doing

if TYPE_CHECKING:
    from stages.registry.references import ResolvedModel

# transformers reads most fields of a config unchecked, so that a wrong one fails in whatever is computed from it.
FAILURES = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


@contextmanager
def explained(model: ResolvedModel, what: str) -> Iterator[None]:
    """Raise a ModelError for what goes wrong inside. ``what``: "model" or "tokenizer"."""
    try:
        with doing(f"loading the {what} of {model.ref!r}"):
            yield
    except ModelError:
        raise
    except FAILURES as error:
        move = _incomplete_folder(model, what) or _move(model, error)
        if model.input.quantization != "none" and what == "model":
            move += f"; quantization: {model.input.quantization} needs bitsandbytes and a backend of it for this device"
        reason = " ".join(str(error).split())[:300]  # a config's error names the field in its first line and the value in its second
        raise ModelError(f"cannot load the {what} of {model.ref!r} ({type(error).__name__}: {reason}); {move}") from error


def _incomplete_folder(model: ResolvedModel, what: str) -> str:
    """What a folder lacks that ``save_pretrained`` would have written; empty for a complete folder and for the hub."""
    folder = Path(model.path)
    if not folder.is_dir():
        return ""
    if what == "tokenizer" and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return f"{folder} has no tokenizer file; save the tokenizer there with save_pretrained, which writes tokenizer.json"
    if what == "model" and not (folder / "config.json").exists():
        return f"{folder} has no config.json; expected a folder written by save_pretrained"
    return ""


def _move(model: ResolvedModel, error: BaseException) -> str:
    """The next move, by the cause that the error names."""
    text = str(error)
    if "trust_remote_code" in text:
        return "its code comes with it and was not run; write {ref: ..., trust_remote_code: true} where you trust it"
    if isinstance(error, ImportError):
        return "install the package that it names"
    if isinstance(error, SafetensorError):
        return "its weights are damaged or cut off; copy or download them again"
    if isinstance(error, json.JSONDecodeError) or "valid JSON" in text:
        return "one of its files is not valid JSON; copy or download it again"
    if "does not recognize this architecture" in text or "Should have a `model_type` key" in text:
        return f"{_of_config(model)}this version of transformers has no class for it; upgrade transformers, or take another model"
    if "Unrecognized configuration class" in text:
        return f"{_of_config(model)}transformers has no class of this kind for it; take a model of another family"
    if isinstance(error, StrictDataclassError):
        return "a field of its config.json has a value that its family does not allow; correct that field"
    if "attn_implementation" in text or "attention implementation" in text or "Flash Attention" in text or "FlashAttention" in text:
        return f"its class refuses attention: {model.input.attention}; write attention: eager, which every class supports"
    if "out of memory" in text:
        return "it does not fit into memory; quantize it (quantization: nf4), or take a smaller model"
    if model.kind == "hub":
        return "check the id (owner/name), the connection and the access rights, or download it and name its folder"
    return "its files do not fit together; compare its config.json with its weights, or save it again"


def _of_config(model: ResolvedModel) -> str:
    """The model type that a folder's config names, as the beginning of a sentence."""
    try:
        kind = json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError):
        return ""
    return f"its config names model_type {kind!r}, and " if kind else "its config names no model_type, and "
