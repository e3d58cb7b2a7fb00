"""Policy, reference, value network and reward model as adapters on one backbone compute the same as four separate models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import LoraSettings, ModelInput
from stages.corpora.templates import encode_prompt
from stages.models.adapters.activation import activate
from stages.models.adapters.shared_backbone import SharedBackbone, backbone_key
from stages.models.heads import RewardModel
from stages.models.loading import load_language_model
from stages.models.passes.responses import Policy, sequence_batch, sequence_values
from stages.models.saving import save_model
from stages.ppo.loop import run
from stages.ppo.records.publishing import publish_value
from stages.ppo.roles import load_roles
from stages.ppo.rollout.collecting import collect
from stages.ppo.rollout.episodes import Episodes
from stages.ppo.update.targets import targets
from stages.ppo.update.updater import Updater
from stages.registry.references import ResolvedModel
from stages.rewards.building import build_reward
from stages.rewards.source import CombinedReward
from tests.ppo.conftest import PROMPTS

QUANTIZATIONS = ["none", "nf4", "int8"]


def disturb(model: Any, seed: int) -> None:
    """Change the trainable adapter from its initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def resolved(record: Any, quantization: str) -> ResolvedModel:
    return ResolvedModel.of_record(record, ModelInput(ref=record.ref, quantization=quantization))


@pytest.fixture
def family(tiny_llama_folder: Path, tiny_tokenizer: Any, step_context: Any, resolve_folder: Any) -> Any:
    """family(quantization, **lora) -> step context of a PPO step: an SFT adapter on the base, a reward model's adapter on that."""

    def make(quantization: str, **lora: Any) -> Any:
        settings = LoraSettings(**{"r": 2, **lora})
        base = resolve_folder(tiny_llama_folder, quantization=quantization)
        language_model = load_language_model(base, dtype=torch.float32, lora=settings)
        disturb(language_model, 1)
        made = step_context("test/sft", models={"model": base}).publish(
            lambda folder: save_model(language_model, tiny_tokenizer, folder), role="language_model", metrics={}, base=base
        )
        sft = resolved(made, quantization)
        reward_model = RewardModel.from_language_model(sft, dtype=torch.float32, lora=settings, seed=4)
        disturb(reward_model, 2)
        reward_model.center(0.7)
        made = step_context("test/preference", models={"model": sft}).publish(
            lambda folder: reward_model.save(folder, tiny_tokenizer), role="reward_model", metrics={}, base=sft
        )
        return step_context("test/aligned", models={"policy": sft, "reward[0].model": resolved(made, quantization)})

    return make


@pytest.fixture
def lora_config(ppo_config: Any) -> Any:
    def make(quantization: str = "none", **fields: Any) -> Any:
        inputs = {"policy": {"ref": "sft", "quantization": quantization}, "value": None}
        reward = [{"model": {"ref": "preference", "quantization": quantization}, "name": "preference"}]
        return ppo_config(**{"reward": reward, **inputs, "lora": {"r": 4}, **fields})

    return make


def rolled(roles: Any, config: Any, context: Any) -> Any:
    reward = build_reward(
        config.reward,
        context.models,
        "reward",
        device=torch.device("cpu"),
        dtype=torch.float32,
        load=lambda model: roles.load_reward_model(model, dtype=torch.float32),
    )
    prompts = (PROMPTS * 2)[: config.rollout_batch_size]
    ids = [encode_prompt(roles.tokenizer, prompt) for prompt in prompts]
    return collect(roles, reward, CombinedReward([]), Episodes(prompts, ids, range(len(ids))), config)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_scores_values_and_logprobs_equal_those_of_separate_models(family, lora_config, quantization) -> None:
    config, context = lora_config(quantization), family(quantization)
    roles = load_roles(config, context)
    assert roles.backbone is not None and roles.value.backbone is roles.policy.decoder
    weights = sum(parameter.numel() for name, parameter in roles.policy.model.named_parameters() if "lora_" not in name)
    alone = load_language_model(context.models["policy"].record.manifest["base"]["path"], dtype=torch.float32)
    if quantization == "none":
        assert weights == sum(parameter.numel() for parameter in alone.parameters())  # once, for four roles

    rollout = rolled(roles, config, context)
    batch = sequence_batch(rollout.prompt_ids, [rollout.response(row) for row in range(12)], 1, "cpu")
    mask = rollout.response_mask
    policy, preference = context.models["policy"], context.models["reward[0].model"]
    separate = Policy(load_language_model(policy, dtype=torch.float32, trainable=False), temperature=1.0, autocast=None)
    expected = separate.logprobs(batch)
    # int8 rounds activations, so a sum in another order may round differently: 1/127 of logits around 1
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if quantization != "int8" else {"rtol": 0, "atol": 2e-2}
    torch.testing.assert_close(rollout.rollout_logprobs[mask], expected, **tolerance)
    torch.testing.assert_close(rollout.reference_logprobs[mask], expected, **tolerance)
    reward_model = RewardModel.from_pretrained(preference, dtype=torch.float32)
    with torch.no_grad():
        values = reward_model.score_positions(batch.input_ids, batch.rows, batch.columns)
    torch.testing.assert_close(rollout.values[mask], values, **tolerance)
    own = build_reward(config.reward, context.models, "reward", device=torch.device("cpu"), dtype=torch.float32)
    torch.testing.assert_close(rollout.scores, own.score(rollout.prompts, rollout.completions).total, **tolerance)


FORMS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa", "use_rslora": True},
    "OLoRA": {"init_lora_weights": "olora"},
    "orthogonal": {
        "init_lora_weights": "orthogonal",
        "rank_pattern": {r"mlp\..*": 2, r"layers\.1\..*_attn.*": 6},
        "exclude_modules": r".*\.0\..*k_proj",
    },
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adapter_has_exact_roles_and_is_published(
    form, quantization, family, lora_config, tiny_llama_folder, tmp_path
) -> None:
    """All adapters have the form. The policy starts as the reference. After training, each role equals its published version."""
    import warnings

    from peft import PeftModel
    from transformers import AutoModel

    from stages.models.heads import ValueModel

    context = family(quantization, **FORMS[form])
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    options = {"lora": {"r": 4, **FORMS[form]}, "data": str(tmp_path / "prompts.jsonl"), "publish_value": True}
    config = lora_config(quantization, **options, training={"learning_rate": 1e-2})
    roles = load_roles(config, context)
    rollout = rolled(roles, config, context)
    batch = sequence_batch(rollout.prompt_ids, [rollout.response(row) for row in range(12)], 1, "cpu")
    mask = rollout.response_mask
    policy, preference = context.models["policy"], context.models["reward[0].model"]
    separate = Policy(load_language_model(policy, dtype=torch.float32, trainable=False), temperature=1.0, autocast=None)
    close = {"rtol": 1e-3, "atol": 1e-4}  # PiSSA and OLoRA subtract numbers of the size of the weights
    torch.testing.assert_close(rollout.reference_logprobs[mask], separate.logprobs(batch), **close)
    torch.testing.assert_close(rollout.rollout_logprobs[mask], rollout.reference_logprobs[mask], **close)
    roles.policy.model.train()
    torch.testing.assert_close(roles.policy.logprobs(batch), rollout.rollout_logprobs[mask], rtol=0, atol=1e-5)  # the first ratio is 1
    with torch.no_grad():
        values = RewardModel.from_pretrained(preference, dtype=torch.float32).score_positions(batch.input_ids, batch.rows, batch.columns)
    torch.testing.assert_close(rollout.values[mask], values, **close)
    record = run(config, context).model  # it compares the published versions with the roles
    value_record = context.registry.get("test/aligned-value")
    bare = AutoModel.from_pretrained(tiny_llama_folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # what peft says if the config names other modules
        assert set(PeftModel.from_pretrained(bare, str(value_record.path)).peft_config) == {"default"}
    for kind in {quantization, "none"}:
        loaded = load_language_model(resolved(record, kind), dtype=torch.float32, trainable=False)
        assert not torch.allclose(
            Policy(loaded, temperature=1.0, autocast=None).logprobs(batch), rollout.reference_logprobs[mask], atol=1e-3
        )
        ValueModel.from_pretrained(resolved(value_record, kind), dtype=torch.float32)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_update_equals_that_of_separate_models(family, lora_config, monkeypatch, quantization) -> None:
    config, context = lora_config(quantization), family(quantization)
    updated = []
    for shared in (True, False):
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(SharedBackbone, "is_base_of", lambda self, model: False)
            roles = load_roles(config, context)
            for name, network in roles.networks().items():  # the adapters are equal on both sides, and none is the identity
                disturb(network, len(name))
                with torch.no_grad():
                    for key, parameter in network.named_parameters():
                        if "lora_A" in key and parameter.requires_grad:
                            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * 0.3)
            rollout = rolled(roles, config, context)
            assert (roles.value.backbone is roles.policy.decoder) == shared
            updater = Updater(roles, {}, config)
            updater.accumulate(rollout, targets(rollout, config, kl_coef=0.1))
            gradients = {}
            for name, network in roles.networks().items():
                for key, parameter in network.named_parameters():
                    if parameter.requires_grad:
                        parameter_name = (
                            key.replace("/", ".")
                            .replace("value", "default")
                            .replace("base_model.model.model.", "")
                            .replace("backbone.", "")
                        )
                        gradients[name, parameter_name.replace("base_model.model.", "")] = parameter.grad
            updated.append((rollout, gradients))
    (one, first), (two, second) = updated
    assert one.completions == two.completions
    assert first.keys() == second.keys() and len(first) > 50
    for key, gradient in first.items():
        torch.testing.assert_close(gradient, second[key], rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_an_adapter_in_a_folder_shares_the_backbone_of_its_base_s_folder(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in a recipe has a digest, but the base path of an adapter has none. Both are recognised as the same model."""
    adapted = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=LoraSettings(r=2))
    adapted.save(tmp_path / "adapted", tiny_tokenizer)

    def folder(path: Path | str, digest: str, kind: str = "folder", **fields: Any) -> ResolvedModel:
        return ResolvedModel(str(path), kind, str(path), digest, ModelInput(ref=str(path), **fields))

    monkeypatch.chdir(tiny_llama_folder.parent)
    policy = folder(tiny_llama_folder.name, "sha256:1234")  # relative to where the recipe runs
    reward = folder(tmp_path / "adapted", "sha256:5678")
    assert backbone_key(policy) == backbone_key(reward)
    assert backbone_key(folder(tmp_path / "adapted", "", quantization="nf4")) != backbone_key(policy)
    backbone = SharedBackbone(policy, dtype=torch.float32, device=torch.device("cpu"), lora=LoraSettings(r=2))
    assert backbone.is_base_of(reward)
    assert backbone.reward_model(reward).backbone is backbone.model.get_base_model().model


def test_models_of_the_hub_share_by_name_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.models.adapters import stacks

    monkeypatch.setattr(stacks, "is_adapter", lambda model: False)

    def hub(**fields: Any) -> tuple[str, str, bool]:
        return backbone_key(ResolvedModel("org/m", "hub", "org/m", fields.pop("digest", ""), ModelInput(ref="org/m", **fields)))

    assert hub(digest="org/m@1") == hub() != hub(revision="2")


def test_roles_do_not_disturb_each_other(family, lora_config) -> None:
    config, context = lora_config(), family("none")
    roles = load_roles(config, context)
    batch = sequence_batch([[5, 6, 7]], [[8, 9, 10]], 1, "cpu")
    before = {"policy": roles.policy.logprobs(batch), "reference": roles.reference_logprobs(batch), "value": roles.values(batch).detach()}
    optimizer = torch.optim.SGD(roles.networks()["policy"].parameters(), lr=1.0)
    roles.policy.loss(batch, lambda logprobs, entropies, rows: -logprobs).summed.backward()
    assert all(parameter.grad is None for parameter in roles.networks()["value"].parameters())
    optimizer.step()
    assert not torch.allclose(roles.policy.logprobs(batch), before["policy"])
    assert torch.equal(roles.reference_logprobs(batch), before["reference"])
    assert torch.equal(roles.values(batch).detach(), before["value"])
    names = {name for name, parameter in roles.policy.model.named_parameters() if parameter.requires_grad}
    assert names and all(".default." in name or ".value." in name for name in names)  # the frozen adapters stay frozen


def test_switching_off_every_adapter_leaves_the_base(tiny_llama_folder: Path) -> None:
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=LoraSettings(r=2))
    disturb(model, 0)
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = model(input_ids=ids).logits
    activate(model, [])
    torch.testing.assert_close(
        model(input_ids=ids).logits, load_language_model(str(tiny_llama_folder), dtype=torch.float32)(input_ids=ids).logits
    )
    activate(model, ["default"])
    assert torch.equal(model(input_ids=ids).logits, adapted)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(("value", "base"), [("policy", "test/sft@1"), (None, "test/preference@1")])
def test_published_value_network_has_the_base_that_it_started_from(family, lora_config, value, base) -> None:
    context, config = family("none"), lora_config(value=value)
    publish_value(config, context, load_roles(config, context))
    assert context.registry.get("test/aligned-value").manifest["base"]["ref"] == base


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_stage_publishes_adapters_that_compute_the_same_again(family, lora_config, tmp_path, quantization) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    context = family(quantization)
    settings = {"data": str(data), "publish_value": True, "training": {"learning_rate": 1e-2}}
    result = run(lora_config(quantization, **settings), context)
    record = result.model
    assert record.is_adapter and record.manifest["base"]["ref"] == "test/sft@1"
    value_record = context.registry.get("test/aligned-value")
    assert value_record.is_adapter and value_record.manifest["base"]["ref"] == "test/preference@1"
    stacked = load_language_model(resolved(record, quantization), dtype=torch.float32, trainable=False)
    merged = load_language_model(resolved(record, "none"), dtype=torch.float32, trainable=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(stacked(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    before = load_language_model(context.models["policy"], dtype=torch.float32, trainable=False)
    assert not torch.allclose(stacked(input_ids=ids).logits, before(input_ids=ids).logits, atol=1e-3)
    from stages.models.heads import ValueModel

    batch = sequence_batch([[5, 6, 7]], [[8, 9]], 1, "cpu")
    values = [
        sequence_values(ValueModel.from_pretrained(resolved(value_record, kind), dtype=torch.float32), batch, torch.no_grad())
        for kind in {quantization, "none"}
    ]
    torch.testing.assert_close(values[0], values[-1], rtol=1e-4, atol=1e-5)
