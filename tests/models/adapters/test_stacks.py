"""Stacks of any depth are resolved: registry, folders and Hub ids, at the revision that an adapter names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError
from stages.models.adapters import stacks
from stages.models.adapters.stacks import find_base, stack_of, trained_on
from stages.models.loading import load_language_model
from stages.models.saving import save_model
from stages.registry.references import ResolvedModel


def folder_of(path: Path | str, **fields: Any) -> ResolvedModel:
    return ResolvedModel(str(path), "folder", str(path), "", ModelInput(ref=str(path), **fields))


def write_adapter(folder: Path, base: Any, **config: Any) -> ResolvedModel:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base, **config}))
    return folder_of(folder)


def test_three_adapters_in_folders_are_read_to_the_bottom(tmp_path: Path, tiny_llama_folder: Path) -> None:
    write_adapter(tmp_path / "one", str(tiny_llama_folder))
    write_adapter(tmp_path / "two", str(tmp_path / "one"))
    top = write_adapter(tmp_path / "three", "../two")  # relative to the adapter's folder, for any working directory
    stack = stack_of(top)
    assert stack.base.path == str(tiny_llama_folder)
    assert [Path(adapter.path).name for adapter in stack.adapters] == ["one", "two", "three"]


def test_a_base_on_the_hub_is_read_at_the_revision_that_the_adapter_names(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "one", "org/base", revision="v2")
    adapter = ResolvedModel(adapter.ref, "folder", adapter.path, "", ModelInput(ref="one", trust_remote_code=True))
    base = find_base(adapter)
    assert (base.kind, base.path, base.input.revision, base.input.trust_remote_code) == ("hub", "org/base", "v2", True)
    assert base.digest == "hub:org/base@v2"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_model_name_or_path": None}, "is empty; set it to the folder or the Hub id"),
        ({"base_model_name_or_path": "sha256:0123456789ab"}, "is a registry digest .sha256:0123456789ab.; export the model merged"),
        ({"base_model_name_or_path": "./gone"}, "'./gone', a folder that does not exist"),
        ({"base_model_name_or_path": "org/base", "peft_type": "IA3"}, "is of peft type IA3; only LORA"),
        ({"base_model_name_or_path": "org/base", "peft_type": "PROMPT_TUNING"}, "is of peft type PROMPT_TUNING; only LORA"),
        ({"base_model_name_or_path": "org/base", "peft_type": "lora"}, "is of peft type lora; only LORA"),
        ({"base_model_name_or_path": None, "peft_type": None}, "names no peft_type, so peft did not write it and cannot read it"),
        ({"base_model_name_or_path": "org/base", "alora_invocation_tokens": [5, 7]}, "acts only after certain tokens .aLoRA."),
        ({"base_model_name_or_path": "org/base", "layer_replication": [[0, 2], [1, 2]]}, "it repeats layers of its base, as layer_rep"),
        ({"base_model_name_or_path": "org/base", "init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16' changed"),
        ({"base_model_name_or_path": "org/base", "init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_an_adapter_that_cannot_be_stacked_is_refused_in_one_message(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    adapter = write_adapter(tmp_path / "one", config.pop("base_model_name_or_path"), **config)
    with pytest.raises(ModelError, match=message):
        stack_of(adapter)


def test_bases_that_form_a_circle_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", str(tmp_path / "two"))
    with pytest.raises(ModelError, match="is its own base"):
        stack_of(write_adapter(tmp_path / "two", str(tmp_path / "one")))


def test_an_adapter_is_trained_on_the_quantization_of_the_next_quantized_input(tmp_path: Path, monkeypatch: Any) -> None:
    """Adapter 1 is on nf4 weights, adapter 2 on the merge of both: its base are the dequantized nf4 weights, not the original ones."""
    base = folder_of(tmp_path / "base", quantization="nf4")
    one = ResolvedModel("one", "folder", "one", "", ModelInput(ref="one"), base=base)
    two = ResolvedModel("two", "folder", "two", "", ModelInput(ref="two"), base=one)
    monkeypatch.setattr(stacks, "is_adapter", lambda model: model.base is not None)
    assert trained_on(two).quantization == "nf4" and trained_on(one).quantization == "nf4"


def test_an_adapter_trained_on_a_merged_quantized_stack_loads_as_it_was_trained(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, resolve_folder: Any
) -> None:
    """The lower adapter is trained on nf4 weights, the upper one on their merge. The merge of all three equals the upper one's outputs."""
    ids = torch.tensor([[5, 17, 40, 3, 250]])
    below = resolve_folder(tiny_llama_folder, quantization="nf4")
    for name in ("one", "two"):
        model = load_language_model(below, dtype=torch.float32, lora=LoraSettings(r=2))
        torch.manual_seed(len(name))
        for key, parameter in model.named_parameters():
            if "lora_B" in key and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        save_model(model, tiny_tokenizer, tmp_path / name)
        below = ResolvedModel(name, "folder", str(tmp_path / name), "", ModelInput(ref=name), base=below)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        again = load_language_model(below, dtype=torch.float32, trainable=False)(input_ids=ids).logits
    torch.testing.assert_close(again, expected)


# In a recipe


@pytest.fixture
def plan_of(tmp_path: Path, tiny_llama_folder: Path) -> Any:
    """plan_of(folder) -> plans of a recipe whose last step reads the model in ``folder`` as its reference."""
    from stages.chain.planning import plan
    from stages.recipe.schema import load_recipe

    (tmp_path / "sft.jsonl").write_text('{"prompt": "a b", "completion": "c"}\n' * 4)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a b", "chosen": "c", "rejected": "d"}\n' * 4)

    def make(folder: Path) -> Any:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "name: stacks\nsteps:\n"
            f"  - {{stage: sft, name: sft, model: {tiny_llama_folder}, data: {{train: sft.jsonl}}}}\n"
            f"  - {{stage: sft, name: other, model: {folder}, data: {{train: sft.jsonl}}}}\n"
            f"  - {{stage: dpo, name: dpo, model: sft, reference: {folder}, data: {{train: pairs.jsonl}}}}\n"
        )
        return plan(load_recipe(recipe), tmp_path / "home")

    return make


def test_an_adapter_that_cannot_be_loaded_is_refused_before_any_step_runs(tmp_path: Path, plan_of: Any) -> None:
    adapter = write_adapter(tmp_path / "one", str(tmp_path / "gone" / "base"), peft_type="IA3")
    with pytest.raises(ModelError, match="is of peft type IA3; only LORA"):
        plan_of(Path(adapter.path))


def test_a_step_runs_again_when_the_base_of_its_adapter_changes(tmp_path: Path, plan_of: Any, tiny_llama_folder: Path) -> None:
    import shutil

    shutil.copytree(tiny_llama_folder, tmp_path / "base")
    adapter = write_adapter(tmp_path / "one", str(tmp_path / "base"))
    first = plan_of(Path(adapter.path))[1].fingerprint
    assert first == plan_of(Path(adapter.path))[1].fingerprint
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert first != plan_of(Path(adapter.path))[1].fingerprint
