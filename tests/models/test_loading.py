"""Loading: a pad token other than the end token, refusal of incomplete models, adapters, and quantized weights."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.auto import tokenization_auto

from stages.config import LoraSettings, ModelInput
from stages.corpora.templates import encode_prompt
from stages.errors import ModelError
from stages.models import loading
from stages.models.adapters.exporting import export_merged
from stages.models.heads import RewardModel
from stages.models.layers.dropout import disable_dropout
from stages.models.loading import ensure_pad_token, load_classifier, load_language_model, load_tokenizer
from stages.models.saving import save_model, save_tokenizer

IDS = torch.tensor([[5, 17, 40, 3, 250]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_missing_pad_token_becomes_the_unknown_token(shared_data: Path) -> None:
    folder = shared_data / "stories260K" / "hf"
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    model = load_language_model(str(folder), dtype=torch.float32, tokenizer=tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == 512  # no token was added
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_end_token_as_pad_token_is_replaced_and_logged_once(
    tiny_llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(str(tiny_llama_folder))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    loading._warned.clear()
    with caplog.at_level(logging.WARNING):
        first, _ = load_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert first.pad_token == "[PAD]"
    assert first.pad_token_id != first.eos_token_id
    assert sum("pads with its end token" in record.message for record in caplog.records) == 1


def test_a_good_pad_token_and_the_padding_side_stay(tiny_tokenizer: Any) -> None:
    before = tiny_tokenizer.pad_token_id, tiny_tokenizer.padding_side, len(tiny_tokenizer)
    ensure_pad_token(tiny_tokenizer)
    assert (tiny_tokenizer.pad_token_id, tiny_tokenizer.padding_side, len(tiny_tokenizer)) == before


def test_the_tokenizer_does_not_depend_on_an_installed_mistral_common(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With that package, transformers chooses a tokenizer that encodes the special tokens of a chat template as plain text."""
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "mistral"))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    (folder / "tekken.json").write_text("{}")
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    monkeypatch.setattr("transformers.integrations.mistral.tokenizer.is_mistral_common_available", lambda: True)
    assert load_tokenizer(str(folder))("a<|endoftext|>")["input_ids"] == tiny_tokenizer("a<|endoftext|>")["input_ids"]


@pytest.mark.parametrize("name", ["processor_config.json", "chat_template.json"])
def test_a_chat_template_that_only_the_processor_has_is_used(tiny_llama_folder: Path, tmp_path: Path, name: str) -> None:
    template = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    (folder / name).write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(encode_prompt(tokenizer, "the film")) == "the film<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == template
    (folder / "chat_template.jinja").write_text("{{ 'own' }}")
    assert load_tokenizer(str(folder)).chat_template == "{{ 'own' }}"


def test_new_rows_of_the_embedding_are_the_mean_of_the_old_and_reported_once(
    tiny_llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(str(tiny_llama_folder))
    plain = load_language_model(str(tiny_llama_folder), dtype=torch.float32, tokenizer=tokenizer)
    assert "were added" not in caplog.text
    tokenizer.add_tokens(["<new>"])
    for _ in range(2):
        grown = load_language_model(str(tiny_llama_folder), dtype=torch.float32, tokenizer=tokenizer)
    assert caplog.text.count("has too few rows for its tokenizer; 1 were added") == 1
    rows = plain.get_input_embeddings().weight
    assert grown.get_input_embeddings().weight.shape[0] == rows.shape[0] + 1
    torch.testing.assert_close(grown.get_input_embeddings().weight[-1], rows.mean(dim=0))
    torch.testing.assert_close(grown.get_output_embeddings().weight[-1], plain.get_output_embeddings().weight.mean(dim=0))


def test_saved_and_loaded_is_the_same_model(tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    save_model(model, tiny_tokenizer, tmp_path)
    again = load_language_model(str(tmp_path), dtype=torch.float32)
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=0)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}


def test_a_saved_tokenizer_encodes_the_same_tokens(tokenizer_of: Any, tmp_path: Path) -> None:
    """transformers loses ``legacy`` of LlamaTokenizer (Yi, Vicuna): a space before the text after a special token."""
    tokenizer_of("metaspace").save_pretrained(tmp_path / "llama")
    config = tmp_path / "llama" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "LlamaTokenizer", "legacy": True}))
    tokenizer, text = load_tokenizer(str(tmp_path / "llama")), "<|begin|>hello there"
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert tokenizer.tokenize(text) == ["<|begin|>", "▁hello", "▁there"] == load_tokenizer(str(tmp_path / "saved")).tokenize(text)


def test_frozen_models_have_no_trainable_weight(tiny_llama_folder: Path) -> None:
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path, tiny_llama_folder: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelError, match="pytorch_model.bin: pickle files can run code"):
        load_language_model(str(tmp_path), dtype=torch.float32)


def test_a_folder_without_weights_is_an_error_with_a_next_move(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a folder written by save_pretrained"):
        load_language_model(str(tmp_path), dtype=torch.float32)
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_missing_transformer_weights_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_llama_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_llama_folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"lacks weights of LlamaForCausalLM .model.layers.1.mlp.up_proj.weight"):
        load_language_model(str(tmp_path), dtype=torch.float32)


def test_a_classifier_without_a_head_is_refused_unless_it_is_to_be_trained(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no trained head"):
        load_classifier(str(tiny_llama_folder), dtype=torch.float32)
    model = load_classifier(str(tiny_llama_folder), dtype=torch.float32, labels=["negative", "positive"], require_head=False)
    save_model(model, load_tokenizer(str(tiny_llama_folder)), tmp_path)
    again = load_classifier(str(tmp_path), dtype=torch.float32)
    assert again.config.id2label == {0: "negative", 1: "positive"}
    torch.testing.assert_close(again.score.weight, model.score.weight)
    with pytest.raises(ModelError, match="no trained head"):
        load_classifier(str(tmp_path), dtype=torch.float32, labels=["a", "b", "c"])


def test_dropout_is_switched_off_in_modules_and_in_attention(tiny_tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.5)
    )
    for model in (gpt2, llama):
        disable_dropout(model)
        model.train()
        torch.testing.assert_close(model(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)
    assert llama.config.attention_dropout == 0.5  # the saved config has not changed


def adapted(folder: Path, target: Path, tokenizer: Any) -> Any:
    """A model with a LoRA adapter that changes its outputs. The adapter is also saved in ``target``."""
    return adapted_from(str(folder), target, tokenizer)


def adapted_from(source: Any, target: Path, tokenizer: Any, seed: int = 1) -> Any:
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=4))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    save_model(model, tokenizer, target)
    return model


def test_new_adapter_is_an_identity_and_only_it_trains(tiny_llama_folder: Path) -> None:
    plain = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=LoraSettings())
    torch.testing.assert_close(logits_of(model), logits_of(plain))
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with pytest.raises(ModelError, match="Linear modules here:.*q_proj"):
        load_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=LoraSettings(target_modules=["nothing"]))


def test_a_chain_of_adapters_loads_from_the_bottom_up(tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    first = adapted(tiny_llama_folder, tmp_path / "one", tiny_tokenizer)
    second = adapted(tmp_path / "one", tmp_path / "two", tiny_tokenizer)
    with second.disable_adapter():
        torch.testing.assert_close(logits_of(second), logits_of(first))  # the reference of a PPO step
    loaded = load_language_model(str(tmp_path / "two"), dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), logits_of(second))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_registry_exports_an_adapter_merged(
    tiny_llama_folder: Path, tiny_tokenizer: Any, step_context: Any, resolve_folder: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = resolve_folder(tiny_llama_folder)
    model = adapted(tiny_llama_folder, tmp_path / "adapter", tiny_tokenizer)
    context = step_context(models={"model": base})
    record = context.publish(lambda folder: save_model(model, tiny_tokenizer, folder), role="language_model", metrics={}, base=base)
    assert str(tmp_path) not in (record.path / "adapter_config.json").read_text()
    context.registry.export(record.ref, tmp_path / "exported", merge=export_merged)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(logits_of(exported), logits_of(model))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_models_answer_and_train_an_adapter(
    tiny_llama_folder: Path, tiny_tokenizer: Any, resolve_folder: Any, tmp_path: Path, quantization: str
) -> None:
    source = resolve_folder(tiny_llama_folder, quantization=quantization)
    full = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings())
    assert torch.nn.functional.cosine_similarity(logits_of(model).flatten(), logits_of(full).flatten(), dim=0) > 0.95
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)
    with pytest.raises(ModelError, match="quantized weights cannot be trained"):
        load_language_model(source, dtype=torch.float32)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_weights_are_the_same_in_every_dtype(tiny_llama_folder: Path, resolve_folder: Any, quantization: str) -> None:
    """An adapter is trained in bf16 on a GPU, and merged in fp32. The expected weights are those of transformers from a load in fp32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if quantization == "nf4" else {"load_in_8bit": True}
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_llama_folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    source = resolve_folder(tiny_llama_folder, quantization=quantization, double_quantization=False)
    half = load_language_model(source, dtype=torch.bfloat16, trainable=False)
    name = "model.layers.1.mlp.down_proj"
    assert half.model.norm.weight.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(half.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert half(input_ids=IDS).logits.dtype == torch.bfloat16
    if quantization == "nf4":
        assert half.get_submodule(name).weight.quant_state.dtype == torch.bfloat16


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 1e-5), ("int8", 2e-2)])
def test_merge_into_quantized_base_preserves_logprobs(
    tiny_llama_folder: Path,
    tiny_tokenizer: Any,
    step_context: Any,
    resolve_folder: Any,
    tmp_path: Path,
    quantization: str,
    tolerance: float,
) -> None:
    """An adapter on an adapter on quantized weights is loaded as it was trained, merged and exported. int8 also rounds activations, which
    full weights do not, so its tolerance is larger (logits are about 1)."""
    from stages.registry.references import ResolvedModel

    def resolved(record: Any, **fields: Any) -> ResolvedModel:
        return ResolvedModel(record.ref, "registry", str(record.path), record.digest, ModelInput(ref=record.ref, **fields), record)

    below: Any = resolve_folder(tiny_llama_folder, quantization=quantization)
    for number in range(2):
        model = adapted_from(below, tmp_path / str(number), tiny_tokenizer, seed=number)
        context = step_context(f"test/step-{number}", models={"model": below})
        save = lambda folder, model=model: save_model(model, tiny_tokenizer, folder)  # noqa: E731
        record = context.publish(save, role="language_model", metrics={}, base=below)
        below = resolved(record, quantization=quantization)
    expected = logits_of(model)
    again = load_language_model(below, dtype=torch.float32, trainable=False)
    torch.testing.assert_close(logits_of(again), expected)
    torch.testing.assert_close(logits_of(load_language_model(resolved(record), dtype=torch.float32)), expected, rtol=0, atol=tolerance)
    context.registry.export(record.ref, tmp_path / "exported", merge=export_merged)
    from transformers import AutoModelForCausalLM

    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")), expected, rtol=0, atol=tolerance)
    plain = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    assert (logits_of(plain) - expected).abs().max() > 5 * tolerance  # the adapters change the outputs


def test_a_classifier_adapter_keeps_its_head_and_labels(tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = load_classifier(str(tiny_llama_folder), dtype=torch.float32, labels=["bad", "good"], require_head=False, lora=LoraSettings())
    save_model(model, tiny_tokenizer, tmp_path)
    again = load_classifier(str(tmp_path), dtype=torch.float32, tokenizer=tiny_tokenizer)
    assert again.config.id2label == {0: "bad", 1: "good"}
    torch.testing.assert_close(logits_of(again), logits_of(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_a_saved_model_stops_where_its_chat_template_ends_a_turn(tiny_llama_folder, tokenizer_of, tmp_path) -> None:
    """Programs that read the generation config alone stop there, too."""
    from transformers import AutoModelForCausalLM

    from stages.models.saving import save_model

    tokenizer = tokenizer_of("byte_bpe")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    own = model.generation_config.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    save_model(model, tokenizer, tmp_path, state_dict=model.state_dict())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert saved == [own, tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_mixture_of_experts_is_loaded_without_its_router_loss(family: str, tmp_path: Path) -> None:
    """TRL's SFT leaves ``output_router_logits: true`` in the config. That loss takes no attention bias of four dimensions."""
    import transformers

    from stages.config import GenerationSettings
    from stages.sampling.generation import generate

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.CONFIG_MAPPING[family](**sizes, **heads, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path), dtype=torch.float32, trainable=False)
    assert model.config.output_router_logits is False
    assert model.config.num_experts == 2  # the name by which TRL asks
    settings = GenerationSettings(max_new_tokens=3, temperature=0.0)
    made = generate(model, [[5, 6, 7], [8]], settings, seeds=[0, 1], stop_ids=[], late_stop_ids=[], pad_token_id=0)
    for prompt, response in zip([[5, 6, 7], [8]], made.response_ids.tolist(), strict=True):
        for token in response:  # one row at a time, without a cache
            with torch.no_grad():
                assert token == int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
            prompt = [*prompt, token]


@pytest.mark.parametrize("said", [True, False])
def test_a_saved_config_has_the_router_setting_of_the_input_model(said: bool, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Loading sets it to false, and TRL's SFT sets it as its own loss needs it."""
    import transformers

    sizes = {"vocab_size": len(tiny_tokenizer), "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
    base = tmp_path / "base"
    config = transformers.Qwen3MoeConfig(**sizes, **layers, output_router_logits=said)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    model = load_language_model(str(base), dtype=torch.float32)
    for used in (True, False):
        model.config.output_router_logits = used
        save_model(model, tiny_tokenizer, tmp_path / "language")
        assert model.config.output_router_logits is used
        assert transformers.AutoConfig.from_pretrained(tmp_path / "language").output_router_logits is said
    RewardModel.from_language_model(str(base), dtype=torch.float32).save(tmp_path / "reward")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "reward").output_router_logits is said


def test_a_model_with_fewer_outputs_than_embedding_rows_is_saved(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Moshi's embedding has one more row than its output layer: a token that is read, but never predicted."""
    import transformers

    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    config = transformers.MoshiConfig(vocab_size=len(tiny_tokenizer), **sizes, pad_token_id=tiny_tokenizer.pad_token_id)
    transformers.MoshiForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load_language_model(str(tmp_path / "base"), dtype=torch.float32, tokenizer=tiny_tokenizer)
    save_model(model, tiny_tokenizer, tmp_path / "saved")
    again = transformers.MoshiForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(model))


def test_passes_of_a_decoder_of_bigbird_are_not_random(tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the first short text transformers replaces its sparse attention by new modules, which have dropout."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "block_size": 4}
    config = transformers.BigBirdConfig(vocab_size=len(tiny_tokenizer), **sizes, is_decoder=True, attention_type="block_sparse")
    transformers.BigBirdForCausalLM(config).save_pretrained(tmp_path)
    full = transformers.BigBirdForCausalLM.from_pretrained(tmp_path, attention_type="original_full").eval()
    model = load_language_model(str(tmp_path), dtype=torch.float32).train()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, full(input_ids=IDS).logits)
    assert "computes with full attention" in caplog.text


@pytest.mark.parametrize("role", ["reward_model", "value_model", "classifier"])
def test_a_model_that_predicts_scores_is_not_loaded_as_a_language_model(role: str, resolve_folder: Any, tiny_llama_folder: Path) -> None:
    model = replace(resolve_folder(tiny_llama_folder), record=SimpleNamespace(role=role))
    with pytest.raises(ModelError, match=f"is a {role.replace('_', ' ')}, which predicts scores; expected a language model"):
        load_language_model(model, dtype=torch.float32)
