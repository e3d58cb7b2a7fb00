"""A model that is not a causal language model is refused with one message before its weights are read."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stages.errors import ModelError
from stages.models.families import refuse_unfit, unfit_products
from stages.models.loading import load_backbone, load_language_model
from stages.models.saving import save_model


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(),
        transformers.GPT2Config(),
        transformers.MambaConfig(),
        transformers.BertConfig(is_decoder=True),
        transformers.XLMConfig(causal=True),
        transformers.Gemma3Config(),
        transformers.ReformerConfig(is_decoder=True, axial_pos_embds=False),
    ],
)
def test_causal_language_models_are_accepted(config: Any) -> None:
    refuse_unfit(config, "some/model")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BertConfig(), "'some/model' is a bert model"),
        (transformers.RobertaConfig(), "'some/model' is a roberta model"),
        (transformers.XLMConfig(), "'some/model' is a xlm model"),
        (transformers.ViTConfig(), "'some/model' is a vit model"),
        (transformers.T5Config(), "'some/model' is a t5 model, an encoder-decoder"),
        (transformers.BartConfig(), "'some/model' is a bart model, an encoder-decoder"),
        (transformers.BertConfig(architectures=["BertForSequenceClassification"]), "To use this classifier as a reward, set label"),
        (transformers.BartConfig(architectures=["BartForSequenceClassification"]), "To use this classifier as a reward, set label"),
        (
            transformers.ReformerConfig(is_decoder=True, axial_pos_shape=(8, 4)),
            "is a reformer model, which trains only on rows of 32 tokens",
        ),
    ],
)
def test_other_models_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        refuse_unfit(config, "some/model")


def test_model_with_remote_code_is_judged_by_its_auto_map() -> None:
    class Custom(transformers.LlamaConfig):
        model_type = "custom"

    refuse_unfit(Custom(auto_map={"AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"}), "some/model")
    with pytest.raises(ModelError, match="custom model"):
        refuse_unfit(Custom(), "some/model")


def test_bidirectional_policy_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match="bert model; a policy or a scalar head needs a causal language model"):
        load_language_model(str(tmp_path), dtype=torch.float32)


SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SHARED = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down"))]
ZAMBA = transformers.ZambaConfig(
    **{**SMALL, "num_hidden_layers": 2},
    layer_types=["hybrid", "hybrid"],
    n_mamba_heads=2,
    mamba_d_state=4,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
    attention_head_dim=32,
    attention_hidden_size=64,
    num_key_value_heads=2,
)
EXPERTS = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "unfit"),
    [
        (transformers.LlamaConfig(**SMALL), []),
        (transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2), []),
        (transformers.FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2), []),
        (transformers.Llama4TextConfig(**EXPERTS, intermediate_size_mlp=48, head_dim=16), ["model.layers.0.feed_forward.router"]),
        (transformers.PhimoeConfig(**EXPERTS), ["model.layers.0.mlp.router"]),
        (transformers.Qwen3_5TextConfig(**SMALL, num_key_value_heads=2, head_dim=16, layer_types=["linear_attention"]), []),
        (
            transformers.Gemma3nTextConfig(
                **SMALL,
                num_key_value_heads=2,
                head_dim=16,
                vocab_size_per_layer_input=40,
                hidden_size_per_layer_input=8,
                laurel_rank=4,
                layer_types=["full_attention"],
                num_kv_shared_layers=0,
            ),
            ["model.layers.0.altup.correction_coefs", "model.layers.0.altup.prediction_coefs"],
        ),
        (ZAMBA, [f"model.layers.{layer}.shared_transf.{part}" for layer in (0, 1) for part in SHARED]),
        (transformers.MobileBertConfig(vocab_size=40, num_hidden_layers=0), ["cls.predictions.dense", "cls.predictions.decoder"]),
    ],
)
def test_linear_modules_that_a_family_uses_in_its_own_way(config: Any, unfit: list[str]) -> None:
    auto = transformers.AutoModelForCausalLM if type(config) in transformers.AutoModelForCausalLM._model_mapping else None
    model = (auto or transformers.AutoModelForMaskedLM).from_config(config)
    assert [name for name in unfit_products(model) if "router" in name or "altup" in name or "cls" in name or "shared" in name] == unfit
    assert unfit or not unfit_products(model)


def test_backbone_that_looks_ahead_is_refused_as_a_language_model_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=40, d_model=32, n_layer=1, n_head=2, d_inner=32)
    transformers.XLNetLMHeadModel(config).save_pretrained(tmp_path)
    for load in (load_backbone, load_language_model):
        with pytest.raises(ModelError, match="is not a causal language model"):
            load(str(tmp_path), dtype=torch.float32)


SEVERAL_INPUTS: dict[str, dict[str, Any]] = {  # the parts for text of models for text and images
    "llama4": {**EXPERTS, "intermediate_size_mlp": 48, "head_dim": 16},
    "gemma3": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
}


def save_model_of_several_inputs(kind: str, folder: Path) -> None:
    """A tiny model for text and images with the settings of its processor."""
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    vision |= dict.fromkeys(("hidden_size", "intermediate_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 8)
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](text_config=SEVERAL_INPUTS[kind], vision_config=vision)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')


def test_of_a_model_for_several_inputs_the_text_part_is_loaded_with_a_warning(tmp_path: Path, caplog) -> None:
    save_model_of_several_inputs("llama4", tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        model = load_language_model(str(tmp_path / "model"), dtype=torch.float32)
    assert type(model).__name__ == "Llama4ForCausalLM"
    assert any("only its text part is loaded (Llama4ForCausalLM)" in message for message in caplog.messages)
    save_model(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()
    with pytest.raises(ModelError, match="cannot load its text part without its output layer"):
        load_backbone(str(tmp_path / "model"), dtype=torch.float32)


def test_a_model_that_keeps_its_part_for_images_keeps_the_settings_of_its_processor(tmp_path: Path) -> None:
    save_model_of_several_inputs("gemma3", tmp_path / "model")
    model = load_language_model(str(tmp_path / "model"), dtype=torch.float32)
    save_model(model, None, tmp_path / "saved")
    copied, original = (tmp_path / name / "preprocessor_config.json" for name in ("saved", "model"))
    assert copied.read_text() == original.read_text()
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert sorted(again.state_dict()) == sorted(model.state_dict())


def test_a_model_whose_source_is_gone_is_saved_without_the_settings_of_its_processor(tmp_path: Path, caplog) -> None:
    save_model_of_several_inputs("gemma3", tmp_path / "model")
    model = load_language_model(str(tmp_path / "model"), dtype=torch.float32)
    shutil.rmtree(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        save_model(model, None, tmp_path / "saved")
    assert f"{tmp_path / 'model'} is gone, so {tmp_path / 'saved'} lacks the settings of its processor" in caplog.text
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_a_model_without_readable_settings_of_a_processor_is_saved_with_a_warning(tmp_path: Path, caplog) -> None:
    save_model_of_several_inputs("gemma3", tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    model = load_language_model(str(tmp_path / "model"), dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        save_model(model, None, tmp_path / "saved")
    assert f"could be read from {tmp_path / 'model'}, so {tmp_path / 'saved'} has none, either" in caplog.text


def test_a_text_part_that_cannot_be_loaded_again_is_refused_before_training() -> None:
    with pytest.raises(ModelError, match=r"cannot load that part \(mllama_text_model\)"):
        refuse_unfit(transformers.MllamaConfig(), "some/model")


def test_scores_by_the_decoder_of_an_encoder_decoder_are_refused_with_the_reason(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 16, "encoder_ffn_dim": 16}
    heads = {"decoder_attention_heads": 2, "encoder_attention_heads": 2, "max_position_embeddings": 16}
    transformers.BartForCausalLM(transformers.BartConfig(**sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is the decoder of an encoder-decoder"):
        load_backbone(str(tmp_path), dtype=torch.float32)
