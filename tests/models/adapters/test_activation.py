"""Switching between adapters, compared with peft's own methods."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaConfig, LlamaForCausalLM

from stages.models.adapters.activation import activate, active_adapters, remove_adapter

IDS = torch.tensor([[3, 5, 7, 9]])


@pytest.fixture
def model() -> Any:
    """Two adapters with random weights, on different modules, and a copy of the output layer in the second one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora("q_proj", "v_proj"), adapter_name="policy")
    made.add_adapter("value", lora("up_proj", modules_to_save=["lm_head"]))
    for name, weight in made.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight)
    activate(made, ["policy"], trainable=["policy", "value"])
    return made


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_an_active_adapter_computes_as_in_peft_and_all_stay_trainable(model) -> None:
    reference, flags = copy.deepcopy(model), trained(model)
    for name in ("value", "policy", "value"):
        activate(model, [name])
        reference.base_model.enable_adapter_layers()
        reference.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)
        assert trained(model) == flags and active_adapters(model) == (name,)
    activate(model, [])
    with reference.disable_adapter():
        torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)
    assert trained(model) == flags and any("policy" in name for name in flags) and any("value" in name for name in flags)


def test_switching_does_not_search_the_model(model, monkeypatch) -> None:
    activate(model, ["value"])
    for name in ("set_adapter", "enable_adapters"):
        monkeypatch.setattr(BaseTunerLayer, name, lambda *_: pytest.fail("peft sets requires_grad of every adapter in every layer"))
    monkeypatch.setattr(type(model), "modules", lambda _: pytest.fail("a walk over the modules of a 7B model takes milliseconds"))
    monkeypatch.setattr(type(model), "named_parameters", lambda _: pytest.fail("a walk over all weights"))
    activate(model, ["policy"])
    activate(model, [])
    assert active_adapters(model) == ()


def test_adapters_that_are_added_and_removed_are_noticed(model) -> None:
    activate(model, ["value"])
    expected = logits(model)
    model.add_adapter("third", lora("down_proj", "k_proj"))
    activate(model, ["third"])
    assert not torch.equal(logits(model), expected)
    activate(model, ["value"])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    remove_adapter(model, "third")
    model.add_adapter("third", lora("o_proj"))  # the same name on other modules
    activate(model, ["third"])
    reference = copy.deepcopy(model)
    reference.set_adapter("third")
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)
