"""Models in the formats of other libraries: scores and values equal those of the original model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from stages.cli import app
from stages.config import LoraSettings
from stages.errors import ModelError
from stages.importing.run import import_model
from stages.models.heads import RewardModel, ValueModel
from stages.models.loading import load_language_model
from stages.registry.ledger import Registry

IDS = torch.tensor([[3, 7, 5, 9, 4]])
MASK = torch.ones_like(IDS)


@pytest.fixture
def language_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer and nothing else."""
    words = {word: number for number, word in enumerate(["<unk>", "<eos>", "<pad>", *(f"w{n}" for n in range(21))])}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    made = tmp_path / "source"
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>").save_pretrained(made)
    return made


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def hidden_states(model: Any) -> Tensor:
    """Last hidden states [1, T, d] by transformers alone."""
    with torch.no_grad():
        return model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]


def expected(model: Any, weight: Tensor, bias: float = 0.0) -> Tensor:
    """A linear head on the last hidden states [1, T]."""
    return (hidden_states(model) @ weight.T).squeeze(-1) + bias


def tensors(model: Any, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in model.state_dict().items()}


def values_of(path: Path) -> Tensor:
    with torch.no_grad():
        return ValueModel.from_pretrained(path, dtype=torch.float32)(IDS, MASK)


def score_of(path: Path) -> Tensor:
    with torch.no_grad():
        return RewardModel.from_pretrained(path, dtype=torch.float32).score(IDS, MASK)


def test_import_trl_value_head_publishes_policy_and_value(language_model: Any, folder: Path, registry: Registry) -> None:
    weight, bias = torch.randn(1, 16), torch.tensor([0.25])
    language_model.config.save_pretrained(folder)
    saved = {**tensors(language_model), "v_head.summary.weight": weight, "v_head.summary.bias": bias}
    torch.save(saved, folder / "pytorch_model.bin")

    imported = import_model(folder, registry, "old/ppo", allow_pickle=True)

    policy, value = imported.records
    assert (policy.ref, policy.role, value.ref, value.role) == ("old/ppo@1", "language_model", "old/ppo-value@1", "value_model")
    assert imported.library == "TRL (AutoModelForCausalLMWithValueHead)"
    assert imported.head == "v_head.summary, linear from 16 to 1 with a bias"
    torch.testing.assert_close(values_of(value.path), expected(language_model, weight, 0.25))
    loaded = load_language_model(policy.path, dtype=torch.float32, trainable=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, language_model(input_ids=IDS).logits)


def test_a_second_import_of_the_same_files_adds_no_version(language_model: Any, folder: Path, registry: Registry) -> None:
    language_model.config.save_pretrained(folder)
    head = torch.ones(1, 16)
    save_file({**tensors(language_model), "v_head.summary.weight": head}, folder / "model.safetensors")
    command = ["models", "import", str(folder), "--as", "old/ppo", "--home", str(registry.root.parent)]
    first = CliRunner().invoke(app, command).stdout
    assert "published old/ppo@1 (language_model)" in first and "published old/ppo-value@1 (value_model)" in first
    again = CliRunner().invoke(app, command).stdout
    assert "already present: old/ppo@1 (language_model)" in again and "already present: old/ppo-value@1 (value_model)" in again
    save_file({**tensors(language_model), "v_head.summary.weight": head + 1}, folder / "model.safetensors")  # the policy is the same
    other = CliRunner().invoke(app, [*command, "--json"]).stdout
    assert json.loads(other)["already_present"] == ["old/ppo@1"]
    assert [record.ref for record in registry.records()] == ["old/ppo@1", "old/ppo-value@1", "old/ppo-value@2"]


def test_import_refuses_pickle_without_the_option(language_model: Any, folder: Path, registry: Registry) -> None:
    language_model.config.save_pretrained(folder)
    torch.save(tensors(language_model), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="--pickle"):
        import_model(folder, registry, "old/model")
    assert registry.records() == []


def test_import_never_runs_code_of_a_pickle(language_model: Any, folder: Path, registry: Registry, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    language_model.config.save_pretrained(folder)
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="was refused"):
        import_model(folder, registry, "old/model", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_import_separate_value_head_of_llama_factory(language_model: Any, folder: Path, registry: Registry) -> None:
    weight, bias = torch.randn(1, 16), torch.tensor([-1.5])
    language_model.save_pretrained(folder)
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, folder / "value_head.safetensors")

    imported = import_model(folder, registry, "old/reward")

    assert [record.role for record in imported.records] == ["reward_model"]
    assert any("--role value_model" in note for note in imported.notes)
    torch.testing.assert_close(score_of(imported.records[0].path), expected(language_model, weight, -1.5)[:, -1])


def test_import_adapter_with_value_head_uses_the_named_base(language_model: Any, folder: Path, registry: Registry, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    language_model.save_pretrained(base)
    adapted = get_peft_model(language_model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "/path/of/another/machine"
    adapted.save_pretrained(folder)
    weight = torch.randn(1, 16)
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": torch.zeros(1)}, folder / "value_head.safetensors")

    imported = import_model(folder, registry, "old/critic", role="value_model", base=str(base))

    assert [record.role for record in imported.records] == ["value_model"]
    torch.testing.assert_close(values_of(imported.records[0].path), expected(adapted, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["value_head", "score"])
def test_import_openrlhf_reward_model_keeps_its_normalisation(language_model: Any, folder: Path, registry: Registry, head: str) -> None:
    weight = torch.randn(1, 16)
    language_model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["RewardModel"], "normalize_reward": True, "mean": 2.0, "std": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**tensors(language_model.model, "model."), f"{head}.weight": weight}, folder / "model.safetensors")

    imported = import_model(folder, registry, "old/reward")

    assert imported.library == "OpenRLHF"
    torch.testing.assert_close(score_of(imported.records[0].path), (expected(language_model, weight)[:, -1] - 2.0) / 4.0)


def test_import_openrlhf_critic_is_a_value_model(language_model: Any, folder: Path, registry: Registry) -> None:
    weight = torch.randn(1, 16)
    language_model.config.save_pretrained(folder)
    config = {**json.loads((folder / "config.json").read_text()), "architectures": ["CriticModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**tensors(language_model.model, "model."), "score.weight": weight}, folder / "model.safetensors")
    record = import_model(folder, registry, "old/critic").records[0]
    assert record.role == "value_model"
    torch.testing.assert_close(values_of(record.path), expected(language_model, weight))


def test_imported_model_is_not_described_as_random_weights(language_model: Any, folder: Path, registry: Registry) -> None:
    from stages.commands.models import _chosen_rows

    language_model.save_pretrained(folder)
    (record,) = import_model(folder, registry, "base").records
    assert dict(_chosen_rows(record))["made from"] == "imported from transformers"


def test_import_deepspeed_chat_reward_model(folder: Path, registry: Registry) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    weight = torch.randn(1, 16)
    model.config.save_pretrained(folder)
    torch.save({**tensors(model.transformer, "rwtransformer."), "v_head.weight": weight}, folder / "pytorch_model.bin")
    record = import_model(folder, registry, "old/reward", allow_pickle=True).records[0]
    torch.testing.assert_close(score_of(record.path), expected(model, weight)[:, -1])


def test_import_trlx_reward_model(folder: Path, registry: Registry) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    weight = torch.randn(1, 16)
    model.config.save_pretrained(folder)
    torch.save({**tensors(model.transformer, "transformer."), "v_head.weight": weight}, folder / "pytorch_model.bin")
    record = import_model(folder, registry, "old/reward", allow_pickle=True).records[0]
    torch.testing.assert_close(score_of(record.path), expected(model, weight)[:, -1])


def test_import_trlx_policy_says_that_its_value_head_is_left_out(language_model: Any, folder: Path, registry: Registry) -> None:
    head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    language_model.config.save_pretrained(folder)
    torch.save({**tensors(language_model, "base_model."), **tensors(head, "v_head.")}, folder / "pytorch_model.bin")

    imported = import_model(folder, registry, "old/policy", allow_pickle=True)

    assert [record.role for record in imported.records] == ["language_model"]
    assert any(note.startswith("dropped: v_head") for note in imported.notes)
    loaded = load_language_model(imported.records[0].path, dtype=torch.float32, trainable=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, language_model(input_ids=IDS).logits)


def test_import_refuses_a_head_of_two_layers(language_model: Any, folder: Path, registry: Registry) -> None:
    language_model.save_pretrained(folder)
    save_file({"v_head.0.weight": torch.randn(32, 16), "v_head.2.weight": torch.randn(1, 32)}, folder / "value_head.safetensors")
    with pytest.raises(ModelError, match="not a linear layer"):
        import_model(folder, registry, "old/reward")
    assert registry.records() == []


def test_import_refuses_a_head_of_another_width(language_model: Any, folder: Path, registry: Registry) -> None:
    language_model.save_pretrained(folder)
    save_file({"v_head.summary.weight": torch.randn(1, 20)}, folder / "value_head.safetensors")
    with pytest.raises(ModelError, match=r"shape \[1, 20\].*need \[1, 16\]"):
        import_model(folder, registry, "old/reward")


def test_import_classifier_with_one_label_is_a_reward_model(language_model: Any, folder: Path, registry: Registry) -> None:
    from transformers import LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=1, pad_token_id=2
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    record = import_model(folder, registry, "old/reward").records[0]
    assert record.role == "reward_model"
    with torch.no_grad():
        torch.testing.assert_close(score_of(record.path), model(input_ids=IDS, attention_mask=MASK).logits[:, 0])


def test_import_adapter_of_a_reward_trainer_is_a_reward_model(folder: Path, registry: Registry, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=1, pad_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)).eval()
    adapted.save_pretrained(folder)

    imported = import_model(folder, registry, "old/reward")

    assert [record.role for record in imported.records] == ["reward_model"]
    with torch.no_grad():
        expected_score = adapted(input_ids=IDS, attention_mask=MASK).logits[:, 0]
    torch.testing.assert_close(score_of(imported.records[0].path), expected_score, rtol=1e-4, atol=1e-5)


def test_import_exported_adapter_of_a_reward_model_keeps_its_head(
    language_model: Any, folder: Path, registry: Registry, tmp_path: Path
) -> None:
    language_model.save_pretrained(folder)
    model = RewardModel.from_language_model(folder, dtype=torch.float32, lora=LoraSettings(r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.score_head.bias.fill_(0.7)
        expected_score = model.eval().score(IDS, MASK)
    model.save(tmp_path / "adapter")
    imported = import_model(tmp_path / "adapter", registry, "old/reward")
    assert [record.role for record in imported.records] == ["reward_model"]
    torch.testing.assert_close(score_of(imported.records[0].path), expected_score, rtol=1e-4, atol=1e-5)
    (tmp_path / "adapter/head.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"head\.safetensors is damaged"):
        import_model(tmp_path / "adapter", registry, "old/reward")


def test_import_says_which_tensors_it_does_not_keep(language_model: Any, folder: Path, registry: Registry) -> None:
    language_model.config.save_pretrained(folder)
    head = {"v_head.summary.weight": torch.randn(1, 16)}
    saved = {name: value.bfloat16() for name, value in tensors(language_model).items()}
    save_file({**saved, **head, "model.layers.7.mlp.up_proj.weight": torch.ones(2)}, folder / "model.safetensors")
    imported = import_model(folder, registry, "old/ppo")
    assert "not kept: model.layers.7.mlp.up_proj.weight" in imported.notes
    assert "the weights were in bfloat16; they are published in fp32 with the same values" in imported.notes


def test_import_publishes_nothing_if_the_value_network_cannot_be_published(
    language_model: Any, folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model.config.save_pretrained(folder)
    save_file({**tensors(language_model), "v_head.summary.weight": torch.randn(1, 16)}, folder / "model.safetensors")
    monkeypatch.setattr(ValueModel, "save", lambda *arguments, **options: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        import_model(folder, registry, "old/ppo")
    assert registry.records() == []


def test_import_refuses_a_folder_without_a_vocabulary(folder: Path, registry: Registry, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no vocabulary"):
        import_model(tmp_path / "bare", registry, "old/model")


def test_import_names_the_missing_files_of_a_folder(folder: Path, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="contains no weights"):
        import_model(folder, registry, "old/model")
    with pytest.raises(ModelError, match="no such folder"):
        import_model(tmp_path / "nowhere", registry, "old/model")
