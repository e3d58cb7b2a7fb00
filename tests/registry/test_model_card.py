"""The card of an exported model: metadata that the Hub accepts, lineage, metrics, evaluations, and nothing of this machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from stages.config import LoraSettings, ModelInput
from stages.models.adapters.exporting import export_merged
from stages.registry.card import model_card, write_card
from stages.registry.ledger import Registry
from stages.registry.record import ModelRecord
from stages.registry.references import ResolvedModel


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "home" / "registry")


def publish(registry: Registry, name: str, save: Any, parents: list[ResolvedModel], **fields: Any) -> ModelRecord:
    sources = [{"path": "/home/me/secret place/prompts.jsonl", "columns": {}}, {"path": "owner/set", "columns": {}}]
    metrics = {"score": 0.5, "episodes": 5120, "alarms": []}
    settings = {"role": "language_model", "metrics": metrics, "data": {"data": "abcdef0123456789"}, **fields}
    return registry.publish(
        f"recipe/{name}", save, parents=parents, recipe_step={"name": name, "stage": "ppo", "data": sources}, **settings
    )


@pytest.fixture
def base(registry: Registry, tiny_llama_folder: Path) -> ModelRecord:
    import shutil

    hub = ResolvedModel("owner/raw", "hub", "owner/raw", "hub:owner/raw@main", ModelInput(ref="owner/raw"))
    return publish(registry, "base", lambda folder: shutil.copytree(tiny_llama_folder, folder, dirs_exist_ok=True), [hub])


def test_card_of_an_imported_adapter_names_the_library_and_the_base(registry, base) -> None:
    import shutil

    origin = {"imported": {"library": "OpenRLHF", "head": None, "notes": [], "base": "owner/instruct"}}
    fill = lambda folder: shutil.copytree(base.path, folder, dirs_exist_ok=True)  # noqa: E731
    record = registry.publish("old/policy", fill, role="language_model", extra=origin)
    text = model_card(record, registry, merged=True)
    assert "imported into Tristage" in text and "its files were written by OpenRLHF" in text and "made by" not in text
    assert ModelCard(text).data.base_model == ["owner/instruct"]


def test_card_states_origin_and_results(registry, base) -> None:
    kept = registry.root.parent / "results" / "ff"
    (kept / "files").mkdir(parents=True)
    (kept / "result.json").write_text(json.dumps({"name": "recipe/verdict", "created": "2026-11-24T20:00:00+00:00"}))
    rate = {"a": "mine", "b": "other", "judge": "gold", "win_rate": 0.75, "ci_low": 0.6, "ci_high": 0.85, "n": 40}
    evaluation = {
        "verdict": "By gold, mine beats other.",
        "candidates": {"other": {"digest": "sha256:x"}, "mine": {"digest": base.digest}},
        "win_rates": [rate, {**rate, "a": "other", "b": "mine", "win_rate": 0.25}, {**rate, "judge": "taste", "win_rate": 0.5}],
    }
    (kept / "files" / "evaluation.json").write_text(json.dumps(evaluation))
    text = model_card(base, registry, merged=True)
    card = ModelCard(text)
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (None, "transformers", "text-generation")
    assert data.base_model == ["owner/raw"] and data.datasets == ["owner/set"] and "tristage" in data.tags
    (result,) = data.eval_results
    assert result.metric_value == 0.75 and "against other by gold (95 %: 0.600 to 0.850, 40 prompts)" in result.metric_name
    for said in (
        "recipe/base@1",
        base.digest,
        "owner/raw  hub:owner/raw@main  (hub)",
        "| episodes | 5,120 |",
        "are not all known (`owner/raw`: not known)",
        "| other | taste | 0.500 | 0.600 to 0.850 | 40 |",
        "By gold, mine beats other.",
        "`data`: prompts.jsonl, set (`abcdef012345`)",
        "lm_eval --model hf --model_args pretrained=FOLDER",
        "vllm serve FOLDER",
        "transformers serve FOLDER",
    ):
        assert said in text, said
    assert "/home/me" not in text and "secret place" not in text


def made_from(registry: Registry, name: str, parents: list[ResolvedModel], **inputs: str) -> ModelRecord:
    fill = lambda folder: (folder / "model.safetensors").write_bytes(name.encode())  # noqa: E731
    settings = {"role": "language_model", "fingerprint_parts": {"inputs": inputs}}
    return registry.publish(f"recipe/{name}", fill, parents=parents, **settings)


def outside(folder: Path, card: str | None) -> ResolvedModel:
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    return ResolvedModel(folder.name, "folder", str(folder), f"sha256:{folder.name}", ModelInput(ref=folder.name))


def test_the_licence_is_that_of_the_first_model_also_when_its_folder_is_gone(registry, tmp_path) -> None:
    """The reward model, with another licence, gave no weights."""
    custom = "---\nlicense: other\nlicense_name: model-licence-2\nlicense_link: https://example.org/licence\n---\n# A model\n"
    pretrained, judge = outside(tmp_path / "pretrained", custom), outside(tmp_path / "judge", "---\nlicense: mit\n---\n")
    sft = made_from(registry, "sft", [pretrained], model=pretrained.digest)
    inputs = {"policy": sft.digest, "reward[0].model": judge.digest}
    aligned = made_from(registry, "aligned", [ResolvedModel.of_record(sft), judge], **inputs)
    (tmp_path / "pretrained" / "README.md").unlink()
    text = model_card(aligned, registry, merged=True)
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "model-licence-2", "https://example.org/licence")
    assert "as its model card names it (`pretrained`: model-licence-2)" in text


@pytest.mark.parametrize(
    "card", [None, "no metadata", "---\nlicense: unknown\n---\n", "---\nlicense: [mit, gpl-3.0]\n---\n", "---\n: [\n---\n"]
)
def test_without_a_known_licence_the_card_names_none(registry, tmp_path, card: str | None) -> None:
    start = outside(tmp_path / "start", card)
    text = model_card(made_from(registry, "sft", [start], model=start.digest), registry, merged=True)
    assert ModelCard(text).data.license is None and "license:" not in text and "(`start`: not known)" in text


def test_the_licence_of_an_adapter_in_a_folder_is_that_of_its_base(registry, tmp_path) -> None:
    below, adapter = (
        outside(tmp_path / "below", "---\nlicense: apache-2.0\n---\n"),
        outside(tmp_path / "adapter", "---\nlicense: mit\n---\n"),
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "below")}))
    assert ModelCard(model_card(made_from(registry, "sft", [adapter]), registry, merged=True)).data.license == "apache-2.0"
    # Which parent gave the weights is not recorded here, and the two licences differ.
    mixed = model_card(
        made_from(registry, "mixed", [below, outside(tmp_path / "other", "---\nlicense: mit\n---\n")]), registry, merged=True
    )
    assert ModelCard(mixed).data.license is None and "(`below`: apache-2.0; `other`: mit)" in mixed


def test_a_model_from_raw_text_has_no_licence_of_another_model(registry) -> None:
    text = model_card(made_from(registry, "raw", []), registry, merged=True)
    assert ModelCard(text).data.license is None and "knows no model from which the weights were trained" in text


def test_an_imported_model_has_the_licence_of_its_source(registry) -> None:
    fill = lambda folder: (folder / "model.safetensors").write_bytes(b"imported")  # noqa: E731
    origin = {"imported": {"library": "TRL", "head": None, "notes": [], "licence": {"license": "llama3"}}}
    record = registry.publish("old/policy", fill, role="language_model", extra=origin)
    later = made_from(registry, "sft", [ResolvedModel.of_record(record)], model=record.digest)
    assert ModelCard(model_card(later, registry, merged=True)).data.license == "llama3"


def test_the_card_of_an_adapter_says_how_to_load_it(registry, base, tmp_path) -> None:
    import torch

    from stages.models.loading import load_language_model, load_tokenizer
    from stages.models.saving import save_model

    source = ResolvedModel.of_record(base)
    tokenizer = load_tokenizer(source)
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2), tokenizer=tokenizer)
    adapter = publish(registry, "adapter", lambda folder: save_model(model, tokenizer, folder), [source], base=source)
    alone = registry.export(adapter.ref, tmp_path / "alone")
    write_card(adapter, registry, alone, merged=False)
    card = ModelCard.load(alone / "README.md")
    assert card.data.library_name == "peft"
    assert "stages models export recipe/base@1 BASE" in card.text and "pretrained=BASE,peft=FOLDER" in card.text
    merged_folder = registry.export(adapter.ref, tmp_path / "merged", merge=export_merged)
    write_card(adapter, registry, merged_folder, merged=True)
    card = ModelCard.load(merged_folder / "README.md")
    assert card.data.library_name == "transformers" and "adapter on" not in card.text.partition("## Use")[0]


COPIES = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(("tokens", "quantization", "lora"), [(3, "none", {}), (3, "none", COPIES), (0, "nf4", {}), (0, "int8", {})])
def test_the_code_in_the_card_of_an_adapter_loads_what_was_trained(
    registry, base, tmp_path: Path, tokens: int, quantization: str, lora: dict[str, Any]
) -> None:
    """Also with ``tokens`` that the base does not have, and on quantized weights."""
    import torch

    from stages.models.loading import load_language_model, load_tokenizer
    from stages.models.saving import save_model

    source = replace(ResolvedModel.of_record(base), input=ModelInput(ref=base.ref, quantization=quantization))
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens([f"<{number}>" for number in range(tokens)])
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2, **lora), tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    adapter = publish(registry, "adapter", lambda folder: save_model(model, tokenizer, folder), [source], base=source)
    code = re.findall(r"```python\n(.*?)```", model_card(adapter, registry, merged=False), re.DOTALL)
    assert len(code) == 1
    places = {"BASE": registry.export(base.ref, tmp_path / "base"), "FOLDER": registry.export(adapter.ref, tmp_path / "adapter")}
    space: dict[str, Any] = {}
    exec(code[0].replace('"BASE"', repr(str(places["BASE"]))).replace('"FOLDER"', repr(str(places["FOLDER"]))), space)
    ids = torch.tensor([[5, 17, 40, 3, 299 + tokens]])
    with torch.no_grad():  # in evaluation mode, bitsandbytes' layers of a CPU need more than 32 features
        actual, expected = (one.train()(input_ids=ids).logits for one in (space["model"], model))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_the_card_of_a_reward_model_s_adapter_says_how_to_load_it(registry, base, tmp_path: Path) -> None:
    import torch

    from stages.models.heads import RewardModel

    source = ResolvedModel.of_record(base)
    made = RewardModel.from_language_model(source, dtype=torch.float32, lora=LoraSettings(r=2), trainable=False)
    reward = publish(registry, "reward", lambda folder: made.save(folder), [source], base=source, role="reward_model")
    card = model_card(reward, registry, merged=False)
    assert "`stages models export recipe/base@1 BASE`" in card
    assert "Write BASE into base_model_name_or_path of its adapter_config.json" in card
    folder, config = registry.export(reward.ref, tmp_path / "alone"), tmp_path / "alone" / "adapter_config.json"
    below = str(registry.export(base.ref, tmp_path / "base"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": below}))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    space: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', repr(str(folder))), space)
    ids = torch.tensor([[5, 17, 40]])
    with torch.no_grad():
        torch.testing.assert_close(space["model"].score_tokens(ids, torch.ones_like(ids)), made.score_tokens(ids, torch.ones_like(ids)))


def test_exported_model_loads_in_other_libraries(registry, base, tmp_path) -> None:
    """lm-eval, vLLM and transformers serve need a known architecture, safetensors and a complete tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    (base.path / "model.safetensors").chmod(0o600)  # as transformers may write it
    folder = registry.export(base.ref, tmp_path / "out", merge=export_merged)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())
    write_card(base, registry, folder, merged=True)
    assert AutoConfig.from_pretrained(folder).architectures == ["LlamaForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder)("the film").input_ids
    assert GenerationConfig.from_pretrained(folder).eos_token_id is not None
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}


def test_reward_models_and_classifiers_say_how_to_read_them(registry, tiny_llama_folder) -> None:
    import torch

    from stages.models.heads import RewardModel

    made = RewardModel.from_language_model(tiny_llama_folder, dtype=torch.float32)
    record = publish(registry, "judge", lambda folder: made.save(folder), [], role="reward_model", metrics={"reward_bias": -0.25})
    text = model_card(record, registry, merged=True)
    assert "plus the bias -0.25" in text and ModelCard(text).data.pipeline_tag == "text-classification"
    other = publish(registry, "taste", lambda folder: made.save(folder), [], role="classifier")
    assert 'pipeline("text-classification", "FOLDER")' in model_card(other, registry, merged=True)
