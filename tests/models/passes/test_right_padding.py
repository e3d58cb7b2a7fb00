"""Causal models compute right-padded rows without a mask like transformers does with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from stages.models.passes.right_padding import without_masks

IDS = torch.tensor([[5, 9, 3, 40, 17, 4, 8], [1, 2, 3, 0, 0, 0, 0], [6, 6, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] * 2 + [0] * 5])
TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**TINY, intermediate_size=48)),
    "mistral, a window of 3": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**TINY, num_key_value_heads=2, intermediate_size=48, sliding_window=3),
    ),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)),
    "opt, positions from the mask": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=16),
    ),
    "bloom, biases from the mask": (
        transformers.BloomForCausalLM,
        transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
    ),
    "mamba": (transformers.MambaForCausalLM, transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_real_tokens_and_gradients_are_those_of_a_pass_with_a_mask(family: str, attention: str) -> None:
    kind, config = FAMILIES[family]
    if attention == "eager" and family == "mamba":
        pytest.skip("it has no attention")
    torch.manual_seed(0)
    model = kind(config).eval()
    if family != "mamba":
        model.set_attn_implementation(attention)

    def computed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
        (logits.log_softmax(-1) * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
        return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected, wanted = computed()
    seen: list[str] = []  # the modules that got the mask [B, T]
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(
                lambda *given, name=name: seen.append(name) if given[2].get("attention_mask") is MASK else None, with_kwargs=True
            )
    with without_masks(model, None):
        logits, gradients = computed()
    assert seen == []
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    computed()
    assert seen  # after the context as before


@pytest.mark.parametrize("kept", ["position ids", "routers", "a mask of four dimensions"])
def test_masks_that_matter_are_kept(kept: str) -> None:
    model = transformers.LlamaForCausalLM(FAMILIES["llama"][1])
    seen: list[Any] = []
    model.model.register_forward_pre_hook(lambda *given: seen.append(given[2].get("attention_mask")), with_kwargs=True)
    named: dict[str, Any] = {"attention_mask": MASK}
    if kept == "position ids":
        named["position_ids"] = torch.arange(7).expand(3, 7)
    elif kept == "routers":
        model.config.output_router_logits = True
    else:
        named["attention_mask"] = torch.zeros(3, 1, 7, 7)
    with without_masks(model):
        model(input_ids=IDS, use_cache=False, **named)
    assert seen[0] is named["attention_mask"]
