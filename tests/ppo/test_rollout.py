"""Rewards, advantages and returns of hand-made rollouts: position of the score, token scores, and groups of whitening."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import TrainingError
from stages.ppo.records.checkpoint import load_rollout, save_rollout
from stages.ppo.rollout.rollout import TENSOR_GROUPS, TENSORS, Rollout, joined
from stages.ppo.update.targets import all_targets, targets


def hand_made(**fields: Any) -> Rollout:
    """Two episodes: one of two tokens that has room for a third, one of three tokens."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tensors = {
        "response_ids": torch.zeros(2, 3, dtype=torch.long),
        "response_mask": mask,
        "stopped": torch.tensor([True, False]),
        "rollout_logprobs": torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -3.0]]),
        "sampler_logprobs": torch.zeros(2, 3),
        "reference_logprobs": torch.tensor([[-1.5, -1.0, 0.0], [-1.0, -2.0, -2.0]]),
        "values": torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, -1.0]]),
        "bootstrap_values": torch.zeros(2),
        "bootstrap_mask": torch.zeros(2, dtype=torch.bool),
        "scores": torch.tensor([10.0, -4.0]),
        "raw_scores": torch.tensor([10.0, -4.0]),
        "token_scores": torch.zeros(2, 3),
    }
    names = {"prompts": ["a", "b"], "prompt_ids": [[1], [2]], "completions": ["x", "y"], "parts": {}, "monitors": {}, "seconds": {}}
    return Rollout(**{**names, **tensors, "sampling_gap": 0.0, **fields})  # type: ignore[arg-type]


def test_score_is_credited_to_the_last_token(ppo_config) -> None:
    config = ppo_config(whiten_advantages=False, gae_lambda=0.5)
    target = targets(hand_made(), config, kl_coef=0.1)
    # kl: 0.5, -1 | 0, 1, -1
    torch.testing.assert_close(target.rewards, torch.tensor([[-0.05, 10.1, 0.0], [0.0, -0.1, -3.9]]))
    # row 0: deltas -0.05 + 0.25 - 0.5 = -0.3 and 10.1 - 0.25 = 9.85; A = -0.3 + 4.925, 9.85
    # row 1: deltas 0 - 1 = -1, -0.1 - 1 = -1.1, -3.9 + 1 = -2.9; A2 = -2.9, A1 = -1.1 - 1.45, A0 = -1 - 1.275
    torch.testing.assert_close(target.advantages, torch.tensor([[4.625, 9.85, 0.0], [-2.275, -2.55, -2.9]]))
    torch.testing.assert_close(target.returns, torch.tensor([[5.125, 10.1, 0.0], [-1.275, -2.55, -3.9]]))
    assert target.bootstrap_returns.tolist() == [0.0, 0.0]


def assert_same(got: Rollout, expected: Rollout) -> None:
    for item in fields(Rollout):
        one, other = getattr(got, item.name), getattr(expected, item.name)
        if item.name in (*TENSORS, *TENSOR_GROUPS):
            torch.testing.assert_close(one, other, equal_nan=True, msg=item.name)
        else:
            assert one == other, item.name


def test_every_field_survives_division_joining_and_a_checkpoint(tmp_path: Path) -> None:
    tensors = {"parts": {"a": torch.tensor([1.0, math.nan])}, "monitors": {"b": torch.tensor([2.0, 3.0])}}
    times = {"seconds": {"scoring": 2.0}, "hidden_seconds": 1.5}
    rollout = hand_made(**tensors, **times, gpu_memory={"scoring": 7}, retreats=2, lag=1, sampled_elsewhere=True)
    first, second = rollout.rows(torch.tensor([0])), rollout.rows(torch.tensor([1]))
    assert (second.prompts, second.completions, second.scores.tolist(), second.parts["a"].isnan().item()) == (["b"], ["y"], [-4.0], True)
    # The first process has responses of at most two tokens, so narrower tensors. It waited longer, and only it ran out of memory.
    wide = {name: value for name, value in vars(first).items() if isinstance(value, torch.Tensor) and value.dim() == 2}
    narrow = {name: value[:, :2] for name, value in wide.items()}
    assert len(narrow) == 7
    shares = [
        replace(first, **narrow, seconds={"scoring": 5.0}, sampling_gap=0.5, retreats=3),
        replace(second, retreats=0, hidden_seconds=None),
    ]
    assert_same(joined(shares), replace(rollout, seconds={"scoring": 5.0}, sampling_gap=0.5, retreats=3))
    save_rollout(rollout, tmp_path)
    assert_same(load_rollout(tmp_path), rollout)


@pytest.mark.detail("P27")
def test_score_is_credited_to_an_extra_state_after_the_last_token(ppo_config) -> None:
    config = ppo_config(whiten_advantages=False, gae_lambda=0.5, score_placement="after")
    rollout = hand_made(bootstrap_mask=torch.tensor([True, False]), bootstrap_values=torch.tensor([8.0, 0.0]))
    target = targets(rollout, config, kl_coef=0.1)
    # row 0: the last token has only its KL; the score is credited to the state after it, whose value is 8
    torch.testing.assert_close(target.rewards, torch.tensor([[-0.05, 0.1, 0.0], [0.0, -0.1, -3.9]]))
    # deltas -0.3, 0.1 + 8 - 0.25 = 7.85, 10 - 8 = 2; A2 = 2, A1 = 7.85 + 1, A0 = -0.3 + 4.425
    torch.testing.assert_close(target.advantages, torch.tensor([[4.125, 8.85, 0.0], [-2.275, -2.55, -2.9]]))
    torch.testing.assert_close(target.returns, torch.tensor([[4.625, 9.1, 0.0], [-1.275, -2.55, -3.9]]))
    assert target.bootstrap_returns.tolist() == [10.0, 0.0]
    # whitening covers only the policy's tokens, not the state after the last token
    whitened = targets(rollout, ppo_config(gae_lambda=0.5, score_placement="after"), kl_coef=0.1)
    counted = target.advantages[rollout.response_mask]
    expected = (counted - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(whitened.advantages[rollout.response_mask], expected)
    torch.testing.assert_close(whitened.returns, target.returns)


def test_token_scores_are_credited_to_their_tokens(ppo_config) -> None:
    config = ppo_config(whiten_advantages=False)
    target = targets(hand_made(token_scores=torch.tensor([[4.0, 3.0, 0.0], [0.0, 0.0, 0.0]])), config, kl_coef=0.0)
    assert target.rewards.tolist() == [[4.0, 6.0, 0.0], [0.0, 0.0, -4.0]]  # of the score 10, 3 belong to no token and are added at the end


def test_a_separate_lambda_for_the_value(ppo_config) -> None:
    settings = {"whiten_advantages": False, "gae_lambda": 0.5}
    one = targets(hand_made(), ppo_config(**settings, value_gae_lambda=1.0), kl_coef=0.1)
    other = targets(hand_made(), ppo_config(**settings), kl_coef=0.1)
    torch.testing.assert_close(one.advantages, other.advantages)
    # at lambda = 1 a return is the sum of the later rewards: -0.05 + 10.1, 10.1 | -4, -4, -3.9
    torch.testing.assert_close(one.returns, torch.tensor([[10.05, 10.1, 0.0], [-4.0, -4.0, -3.9]]))


@pytest.mark.detail("P10")
def test_whitening_by_process_whitens_each_share_separately(ppo_config) -> None:
    config = ppo_config(whitening_scope="process")
    two_processes = all_targets(hand_made(), config, kl_coef=0.1, num_processes=2)
    for row in range(2):
        alone = targets(hand_made().rows(torch.tensor([row])), config, kl_coef=0.1)
        torch.testing.assert_close(two_processes.advantages[row], alone.advantages[0])
        counted = two_processes.advantages[row][hand_made().response_mask[row]]
        assert abs(float(counted.mean())) < 1e-5
    together = all_targets(hand_made(), config, kl_coef=0.1, num_processes=1)
    torch.testing.assert_close(together.advantages, targets(hand_made(), ppo_config(), kl_coef=0.1).advantages)


def test_nan_value_is_refused(ppo_config) -> None:
    values = hand_made().values.clone()
    values[0, 1] = float("nan")
    with pytest.raises(TrainingError, match="is not finite"):
        targets(hand_made(values=values), ppo_config(), kl_coef=0.1)


@pytest.mark.parametrize("value", ["policy", "shared"])
def test_bootstrap_value_is_read_at_the_last_token(ppo_config, ppo_context, make_rollout, value) -> None:
    from stages.ppo.roles import load_roles

    config = ppo_config(score_placement="after", value=value)
    roles = load_roles(config, ppo_context)
    head = roles.value.score_head if roles.value is not None else roles.policy.value_head
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    rollout = make_rollout(roles, config)
    assert rollout.bootstrap_mask.any() and not rollout.bootstrap_mask.all()
    backbone = roles.value.backbone if roles.value is not None else roles.policy.model.model
    for row in range(len(rollout.prompts)):
        ids = torch.tensor([rollout.prompt_ids[row] + rollout.response(row)])
        with torch.no_grad():
            values = head(backbone(input_ids=ids).last_hidden_state)[0]
        length = int(rollout.lengths[row])
        # before each token, and for a response with room after the last one
        torch.testing.assert_close(rollout.values[row, :length], values[-length - 1 : -1], rtol=1e-4, atol=1e-5)
        if rollout.bootstrap_mask[row]:
            torch.testing.assert_close(rollout.bootstrap_values[row], values[-1], rtol=1e-4, atol=1e-5)


def test_each_phase_of_an_iteration_has_its_peak_of_gpu_memory(ppo_config, ppo_context, make_rollout, monkeypatch) -> None:
    from stages.ppo.records.metrics import iteration_metrics
    from stages.ppo.roles import load_roles
    from stages.ppo.update.updater import UpdateResult

    config = ppo_config()
    roles = load_roles(config, ppo_context)
    peaks = iter([0, 5 * 2**30, 0, 3 * 2**30, 0, 2**30])  # at the beginning, and at the end of generation, measuring and scoring
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: next(peaks))
    rollout = make_rollout(roles, config)
    rollout.seconds["update"] = 1.0
    metrics = iteration_metrics(rollout, UpdateResult({}, 1, 1), config, kl_coef=0.1)
    memory = {name: value for name, value in metrics.items() if name.startswith("memory/")}
    assert memory == {"memory/generation_gpu_gib": 5.0, "memory/scoring_gpu_gib": 1.0, "memory/measuring_gpu_gib": 3.0}


def test_scores_by_ending_are_means_after_the_penalties(ppo_config, ppo_context, make_rollout) -> None:
    from stages.ppo.records.metrics import iteration_metrics
    from stages.ppo.roles import load_roles
    from stages.ppo.update.updater import UpdateResult

    rollout = make_rollout(load_roles(ppo_config(), ppo_context), ppo_config())
    rollout.seconds["update"] = 1.0
    rollout.stopped[:] = torch.arange(len(rollout.stopped)) < 2
    rollout.scores[:] = torch.where(rollout.stopped, torch.tensor(3.0), torch.tensor(-4.0))
    rollout.scores[0] = 5.0
    expected = {"responses/stopped_score": 4.0, "responses/unstopped_score": -4.0}
    metrics = iteration_metrics(rollout, UpdateResult({}, 1, 1), ppo_config(missing_eos="replace"), kl_coef=0.1)
    assert {name: value for name, value in metrics.items() if name.endswith("stopped_score")} == expected
    assert expected.keys().isdisjoint(iteration_metrics(rollout, UpdateResult({}, 1, 1), ppo_config(missing_eos="none"), kl_coef=0.1))
