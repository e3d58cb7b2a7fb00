"""Residual dropout applies only to the outputs of attention and MLP, in families with and without dropout modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.errors import ModelError
from stages.models.layers.dropout import disable_dropout, has_dropout, set_residual_dropout


def make(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    configs = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64),  # all its p are 0.1
        "llama": lambda: transformers.LlamaConfig(**common),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common, hidden_dropout=0.1, attention_dropout=0.1),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=300,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
    }
    config = configs[family]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return transformers.AutoModelForCausalLM.from_config(config)


def outputs(model: Any, module: Any) -> torch.Tensor:
    """The outputs of ``module`` in one forward pass."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _m, _i, output: seen.append(output[0] if isinstance(output, tuple) else output))
    model(input_ids=torch.arange(50)[None] % 300)
    handle.remove()
    return seen[0].detach()


@pytest.mark.detail("S2")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt"])
def test_dropout_applies_only_to_residual_branches(family: str) -> None:
    model = make(family)
    plain = model.eval()(input_ids=torch.arange(50)[None]).logits.detach()
    assert set_residual_dropout(model, 0.2) == 4
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    assert names == [], "the family's own dropouts are off"
    torch.testing.assert_close(model(input_ids=torch.arange(50)[None]).logits, plain)  # evaluation has not changed
    model.train()
    branches = [module for name, module in model.named_modules() if name.endswith((".attn", ".attention", ".self_attn", ".mlp", ".fc2"))]
    assert len(branches) == 4
    for branch in branches:
        dropped = outputs(model, branch)
        # 1600 numbers, each dropped with probability 0.2: standard error 0.01
        assert (dropped == 0).float().mean().item() == pytest.approx(0.2, abs=0.05)
    embedding = model.get_input_embeddings()
    assert (outputs(model, embedding) == 0).sum() == 0
    # the other values are scaled by 1 / 0.8
    torch.manual_seed(3)
    first = outputs(model, branches[0])
    model.eval()
    undropped = outputs(model, branches[0])
    kept = first != 0
    torch.testing.assert_close(first[kept], undropped[kept] / 0.8, rtol=1e-4, atol=1e-6)


def test_family_with_unknown_layers_is_refused() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="[Rr]emove residual_dropout"):
        set_residual_dropout(transformers.AutoModelForCausalLM.from_config(config), 0.2)


@pytest.mark.parametrize(("family", "expected"), [("gpt2", True), ("llama", False), ("gpt_neox", True)])
def test_has_dropout_sees_modules_and_attention_and_branches(family: str, expected: bool) -> None:
    model = make(family)
    assert has_dropout(model) is expected
    disable_dropout(model)
    assert not has_dropout(model)
    set_residual_dropout(model, 0.2)
    assert has_dropout(model)
    disable_dropout(model)  # it reaches the branches, too
    branch = next(module for name, module in model.named_modules() if name.endswith(".mlp"))
    assert not has_dropout(model) and not (outputs(model.train(), branch) == 0).any()


def test_routers_and_dropped_layers_are_not_random_without_dropout() -> None:
    """In training mode PhiMoE samples its experts, Mixtral's router has jitter, and OPT drops whole layers."""
    import transformers

    common = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    common |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, **common}
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "layerdrop": 0.5, "dropout": 0.0}
    configs = [
        transformers.PhimoeConfig(**experts, router_jitter_noise=0.4),
        transformers.MixtralConfig(**experts, router_jitter_noise=0.4),
        transformers.OPTConfig(
            **opt, **{name: value for name, value in common.items() if name not in ("intermediate_size", "num_key_value_heads")}
        ),
    ]
    ids = torch.arange(3, 43)[None]
    for config in configs:
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        plain = model.eval()(input_ids=ids, use_cache=False).logits.detach()
        assert has_dropout(model)
        disable_dropout(model)
        assert not has_dropout(model)
        model.train()
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, plain)
        assert model.training and config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("family", ["falcon", "persimmon"])
def test_dropout_that_a_pass_reads_from_its_config_is_disabled(family: str, tmp_path) -> None:
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CONFIG_MAPPING[family](**sizes, hidden_dropout=0.3, attention_dropout=0.3)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.arange(20)[None]
    assert has_dropout(model) and not torch.equal(model.train()(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    expected = model.eval()(input_ids=ids).logits
    model.train().gradient_checkpointing_enable()
    logits = model(input_ids=ids).logits
    logits.sum().backward()  # the recomputation compares its shapes with those of the first pass
    assert not has_dropout(model)
    torch.testing.assert_close(logits, expected)
    assert (model.config.hidden_dropout, model.config.attention_dropout) == (0.3, 0.3), "the saved config is the same"
