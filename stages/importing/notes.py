"""Notes on what an import changed or left out.

Each function returns the sentences that apply, or an empty list.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.importing.layouts import Layout, not_kept
from stages.importing.source import read_json
from stages.models.embeddings import vocabulary_size
from stages.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import AutoClass

LOADERS: dict[str, AutoClass] = {"language_model": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
SCALAR = ("reward_model", "value_model")


def on_precision(weights: dict[str, Tensor]) -> list[str]:
    """Weights in half precision need twice the space in fp32."""
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values() if value.is_floating_point()} - {"float32"})
    return [f"the weights were in {', '.join(kinds)}; they are published in fp32 with the same values"] if kinds else []


def on_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A folder with only the vocabulary has lost its special tokens and its chat template. New tokens need new rows of the embedding."""
    if (folder / "adapter_config.json").exists():
        return []
    notes = []
    if not (folder / "tokenizer_config.json").exists():
        notes.append(
            "there is no tokenizer_config.json: special tokens and chat template are transformers' defaults; copy that file if it exists"
        )
    size, rows = vocabulary_size(tokenizer), read_json(folder / "config.json").get("vocab_size")
    if isinstance(rows, int) and size > rows:
        notes.append(f"the tokenizer has {size} tokens and the embedding {rows} rows; {size - rows} untrained rows were added")
    return notes


def unused(layout: Layout, folder: Path) -> list[str]:
    """A note on the tensors that no published model contains. Reads their names, without the weights."""
    if not layout.body:
        return []
    roles = {"language_model" if layout.role is None or layout.has_policy else layout.role, layout.role or "language_model"}
    left: set[str] | None = None
    for role in roles:
        where = value_folder(folder) if layout.value_body and role in SCALAR else folder
        names = _unexpected(LOADERS.get(role, AutoModel), where)
        names = {name for name in names if not (role in SCALAR and layout.head is None and name.startswith("score."))}
        left = names if left is None else left | names if layout.value_body else left & names
    return [not_kept(sorted(left))] if left else []


def value_folder(folder: Path) -> Path:
    """The scratch folder of a value network with separate transformer weights, next to that of the policy."""
    return folder.with_name("value")


def _unexpected(auto: AutoClass, folder: Path) -> set[str]:
    """The tensors of ``folder`` that the class selected by ``auto`` does not have."""
    try:
        with quiet_transformers():
            _, report = auto.from_pretrained(
                str(folder), output_loading_info=True, device_map="meta", ignore_mismatched_sizes=True, trust_remote_code=False
            )
    except Exception:  # loading the model raises it again, with its cause
        return set()
    return set(report["unexpected_keys"])
