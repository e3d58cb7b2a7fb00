"""The sizes counted or computed from a config equal those of the models that transformers and peft make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stages.config import LoraSettings
from stages.errors import ModelError
from stages.memory.counting import model_weights, pass_memory, uncounted
from stages.memory.decoding import LayerStates
from stages.memory.passes import Adapter, PassKind, Task
from stages.memory.shapes import KNOWN_MODELS, Shape, shape_of, shape_of_folder, shape_of_hub
from stages.memory.weights import AdapterWeights

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
    assert counted is not None
    # A fused layer for queries, keys and values is one module; the formula has three.
    assert counted == (replace(shape.formula, quantizable=counted.quantizable) if family.startswith("gpt") else shape.formula)


UNUSUAL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 88, "num_local_experts": 4},
    "qwen3_moe": {"num_attention_heads": 4, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 6, "intermediate_size": 88},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 64},
    # a decoder of a family of encoders, whose output layer has its own width
    "rembert": {
        "is_decoder": True,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "input_embedding_size": 16,
        "output_embedding_size": 24,
    },
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_weights_of_experts_and_state_space_models_are_counted(name: str) -> None:
    from transformers import AutoConfig

    fields = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 200, **UNUSUAL[name]}
    shape = shape_of({"model_type": name, **fields})
    assert shape is not None
    assert shape.weights == weights_of(built(AutoConfig.for_model(name, **fields)))


def test_experts_in_one_tensor_are_not_quantized_but_adapted() -> None:
    shape = shape_of({"model_type": "mixtral", "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 3, **UNUSUAL["mixtral"]})
    assert shape is not None
    assert shape.linear_weights == 3 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32)  # query, key, value, output
    attention = 64 + 48 + 48 + 64
    # peft adds an adapter of each expert: of twice the rank for gate and up, which are one tensor
    assert shape.adapter(Adapter.of(LoraSettings(r=2))).weights == 3 * (2 * (attention + 32 + 4) + 4 * 4 * (32 + 176) + 4 * 2 * (88 + 32))
    experts, router, embedding, norms = 3 * 4 * 3 * 32 * 88, 3 * 4 * 32, 200 * 32, 7 * 32
    assert shape.other_weights == experts + router + embedding + norms


def test_without_a_count_the_weights_are_those_of_the_formula() -> None:
    shape = shape_of(
        {"model_type": "nobody-made-this", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 9}
    )
    assert shape is not None
    with uncounted() as messages:
        assert shape.linear_weights == shape.formula.linear
        assert shape.adapter(Adapter.of(LoraSettings(r=2))).weights == 2 * 3 * (4 * (32 + 32) + 3 * (32 + 128))
        kept = shape.decoding("cpu", 4, 4).layers
    assert kept == (LayerStates(token=2 * 32 * 4, state=0, window=0, number=3),)
    reason = "cannot be counted: transformers has no model type 'nobody-made-this'"
    assert messages == [
        f"the weights of nobody-made-this are computed as those of a plain transformer, because they {reason}",
        f"the adapter of nobody-made-this is computed as one on a plain transformer, because it {reason}",
        f"the KV cache of nobody-made-this is computed as that of a plain transformer, because it {reason}",
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


@pytest.mark.parametrize("family", ["distilbert", "bert", "roberta", "llama"])
def test_a_classifier_has_the_weights_of_its_pooler_and_head(family: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 90}
    if family == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 90}
    config = AutoConfig.for_model(family, **sizes)
    own = shape_of(config.to_dict())
    assert own is not None
    assert replace(own, task="SEQ_CLS").weights == weights_of(AutoModelForSequenceClassification.from_config(config))


def test_unknown_model_has_no_shape() -> None:
    assert shape_of_hub("nobody/ever-made-this") is None
    assert shape_of({"architectures": ["Mystery"]}) is None


ADAPTERS: dict[str, tuple[Task, dict[str, Any]]] = {
    "all-linear": ("CAUSAL_LM", {}),
    "two modules": ("CAUSAL_LM", {"target_modules": ["q_proj", "v_proj"]}),
    "one layer": ("CAUSAL_LM", {"target_modules": r"model\.layers\.3\..*_proj"}),
    "copies": ("CAUSAL_LM", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "scalar head": ("FEATURE_EXTRACTION", {"target_modules": ["down_proj"], "modules_to_save": ["input_layernorm"]}),
    "classifier": ("SEQ_CLS", {}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_the_weights_that_peft_makes(name: str) -> None:
    """Five layers: those of like layers are extrapolated. ``small``: in tensors of less than 4096 weights."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=88, num_hidden_layers=5, num_attention_heads=4, tie_word_embeddings=False
    )
    task, settings = ADAPTERS[name]
    auto = {"CAUSAL_LM": AutoModelForCausalLM, "FEATURE_EXTRACTION": AutoModel, "SEQ_CLS": AutoModelForSequenceClassification}[task]
    excluded = "score" if task == "SEQ_CLS" else None  # its copy is trained instead
    real = LoraConfig(r=4, task_type=TaskType(task), exclude_modules=excluded, **{"target_modules": "all-linear", **settings})
    trained = {key: one.numel() for key, one in get_peft_model(auto.from_config(config), real).named_parameters() if one.requires_grad}
    shape = shape_of(config.to_dict())
    assert shape is not None
    counted = shape.adapter(_kind_of(r=4, **settings), task)
    output = sum(number for key, number in trained.items() if "lm_head" in key)
    small = sum(number for number in trained.values() if number < 4096)
    assert counted == AdapterWeights(sum(trained.values()), output, small)


def _kind_of(**settings: Any) -> Adapter:
    adapter = Adapter.of(LoraSettings.model_validate(settings))
    assert adapter is not None and adapter.settings == LoraSettings.model_validate(settings)
    return adapter


def test_an_adapter_that_does_not_fit_is_an_error() -> None:
    own = shape(model_type="llama", vocab_size=50)
    for _ in range(2):  # counted, and kept
        with pytest.raises(ModelError, match="target_modules names query_proj, which LlamaForCausalLM does not have"):
            own.adapter(Adapter.of(LoraSettings(target_modules=["query_proj"])))


GEMMA = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "head_dim": 8},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 1,
}


def test_a_model_of_several_modalities_has_the_sizes_of_its_text_part_and_the_weights_of_all_parts() -> None:
    """Its config leaves out what the class has as a default: heads, key-value heads and the vocabulary."""
    from transformers import Gemma3Config

    shape = shape_of(GEMMA)
    assert shape is not None
    config = Gemma3Config(**{name: value for name, value in GEMMA.items() if name != "model_type"})
    text = config.text_config
    assert (shape.hidden, shape.layers, shape.head_width, shape.kv_heads) == (32, 7, 8, text.num_key_value_heads)
    assert (shape.heads, shape.vocabulary, shape.positions) == (text.num_attention_heads, text.vocab_size, text.max_position_embeddings)
    assert shape.weights == weights_of(built(config))
    # five layers of six have a window: 4 bytes, two tensors, 4 heads of 8
    full, windowed = sorted(shape.decoding("cpu", 4, 4).layers, key=lambda layer: layer.window)
    assert (full.token, full.window, full.number) == (4 * 2 * 4 * 8, 0, 1)
    assert (windowed.token, windowed.window, windowed.number) == (4 * 2 * 4 * 8, text.sliding_window, 6)
    kind = PassKind(shape.config, shape.vocabulary, "cpu", weights=4, compute=4, trains=True)
    attention = Adapter.of(LoraSettings(r=2, target_modules=["q_proj"]))
    assert pass_memory(kind) is not None and pass_memory(replace(kind, adapter=attention)) is not None


def shape(**fields: Any) -> Shape:
    return shape_of({"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 160, **fields})  # type: ignore[return-value]


@pytest.mark.parametrize(("family", "lean"), [("llama", False), ("llama", True), ("gpt_neox", True), ("gpt2", True)])
def test_saved_activations_of_a_layer(family: str, lean: bool) -> None:
    """Counted by autograd: the difference between two layers and one, per token. 15 % tolerance for rotations, masks and small tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models.layers.lean import use_lean_layers

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
