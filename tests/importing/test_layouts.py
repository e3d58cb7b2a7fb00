"""Layouts of other libraries, recognised by their tensor names alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stages.errors import ModelError
from stages.importing.layouts import Layout, recognise

WEIGHT = torch.tensor([[1.0, -2.0]])
BODY = {"model.norm.weight": torch.ones(2), "model.embed_tokens.weight": torch.ones(3, 2)}


def layout_of(weights: dict[str, Tensor], config: dict[str, object] | None = None, **options: Any) -> Layout:
    return recognise(weights, {}, config or {}, **options)


@pytest.mark.parametrize("prefix", ["rwtransformer.", "rwtranrsformer."])
def test_both_spellings_of_deepspeed_chat_are_recognised(prefix: str) -> None:
    layout = layout_of({f"{prefix}h.0.weight": torch.ones(2, 2), "v_head.weight": WEIGHT, "extra": WEIGHT}, {"num_padding_at_beginning": 1})
    assert (layout.library, layout.role, set(layout.body)) == ("DeepSpeed-Chat", "reward_model", {"h.0.weight"})
    assert "not kept: extra" in layout.notes
    assert any("num_padding_at_beginning" in note for note in layout.notes)


def test_openrlhf_uses_the_prefix_of_the_config() -> None:
    weights = {**BODY, "score.weight": WEIGHT, "value_head.weight": 3 * WEIGHT}
    layout = layout_of(weights, {"architectures": ["RewardModel"], "value_head_prefix": "score"})
    assert layout.head is not None
    assert torch.equal(layout.head.weight, WEIGHT)
    own = layout_of({**BODY, "my_head.weight": WEIGHT}, {"architectures": ["RewardModel"], "value_head_prefix": "my_head"})
    assert own.head_name == "my_head, linear from 2 to 1"


@pytest.mark.parametrize("where", ["numbers", "lists", "tensors"])
def test_openrlhf_reads_mean_and_std_from_the_config_or_from_buffers(where: str) -> None:
    config: dict[str, object] = {"architectures": ["RewardModel"], "normalize_reward": True}
    weights = {**BODY, "score.weight": WEIGHT}
    if where == "tensors":
        weights |= {"mean": torch.tensor([2.0]), "std": torch.tensor([4.0])}
    else:
        config |= {"mean": 2.0, "std": 4.0} if where == "numbers" else {"mean": [2.0], "std": [4.0]}
    layout = layout_of(weights, config)
    assert layout.head is not None
    assert torch.equal(layout.head.weight, WEIGHT / 4)
    assert layout.head.bias == -0.5
    assert set(layout.body) == set(BODY)


@pytest.mark.parametrize(("std", "words"), [(0.0, "cannot divide scores"), ("wide", "expected a number")])
def test_openrlhf_refuses_a_useless_std(std: object, words: str) -> None:
    config = {"architectures": ["RewardModel"], "normalize_reward": True, "mean": 1.0, "std": std}
    with pytest.raises(ModelError, match=words):
        layout_of({**BODY, "score.weight": WEIGHT}, config)


def test_a_checkpoint_of_trls_policy_and_value_wrapper_has_two_transformers() -> None:
    weights = {f"policy.{name}": value for name, value in {**BODY, "lm_head.weight": torch.ones(3, 2)}.items()}
    weights |= {f"value_model.{name}": 2 * value for name, value in BODY.items()} | {"value_model.score.weight": WEIGHT}
    weights |= {"critic_backbone.norm.weight": 2 * torch.ones(2)}
    layout = layout_of(weights)
    assert layout.has_policy
    assert set(layout.body) == {*BODY, "lm_head.weight"}
    assert torch.equal(layout.value_body["model.norm.weight"], 2 * torch.ones(2))
    assert layout.notes == []


def test_a_single_output_under_an_unknown_name_is_a_head() -> None:
    layout = layout_of({**BODY, "reward_layer.weight": WEIGHT, "reward_layer.bias": torch.tensor([0.5])})
    assert layout.library == "an unknown library"
    assert layout.head_name == "reward_layer, linear from 2 to 1 with a bias"
    assert layout_of({**BODY, "lm_head.weight": torch.ones(1, 2)}).role == "language_model"


@pytest.mark.parametrize("name", ["model.layers.0.mlp.shared_expert_gate", "embeddings.token_type_embeddings"])
def test_one_row_in_a_layer_or_an_embedding_is_not_a_head(name: str) -> None:
    assert layout_of({**BODY, f"{name}.weight": WEIGHT}).library == "transformers"


def test_an_unknown_head_may_be_in_the_module_of_the_transformer_but_has_one_layer() -> None:
    layers = {"model.layers.0.mlp.weight": torch.ones(2, 2)}
    assert layout_of({**BODY, **layers, "model.reward_head.weight": WEIGHT}).head_name == "model.reward_head, linear from 2 to 1"
    with pytest.raises(ModelError, match=r"expected head\.2\.weight"):
        layout_of({**BODY, "head.0.weight": torch.ones(2, 2), "head.2.weight": WEIGHT})


def test_trlx_says_which_heads_it_leaves_out() -> None:
    layout = layout_of({"base_model.norm.weight": torch.ones(2), "ilql_heads.q_heads.0.weight": WEIGHT})
    assert layout.notes == ["not kept: ilql_heads"]


def test_an_adapter_with_one_output_has_a_reward_head_and_with_two_a_classifier() -> None:
    lora = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(1, 2)}
    layout = layout_of({}, adapter={**lora, "base_model.model.score.weight": WEIGHT})
    assert (layout.role, layout.head_name) == ("reward_model", "score, linear from 2 to 1")
    layout = layout_of({}, adapter={**lora, "base_model.model.score.modules_to_save.weight": torch.ones(2, 2)})
    assert (layout.role, layout.head_name) == ("classifier", "score.weight [2, 2]")
    assert layout_of({}, adapter={**lora, "base_model.model.classifier.weight": WEIGHT}).role == "classifier"  # BERT's, with one label
    assert layout_of({}, adapter=lora).role is None


def test_an_adapter_beside_a_complete_model_is_ambiguous() -> None:
    with pytest.raises(ModelError, match=r"Remove adapter_config\.json"):
        layout_of(BODY, adapter={})


@pytest.mark.parametrize("weights", [{"v_head.summary.weight": WEIGHT}, {"v_head.0.weight": WEIGHT.T, "v_head.2.weight": WEIGHT}])
def test_a_head_without_a_transformer_is_refused(weights: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match="only a value head"):
        layout_of(weights)


@pytest.mark.parametrize("name", ["v_head.summary", "score"])
def test_a_head_with_nan_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="NaN"):
        layout_of({**BODY, f"{name}.weight": WEIGHT * float("nan")})


def test_a_head_with_an_empty_bias_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a bias \[1\] or none"):
        layout_of({**BODY, "v_head.summary.weight": WEIGHT, "v_head.summary.bias": torch.zeros(0)})


@pytest.mark.parametrize("where", ["full weights", "adapter"])
def test_a_head_of_transformers_is_a_reward_model_and_a_note_says_so(where: str) -> None:
    if where == "adapter":
        layout = layout_of({}, adapter={"base_model.model.score.weight": WEIGHT})
    else:
        layout = layout_of({**BODY, "score.weight": WEIGHT})
    assert layout.role == "reward_model"
    assert layout.notes == [
        "the file does not say whether score predicts rewards or values; assumed: a reward model (else use --role value_model)"
    ]


def test_an_adapter_with_an_empty_bias_is_refused() -> None:
    adapter = {"base_model.model.score.weight": WEIGHT, "base_model.model.score.bias": torch.zeros(0)}
    with pytest.raises(ModelError, match=r"a bias \[1\] or none; the file has score\.bias \[0\]"):
        layout_of({}, adapter=adapter)


def test_the_head_of_xlnet_is_a_classifier() -> None:
    weights = {"transformer.x": torch.ones(2), "sequence_summary.summary.weight": torch.ones(2, 2), "logits_proj.weight": WEIGHT}
    layout = layout_of(weights, {"num_labels": 1})
    assert layout.role == "classifier" and "logits_proj.weight [1, 2]" in layout.head_name
