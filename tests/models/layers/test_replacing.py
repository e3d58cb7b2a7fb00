"""Replacing layers: the replaced layers are logged, and saved weights do not change."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import nn

from stages.errors import LaunchError
from stages.kernels.matmul import prefers_onednn
from stages.models.layers.replacing import use_own_layers
from stages.process.console import announcing


def test_switched_layers_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(3, 9)[None]
    names, before = list(model.state_dict()), model(input_ids=ids).logits.detach()
    with caplog.at_level(logging.INFO, logger="stages.models.layers.replacing"):
        switched = use_own_layers(model)
    expected = {"LlamaRMSNorm": 5, "LlamaMLP": 2} | ({"Linear": 15} if prefers_onednn() else {})  # 7 products a layer, and the output
    assert switched == expected
    assert "LlamaForCausalLM" in caplog.text and "5 LlamaRMSNorm" in caplog.text
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=ids).logits.detach(), before)
    assert all(isinstance(module, nn.Linear) for name, module in model.named_modules() if name.endswith("_proj"))


def test_second_call_switches_no_layer() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    use_own_layers(model)
    assert not use_own_layers(model)


def test_the_switch_keeps_the_layers_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    said: list[str] = []
    with announcing(said.append):
        monkeypatch.setenv("STAGES_OWN_LAYERS", "0")
        assert not use_own_layers(transformers.LlamaForCausalLM(config)) and said == []
        monkeypatch.setenv("STAGES_OWN_LAYERS", "1")
        use_own_layers(transformers.LlamaForCausalLM(config))
        (line,) = said  # printed immediately, not at the end of the step
        assert line.startswith("LlamaForCausalLM: replaced layers: ") and "1 LlamaMLP, 3 LlamaRMSNorm" in line
        assert line.endswith("(faster or leaner, with equal outputs; STAGES_OWN_LAYERS=0 keeps those of transformers)")
        use_own_layers(transformers.LlamaForCausalLM(config))
        assert len(said) == 1  # of the same kind
        use_own_layers(transformers.LlamaModel(config))
        assert len(said) == 2
    use_own_layers(transformers.LlamaForCausalLM(config))  # outside of a step: only the log
    assert len(said) == 2
    with announcing(said.append):
        use_own_layers(transformers.LlamaForCausalLM(config))
    assert len(said) == 3  # once per step
    monkeypatch.setenv("STAGES_OWN_LAYERS", "no")
    with pytest.raises(LaunchError, match="STAGES_OWN_LAYERS=no: expected 0"):
        use_own_layers(transformers.LlamaForCausalLM(config))
