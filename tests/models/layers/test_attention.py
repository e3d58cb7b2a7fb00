"""The attention implementation of each class, refused choices, and equality with transformers' eager attention."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.config import ModelInput
from stages.errors import ModelError
from stages.models.architectures import random_model
from stages.models.layers.attention import attention_of
from stages.models.loading import load_language_model
from stages.process import packages

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder)
    return folder


def chosen(auto: Any, config: Any, attention: str = "auto", dtype: torch.dtype = torch.float32) -> str | None:
    return attention_of(auto, config, ModelInput(ref="some/model", attention=attention), dtype)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(), None),  # transformers then takes sdpa
        (transformers.Gemma2Config(), "eager"),  # no sdpa in its class
        (transformers.Gemma3TextConfig(), None),
        (transformers.Gemma3TextConfig(attn_logit_softcapping=2.0), "eager"),  # sdpa in its class, but not with this field
        (transformers.Gemma3Config(text_config={"attn_logit_softcapping": 2.0}), "eager"),
    ],
)
def test_auto_uses_sdpa_unless_class_or_config_forbid_it(config: Any, expected: str | None) -> None:
    assert chosen(AutoModelForCausalLM, config) == expected


@pytest.mark.parametrize("cap", ["gemma2", "vaultgemma"])
def test_capped_scores_are_computed_as_the_config_says(cap: str, tmp_path: Path) -> None:
    config = transformers.CONFIG_MAPPING[cap](**TINY, query_pre_attn_scalar=1, attn_logit_softcapping=0.5)
    folder = saved(config, tmp_path)
    loaded = load_language_model(str(folder), dtype=torch.float32, trainable=False)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, reference(input_ids=ids).logits)
        reference.config.attn_logit_softcapping = None
        for layer in reference.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(loaded(input_ids=ids).logits, reference(input_ids=ids).logits, atol=1e-3)  # the cap has an effect here


def test_a_recipe_chooses_the_attention(tmp_path: Path, resolve_folder: Any) -> None:
    folder = saved(transformers.LlamaConfig(**TINY), tmp_path)
    for attention in ("eager", "sdpa"):
        model = load_language_model(resolve_folder(folder, attention=attention), dtype=torch.float32)
        assert model.config._attn_implementation == attention
    assert load_language_model(resolve_folder(folder), dtype=torch.float32).config._attn_implementation == "sdpa"


def test_random_weights_get_the_attention_of_their_class(tiny_tokenizer: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = random_model(AutoModelForCausalLM, {"type": "gemma2", "head_dim": 8, "num_key_value_heads": 1, **sizes}, tiny_tokenizer)
    deberta = random_model(AutoModelForSequenceClassification, {"type": "deberta-v2", **sizes}, tiny_tokenizer)
    assert (gemma.config._attn_implementation, deberta.config._attn_implementation) == ("eager", "eager")


@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        (transformers.Gemma2Config(), "sdpa", "Gemma2ForCausalLM does not support sdpa"),
        (transformers.Gemma3TextConfig(attn_logit_softcapping=2.0), "sdpa", "caps its attention scores, which sdpa cannot"),
        (transformers.BloomConfig(), "flash_attention_2", "BloomForCausalLM does not support flash attention"),
        (transformers.LlamaConfig(), "flash_attention_2", "neither flash_attn nor kernels is installed"),
        (transformers.LlamaConfig(), "kernels-community/flash-attn2", "need the package kernels, which is not installed"),
        (transformers.BloomConfig(), "flex_attention", "BloomForCausalLM does not support flex_attention"),
    ],
)
def test_an_attention_that_cannot_be_used_is_refused_with_its_reason(
    config: Any, attention: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda module: False)
    with pytest.raises(ModelError, match=f"attention: {attention} cannot be used for 'some/model': .*{re.escape(reason)}"):
        chosen(AutoModelForCausalLM, config, attention)


def test_flash_attention_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="it needs a GPU, and there is none"):
        chosen(AutoModelForCausalLM, transformers.LlamaConfig(), "flash_attention_2", torch.bfloat16)


def test_auto_uses_flash_attention_on_a_gpu_if_sdpa_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen(AutoModelForCausalLM, transformers.Gemma2Config(), dtype=torch.bfloat16) == "flash_attention_2"
    assert chosen(AutoModelForCausalLM, transformers.Gemma2Config(), dtype=torch.float32) == "eager"  # it supports only half precision


def test_unknown_attention_gives_a_message_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="attention='flash_attention' is unknown.*Did you mean flash_attention_"):
        ModelInput(ref="x", attention="flash_attention")
