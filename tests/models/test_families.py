"""A model that is not a causal language model is refused with one message before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stages.errors import ModelError
from stages.models.families import refuse_unfit
from stages.models.loading import load_language_model


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(),
        transformers.GPT2Config(),
        transformers.MambaConfig(),
        transformers.BertConfig(is_decoder=True),
        transformers.XLMConfig(causal=True),
        transformers.Gemma3Config(),
    ],
)
def test_causal_language_models_are_accepted(config: Any) -> None:
    refuse_unfit(config, "some/model")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BertConfig(), "'some/model' is a bert model"),
        (transformers.RobertaConfig(), "'some/model' is a roberta model"),
        (transformers.XLMConfig(), "'some/model' is a xlm model"),
        (transformers.ViTConfig(), "'some/model' is a vit model"),
        (transformers.T5Config(), "'some/model' is a t5 model, an encoder-decoder"),
        (transformers.BartConfig(), "'some/model' is a bart model, an encoder-decoder"),
    ],
)
def test_other_models_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        refuse_unfit(config, "some/model")


def test_model_with_remote_code_is_judged_by_its_auto_map() -> None:
    class Custom(transformers.LlamaConfig):
        model_type = "custom"

    refuse_unfit(Custom(auto_map={"AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"}), "some/model")
    with pytest.raises(ModelError, match="custom model"):
        refuse_unfit(Custom(), "some/model")


def test_bidirectional_policy_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match="bert model; a policy or a scalar head needs a causal language model"):
        load_language_model(str(tmp_path), dtype=torch.float32)
