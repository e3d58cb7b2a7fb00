"""If a saved model computes other outputs than the model in memory, the step ends and publishes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.config import LoraSettings
from stages.errors import ModelError, RegistryError
from stages.models import verification
from stages.models.adapters import applying, merging
from stages.models.adapters.activation import active_adapters
from stages.models.heads import RewardModel
from stages.models.loading import load_classifier, load_language_model
from stages.models.saving import save_model

ROWS = [[5, 17, 40, 3, 250], [7, 8, 9]]


@pytest.fixture
def tied_folder(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=0, bos_token_id=None, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def disturb(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Save every model with a fault: call ``change`` with its folder after peft or transformers wrote it."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    for kind in (PeftModel, PreTrainedModel):
        saved = kind.save_pretrained

        def spoilt(self: Any, folder: Any, *args: Any, saved: Any = saved, **options: Any) -> None:
            saved(self, folder, *args, **options)
            change(Path(folder))

        monkeypatch.setattr(kind, "save_pretrained", spoilt)


def change_config(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **fields}))

    return change


def change_weights(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, metadata={"format": "pt"})

    return changed


def halve(weights: dict[str, torch.Tensor]) -> None:
    first = next(name for name in sorted(weights) if "lora_B" in name)
    weights[first] = weights[first] / 2


FAULTS = {
    "another scale": change_config("adapter_config.json", lora_alpha=8),
    "other weights": change_weights("adapter_model.safetensors", halve),
    "a weight dropped": change_weights("adapter_model.safetensors", lambda weights: weights.popitem()),
}


@pytest.mark.parametrize("small", [verification.CHECKED_WEIGHTS, 0])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_saved_with_a_fault_is_not_published(
    fault: str, small: int, tied_folder: Path, tiny_tokenizer: Any, step_context: Any, resolve_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "CHECKED_WEIGHTS", small)
    base = resolve_folder(tied_folder)
    model = disturb(load_language_model(base, dtype=torch.float32, lora=LoraSettings(r=2)))
    context = step_context(models={"model": base})
    spoil(monkeypatch, FAULTS[fault])
    with pytest.raises(ModelError, match="the saved model is not the model in memory|does not fit its base"):
        context.publish(lambda folder: save_model(model, tiny_tokenizer, folder, rows=ROWS), role="language_model", metrics={}, base=base)
    with pytest.raises(RegistryError):
        context.registry.get("test/step")


def test_a_merge_that_changes_a_tied_output_layer_is_not_published(
    tied_folder: Path, tiny_tokenizer: Any, resolve_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier bug: the embedding's adapter was merged into a matrix that is also the output layer. Each of the two checks detects it."""
    lora = LoraSettings(r=2, target_modules=["embed_tokens"])
    model = disturb(load_language_model(resolve_folder(tied_folder), dtype=torch.float32, lora=lora))
    save_model(model, tiny_tokenizer, tmp_path / "saved", rows=ROWS)
    monkeypatch.setattr(merging, "_untie", lambda plain: False)
    with pytest.raises(ModelError, match="merging the adapter 'one' changes its outputs"):
        save_model(model, tiny_tokenizer, tmp_path / "one", rows=ROWS)
    monkeypatch.setattr(applying, "_check_merge", lambda *arguments: None)
    with pytest.raises(ModelError, match="not the model in memory: merged into its base, its outputs differ by"):
        save_model(model, tiny_tokenizer, tmp_path / "two", rows=ROWS)


def test_full_weights_saved_with_a_fault_are_refused(
    tied_folder: Path, tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    with monkeypatch.context() as patch:
        spoil(patch, change_weights("model.safetensors", lambda weights: weights.pop("lm_head.weight")))
        with pytest.raises(ModelError, match="its files contain .* values, but the model in memory has"):
            save_model(model, tiny_tokenizer, tmp_path / "one")
    with monkeypatch.context() as patch:
        spoil(patch, change_config("config.json", rms_norm_eps=0.5))
        with pytest.raises(ModelError, match="loaded again, its outputs differ"):
            save_model(model, tiny_tokenizer, tmp_path / "two")
    tied = load_language_model(str(tied_folder), dtype=torch.float32)
    tied.lm_head.weight = torch.nn.Parameter(2 * tied.lm_head.weight.detach())
    with pytest.raises(ModelError, match="are tied .tie_word_embeddings., but they differ"):
        save_model(tied, tiny_tokenizer, tmp_path / "three")


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_reward_models_and_classifiers_are_compared_too(
    lora: LoraSettings | None, tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = disturb(RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=lora))
    model.center(0.3)
    model.save(tmp_path / "reward", tiny_tokenizer, rows=ROWS)
    real = RewardModel.from_pretrained
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *args, **options: disturb(real(*args, **options, trainable=True)))
    with pytest.raises(ModelError, match="its outputs differ"):
        model.save(tmp_path / "other", tiny_tokenizer, rows=ROWS)
    labels = {"labels": ["bad", "good"], "require_head": False}
    classifier = disturb(load_classifier(str(tiny_llama_folder), dtype=torch.float32, lora=lora, **labels))
    save_model(classifier, tiny_tokenizer, tmp_path / "classifier", rows=ROWS)
    spoil(
        monkeypatch,
        change_weights(
            "adapter_model.safetensors" if lora else "model.safetensors",
            lambda weights: weights.update({name: value + 1 for name, value in weights.items() if name.endswith("score.weight")}),
        ),
    )
    with pytest.raises(ModelError, match="its outputs differ"):
        save_model(classifier, tiny_tokenizer, tmp_path / "spoilt", rows=ROWS)


def test_check_restores_adapters_and_random_state(tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = disturb(load_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=LoraSettings(r=2)))
    before = {name: (parameter.detach().clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    save_model(model, tiny_tokenizer, tmp_path)
    assert torch.equal(torch.rand(2), expected)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and model.training
    assert all(torch.equal(after[name], value) and after[name].requires_grad == flag for name, (value, flag) in before.items())
    assert active_adapters(model) == ("default",)
