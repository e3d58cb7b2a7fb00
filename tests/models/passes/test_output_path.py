"""Capped or scaled logits are detected for any weights; a policy then uses the logits of the model itself."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from stages.models.passes.output_path import multiplies_directly
from stages.models.passes.responses import Policy, sequence_batch

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
OPT = {"ffn_dim": 16, "word_embed_proj_dim": 8, "max_position_embeddings": 16}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}


def model_of(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind]
    known = {*config().to_dict(), *config.attribute_map}
    return AutoModelForCausalLM.from_config(config(**{name: value for name, value in {**SIZES, **fields}.items() if name in known}))


def is_direct(model: Any) -> bool:
    return multiplies_directly(model, model.base_model, model.get_output_embeddings(), nullcontext)


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("llama", {}, True),
        ("gpt2", GPT2, True),
        ("opt", OPT, True),  # a projection after the layers; the model with a head does not call its outer transformer
        ("cohere", {"logit_scale": 1.0}, True),
        ("granite", {"logits_scaling": 1.0}, True),
        ("gemma3_text", {"head_dim": 8}, True),
        ("gemma2", {"head_dim": 8}, False),  # cap * tanh(logit / cap)
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 30.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
        ("granite", {"logits_scaling": 8.0}, False),
        ("nanochat", {}, False),
    ],
)
@pytest.mark.parametrize("weights", ["as drawn", "zeros"])
def test_operation_between_hidden_states_and_logits_is_detected(kind: str, fields: dict[str, Any], expected: bool, weights: str) -> None:
    model = model_of(kind, **fields)
    if weights == "zeros":  # then capped, scaled and plain logits are all 0
        nn.init.zeros_(model.get_output_embeddings().weight)
    assert is_direct(model) is expected


class Scaled(transformers.LlamaForCausalLM):
    """Like MiniCPM's code: it divides the input of the output matrix; here in only one mode."""

    in_training = False

    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        outputs = self.model(input_ids=input_ids, use_cache=False)
        hidden = outputs.last_hidden_state / (2 if self.training == self.in_training else 1)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


@pytest.mark.parametrize("in_training", [False, True])
def test_operation_in_only_one_mode_is_detected(in_training: bool) -> None:
    model = Scaled(transformers.LlamaConfig(**SIZES))
    model.in_training = in_training
    assert not is_direct(model)


def test_check_restores_random_state_mode_and_hooks() -> None:
    model = model_of("gpt2", **GPT2).train()  # with dropout
    before = torch.get_rng_state()
    assert is_direct(model)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("gemma2", {"head_dim": 8}), ("cohere", {}), ("granite", {"logits_scaling": 8.0}), ("nanochat", {}), ("opt", OPT), ("llama", {})],
)
def test_log_probabilities_stay_right_when_the_weights_grow_after_the_check(kind: str, fields: dict[str, Any]) -> None:
    """Reference: log-softmax of the full model's logits, one row at a time."""
    model = model_of(kind, **fields)
    policy = Policy(model, temperature=0.7, autocast=None)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    prompts, responses = [[4, 5, 6], [7]], [[8, 9], [10, 11, 12]]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0] / 0.7
        for step, token in enumerate(response):
            expected.append(logits[len(prompt) + step - 1].log_softmax(-1)[token])
    batch = sequence_batch(prompts, responses, 1, "cpu")
    torch.testing.assert_close(policy.logprobs(batch), torch.stack(expected))
    summed = policy.loss(batch, lambda logprobs, entropies, places: logprobs).summed
    torch.testing.assert_close(summed.detach(), torch.stack(expected).sum())
