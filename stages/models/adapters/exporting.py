"""Export adapters as full models for ``from_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stages.config import ModelInput
from stages.models import heads, loading, saving
from stages.models.adapters.saved import HEAD_FILE
from stages.models.adapters.stacks import read_adapter_config
from stages.models.reward_question import read_question
from stages.registry.references import ResolvedModel

if TYPE_CHECKING:
    from stages.registry.record import ModelRecord


def save_merged(adapter: ResolvedModel, folder: Path) -> None:
    """Merge an adapter into its base and save it in fp32 with its tokenizer.

    Reward and value models keep their head and bias, generative reward models their question.
    """
    tokenizer = loading.load_tokenizer(adapter)
    plain = adapter.with_quantization(ModelInput(ref=adapter.ref))
    role = adapter.record.role if adapter.record is not None else _guess_role(adapter)
    if role in ("reward_model", "value_model"):
        kind = heads.RewardModel if role == "reward_model" else heads.ValueModel
        kind.from_pretrained(plain, dtype=torch.float32).save(folder, tokenizer)
        return
    load = loading.load_classifier if role == "classifier" else loading.load_language_model
    model = load(plain, dtype=torch.float32, trainable=False, dropout=True)
    saving.save_model(model, tokenizer, folder)
    if (asked := read_question(adapter)) is not None:
        asked.write(folder)


def _guess_role(adapter: ResolvedModel) -> str:
    if (Path(adapter.path) / HEAD_FILE).exists():
        return "reward_model"
    return "classifier" if read_adapter_config(adapter).get("task_type") == "SEQ_CLS" else "language_model"


def export_merged(record: ModelRecord, folder: Path) -> None:
    """Save the registry's adapter version ``record`` as a full model for ``from_pretrained``."""
    save_merged(ResolvedModel.of_record(record), folder)
