"""An adapter computes the same while it is trained, when peft loads it, when it is loaded here, and when it is merged and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError
from stages.models.adapters.exporting import save_merged
from stages.models.loading import load_backbone, load_language_model, load_tokenizer
from stages.models.saving import save_model
from stages.registry.references import ResolvedModel

VOCABULARY = 300
IDS = torch.tensor([[5, 17, 40, 3, 250, 299]])
NEW_IDS = torch.tensor([[5, 300, 40, 301, 250, 302, 7]])  # three tokens that the model has no rows for
TARGETS = {
    "all-linear": {"target_modules": "all-linear"},
    "one": {"target_modules": ["q_proj"]},
    "pattern": {"target_modules": r".*\.0\.self_attn\.(q|v)_proj"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "output": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved output": {"modules_to_save": ["lm_head"]},
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """One-layer models with and without tied weights, and a GPT-2, whose layers are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    made = {}
    for tied in (True, False):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        special = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, initializer_range=0.3, **sizes, **special))
        made["tied" if tied else "untied"] = model
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    made["gpt2"] = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **sizes, eos_token_id=0, pad_token_id=1))
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tiny_tokenizer.save_pretrained(folders[name])
    return folders


def resolved(path: Path, base: ResolvedModel | None = None, **fields: Any) -> ResolvedModel:
    return ResolvedModel(str(path), "folder", str(path), "", ModelInput(ref=str(path), **fields), base=base)


def disturb(model: Any, seed: int = 1) -> None:
    """Change every trainable weight from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def by_peft(adapter: Path, base: Path, quantization: str, rows: int = VOCABULARY) -> Any:
    """The adapter, loaded by peft on a base that transformers loads."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kinds = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}
    options = {"quantization_config": BitsAndBytesConfig(**kinds[quantization])} if quantization != "none" else {}
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options)
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if rows > VOCABULARY:
        loaded.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(loaded, adapter)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, quantization: str = "none") -> None:
    """int8 layers also round activations, unlike merged weights: the difference may be 8 percent of the logits' size."""
    if quantization == "int8":
        assert (actual - expected).pow(2).mean() < 0.08**2 * expected.pow(2).mean()
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


CASES = [
    (target, base, quantization)
    for target in TARGETS
    for base in ("tied", "untied")
    for quantization in ("none", "nf4", "int8")
    if quantization != "int8" or (base == "tied" and target in ("all-linear", "embedding", "both", "saved both"))
]


@pytest.mark.parametrize(("target", "base", "quantization"), CASES)
def test_adapter_gives_equal_outputs_trained_loaded_stacked_and_exported(
    bases: dict[str, Path], tiny_tokenizer: Any, tmp_path: Path, target: str, base: str, quantization: str
) -> None:
    from transformers import AutoModelForCausalLM

    source = resolved(bases[base], quantization=quantization)
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2, **TARGETS[target]))
    before = logits_of(model)
    disturb(model)
    expected = logits_of(model)
    assert (expected - before).abs().max() > 0.1
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    assert_same(logits_of(by_peft(tmp_path / "adapter", bases[base], quantization)), expected)
    adapter = resolved(tmp_path / "adapter", source, quantization=quantization)
    assert_same(logits_of(load_language_model(adapter, dtype=torch.float32, trainable=False)), expected)
    save_merged(adapter, tmp_path / "merged")
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, quantization)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("settings", [{}, {"target_modules": ["wte", "c_attn"]}, {"target_modules": ["lm_head", "c_proj"]}])
def test_adapters_on_the_transposed_layers_of_gpt2_are_saved_and_merged(
    bases: dict[str, Path], tiny_tokenizer: Any, tmp_path: Path, settings: dict[str, Any], quantization: str
) -> None:
    from transformers import AutoModelForCausalLM

    source = resolved(bases["gpt2"], quantization=quantization)
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2, **settings))
    disturb(model)
    expected = logits_of(model)
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    assert_same(logits_of(by_peft(tmp_path / "adapter", bases["gpt2"], quantization)), expected)
    save_merged(resolved(tmp_path / "adapter", source), tmp_path / "merged")
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, quantization)


FORMS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rank-stabilized": {"use_rslora": True},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, rank-stabilized": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {r"mlp\..*": 8}},
    "OLoRA": {"init_lora_weights": "olora"},
    "patterns": {"rank_pattern": {r"mlp\..*": 2}, "alpha_pattern": {r".*\.0\..*": 5.5}},
    "excluded": {"exclude_modules": ["down_proj", "self_attn.k_proj"]},
    "excluded by an expression": {"exclude_modules": r".*\.mlp\..*"},
}
ON = [("untied", "none"), ("gpt2", "none"), ("untied", "nf4"), ("gpt2", "nf4"), ("untied", "int8")]
FORMS_ON = [(form, *on) for form in FORMS for on in ON if (form, on[1]) != ("DoRA", "int8") and (form, on[0]) != ("excluded", "gpt2")]


@pytest.mark.parametrize(("form", "base", "quantization"), FORMS_ON)
def test_every_form_starts_as_the_identity_and_is_equal_in_peft_and_merged(
    bases: dict[str, Path], tiny_tokenizer: Any, tmp_path: Path, form: str, base: str, quantization: str
) -> None:
    """Also above an adapter of the same form, whose merge is loaded by transformers alone."""
    from transformers import AutoModelForCausalLM

    source, lora = resolved(bases[base], quantization=quantization), LoraSettings(r=4, **FORMS[form])
    model = load_language_model(source, dtype=torch.float32, lora=lora)
    assert_same(logits_of(model), logits_of(load_language_model(source, dtype=torch.float32, trainable=False)))
    disturb(model)
    expected = logits_of(model)
    save_model(model, tiny_tokenizer, tmp_path / "one")
    assert_same(logits_of(by_peft(tmp_path / "one", bases[base], quantization)), expected)
    one = resolved(tmp_path / "one", source, quantization=quantization)
    above = load_language_model(one, dtype=torch.float32, lora=lora)
    assert_same(logits_of(above), expected)
    disturb(above, 2)
    save_model(above, tiny_tokenizer, tmp_path / "two")
    save_merged(resolved(tmp_path / "two", one), tmp_path / "merged")
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(above), quantization)


@pytest.mark.parametrize("form", ["PiSSA", "OLoRA", "DoRA", "rank-stabilized", "patterns", "excluded by an expression"])
def test_training_equals_that_of_peft(bases: dict[str, Path], form: str) -> None:
    """The gradients of every adapter weight, and the outputs after a step along them. peft changes the base for PiSSA and OLoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": "all-linear", **FORMS[form]}
    plain = AutoModelForCausalLM.from_pretrained(bases["untied"], attn_implementation="eager")
    reference = get_peft_model(plain, LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **settings))
    model = load_language_model(str(bases["untied"]), dtype=torch.float32, lora=LoraSettings(r=4, **FORMS[form]))
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    theirs = {name: parameter for name, parameter in reference.named_parameters() if parameter.requires_grad}
    assert own.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(theirs[name])
    for one in (model, reference):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        for parameter in (*own.values(), *theirs.values()):
            parameter.sub_(0.1 * parameter.grad)
    assert_same(logits_of(model), logits_of(reference))


@pytest.mark.parametrize("form", ["PiSSA, rank-stabilized", "OLoRA", "patterns"])
def test_the_adapter_for_a_server_computes_the_same(bases: dict[str, Path], tmp_path: Path, form: str) -> None:
    """vLLM gets plain LoRA of one rank for the base, also during the training of an adapter that starts from the weights."""
    from stages.models.adapters.served import updates_of, write_adapter

    model = load_language_model(str(bases["untied"]), dtype=torch.float32, lora=LoraSettings(r=4, **FORMS[form]))
    disturb(model)
    write_adapter(updates_of(model), tmp_path / "served", str(bases["untied"]))
    assert_same(logits_of(by_peft(tmp_path / "served", bases["untied"], "none")), logits_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"nothing": 4}}, "lora.rank_pattern names 'nothing', but no module with an adapter has this name"),
        ({"alpha_pattern": {"lm_head": 4.0}}, "lora.alpha_pattern names 'lm_head', but no module with an adapter has this name"),
        (
            {"alpha_pattern": {r"mlp.*": 4.0, "down_proj": 2.0}},
            r"several numbers for model.layers.0.mlp.down_proj: 'mlp.\*': 4, 'down_proj': 2",
        ),
        ({"exclude_modules": ["mlp"]}, "lora.exclude_modules: 'mlp' is no linear module .* of LlamaForCausalLM, so it excludes nothing"),
        ({"exclude_modules": "nothing"}, "lora.exclude_modules: 'nothing' is no linear module"),
        ({"exclude_modules": ".*"}, "no adapter with exclude_modules='.*' fits LlamaForCausalLM"),
        ({"r": 40, "init_lora_weights": "pissa"}, "needs a rank of at most 32 for .*q_proj, but it is 40. Lower lora.r"),
        ({"target_modules": ["embed_tokens"], "init_lora_weights": "olora"}, "impossible for model.embed_tokens, which is no linear layer"),
    ],
)
def test_settings_without_effect_or_room_are_refused(bases: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_language_model(str(bases["tied"]), dtype=torch.float32, lora=LoraSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "("}, r"'\(' is not a regular expression: missing \)"),
        (
            {"exclude_modules": "(?i).*MLP.*"},
            r"is not a regular expression: global flags not at the start .*; write the flags as \(\?i:...\)",
        ),
        ({"rank_pattern": {"(?i)MLP": 2}}, "is not a regular expression: global flags"),
        ({"alpha_pattern": {"a)(b": 2.0}}, "is not a regular expression: unbalanced parenthesis"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 must be greater than 0"),
        ({"r": 4, "rank_pattern": {"q_proj": 3}, "init_lora_weights": "orthogonal"}, "needs even ranks, but a rank is 3"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "init_lora_weights=pissa and use_dora cannot be combined"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraSettings(**settings)


def test_flags_of_an_expression_are_allowed_where_it_is_used_alone() -> None:
    settings = LoraSettings(target_modules="(?i).*Q_PROJ", exclude_modules="(?i:.*MLP.*)")
    assert (settings.target_modules, settings.exclude_modules) == ("(?i).*Q_PROJ", "(?i:.*MLP.*)")


# Tokens that the model has no rows for


@pytest.fixture
def larger_tokenizer(bases: dict[str, Path]) -> Any:
    tokenizer = load_tokenizer(str(bases["tied"]))
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    return tokenizer


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("base", ["tied", "untied", "gpt2"])
def test_rows_of_new_tokens_train_and_are_saved(
    bases: dict[str, Path], larger_tokenizer: Any, tmp_path: Path, base: str, quantization: str
) -> None:
    from transformers import AutoModelForCausalLM

    source = resolved(bases[base], quantization=quantization)
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2), tokenizer=larger_tokenizer)
    model.train()(input_ids=NEW_IDS, labels=NEW_IDS).loss.backward()
    rows = {name: value.grad for name, value in model.named_parameters() if "trainable_tokens_delta" in name}
    assert len(rows) == (2 if base == "untied" else 1)  # with tied weights the output layer follows the embedding
    assert all(gradient is not None and bool((gradient.abs().sum(dim=1) > 0).all()) for gradient in rows.values())
    disturb(model)
    expected = logits_of(model, NEW_IDS)
    save_model(model, larger_tokenizer, tmp_path / "adapter")
    # peft grows its base with random rows; the adapter brings its own, for input and output alike
    again = logits_of(by_peft(tmp_path / "adapter", bases[base], quantization, rows=303), NEW_IDS)
    assert_same(again, expected)
    adapter = resolved(tmp_path / "adapter", source, quantization=quantization)
    assert_same(logits_of(load_language_model(adapter, dtype=torch.float32, trainable=False), NEW_IDS), expected)
    hidden = load_backbone(adapter, dtype=torch.float32, trainable=False)(input_ids=NEW_IDS).last_hidden_state
    reloaded = load_language_model(adapter, dtype=torch.float32, trainable=False)
    assert_same(hidden, reloaded(input_ids=NEW_IDS, output_hidden_states=True).hidden_states[-1])
    save_merged(adapter, tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert exported.config.tie_word_embeddings == (base != "untied")
    assert_same(logits_of(exported, NEW_IDS), expected)


def test_the_pad_token_s_row_does_not_train(bases: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(bases["tied"]))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = load_language_model(str(bases["tied"]), dtype=torch.float32, lora=LoraSettings(r=2), tokenizer=tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == 301
    assert not any("trainable_tokens" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        ("untied", {"modules_to_save": ["embed_tokens"]}, "put both into lora.modules_to_save: .embed_tokens, lm_head."),
        ("tied", {"modules_to_save": ["embed_tokens"]}, "remove embed_tokens from lora.modules_to_save"),
        ("tied", {"target_modules": ["embed_tokens"]}, "lora.target_modules puts an adapter on their matrix"),
        ("untied", {"target_modules": ".*lm_head"}, "lora.target_modules puts an adapter on their matrix"),
    ],
)
def test_rows_that_cannot_train_are_refused(
    bases: dict[str, Path], larger_tokenizer: Any, base: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_language_model(str(bases[base]), dtype=torch.float32, lora=LoraSettings(**settings), tokenizer=larger_tokenizer)


def test_modules_to_save_contain_the_new_rows(bases: dict[str, Path], larger_tokenizer: Any, tmp_path: Path) -> None:
    lora = LoraSettings(r=2, modules_to_save=["embed_tokens", "lm_head"])
    model = load_language_model(str(bases["untied"]), dtype=torch.float32, lora=lora, tokenizer=larger_tokenizer)
    disturb(model)
    save_model(model, larger_tokenizer, tmp_path)
    again = load_language_model(str(tmp_path), dtype=torch.float32, trainable=False)
    assert_same(logits_of(again, NEW_IDS), logits_of(model, NEW_IDS))


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "nothing"]}, {"modules_to_save": ["nothing"]}])
def test_a_name_that_no_module_has_is_refused(bases: dict[str, Path], settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="names nothing, which LlamaForCausalLM does not have"):
        load_language_model(str(bases["tied"]), dtype=torch.float32, lora=LoraSettings(**settings))
    with pytest.raises(ModelError, match="no adapter with target_modules"):
        load_language_model(str(bases["tied"]), dtype=torch.float32, lora=LoraSettings(target_modules="nothing"))


def test_modules_to_save_train_only_the_named_modules(bases: dict[str, Path], tmp_path: Path, tiny_tokenizer: Any) -> None:
    """peft's own comparison takes input_layernorm for norm, too. A saved adapter names the module such that plain peft loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = LoraSettings(r=2, modules_to_save=["norm"])
    model = load_language_model(str(bases["tied"]), dtype=torch.float32, lora=lora)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert trained == ["base_model.model.model.norm.modules_to_save.default.weight"]
    disturb(model)
    save_model(model, tiny_tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(bases["tied"], attn_implementation="eager")
    assert_same(logits_of(model), logits_of(PeftModel.from_pretrained(plain, str(tmp_path))))
    with pytest.raises(ModelError, match="also reaches layers.0.input_layernorm of LlamaModel, because peft compares only the ends"):
        load_backbone(str(bases["tied"]), dtype=torch.float32, lora=lora)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_full_copies_of_quantized_modules_are_refused(quantization: str, bases: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="full weights of model.layers.0.mlp.gate_proj .modules_to_save., which is quantized. Remove"):
        load_language_model(
            resolved(bases["tied"], quantization=quantization), dtype=torch.float32, lora=LoraSettings(r=2, modules_to_save=["mlp"])
        )


def test_the_message_names_the_layers_of_a_model_under_adapters(bases: dict[str, Path], tiny_tokenizer: Any, tmp_path: Path) -> None:
    source = resolved(bases["gpt2"], quantization="nf4")
    save_model(load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2)), tiny_tokenizer, tmp_path)
    with pytest.raises(ModelError, match="Linear modules here: c_attn, c_fc, c_proj, lm_head; or use"):
        load_language_model(
            resolved(tmp_path, source, quantization="nf4"), dtype=torch.float32, lora=LoraSettings(target_modules=["q_proj"])
        )


# Stacks


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_each_of_three_stacked_adapters_computes_its_training_outputs(
    bases: dict[str, Path], larger_tokenizer: Any, tiny_tokenizer: Any, tmp_path: Path, quantization: str
) -> None:
    """New rows, then an adapter on embedding and output layer, then a fully saved module: each starts from the outputs of the one below."""
    from transformers import AutoModelForCausalLM

    below = resolved(bases["tied"], quantization=quantization)
    kinds: list[dict[str, Any]] = [{}, {"target_modules": ["embed_tokens", "v_proj"]}, {"modules_to_save": ["lm_head"]}]
    expected = None
    for number, settings in enumerate(kinds):
        model = load_language_model(below, dtype=torch.float32, lora=LoraSettings(r=2, **settings), tokenizer=larger_tokenizer)
        if expected is not None:
            assert_same(logits_of(model, NEW_IDS), expected)
        disturb(model, number)
        expected = logits_of(model, NEW_IDS)
        save_model(model, larger_tokenizer, tmp_path / str(number))
        below = resolved(tmp_path / str(number), below, quantization=quantization)
    assert expected is not None
    assert_same(logits_of(load_language_model(below, dtype=torch.float32, trainable=False), NEW_IDS), expected)
    save_merged(below, tmp_path / "merged")
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), NEW_IDS), expected)


@pytest.mark.parametrize("field", [None, "modules_to_save", "target_modules"])
def test_copies_in_fp32_work_on_a_bf16_base(bases: dict[str, Path], larger_tokenizer: Any, tmp_path: Path, field: str | None) -> None:
    """Without autocast, as in PPO and evaluation. Saving compares the saved adapter itself."""
    settings: dict[str, Any] = {field: ["embed_tokens", "lm_head"]} if field is not None else {}
    tokenizer = load_tokenizer(str(bases["untied"])) if field == "target_modules" else larger_tokenizer
    source = resolved(bases["untied"])
    model = load_language_model(source, dtype=torch.bfloat16, lora=LoraSettings(r=2, **settings), tokenizer=tokenizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    model(input_ids=IDS, labels=IDS).loss.backward()
    disturb(model)
    save_model(model, tokenizer, tmp_path / "adapter", rows=[IDS[0].tolist()])
    again = load_language_model(resolved(tmp_path / "adapter", source), dtype=torch.bfloat16, trainable=False)
    difference = (logits_of(again) - logits_of(model)).pow(2).mean().sqrt()
    assert difference < 0.05 * logits_of(model).pow(2).mean().sqrt()  # bf16 has 8 bits
