"""Training targets of the update: rewards per token, advantages and returns. B episodes, R response tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import TrainingError
from stages.ppo.config import PPOStepConfig
from stages.ppo.rollout.rollout import Rollout
from stages.rl.baselines import batch_baseline, group_relative, leave_one_out, spread
from stages.rl.gae import gae
from stages.rl.kl import estimate_kl
from stages.rl.masking import scale_to_unit_variance, whiten
from stages.rl.shaping import shape_rewards


@dataclass(frozen=True)
class Targets:
    """Training targets of the update, [B, R], 0 outside the mask.

    ``bootstrap_returns`` [B]: returns of the states after the last tokens, 0 where those do not count. A score that is added there is not
    in ``rewards``.
    """

    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    bootstrap_returns: Tensor

    def rows(self, chosen: Tensor) -> Targets:
        """The targets of the episodes ``chosen`` [M]."""
        return Targets(self.rewards[chosen], self.advantages[chosen], self.returns[chosen], self.bootstrap_returns[chosen])


def targets(rollout: Rollout, config: PPOStepConfig, *, kl_coef: float) -> Targets:
    """Rewards (score at the last token, minus the KL penalty), advantages and returns of ``rollout``.

    The KL is that of the rollout's log-probabilities and stays fixed during the update (Ouyang et al. 2022, section 3.5). Returns are
    computed before the advantages are whitened (openai/lm-human-preferences). Raises TrainingError if an advantage or a return is not
    finite.
    """
    mask = rollout.response_mask
    kl = estimate_kl(rollout.rollout_logprobs, rollout.reference_logprobs, estimator=config.kl.estimator)
    paid = rollout.token_scores
    states, values = mask, rollout.values  # all states with a value: the states before the tokens, ...
    if rollout.bootstrap_mask.any():  # ... and with score_placement: after also the states after the last tokens
        rows, ends = torch.nonzero(rollout.bootstrap_mask).flatten(), rollout.lengths[rollout.bootstrap_mask]
        kl, states, values, paid = (torch.nn.functional.pad(tensor, (0, 1)) for tensor in (kl, mask, values, paid))
        states[rows, ends], values[rows, ends] = True, rollout.bootstrap_values[rows]
        kl[rows, ends] = 0.0
    at_end = rollout.scores - rollout.token_scores.sum(dim=1)
    rewards = shape_rewards(at_end, kl, states, kl_coef=kl_coef, token_scores=paid)
    if config.whiten.rewards:
        rewards = scale_to_unit_variance(rewards, states)
    if not config.has_value:
        return _targets_without_values(rewards, mask, config)
    advantages, returns = gae(rewards, values, states, gamma=config.gae.gamma, gae_lambda=config.gae.gae_lambda)
    if config.gae.value_gae_lambda is not None:
        _, returns = gae(rewards, values, states, gamma=config.gae.gamma, gae_lambda=config.gae.value_gae_lambda)
    bootstrap_returns = torch.zeros(len(mask))
    if rollout.bootstrap_mask.any():
        bootstrap_returns[rows] = returns[rows, ends]
        rewards, advantages, returns = rewards[:, :-1], torch.where(mask, advantages[:, :-1], 0.0), returns[:, :-1]
        rewards = torch.where(mask, rewards, 0.0)
    if config.whitens_advantages:
        advantages = whiten(advantages, mask)
    if not bool(torch.isfinite(advantages).all() and torch.isfinite(returns).all()):
        raise TrainingError("an advantage or return is not finite; check the scores and values of this rollout")
    return Targets(rewards, advantages, torch.where(mask, returns, 0.0), bootstrap_returns)


def _targets_without_values(rewards: Tensor, mask: Tensor, config: PPOStepConfig) -> Targets:
    """Targets from the return of each completion, by ``config.advantages``. Completions of one prompt must be adjacent and complete."""
    returns = torch.where(mask, rewards, 0.0).sum(dim=1)
    if config.advantages == "rloo":
        each = leave_one_out(returns, config.samples_per_prompt)
    elif config.advantages == "grpo":
        each = group_relative(returns, config.samples_per_prompt, divide_by_deviation=config.divide_by_deviation)
    else:
        each = batch_baseline(returns)
    advantages = spread(each, mask)
    if config.whitens_advantages:
        advantages = whiten(advantages, mask)
    if not bool(torch.isfinite(advantages).all()):
        raise TrainingError("an advantage is not finite; check the scores of this rollout")
    return Targets(rewards, advantages, torch.zeros_like(advantages), torch.zeros(len(mask)))


def all_targets(rollout: Rollout, config: PPOStepConfig, *, kl_coef: float, num_processes: int) -> Targets:
    """``targets`` of a complete rollout. With ``whiten.scope: process``, each process's share is whitened separately."""
    if config.whiten.scope != "process" or num_processes == 1:
        return targets(rollout, config, kl_coef=kl_coef)
    rows_of = [torch.arange(index, len(rollout.prompts), num_processes) for index in range(num_processes)]
    parts = [targets(rollout.rows(own_rows), config, kl_coef=kl_coef) for own_rows in rows_of]
    order = torch.cat(rows_of).argsort()
    return Targets(*(torch.cat([getattr(part, name) for part in parts])[order] for name in Targets.__dataclass_fields__))
