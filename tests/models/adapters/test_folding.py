"""Folded adapters compute what peft's own layers compute, with fewer operations, for plain LoRA in any family."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.utils._python_dispatch import TorchDispatchMode

from stages.kernels.casts import kept_casts
from stages.models.adapters.folding import roles_together, why_not_together
from stages.models.layers.replacing import use_folded_adapters

IDS = torch.tensor([[5, 9, 3, 250, 17, 4, 88], [1, 2, 3, 4, 5, 6, 7]])
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Any, Any, dict[str, list[str]]]] = {  # class, config, the groups of a layer with the same input
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**TINY, num_key_value_heads=2),
        {"q_proj": ["k_proj", "v_proj"], "gate_proj": ["up_proj"]},
    ),
    "qwen2": (  # with biases
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**TINY, num_key_value_heads=2),
        {"q_proj": ["k_proj", "v_proj"], "gate_proj": ["up_proj"]},
    ),
    "opt": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig(
            vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, dropout=0.0
        ),
        {"q_proj": ["k_proj", "v_proj"]},
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
        {},
    ),
    "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**TINY), {}),
}


class Operations(TorchDispatchMode):
    """Counts the operations that would be kernels on a GPU. Views and allocations are not counted."""

    VIEWS = {
        "view",
        "t",
        "transpose",
        "expand",
        "slice",
        "select",
        "detach",
        "alias",
        "unsqueeze",
        "squeeze",
        "permute",
        "split",
        "_unsafe_view",
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.VIEWS and not name.startswith(("empty", "new_empty")):
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def number(self) -> int:
        return sum(self.counts.values())


def adapted(family: str = "llama", names: tuple[str, ...] = ("default",), **settings: Any) -> Any:
    """peft's model with adapters that change its outputs."""
    torch.manual_seed(0)
    kind, config, _ = FAMILIES[family]
    model = kind(copy.deepcopy(config)).train()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(model, LoraConfig(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**{**settings, "r": 3}))
    model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def passed(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, gradients by name) of one pass."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().log_softmax(dim=-1)[..., 7].sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def folded(model: Any) -> Any:
    made = copy.deepcopy(model)
    use_folded_adapters(made)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_keeps_outputs_of_a_family_and_detects_layers_with_equal_input(family: str) -> None:
    plain = adapted(family)
    ours = folded(plain)
    check_equal(passed(ours), passed(plain))
    check_equal(passed(copy.deepcopy(ours)), passed(plain))
    actual: dict[str, list[str]] = {}
    names = {module: name.rpartition(".")[2] for name, module in ours.named_modules()}
    for module, name in names.items():
        if followers := getattr(module, "fold_followers", ()):
            assert actual.setdefault(name, [names[one] for one in followers]) == [names[one] for one in followers]
    assert actual == FAMILIES[family][2]
    assert ours.state_dict().keys() == plain.state_dict().keys()


SETTINGS: dict[str, dict[str, Any]] = {
    "rank-stabilized, two ranks": {"use_rslora": True, "rank_pattern": {"k_proj": 2, "up_proj": 1}},
    "two adapters": {"names": ("frozen-0", "default")},
    "not every sibling": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "DoRA": {"use_dora": True},
    "a trained bias": {"lora_bias": True, "target_modules": ["down_proj"]},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_folding_keeps_outputs_for_the_settings_of_peft(kind: str) -> None:
    plain = adapted(**SETTINGS[kind])
    ours = folded(plain)
    check_equal(passed(ours), passed(plain))
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours.enable_input_require_grads()
    check_equal(passed(ours), passed(plain))
    for model in (plain, ours):
        model.base_model.disable_adapter_layers()
    torch.testing.assert_close(ours(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_active_dropout_draws_the_same_numbers_as_peft_and_inactive_dropout_is_folded() -> None:
    plain = adapted(lora_dropout=0.5)
    ours = folded(plain)
    torch.manual_seed(3)
    expected = passed(plain)
    torch.manual_seed(3)
    check_equal(passed(ours), expected)
    for model in (plain, ours):
        model.eval()
    check_equal(passed(ours), passed(plain))
    assert passed_operations(ours).number < passed_operations(plain).number


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_folding_keeps_outputs_of_adapters_on_quantized_weights(
    tiny_llama_folder: Any, resolve_folder: Any, quantization: str, monkeypatch: Any
) -> None:
    from stages.config import LoraSettings
    from stages.models.loading import load_language_model

    with monkeypatch.context() as patch:
        patch.setattr("stages.models.adapters.attaching.use_folded_adapters", lambda model: None)
        plain = load_language_model(
            resolve_folder(tiny_llama_folder, quantization=quantization), dtype=torch.float32, lora=LoraSettings(r=2)
        )
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = passed(plain)
    use_folded_adapters(plain)  # deepcopy fails for bitsandbytes' weights in some versions
    actual = passed(plain)
    if quantization == "nf4":
        check_equal(actual, expected)
    else:  # int8 rounds activations: sums in another order may round differently
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0.05)
        assert actual[1].keys() == expected[1].keys()


def passed_operations(model: Any) -> Operations:
    """The operations of a pass in bf16 that is not the first one of its optimizer step."""
    with kept_casts("cpu"), torch.autocast("cpu", torch.bfloat16):
        passed(model)  # makes the casts that are kept for the optimizer step
        model.zero_grad()
        with Operations() as seen:
            passed(model)
    return seen


def test_a_pass_has_far_fewer_operations(caplog: pytest.LogCaptureFixture) -> None:
    """A Llama of two layers, with 14 adapted modules in 8 groups with the same input."""
    plain = adapted()
    ours = copy.deepcopy(plain)
    with caplog.at_level(logging.INFO, "stages.models.layers.replacing"):
        assert use_folded_adapters(ours) == {"Linear": 14}
        assert use_folded_adapters(ours) == {}
    assert [record.message for record in caplog.records] == ["PeftModelForCausalLM: adapters folded: 14 Linear"]
    before, after = passed_operations(plain), passed_operations(ours)
    # Each module of peft casts its input to fp32 and back, forward and backward; multiplies and adds its update.
    assert before.number - after.number >= 110
    assert after.counts["_to_copy"] <= before.counts["_to_copy"] / 2

    def products(seen: Operations) -> int:
        return sum(seen.counts.get(name, 0) for name in ("mm", "addmm", "addmm_"))

    # The products with a, 14 before, are 8; so are those for its gradient. Those for the gradient of the input, 11 before, are 7: nothing
    # before the first group (queries, keys and values of the first layer) needs a gradient. 6 + 6 + 4 = 16.
    assert products(before) - products(after) == 16


def test_passes_of_two_roles_together_equal_two_passes() -> None:
    plain = adapted(names=("policy", "value"))
    ours = folded(plain)
    plain.base_model.set_adapter(["policy"])
    policy = plain(input_ids=IDS).logits
    plain.base_model.set_adapter(["value"])
    value = plain(input_ids=IDS).logits
    expected = torch.cat([policy, value])
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert why_not_together(ours, ["policy"], ["value"]) == ""
    with roles_together(["policy"], ["value"]):
        actual = ours(input_ids=IDS.repeat(2, 1)).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        actual[:2].log_softmax(-1)[..., 7].sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert all(not gradient.any() for name, gradient in gradients.items() if ".value." in name)
    plain.base_model.set_adapter(["policy"])
    for name, gradient in passed(plain)[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "not plain LoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "full copies"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "not plain LoRA of a linear layer"),
        ({"lora_dropout": 0.5}, "not plain LoRA"),
    ],
)
def test_roles_that_cannot_share_a_pass_say_why(settings: dict[str, Any], reason: str) -> None:
    assert reason in why_not_together(folded(adapted(**settings)), ["default"], [])


def test_layers_with_hooks_on_their_parts_are_left_to_peft() -> None:
    """DeepSpeed gathers a weight in a hook of the module that contains it."""
    plain = adapted()
    ours = folded(plain)
    seen = []
    for module in ours.modules():
        if isinstance(module, LoraLinear):
            module.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append(1))
    check_equal(passed(ours), passed(plain))
    assert len(seen) == 14
