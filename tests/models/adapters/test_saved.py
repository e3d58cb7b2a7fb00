"""Adapters made by peft alone, in all formats that it writes, and adapters that cannot be stacked."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError
from stages.models.adapters.attaching import add_adapter
from stages.models.adapters.exporting import save_merged
from stages.models.adapters.shared_backbone import SharedBackbone
from stages.models.heads import RewardModel
from stages.models.loading import as_resolved, load_classifier, load_language_model, load_tokenizer
from stages.models.saving import save_model
from stages.registry.references import ResolvedModel

IDS = torch.tensor([[5, 17, 40, 3, 250]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def foreign(base: Path | str, folder: Path, *, seed: int = 1, loaded: Any = None, **settings: Any) -> torch.Tensor:
    """Write an adapter made by peft alone, without a tokenizer; returns the logits of the model it was made on."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = loaded if loaded is not None else AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = LoraConfig(r=4, lora_alpha=16, **{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **settings})
    model = get_peft_model(plain, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits_of(model)


KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "patterns of full names": {"rank_pattern": {r"model\.layers\.0\..*": 2}, "alpha_pattern": {r"model\.layers\.\d\..*v_proj": 5}},
    "regular expression": {"target_modules": r".*model\.layers\.\d+\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0.*"},
    "trained biases": {"bias": "all", "target_modules": ["q_proj"]},
    "dropout": {"lora_dropout": 0.5},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [3, 250], "lm_head": [3]}},
    "full modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "only the output layer": {"target_modules": ["lm_head"]},
    "one norm": {"modules_to_save": ["model.norm"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_every_form_is_loaded_and_exported(kind: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = foreign(tiny_llama_folder, tmp_path / "adapter", **KINDS[kind])
    tokenizer = load_tokenizer(str(tmp_path / "adapter"))  # its base's
    loaded = load_language_model(str(tmp_path / "adapter"), dtype=torch.float32, trainable=False, tokenizer=tokenizer)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)
    save_merged(as_resolved(tmp_path / "adapter"), tmp_path / "merged")
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "trained biases", "rows", "full modules", "one norm"])
def test_every_adapter_kind_keeps_its_outputs_under_a_new_adapter(kind: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """On nf4 weights the adapter stays unmerged, and a new adapter on top starts as an identity."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, attn_implementation="eager", quantization_config=quantized)
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    expected = foreign(tiny_llama_folder, tmp_path / "adapter", loaded=plain, **KINDS[kind])
    source = ResolvedModel("one", "folder", str(tmp_path / "adapter"), "", ModelInput(ref="one", quantization="nf4"))
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["_fsdp_wrapped_module.", "_orig_mod.", "module."])
def test_parameter_names_with_wrapper_prefixes_load(prefix: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    expected = foreign(tiny_llama_folder, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.", f"base_model.model.{prefix}"): value for name, value in weights.items()}
    renamed = {name.replace(".lora_A.weight", ".lora_A.default.weight"): value for name, value in renamed.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits_of(load_language_model(str(tmp_path), dtype=torch.float32)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("below", ["plain", "dora", "PiSSA"])
@pytest.mark.parametrize("kind", ["dora", "PiSSA"])
def test_an_adapter_that_belongs_to_merged_weights_is_right_above_an_unmerged_adapter(
    kind: str, below: str, tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """DoRA's magnitudes and PiSSA's start refer to the merged weights below: here peft merged those."""
    foreign(tiny_llama_folder, tmp_path / "one", **KINDS.get(below, {}))
    merged = load_language_model(str(tmp_path / "one"), dtype=torch.float32, trainable=False)
    expected = foreign(tmp_path / "one", tmp_path / "two", loaded=merged, **KINDS[kind])
    two = as_resolved(tmp_path / "two")
    torch.testing.assert_close(logits_of(load_language_model(two, dtype=torch.float32)), expected, rtol=1e-4, atol=1e-5)
    tiny_tokenizer.save_pretrained(tmp_path / "two")
    backbone = backbone_of(two)
    backbone.activation(backbone.frozen(two))()
    torch.testing.assert_close(logits_of(backbone.model), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_orthogonal_initial_weights_works_on_quantized_weights(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """peft cannot make such initial weights there, but the saved ones replace them."""
    foreign(tiny_llama_folder, tmp_path, target_modules=["q_proj"], init_lora_weights="orthogonal")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    source = ResolvedModel("one", "folder", str(tmp_path), "", ModelInput(ref="one", quantization="nf4"))
    loaded = dict(load_language_model(source, dtype=torch.float32, trainable=False).named_parameters())
    for name, value in saved.items():
        torch.testing.assert_close(loaded[name.replace(".weight", ".below-0.weight")].float(), value)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_update_of_the_embedding_is_merged_in_bf16_above_quantized_layers(
    quantization: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """The merge rounds the embedding to bf16, which is no error of the merge."""
    expected = foreign(tiny_llama_folder, tmp_path / "adapter", **KINDS["embedding"])
    source = ResolvedModel("one", "folder", str(tmp_path / "adapter"), "", ModelInput(ref="one", quantization=quantization))
    logits = logits_of(load_language_model(source, dtype=torch.bfloat16, trainable=False)).float()
    assert float((logits - expected).pow(2).mean().sqrt()) < 0.2 * float(expected.pow(2).mean().sqrt())


def test_a_dora_adapter_on_int8_weights_on_a_cpu_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    foreign(tiny_llama_folder, tmp_path, use_dora=True)
    source = ResolvedModel("one", "folder", str(tmp_path), "", ModelInput(ref="one", quantization="int8"))
    with pytest.raises(ModelError, match="DoRA adapter, which peft cannot compute on int8 weights on a CPU. Write quantization"):
        load_language_model(source, dtype=torch.float32, trainable=False)


@pytest.mark.parametrize("kind", ["rows", "one norm", "patterns of full names"])
def test_adapters_of_language_models_serve_a_reward_model(kind: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """A reward model uses the adapter's weights of the transformer, but not those of the output layer."""
    foreign(tiny_llama_folder, tmp_path / "adapter", **KINDS[kind])
    language_model = load_language_model(str(tmp_path / "adapter"), dtype=torch.float32, trainable=False)
    reward_model = RewardModel.from_language_model(str(tmp_path / "adapter"), dtype=torch.float32)
    with torch.no_grad():
        hidden = language_model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(reward_model.eval().backbone(input_ids=IDS).last_hidden_state, hidden)


@pytest.mark.parametrize("labels", [2, 3])
def test_classifier_adapter_loads_its_head(labels: int, tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Saved by peft, without a config.json: the number of classes is the number of the head's rows."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(labels)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_llama_folder, num_labels=labels)
    expected = foreign(tiny_llama_folder, tmp_path, loaded=plain, task_type="SEQ_CLS")
    loaded = load_classifier(str(tmp_path), dtype=torch.float32, trainable=False)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)
    foreign(tiny_llama_folder, tmp_path / "headless", task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="no trained head"):
        load_classifier(str(tmp_path / "headless"), dtype=torch.float32, trainable=False)


def test_an_adapter_of_the_output_layer_does_not_change_a_reward_model(tiny_llama_folder: Path, tmp_path: Path) -> None:
    foreign(tiny_llama_folder, tmp_path / "adapter", **KINDS["only the output layer"])
    ids, mask = IDS, torch.ones_like(IDS)
    with torch.no_grad():
        above, below = (
            RewardModel.from_language_model(str(folder), dtype=torch.float32).eval().backbone(input_ids=ids, attention_mask=mask)
            for folder in (tmp_path / "adapter", tiny_llama_folder)
        )
    torch.testing.assert_close(above.last_hidden_state, below.last_hidden_state)


def test_a_bias_for_a_layer_without_a_bias_is_refused_in_a_merge(tiny_llama_folder: Path, tmp_path: Path) -> None:
    foreign(tiny_llama_folder, tmp_path, lora_bias=True)
    with pytest.raises(ModelError, match="peft cannot merge the adapter .*because the base layer has no bias. Load it with quantization"):
        load_language_model(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["dora", "PiSSA", "QALoRA"])
def test_a_server_of_plain_adapters_refuses_other_adapters(kind: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """The update of a PiSSA adapter counts from changed base weights, so its two matrices are not its whole effect."""
    from stages.models.adapters.served import updates_of

    foreign(tiny_llama_folder, tmp_path, **{**KINDS, "QALoRA": {"use_qalora": True, "qalora_group_size": 8}}[kind])
    with pytest.raises(ModelError, match="a vLLM server can load only low-rank updates"):
        updates_of(load_language_model(str(tiny_llama_folder), dtype=torch.float32), [as_resolved(tmp_path)])


def mixture(kind: str, folder: Path, tokenizer: Any, **fields: Any) -> Path:
    """A model of random weights with a dense layer, then a layer with two experts and a shared one."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 1, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **heads, **fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_names_of_a_saved_adapter_that_fit_the_model_stay_as_they_are(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """peft renames Laguna's shared_experts to a name that does not exist, and then leaves their updates out silently."""
    base = mixture(
        "laguna",
        tmp_path / "base",
        tiny_tokenizer,
        num_experts=2,
        shared_expert_intermediate_size=8,
        layer_types=["full_attention", "full_attention"],
        num_attention_heads_per_layer=[2, 2],
        mlp_layer_types=["dense", "sparse"],
    )
    expected = foreign(base, tmp_path / "adapter", target_modules="all-linear")
    loaded = load_language_model(str(tmp_path / "adapter"), dtype=torch.float32, trainable=False)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)


def test_linear_modules_that_peft_leaves_out_are_counted(tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three of the dense layer and three of the shared expert have the names of the experts' tensors."""
    experts = {"n_routed_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    base = mixture("glm4_moe", tmp_path / "base", tiny_tokenizer, **experts)
    load_language_model(str(base), dtype=torch.float32, lora=LoraSettings(r=2))
    assert "leaves 6 linear modules with the same names without an adapter, e.g. model.layers.0.mlp.gate_proj" in caplog.text
    load_language_model(str(base), dtype=torch.float32, lora=LoraSettings(r=2, target_modules=["q_proj", "down_proj"]))
    assert "leaves 2 linear modules with the same names without an adapter, e.g. model.layers.0.mlp.down_proj" in caplog.text


def test_an_adapter_of_a_router_that_peft_cannot_load_again_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """AFMoE's router is a linear layer, which peft treats as a parameter. Training worked on nf4, and publishing failed."""
    experts = {"num_experts": 2, "num_dense_layers": 1, "num_shared_experts": 1, "layer_types": ["full_attention", "full_attention"]}
    base = mixture("afmoe", tmp_path / "base", tiny_tokenizer, **experts)
    source = ResolvedModel("one", "folder", str(base), "", ModelInput(ref="one", quantization="nf4"))
    with pytest.raises(ModelError, match="adapter of model.layers.1.mlp.router.gate .* one of a parameter, but the module is quantized"):
        load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2))
    with pytest.raises(ModelError, match="one of a parameter, in spite of lora.exclude_modules. Name the modules"):
        load_language_model(str(base), dtype=torch.float32, lora=LoraSettings(r=2, exclude_modules=["router.gate"]))
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2, target_modules=["q_proj", "o_proj"]))
    save_model(model, tiny_tokenizer, tmp_path / "adapter")  # it compares the saved adapter


def test_a_field_that_peft_does_not_know_is_refused_or_named(
    tiny_llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """peft ignores such a field of a newer version with a warning. What is off has no effect."""
    foreign(tiny_llama_folder, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def load(**fields: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        load_language_model(str(tmp_path), dtype=torch.float32)

    load(use_future=False, future_config=None, future_list=[])
    assert "does not know" not in caplog.text
    for value in (True, {"size": 2}, ["q_proj"]):
        with pytest.raises(ModelError, match="needs a newer peft: its adapter_config.json has use_future=.*Update peft"):
            load(use_future=value)
    load(future_size=16)
    assert "the installed peft does not know future_size=16 and ignores it" in caplog.text


def test_weights_in_a_pickle_file_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    foreign(tiny_llama_folder, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model.bin, a pickle file that can run code; save it again with peft"):
        load_language_model(str(tmp_path), dtype=torch.float32)


# Several roles on one backbone


def backbone_of(policy: ResolvedModel) -> SharedBackbone:
    return SharedBackbone(policy, dtype=torch.float32, device=torch.device("cpu"), lora=LoraSettings(r=2))


@pytest.mark.parametrize("kind", ["rows", "full modules", "one norm", "embedding", "rslora", "dora", "PiSSA", "OLoRA"])
def test_roles_on_one_backbone_keep_their_own_copies(kind: str, tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The policy's adapter has rows or modules, the reward model's adapter has none. Each computes the same as on a separate backbone."""
    expected = foreign(tiny_llama_folder, tmp_path / "policy", **KINDS[kind])
    tiny_tokenizer.save_pretrained(tmp_path / "policy")
    reward_model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=LoraSettings(r=2), trainable=False)
    reward_model.save(tmp_path / "reward", tiny_tokenizer)
    mask = torch.ones_like(IDS)
    scores = reward_model.score_tokens(IDS, mask)
    backbone = backbone_of(as_resolved(tmp_path / "policy"))
    below = backbone.frozen(as_resolved(tmp_path / "policy"))
    backbone.new_adapter("default", below)
    assert backbone.is_base_of(as_resolved(tmp_path / "reward"))
    shared = backbone.reward_model(as_resolved(tmp_path / "reward"))
    for _ in range(2):
        backbone.activation(below)()
        torch.testing.assert_close(logits_of(backbone.model), expected, rtol=1e-4, atol=1e-5)
        backbone.activation([*below, "default"])()
        torch.testing.assert_close(logits_of(backbone.model), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(shared.score_tokens(IDS, mask), scores.detach(), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_changes_the_base_is_refused_on_a_shared_backbone(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, attention_bias=True)
    plain.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tiny_llama_folder)).save_pretrained(tmp_path / "base")
    foreign(tmp_path / "base", tmp_path / "policy", **KINDS["trained biases"])
    backbone = backbone_of(as_resolved(tmp_path / "policy"))
    with pytest.raises(ModelError, match="changes weights of its base .*bias.* but other roles use that base"):
        backbone.frozen(as_resolved(tmp_path / "policy"))


def test_adapters_that_peft_cannot_combine_are_refused_with_a_way_out(tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """peft combines adapters of parameters, such as experts, only if all change the same ones."""
    foreign(tiny_llama_folder, tmp_path / "up", target_parameters=["mlp.up_proj.weight"])
    foreign(tiny_llama_folder, tmp_path / "down", target_parameters=["mlp.down_proj.weight"])
    tiny_tokenizer.save_pretrained(tmp_path / "up")
    backbone = backbone_of(as_resolved(tmp_path / "up"))
    backbone.frozen(as_resolved(tmp_path / "up"))
    with pytest.raises(ModelError, match="must target the same set of parameters.*export that model merged"):
        add_adapter(backbone.model, as_resolved(tmp_path / "down"), "above")


def test_an_update_and_rows_of_one_embedding_are_refused_on_a_shared_backbone(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Each of them works alone. Both also work in a separate stack, where the lower one is merged."""
    foreign(tiny_llama_folder, tmp_path / "rows", **KINDS["rows"])
    tiny_tokenizer.save_pretrained(tmp_path / "rows")
    merged = load_language_model(str(tmp_path / "rows"), dtype=torch.float32, trainable=False)
    expected = foreign(tmp_path / "rows", tmp_path / "update", loaded=merged, **KINDS["embedding"])
    torch.testing.assert_close(
        logits_of(load_language_model(str(tmp_path / "update"), dtype=torch.float32)), expected, rtol=1e-4, atol=1e-5
    )
    backbone = backbone_of(as_resolved(tmp_path / "update"))
    with pytest.raises(ModelError, match="change model.embed_tokens in different ways .update, full copy, rows., which"):
        backbone.frozen(as_resolved(tmp_path / "update"))
    shared = SharedBackbone(
        as_resolved(tmp_path / "rows"),
        dtype=torch.float32,
        device=torch.device("cpu"),
        lora=LoraSettings(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    with pytest.raises(ModelError, match="the new adapter and another adapter on the same weights change lm_head"):
        shared.new_adapter("default", shared.frozen(as_resolved(tmp_path / "rows")))


def test_a_reward_model_that_names_the_output_layer_it_does_not_have_shares_a_backbone(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The settings of a policy are often used for its reward model, too."""
    lora = LoraSettings(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    alone = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=lora, trainable=False)
    alone.save(tmp_path / "reward", tiny_tokenizer)
    shared = backbone_of(as_resolved(tiny_llama_folder)).reward_model(as_resolved(tmp_path / "reward"))
    with torch.no_grad():
        expected, scores = (one.score_tokens(IDS, torch.ones_like(IDS)) for one in (alone, shared))
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("copies", [["norm", "lm_head"], ["model.embed_tokens", "lm_head"]])
def test_a_value_network_on_a_shared_backbone_is_saved_with_its_full_modules(
    copies: list[str], tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Modules have other full names in a language model and in the transformer of a value network.

    peft loads the saved adapter, too, unless a name is the end of another one: it takes input_layernorm for norm.
    """
    from peft import PeftModel
    from transformers import AutoModel

    from stages.models.heads import ValueModel

    source, lora = as_resolved(tiny_llama_folder), LoraSettings(r=2, target_modules=["q_proj"], modules_to_save=copies)
    backbone = SharedBackbone(source, dtype=torch.float32, device=torch.device("cpu"), lora=lora)
    value = backbone.value_model(source, with_head=False)
    with torch.no_grad():
        value.score_head.weight.normal_()
        for name, parameter in backbone.named_parameters("value"):
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    expected = value.score_tokens(IDS, torch.ones_like(IDS)).detach()
    value.save(tmp_path / "value", tiny_tokenizer)
    saved = ResolvedModel("value", "folder", str(tmp_path / "value"), "", ModelInput(ref="value"), base=source)
    again = ValueModel.from_pretrained(saved, dtype=torch.float32).score_tokens(IDS, torch.ones_like(IDS))
    torch.testing.assert_close(again.detach(), expected, rtol=1e-4, atol=1e-4)
    if "norm" in copies:
        return
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_llama_folder), str(tmp_path / "value"))
    with torch.no_grad():
        hidden = by_peft(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(value.score_head(hidden).view_as(expected), expected, rtol=1e-4, atol=1e-4)


def test_a_policy_with_new_tokens_trains_their_rows_apart_from_its_value_network(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from stages.models.heads import ValueModel

    tokenizer = load_tokenizer(str(tiny_llama_folder))
    tokenizer.add_tokens(["<a>", "<b>"])
    load_language_model(str(tiny_llama_folder), dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    source = as_resolved(tmp_path / "base")
    backbone = backbone_of(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exclude_modules")  # of peft, if a name in it excludes nothing
        backbone.new_adapter("default")
        value = backbone.value_model(source, with_head=False)
    for role in ("default", "value"):
        names = [name for name, parameter in backbone.named_parameters(role) if parameter.requires_grad]
        assert any("trainable_tokens_delta" in name for name in names)
    ids = torch.tensor([[5, 300, 301, 7]])
    with torch.no_grad():
        value.score_head.weight.normal_()
        for number, role in enumerate(("default", "value")):
            for name, parameter in backbone.named_parameters(role):
                if "trainable_tokens" in name:
                    parameter.add_(number + 1.0)
    values = value.score_tokens(ids, torch.ones_like(ids)).detach()
    value.save(tmp_path / "value", tokenizer)  # publishing checks that the saved adapter computes the same
    read = ValueModel.from_pretrained(
        ResolvedModel("value", "folder", str(tmp_path / "value"), "", ModelInput(ref="value"), base=source), dtype=torch.float32
    )
    torch.testing.assert_close(read.score_tokens(ids, torch.ones_like(ids)).detach(), values, rtol=1e-4, atol=1e-4)
    backbone.activation(["default"])()
    save_model(backbone.model, tokenizer, tmp_path / "policy")
    policy = ResolvedModel("policy", "folder", str(tmp_path / "policy"), "", ModelInput(ref="policy"), base=source)
    expected = backbone.model(input_ids=ids).logits.detach()
    again = load_language_model(policy, dtype=torch.float32)
    torch.testing.assert_close(again(input_ids=ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)
