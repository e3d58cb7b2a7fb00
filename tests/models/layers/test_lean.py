"""Which layers of each family are replaced by lean layers, and that the model's outputs stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.layers.lean import _LeanMLP, _LeanNorm, use_lean_layers

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def model_of(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **fields})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # with weights that are all 1, a missing weight would not be noticed
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
def test_families_use_the_expected_lean_layers(family: str, expected: tuple[int, int]) -> None:
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


def test_lean_layers_are_used_only_for_fp32_training(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert calls == [1] and taken.count("_LeanMLP") == 1  # hooks on a product are called


def test_layer_with_an_adapter_is_not_replaced() -> None:
    from peft import LoraConfig, get_peft_model

    model = model_of("llama")
    use_lean_layers(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    _, gradients = loss_and_gradients(adapted)
    assert len(gradients) == 4 and all(gradient.abs().sum() > 0 for gradient in gradients.values())


# The check of a layer does not depend on its current weights.


class Gated(torch.nn.Module):
    """A feed-forward layer as families write it, with any activation."""

    def __init__(self, activation: Any, *, named: bool = True, size: float = 1e-4) -> None:
        super().__init__()
        for name, (given, made) in {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}.items():
            layer = torch.nn.Linear(given, made, bias=False)
            torch.nn.init.normal_(layer.weight, std=size)
            setattr(self, name, layer)
        if named:
            self.act_fn = activation
        self.compute = lambda x: activation(x)

    def forward(self, x: Any) -> Any:
        return self.down_proj(self.compute(self.gate_proj(x)) * self.up_proj(x))


class Clamped(Gated):
    def forward(self, x: Any) -> Any:
        return super().forward(x).clamp(max=7.0)


class InTraining(Gated):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * (2 if self.training else 1)


silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Gated(silu), True),
        (Gated(torch.nn.SiLU()), True),
        (Gated(silu, named=False), True),  # written into its forward
        (Gated(gelu), False),
        (Gated(gelu, named=False), False),
        (Gated(torch.nn.GELU(approximate="tanh"), named=False), False),
        (Gated(lambda x: x * torch.sigmoid(1.702 * x), named=False), False),
        (Gated(lambda x: silu(x.clamp(max=7)), named=False), False),
        (Clamped(silu), False),
        (InTraining(silu), False),
    ],
)
def test_activation_is_identified_for_weights_near_zero(layer: Any, expected: bool) -> None:
    assert bool(use_lean_layers(layer)) is expected


def test_earlier_identification_would_fail_for_weights_near_zero() -> None:
    """With the current weights, both activations agree within the earlier tolerance. So the probe must not use these weights."""
    layer = Gated(gelu)
    x = torch.randn(3, 8)
    plain = layer.down_proj(silu(layer.gate_proj(x)) * layer.up_proj(x))
    assert torch.allclose(layer(x), plain, rtol=1e-4, atol=1e-5)


class Norm(torch.nn.Module):
    """An RMS norm whose weight is multiplied, as Llama's, or added to 1, as Gemma's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.variance_epsilon = 1e-6
        self.kind = kind

    def forward(self, x: Any) -> Any:
        centred = x - x.mean(-1, keepdim=True) if self.kind == "centred" else x
        scale = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + (0.0 if self.kind == "no epsilon" else self.variance_epsilon))
        return centred * scale * (1 + self.weight if self.kind == "plus one" else self.weight)


class GatedNorm(Norm):
    """Like Mamba 2's norm: without a gate it is a plain RMS norm, but the model calls it with a gate."""

    def forward(self, x: Any, gate: Any = None) -> Any:
        return super().forward(x if gate is None else x * silu(gate))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Norm("plain"), True),
        (Norm("plus one"), False),
        (Norm("centred"), False),
        (Norm("no epsilon"), False),
        (GatedNorm("plain"), False),
    ],
)
def test_norms_with_other_formulas_are_distinguished(layer: Any, expected: bool) -> None:
    assert bool(use_lean_layers(layer)) is expected


def test_layers_of_one_class_with_different_settings_are_checked_separately() -> None:
    layers = torch.nn.Sequential(Norm("plain"), Norm("plus one"), Norm("plain"))
    assert use_lean_layers(layers) == {"Norm": 2}
    assert [isinstance(layer, _LeanNorm) for layer in layers] == [True, False, True]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "granite", "cohere", "olmo2", "phi3", "helium", "glm4"])
def test_training_equals_the_original_layers_for_large_weights(family: str) -> None:
    fields = {"head_dim": 8} if family in ("gemma", "gemma2", "gemma3_text", "glm4", "helium") else {}
    model = model_of(family, **fields, initializer_range=1e-4)
    lean = model_of(family, **fields, initializer_range=1e-4)
    use_lean_layers(lean)
    with torch.no_grad():
        for one, other in zip(model.parameters(), lean.parameters(), strict=True):
            grown = torch.randn(one.shape, generator=torch.Generator().manual_seed(2)) * 0.5
            one.copy_(grown)
            other.copy_(grown)
    loss, gradients = loss_and_gradients(model)
    lean_loss, lean_gradients = loss_and_gradients(lean)
    torch.testing.assert_close(lean_loss, loss, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(lean_gradients[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
