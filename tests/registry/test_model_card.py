"""The card of an exported model: metadata that the Hub accepts, lineage, metrics, evaluations, and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from stages.config import LoraSettings, ModelInput
from stages.models.exporting import export_merged
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


def resolved(record: ModelRecord) -> ResolvedModel:
    return ResolvedModel(record.ref, "registry", str(record.path), record.digest, ModelInput(ref=record.ref), record)


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
    assert (data.license, data.library_name, data.pipeline_tag) == ("unknown", "transformers", "text-generation")
    assert data.base_model == ["owner/raw"] and data.datasets == ["owner/set"] and "tristage" in data.tags
    (result,) = data.eval_results
    assert result.metric_value == 0.75 and "against other by gold (95 %: 0.600 to 0.850, 40 prompts)" in result.metric_name
    for said in (
        "recipe/base@1",
        base.digest,
        "owner/raw  hub:owner/raw@main  (hub)",
        "| episodes | 5,120 |",
        "The licence is **unknown**",
        "| other | taste | 0.500 | 0.600 to 0.850 | 40 |",
        "By gold, mine beats other.",
        "`data`: prompts.jsonl, set (`abcdef012345`)",
        "lm_eval --model hf --model_args pretrained=FOLDER",
        "vllm serve FOLDER",
        "transformers serve FOLDER",
    ):
        assert said in text, said
    assert "/home/me" not in text and "secret place" not in text


def test_the_card_of_an_adapter(registry, base, tmp_path) -> None:
    import torch

    from stages.models.loading import load_language_model, load_tokenizer, save_model

    source = resolved(base)
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
