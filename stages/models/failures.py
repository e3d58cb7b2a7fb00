"""Convert errors of transformers, the Hub and safetensors during loading to one message with the cause and the next move."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from stages.errors import ModelError, doing, is_out_of_memory

if TYPE_CHECKING:
    from stages.registry.references import ResolvedModel

# transformers does not validate most config fields, so a wrong value can cause many kinds of errors.
FAILURES = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
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
    """Context manager that converts loading errors to ModelError. ``what``: "model" or "tokenizer"."""
    try:
        with doing(f"loading the {what} of {model.ref!r}"):
            yield
    except ModelError:
        raise
    except Exception as error:
        if not isinstance(error, FAILURES) and type(error) is not Exception:  # the library tokenizers raises the latter
            raise
        if problem := _wrong_labels(model):
            raise ModelError(f"cannot load the {what} of {model.ref!r}: {problem}. Correct its config.json") from error
        move = _incomplete_folder(model, what) or _move(model, what, error)
        if model.input.quantization != "none" and what == "model":
            move += f"; quantization: {model.input.quantization} needs bitsandbytes with a backend for this device"
        reason = " ".join(str(error).split())[:300]  # a config error names the field in its first line and the value in its second
        raise ModelError(f"cannot load the {what} of {model.ref!r} ({type(error).__name__}: {reason}); {move}") from error


def _wrong_labels(model: ResolvedModel) -> str:
    """What is wrong with the classes in a folder's config.json; empty if nothing is. Tokenizers read this file, too."""
    try:
        config = json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    number, names = (config.get(name) for name in ("num_labels", "id2label")) if isinstance(config, dict) else (None, None)
    if number is not None and (not isinstance(number, int) or number < 1):
        return f"num_labels in its config.json is {number!r:.60}; expected the number of classes"
    if names is not None and not (isinstance(names, dict) and all(index.isdecimal() for index in names)):
        return f'id2label in its config.json is {names!r:.60}; expected names by index, as {{"0": "negative", "1": "positive"}}'
    return ""


def _incomplete_folder(model: ResolvedModel, what: str) -> str:
    """The files that a folder lacks, compared with the output of ``save_pretrained``; empty for a complete folder and for the Hub."""
    folder = Path(model.path)
    if not folder.is_dir():
        return ""
    if what == "tokenizer" and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return f"{folder} has no tokenizer file; save the tokenizer there with save_pretrained, which writes tokenizer.json"
    if what == "model" and not (folder / "config.json").exists():
        return f"{folder} has no config.json; expected a folder written by save_pretrained"
    return ""


def _move(model: ResolvedModel, what: str, error: BaseException) -> str:
    """The next move for the cause named in the error."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs its own code, which was not run; write {ref: ..., trust_remote_code: true} if you trust it"
    if isinstance(error, ImportError):
        return "install the named package"
    if "`tiktoken` is required" in text:  # transformers tries it last, so it may be a file of SentencePiece
        return "its vocabulary is a file of SentencePiece or tiktoken; install what reads them: pip install sentencepiece tiktoken"
    if isinstance(error, SafetensorError):
        return "its weights are damaged or truncated; copy or download them again"
    if isinstance(error, json.JSONDecodeError) or "valid JSON" in text:
        return "one of its files is not valid JSON; copy or download it again"
    if "does not recognize this architecture" in text or "Should have a `model_type` key" in text:
        return f"{_of_config(model)}this version of transformers has no class for it; upgrade transformers, or use another model"
    if "Unrecognized configuration class" in text:
        return f"{_of_config(model)}transformers has no class of this kind for it; use another model family"
    if isinstance(error, StrictDataclassError):
        return "a field of its config.json has an invalid value; correct that field"
    if "attn_implementation" in text or "attention implementation" in text or "Flash Attention" in text or "FlashAttention" in text:
        return f"its class does not support attention: {model.input.attention}; write attention: eager, which every class supports"
    if is_out_of_memory(error):
        return "it does not fit into memory; quantize it (quantization: nf4), or use a smaller model"
    if model.kind == "hub":
        return "check the id (owner/name), the connection and the access rights, or download it and use its folder"
    if "Missing [UNK]" in text or "`unk_id` is missing" in text:
        return "it cannot encode characters outside its vocabulary; name an unknown token in the model of its tokenizer.json"
    if what == "tokenizer":
        return "its files are damaged or inconsistent; copy or download them again"
    return "its files are inconsistent; compare its config.json with its weights, or save it again"


def _of_config(model: ResolvedModel) -> str:
    """The model type in a folder's config, as the beginning of a sentence."""
    try:
        kind = json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError):
        return ""
    return f"its config names model_type {kind!r}, and " if kind else "its config names no model_type, and "
