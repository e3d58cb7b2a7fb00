"""Scores are read at the last real token for either padding side. Head and bias are saved in every format. No head is random."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from stages.config import LoraSettings
from stages.errors import ModelError
from stages.models.adapters.exporting import save_merged
from stages.models.heads import RewardModel, ValueModel, last_positions
from stages.models.loading import as_resolved, load_language_model

TEXT = [7, 42, 105, 9]
PAD = 1


@pytest.fixture
def reward_model(tiny_llama_folder: Path) -> RewardModel:
    model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    model.center(-0.7)
    return model


def score(model: RewardModel, ids: list[int], mask: list[int] | None = None) -> float:
    return float(model.score(torch.tensor([ids]), torch.tensor([mask or [1] * len(ids)])).detach())


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A tiny random model of each family that a reward model should support."""
    import transformers

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    configs = {
        "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        "gpt_neox": transformers.GPTNeoXConfig(**common, intermediate_size=16, max_position_embeddings=32),
        # layers of width 24 and projected hidden states of width 16, like OPT-350m with 1024 and 512
        "opt": transformers.OPTConfig(
            vocab_size=300,
            hidden_size=24,
            ffn_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
        ),
        "qwen2": transformers.Qwen2Config(**common, num_key_value_heads=2, intermediate_size=16, max_position_embeddings=32),
    }
    folders = {}
    for name, config in configs.items():
        config.eos_token_id, config.pad_token_id, config.bos_token_id = 0, PAD, None
        folders[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        tiny_tokenizer.save_pretrained(folders[name])
    return folders


def test_last_positions_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    assert last_positions(mask).tolist() == [2, 4, 4, 0]


def test_padding_changes_no_score_on_either_side(reward_model: RewardModel) -> None:
    plain = score(reward_model, TEXT)
    assert score(reward_model, TEXT + [PAD, PAD], [1, 1, 1, 1, 0, 0]) == pytest.approx(plain, abs=1e-5)
    assert score(reward_model, [PAD, PAD, PAD] + TEXT, [0, 0, 0, 1, 1, 1, 1]) == pytest.approx(plain, abs=1e-5)
    # garbage under the mask, too
    assert score(reward_model, TEXT + [88, 200], [1, 1, 1, 1, 0, 0]) == pytest.approx(plain, abs=1e-5)
    assert score(reward_model, [88, 200] + TEXT, [0, 0, 1, 1, 1, 1]) == pytest.approx(plain, abs=1e-5)
    assert score(reward_model, TEXT[:-1] + [10]) != pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "qwen2"])
def test_every_family_scores_saves_and_reloads(architectures: dict[str, Path], family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = RewardModel.from_language_model(str(architectures[family]), dtype=torch.float32, trainable=False)
    model.center(0.25)
    plain = score(model, TEXT)
    assert score(model, [PAD, PAD] + TEXT, [0, 0, 1, 1, 1, 1]) == pytest.approx(plain, abs=1e-5)
    model.save(tmp_path)
    assert score(RewardModel.from_pretrained(str(tmp_path), dtype=torch.float32), TEXT) == pytest.approx(plain, abs=1e-6)
    # transformers' class loads the same weights; only the bias is missing
    foreign = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert float(foreign(input_ids=torch.tensor([TEXT])).logits) - 0.25 == pytest.approx(plain, abs=1e-5)


def test_a_reward_model_whose_layers_share_weights_is_saved(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """In Zamba all hybrid layers have the weights of one transformer block."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_state": 4}
    layers = {
        "num_hidden_layers": 2,
        "layer_types": ["hybrid", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    }
    config = transformers.ZambaConfig(vocab_size=300, **sizes, **layers, attention_head_dim=16, attention_hidden_size=32, pad_token_id=PAD)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = RewardModel.from_language_model(str(tmp_path / "base"), dtype=torch.float32, trainable=False)
    model.save(tmp_path / "saved")
    foreign = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert float(foreign(input_ids=torch.tensor([TEXT])).logits.detach()) == pytest.approx(score(model, TEXT), abs=1e-5)


def test_a_decoder_whose_class_has_a_pooler_can_be_a_reward_model(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """RoBERTa's transformer has a pooler, which its language model leaves out. The score is read from the hidden states."""
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**sizes, max_position_embeddings=40, is_decoder=True, pad_token_id=PAD)
    plain = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = RewardModel.from_language_model(str(tmp_path / "base"), dtype=torch.float32, trainable=False)
    hidden = plain.roberta(input_ids=torch.tensor([TEXT])).last_hidden_state[0, -1]
    assert score(model, TEXT) == pytest.approx(float(hidden @ model.score_head.weight[0]), abs=1e-5)
    model.save(tmp_path / "saved")
    assert score(RewardModel.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32), TEXT) == pytest.approx(score(model, TEXT))


def test_the_head_is_drawn_as_in_the_paper(tiny_llama_folder: Path) -> None:
    model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32)
    again = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32)
    torch.testing.assert_close(model.score_head.weight, again.score_head.weight, rtol=0, atol=0)
    assert model.reward_bias == 0.0
    # 32 draws of standard deviation 1/sqrt(33) = 0.174; the sample's own deviation is off by about 1/sqrt(64) = 12.5 % of that
    assert float(model.score_head.weight.std()) == pytest.approx(1 / math.sqrt(33), rel=0.4)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.detail("R11")
def test_centring_subtracts_and_survives_reload(reward_model: RewardModel, tmp_path: Path) -> None:
    before = score(reward_model, TEXT)
    reward_model.center(1.5)
    assert score(reward_model, TEXT) == pytest.approx(before - 1.5, abs=1e-5)
    reward_model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["reward_bias"] == pytest.approx(-0.8)  # 0 + 0.7 - 1.5
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert score(RewardModel.from_pretrained(str(tmp_path), dtype=torch.float32), TEXT) == pytest.approx(before - 1.5, abs=1e-5)


def test_a_missing_head_is_refused(tiny_llama_folder: Path, tmp_path: Path, reward_model: RewardModel) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ModelError, match="no reward head"):
        RewardModel.from_pretrained(str(tiny_llama_folder), dtype=torch.float32)
    reward_model.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no reward head"):
        RewardModel.from_pretrained(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize(("said", "kept"), [("single_label_classification", None), ("regression", "regression")])
def test_a_reward_model_that_started_from_a_classifier_is_saved(
    said: str, kept: str | None, tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """transformers refuses the config of a single label with the problem type of several."""
    labels = {"num_labels": 3, "problem_type": said}
    AutoModelForSequenceClassification.from_pretrained(tiny_llama_folder, **labels).save_pretrained(tmp_path / "classifier")
    tiny_tokenizer.save_pretrained(tmp_path / "classifier")
    model = RewardModel.from_language_model(str(tmp_path / "classifier"), dtype=torch.float32)
    model.save(tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert (plain.config.num_labels, plain.config.problem_type) == (1, kept)
    ids = torch.tensor([[5, 17, 40, 3, 250]])
    with torch.no_grad():
        torch.testing.assert_close(model.score(ids, torch.ones_like(ids)), plain(input_ids=ids).logits[:, 0])


def test_a_classifier_without_an_output_layer_is_refused_as_a_language_model(tiny_llama_folder: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(tiny_llama_folder, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"was saved as LlamaForSequenceClassification, without .* \(lm_head.weight missing .* Use a language"
    ):
        load_language_model(str(tmp_path), dtype=torch.float32)


def test_an_encoder_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    import transformers

    config = transformers.DistilBertConfig(vocab_size=300, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    transformers.DistilBertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="distilbert model; a policy or a scalar head needs a causal language model"):
        RewardModel.from_language_model(str(tmp_path), dtype=torch.float32)


def lora_reward_model(source: Any) -> RewardModel:
    torch.manual_seed(2)
    model = RewardModel.from_language_model(source, dtype=torch.float32, lora=LoraSettings(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.center(0.33)
    return model.eval()


def test_an_adapter_keeps_head_and_bias_through_reload_and_merge(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = lora_reward_model(str(tiny_llama_folder))
    expected = score(model, TEXT)
    model.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert score(RewardModel.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32), TEXT) == pytest.approx(expected, abs=1e-5)
    save_merged(as_resolved(tmp_path / "adapter"), tmp_path / "merged")
    merged = RewardModel.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    assert score(merged, TEXT) == pytest.approx(expected, abs=1e-5)
    assert merged.reward_bias == pytest.approx(-0.33)


def test_the_head_computes_in_full_precision_under_autocast(reward_model: RewardModel) -> None:
    ids, weight = torch.tensor([TEXT]), reward_model.score_head.weight[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = reward_model.score_tokens(ids, torch.ones_like(ids))[0]
        hidden = reward_model.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
    expected = [sum(a * b for a, b in zip(state, weight.tolist(), strict=True)) + 0.7 for state in hidden.tolist()]
    torch.testing.assert_close(scores, torch.tensor(expected))
    with torch.no_grad():
        reward_model.score_head.bfloat16()  # as DeepSpeed does
        torch.testing.assert_close(reward_model.score_head(hidden), torch.tensor(expected), rtol=0, atol=0.02)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_head_stays_in_full_precision_on_a_quantized_backbone(
    tiny_llama_folder: Path, resolve_folder: Any, tmp_path: Path, quantization: str
) -> None:
    model = lora_reward_model(resolve_folder(tiny_llama_folder, quantization=quantization))
    assert model.score_head.weight.dtype == torch.float32
    model.train()
    model.score(torch.tensor([TEXT]), torch.ones(1, 4, dtype=torch.long)).sum().backward()
    assert model.score_head.weight.grad is not None
    model.save(tmp_path)
    again = RewardModel.from_pretrained(str(tmp_path), dtype=torch.float32)  # on the unquantized base
    torch.testing.assert_close(again.score_head.weight, model.score_head.weight)
    assert score(again, TEXT) == pytest.approx(score(model.eval(), TEXT), abs=0.3)  # differs only by the quantization


def test_the_value_at_the_last_token_is_the_score(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save(tmp_path)
    value_model = ValueModel.from_pretrained(tmp_path, dtype=torch.float32, trainable=True)
    values = value_model(torch.tensor([TEXT]), torch.ones(1, 4, dtype=torch.long))
    assert values.shape == (1, 4)
    assert float(values[0, -1].detach()) == pytest.approx(score(reward_model, TEXT), abs=1e-5)
    assert all(parameter.requires_grad for parameter in value_model.parameters())


def test_values_from_a_policy_begin_at_zero_and_are_saved(tiny_llama_folder: Path, tmp_path: Path) -> None:
    value_model = ValueModel.from_policy(str(tiny_llama_folder), dtype=torch.float32)
    ids, mask = torch.tensor([TEXT]), torch.ones(1, 4, dtype=torch.long)
    torch.testing.assert_close(value_model(ids, mask), torch.zeros(1, 4))
    with torch.no_grad():
        value_model.score_head.weight.fill_(0.1)
    value_model.save(tmp_path)
    torch.testing.assert_close(ValueModel.from_pretrained(str(tmp_path), dtype=torch.float32)(ids, mask), value_model(ids, mask))


def test_gradient_checkpointing_gives_the_same_gradient(tiny_llama_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.score(torch.tensor([TEXT]), torch.ones(1, 4, dtype=torch.long)).sum().backward()
        gradients.append(model.backbone.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_head_width_equals_the_backbones_output_width(architectures: dict[str, Path], tmp_path: Path) -> None:
    source = str(architectures["opt"])
    reward = RewardModel.from_language_model(source, dtype=torch.float32)
    assert reward.score_head.in_features == 16  # the projection's width; the config says hidden_size 24
    value = ValueModel.from_policy(source, dtype=torch.float32, lora=LoraSettings(r=2))
    assert value.score_head.in_features == 16
    value.save(tmp_path)
    assert ValueModel.from_pretrained(str(tmp_path), dtype=torch.float32).score_head.in_features == 16
