"""Convert a GGUF file of llama.cpp to a folder for from_pretrained, with transformers' reader."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.errors import ModelError
from stages.importing.layouts import Layout, not_kept
from stages.json_types import JsonObject
from stages.models.quiet import quiet_transformers
from stages.models.saving import save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAILURES = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, RuntimeError, struct.error)
PLAIN = ("F32", "F16", "BF16")


def convert_gguf(path: Path, folder: Path) -> Layout:
    """Write the dequantized weights (fp32) and the tokenizer of ``path`` to ``folder``. Raises ModelError for an unreadable file."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            model, report = cast(
                "tuple[PreTrainedModel, dict[str, list[str]]]",
                AutoModelForCausalLM.from_pretrained(
                    str(path.parent), gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **_unpacked()
                ),
            )
            # The weights are dequantized, but still marked as quantized.
            if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
                quantizer.remove_quantization_config(model)
        types, heads = _types(path)
    except ImportError as error:
        raise ModelError(f"{path}: reading GGUF needs the package gguf; install it with: pip install 'tristage[gguf]'") from error
    except FAILURES as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: transformers cannot read this GGUF file ({type(error).__name__}: {reason})") from error
    if missing := sorted(set(report["missing_keys"])):
        raise ModelError(f"{path} lacks weights of {type(model).__name__}: {', '.join(missing[:4])}; the file is incomplete")
    save_model(model, tokenizer, folder)
    others = [*heads, *sorted(report["unexpected_keys"])]
    notes = [not_kept(others)] if others else []
    return Layout("GGUF (llama.cpp)", {}, role="language_model", has_policy=True, notes=[_on_types(types), *notes])


def _types(path: Path) -> tuple[Counter[str], list[str]]:
    """Return (how many tensors of the file have each type, the tensors of a classification head, which transformers passes over)."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    return Counter(tensor.tensor_type.name for tensor in tensors), [tensor.name for tensor in tensors if tensor.name.startswith("cls.")]


def _on_types(types: Counter[str]) -> str:
    shown = ", ".join(f"{count} {name}" for name, count in types.most_common())
    if set(types) <= set(PLAIN):
        return f"tensors in the file: {shown}; they are published in fp32"
    return f"the weights were quantized in the file ({shown}); they are published dequantized, in fp32"


def _unpacked() -> JsonObject:
    """The option that makes newer transformers releases dequantize a GGUF file."""
    return {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
