"""The sizes counted or computed from a config equal those of the models that transformers and peft make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stages.memory.counting import model_weights, uncounted
from stages.memory.shapes import KNOWN_MODELS, Shape, shape_of, shape_of_folder, shape_of_hub

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "num_key_value_heads": 2, "intermediate_size": 88},
    "llama, tied": {"tie_word_embeddings": True, "intermediate_size": 88},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"tie_word_embeddings": False, "intermediate_size": 128},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 88},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 88},
}


def built(config: Any) -> Any:
    """The model on the meta device: shapes without memory."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        return (AutoModel if config.model_type == "distilbert" else AutoModelForCausalLM).from_config(config)


def weights_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in {id(parameter): parameter for parameter in model.parameters()}.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_is_counted(name: str) -> None:
    from transformers import AutoConfig

    family = name.split(",")[0]
    common = {} if family == "gpt2" else {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=200, **{**common, **FAMILIES[name]})
    shape = shape_of(config.to_dict())
    assert shape is not None
    made = weights_of(built(config))
    assert shape.weights == made
    counted = model_weights(shape.config, 200)
    # A fused layer for queries, keys and values has one adapter; the formula has three.
    assert counted == (replace(shape.formula, adapter=counted.adapter) if family.startswith("gpt") else shape.formula)


UNUSUAL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 88, "num_local_experts": 4},
    "qwen3_moe": {"num_attention_heads": 4, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 6, "intermediate_size": 88},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 64},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_weights_of_experts_and_state_space_models_are_counted(name: str) -> None:
    from transformers import AutoConfig

    fields = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 200, **UNUSUAL[name]}
    shape = shape_of({"model_type": name, **fields})
    assert shape is not None
    assert shape.weights == weights_of(built(AutoConfig.for_model(name, **fields)))


def test_experts_in_one_tensor_are_neither_quantized_nor_adapted() -> None:
    shape = shape_of({"model_type": "mixtral", "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 3, **UNUSUAL["mixtral"]})
    assert shape is not None
    assert shape.linear_weights == 3 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32)  # query, key, value, output
    assert shape.lora_weights(2) == 2 * 3 * (64 + 48 + 48 + 64)
    experts, router, embedding, norms = 3 * 4 * 3 * 32 * 88, 3 * 4 * 32, 200 * 32, 7 * 32
    assert shape.other_weights == experts + router + embedding + norms


def test_without_a_count_the_weights_are_those_of_the_formula() -> None:
    shape = shape_of(
        {"model_type": "nobody-made-this", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 9}
    )
    assert shape is not None
    with uncounted() as messages:
        assert shape.linear_weights == shape.formula.linear
        assert shape.lora_weights(2) == 2 * shape.formula.adapter
    assert messages == [
        "the weights of nobody-made-this are computed as those of a plain transformer, because they cannot be counted: "
        "transformers has no model type 'nobody-made-this'"
    ]


def known() -> list[tuple[str, dict[str, Any]]]:
    from ruamel.yaml import YAML

    return list(YAML(typ="safe").load(KNOWN_MODELS).items())


@pytest.mark.parametrize(("name", "listed"), known(), ids=[name for name, _ in known()])
def test_known_models_have_the_shapes_of_transformers(name: str, listed: dict[str, Any]) -> None:
    from transformers import AutoConfig

    fields = dict(listed)
    shape = shape_of_hub(name)
    model = built(AutoConfig.for_model(fields.pop("model_type"), **fields))
    assert shape is not None
    output = shape.output_weights if not shape.encoder else 0
    assert shape.linear_weights + shape.other_weights + output == weights_of(model)


def test_unknown_model_has_no_shape() -> None:
    assert shape_of_hub("nobody/ever-made-this") is None
    assert shape_of({"architectures": ["Mystery"]}) is None


def test_an_adapter_on_every_product_is_counted() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    shape = shape_of(config.to_dict())
    assert shape is not None
    assert shape.lora_weights(4) == adapters


def shape(**fields: Any) -> Shape:
    return shape_of({"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 160, **fields})  # type: ignore[return-value]


@pytest.mark.parametrize(("family", "lean"), [("llama", False), ("llama", True), ("gpt_neox", True), ("gpt2", True)])
def test_saved_activations_of_a_layer(family: str, lean: bool) -> None:
    """Counted by autograd: the difference between two layers and one, per token. 15 % tolerance for rotations, masks and small tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models.lean import use_lean_layers

    rows, columns = 4, 48

    def kept(layers: int) -> tuple[int, Shape]:
        sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 160}
        if family == "gpt2":
            sizes = {"n_embd": 64, "n_layer": layers, "n_head": 4, "n_inner": 160}
        config = AutoConfig.for_model(family, vocab_size=50, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()  # no dropout, as PPO has it
        if lean:
            use_lean_layers(model)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(input_ids=torch.ones(rows, columns, dtype=torch.long), use_cache=False).logits
        assert output.requires_grad
        shape = shape_of(config.to_dict())
        assert shape is not None
        return sum(storages.values()), shape

    (one, _), (two, of_two) = kept(1), kept(2)
    assert (two - one) / 4 / (rows * columns) == pytest.approx(of_two.saved_per_token(lean=lean), rel=0.15)


def test_a_folder_without_a_config_has_no_shape(tmp_path: Any, tiny_llama_folder: Any) -> None:
    assert shape_of_folder(tmp_path) is None
    shape = shape_of_folder(tiny_llama_folder)
    assert shape is not None
    assert (shape.hidden, shape.layers, shape.kv_width, shape.query_width) == (32, 2, 16, 32)


def test_shape_of_a_config_with_one_size_per_layer_is_none() -> None:
    assert shape_of({"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": [2, 4]}) is None
