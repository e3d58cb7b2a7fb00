"""Which layers of which families become lean, and that a model with them is the model it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.lean import _LeanMLP, _LeanNorm, use_lean_layers

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def model_of(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **fields})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # a norm whose weights are all 1 would hide a weight left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def counted(model: Any) -> tuple[int, int]:
    return tuple(sum(isinstance(module, kind) for module in model.modules()) for kind in (_LeanNorm, _LeanMLP))  # type: ignore[return-value]


def loss_and_gradients(model: Any) -> tuple[Any, dict[str, Any]]:
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", (5, 2)),
        ("mistral", (5, 2)),
        ("qwen2", (5, 2)),
        ("qwen3", (9, 2)),  # two more norms a layer, of queries and keys
        ("gemma", (0, 0)),  # its norm adds 1 to the weight, its activation is gelu
        ("gpt_neox", (0, 0)),
    ],
)
def test_the_families(family: str, expected: tuple[int, int]) -> None:
    model = model_of(family, **({"head_dim": 8} if family in ("qwen3", "gemma") else {}))
    loss, gradients = loss_and_gradients(model)
    names, kinds = list(model.state_dict()), {type(module).__name__ for module in model.modules()}
    use_lean_layers(model)
    use_lean_layers(model)  # a second time changes nothing
    assert counted(model) == expected
    assert list(model.state_dict()) == names and {type(module).__name__ for module in model.modules()} == kinds
    lean_loss, lean_gradients = loss_and_gradients(model)
    torch.testing.assert_close(lean_loss, loss)
    assert lean_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(lean_gradients[name], gradient, rtol=1e-4, atol=1e-6)  # sums in another order


def test_the_lean_way_is_taken_only_where_a_backward_pass_in_fp32_may_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    use_lean_layers(model)
    taken: list[str] = []
    for kind in (_LeanNorm, _LeanMLP):
        own = kind.lean
        monkeypatch.setattr(kind, "lean", lambda self, x, own=own, name=kind.__name__: taken.append(name) or own(self, x))
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=ids)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)
    assert taken == []
    model(input_ids=ids)
    assert taken.count("_LeanNorm") == 5 and taken.count("_LeanMLP") == 2
    taken.clear()
    calls: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=ids)
    assert calls == [1] and taken.count("_LeanMLP") == 1  # what listens to a product gets to hear it


def test_a_layer_with_an_adapter_on_it_stays_as_it_is_written() -> None:
    from peft import LoraConfig, get_peft_model

    model = model_of("llama")
    use_lean_layers(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    _, gradients = loss_and_gradients(adapted)
    assert len(gradients) == 4 and all(gradient.abs().sum() > 0 for gradient in gradients.values())
