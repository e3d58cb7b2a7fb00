"""PPO without a value network: targets by hand, refused contradictions, no values, and a rising reward."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.models.heads import ValueModel
from stages.ppo.loop import run
from stages.ppo.roles import load_roles
from stages.ppo.rollout.rollout import Rollout
from stages.ppo.update.targets import all_targets, targets
from tests.ppo.test_rollout import hand_made as two_episodes

ROOT = math.sqrt(0.5)


def hand_made() -> Rollout:
    """Two completions of one prompt, with a KL of 0.5, -1 and 0, 1, -1 nats per token."""
    return two_episodes(prompts=["a", "a"], prompt_ids=[[1], [1]], stopped=torch.ones(2, dtype=torch.bool), values=torch.zeros(2, 3))


def two(**fields: Any) -> dict[str, Any]:
    return {"value": None, "samples_per_prompt": 2, **fields}


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        # returns with kl_coef 0.1: 10 - 0.1 * (0.5 - 1) = 10.05 and -4 - 0.1 * (0 + 1 - 1) = -4; their mean is 3.025
        ({"advantages": "rloo"}, 14.05),
        ({"advantages": "grpo"}, ROOT),  # 7.025 / (7.025 * sqrt(2)): the unbiased deviation of two numbers
        ({"advantages": "grpo", "divide_by_deviation": False}, 7.025),
        ({"advantages": "reinforce"}, 7.025),
        ({"advantages": "reinforce", "samples_per_prompt": 1}, 7.025),
    ],
)
def test_advantages_without_a_value_network_by_hand(ppo_config, fields, first) -> None:
    target = targets(hand_made(), ppo_config(**two(**fields)), kl_coef=0.1)
    expected = torch.tensor([[first, first, 0.0], [-first, -first, -first]])
    torch.testing.assert_close(target.advantages, expected)
    torch.testing.assert_close(target.rewards, torch.tensor([[-0.05, 10.1, 0.0], [0.0, -0.1, -3.9]]))
    assert not target.returns.any()
    shared = all_targets(hand_made(), ppo_config(**two(**fields)), kl_coef=0.1, num_processes=2)
    torch.testing.assert_close(shared.advantages, expected)  # a prompt's completions are compared over all processes


def test_whitening_is_off_by_default(ppo_config) -> None:
    target = targets(hand_made(), ppo_config(**two(advantages="rloo", whiten_advantages=True)), kl_coef=0.1)
    counted = target.advantages[hand_made().response_mask]
    assert counted.mean().abs() < 1e-6 and counted.var(correction=0) == pytest.approx(1.0, abs=1e-5)
    assert ppo_config().whitens_advantages and not ppo_config(**two(advantages="rloo")).whitens_advantages


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (two(advantages="rloo", samples_per_prompt=1), "advantages=rloo compares completions of one prompt"),
        (two(advantages="grpo", samples_per_prompt=1), "advantages=grpo compares completions of one prompt"),
        (two(advantages="rloo", value="policy"), "value=policy requires advantages: gae"),
        (two(advantages="grpo", value="shared"), "value=shared requires advantages: gae"),
        (two(advantages="reinforce", value={"ref": "some/model"}), "value=some/model requires advantages: gae"),
        (two(advantages="rloo", publish_value=True), "publish_value=true requires advantages: gae"),
        (two(advantages="rloo", value_warmup_iterations=1), "value_warmup_iterations=1 requires advantages: gae"),
        (two(advantages="rloo", score_placement="after"), "score_placement=after requires advantages: gae"),
        (two(advantages="rloo", gamma=0.9), "gae.gamma=0.9 requires advantages: gae"),
        (two(advantages="rloo", whitening_scope="process"), "whiten.scope=process requires advantages: gae"),
        (two(advantages="rloo", training={"value_learning_rate": 1e-3}), "value_learning_rate requires advantages: gae"),
        (two(advantages="rloo", value_coef=0.5), "value_coef=0.5 requires advantages: gae"),
        (two(advantages="rloo", gae_lambda=0.9), "gae.gae_lambda=0.9 requires advantages: gae"),
        (two(advantages="rloo", value_clip_range=None), "clip.value=null requires advantages: gae"),
        ({"advantages": "reinforce", "rollout_batch_size": 1, "minibatch_size": 1}, "no other completion to compare with"),
        (two(advantages="rloo", divide_by_deviation=False), "divide_by_deviation=false requires advantages: grpo"),
        ({"samples_per_prompt": 5}, "rollout_batch_size=12 must be a multiple of samples_per_prompt=5"),
        ({"advantages": "ppo"}, "'gae', 'rloo', 'grpo' or 'reinforce'"),
    ],
)
def test_contradictions_are_refused(ppo_config, fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        ppo_config(**fields)


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_critic_free_methods_have_no_value_network(ppo_config, ppo_context, prompts, monkeypatch, lora) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a value network was loaded")

    for name in ("from_policy", "from_pretrained"):
        monkeypatch.setattr(ValueModel, name, refuse)
    config = ppo_config(**two(advantages="rloo", data=prompts, lora=lora))
    roles = load_roles(config, ppo_context)
    assert set(roles.networks()) == {"policy"} and roles.value is None and not roles.has_value
    assert not any("value" in name or "score_head" in name for name, _ in roles.policy.model.named_parameters())
    result = run(config, ppo_context)
    assert "value_explained_variance" not in result.metrics
    lines = [json.loads(line) for line in (ppo_context.folder / "metrics.jsonl").read_text().splitlines()]
    assert not any(name.startswith("value/") for line in lines for name in line)
    assert all(line["rewards/prompt_std"] >= 0 and 0 <= line["rewards/flat_prompt_share"] <= 1 for line in lines)
    kept = {path.name for path in ppo_context.checkpoint_folder.rglob("*") if path.is_file()}
    assert "policy.safetensors" in kept and not any(name.startswith("value") for name in kept)


def test_completions_of_a_prompt_are_consecutive_rows_and_differ(ppo_config, ppo_context, prompts) -> None:
    run(ppo_config(**two(advantages="rloo", data=prompts, samples_per_prompt=4, num_samples=12)), ppo_context)
    rows = [json.loads(line) for line in (ppo_context.folder / "samples.jsonl").read_text().splitlines()]
    asked = [row["prompt"] for row in rows]
    assert len(asked) == 24  # two iterations of three prompts, four times each
    groups = [asked[start : start + 4] for start in range(0, 24, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) == 6  # no prompt occurs twice before every prompt has occurred once
    assert all(len({row["completion"] for row in rows[start : start + 4]}) > 1 for start in range(0, 24, 4))


def test_training_raises_the_reward(ppo_config, ppo_context, prompts) -> None:
    config = ppo_config(
        data=prompts,
        reward=[{"function": "letters_reward:vowels"}],
        total_episodes=10 * 64,
        rollout_batch_size=64,
        minibatch_size=32,
        microbatch_size=32,
        ppo_epochs=2,
        kl_coef=0.0,
        training={"learning_rate": 4e-3, "schedule": "constant"},
        generation={"max_new_tokens": 6},
        advantages="grpo",
        samples_per_prompt=4,
        value=None,
    )
    metrics = run(config, ppo_context).metrics
    assert metrics["score_mean_last"] > metrics["score_mean_first"] + 0.1
