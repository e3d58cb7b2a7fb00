"""One iteration's data: sample completions, score them, and keep everything the update needs.

B episodes, R response tokens (right padded). Tensors are on the CPU and whole on every process: they are small beside the models, and so
whitening, the KL controller, minibatches and metrics are global without further ado.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stages.corpora.messages import Prompt
from stages.errors import TrainingError
from stages.models.budget import PassBudget
from stages.models.sharding import unsharded
from stages.ppo.config import PPOStepConfig
from stages.ppo.credit import token_scores
from stages.ppo.early_scoring import EarlyScoring
from stages.ppo.measuring import measure, measuring_budget
from stages.ppo.roles import Roles
from stages.process.gpus import measured_gpu_memory
from stages.rewards.details import Details
from stages.rewards.source import CombinedReward, Scores
from stages.rl.baselines import batch_baseline, group_relative, leave_one_out, spread
from stages.rl.gae import gae
from stages.rl.kl import estimate_kl
from stages.rl.losses import importance_weights
from stages.rl.masking import scale_to_unit_variance, whiten
from stages.rl.shaping import penalize_missing_eos, shape_rewards
from stages.sampling.generation import decode_completions, right_pad


class ScoringError(TrainingError):
    """A reward source failed, or gave something that is no finite number; ``episodes`` are the prompts and completions it was shown."""

    def __init__(self, message: str, episodes: list[tuple[Prompt, str]]) -> None:
        super().__init__(message)
        self.episodes = episodes


@dataclass(frozen=True)
class Rollout:
    """Episodes of one iteration, in order."""

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    completions: list[str]
    response_ids: Tensor  # [B, R]
    response_mask: Tensor  # [B, R] bool, True through the stop token
    stopped: Tensor  # [B] bool: ended with a stop token
    rollout_logprobs: Tensor  # [B, R] by the policy that sampled, at the sampling temperature
    sampler_logprobs: Tensor  # [B, R] as sampling gave them; those of another engine where that sampled
    reference_logprobs: Tensor  # [B, R]
    values: Tensor  # [B, R] value before each token, by the value network of the rollout
    closing_values: Tensor  # [B] value after the last token, where closing_mask is True
    closing_mask: Tensor  # [B] bool: the score is paid one state behind the last token (score_placement: after, and room left)
    scores: Tensor  # [B] weighted sum of the reward sources, after the penalty for a missing stop token
    raw_scores: Tensor  # [B] before it
    token_scores: Tensor  # [B, R] the share of the scores that has a place in the text; what is left of a score is paid at the end
    parts: dict[str, Tensor]  # [B] by source, NaN where it does not apply; and what was measured beside (stages.rewards.source.Scores)
    monitors: dict[str, Tensor]  # [B] by judge, likewise
    seconds: dict[str, float]  # by phase, of this process
    sampling_gap: float  # largest difference between sampled and recomputed log-probabilities; 0 where not recomputed
    hidden_seconds: float | None = None  # of remote scoring while the policy sampled and was measured; None without a remote source
    sampled_elsewhere: bool = False  # by another engine, whose log-probabilities are not quite the policy's
    gpu_memory: dict[str, int] = field(default_factory=dict)  # peak bytes of the GPU by phase, the largest of all processes
    retreats: int = 0  # how often memory ran out while it was measured, on all processes

    @property
    def kl(self) -> Tensor:
        """k1 estimate per token [B, R], 0 outside the mask."""
        return torch.where(self.response_mask, self.rollout_logprobs - self.reference_logprobs, 0.0)

    @property
    def lengths(self) -> Tensor:
        """Response tokens [B]."""
        return self.response_mask.sum(dim=1)

    def importance(self, cap: float) -> Tensor | None:
        """Weights of the tokens' losses [B, R], 1 outside the mask; None where the policy itself sampled."""
        if not self.sampled_elsewhere:
            return None
        return importance_weights(self.rollout_logprobs, self.sampler_logprobs, cap=cap)

    def response(self, row: int) -> list[int]:
        """Token ids of one response."""
        return self.response_ids[row][self.response_mask[row]].tolist()

    def rows(self, chosen: Tensor) -> Rollout:
        """The episodes ``chosen`` [M]."""
        places = chosen.tolist()
        tensors = {name: getattr(self, name)[chosen] for name in TENSORS}
        return Rollout(
            prompts=[self.prompts[row] for row in places],
            prompt_ids=[self.prompt_ids[row] for row in places],
            completions=[self.completions[row] for row in places],
            parts={name: part[chosen] for name, part in self.parts.items()},
            monitors={name: part[chosen] for name, part in self.monitors.items()},
            seconds=self.seconds,
            sampling_gap=self.sampling_gap,
            hidden_seconds=self.hidden_seconds,
            sampled_elsewhere=self.sampled_elsewhere,
            gpu_memory=self.gpu_memory,
            retreats=self.retreats,
            **tensors,
        )


TOKEN_TENSORS = ("response_ids", "response_mask", "rollout_logprobs", "sampler_logprobs", "reference_logprobs", "values", "token_scores")
TENSORS = (*TOKEN_TENSORS, "closing_values", "closing_mask", "stopped", "scores", "raw_scores")


@dataclass(frozen=True)
class Targets:
    """What the update trains towards, [B, R] and 0 outside the mask.

    ``closing_returns`` [B] are the returns of the states after the last tokens, 0 where those do not count; a score that is paid there is
    in no column of ``rewards``.
    """

    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    closing_returns: Tensor

    def rows(self, chosen: Tensor) -> Targets:
        """Those of the episodes ``chosen`` [M]."""
        return Targets(self.rewards[chosen], self.advantages[chosen], self.returns[chosen], self.closing_returns[chosen])


def collect(
    roles: Roles,
    reward: CombinedReward,
    monitors: CombinedReward,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    seeds: Sequence[int],
    config: PPOStepConfig,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    budget: PassBudget | None = None,
) -> Rollout:
    """Sample a completion for every prompt and measure it; each process takes every ``num_processes``-th episode.

    ``budget``: of the measuring passes, from one rollout to the next (None: one as the config says).

    ``columns``: what the prompts' rows say beside them, for the reward functions that ask for it.
    Raises ScoringError where a reward source gives something that is no finite number, SamplerLost where the sampler is gone.
    """
    own = list(range(process_index, len(prompts), num_processes))
    details = Details(columns or {}).rows(own)
    with unsharded(*roles.models()):  # the processes sample and measure apart
        share = _collect_share(
            roles,
            reward,
            monitors,
            [prompts[row] for row in own],
            [prompt_ids[row] for row in own],
            [seeds[row] for row in own],
            config,
            details,
            budget or measuring_budget(config, roles.policy.device),
        )
    if num_processes == 1:
        return share
    from accelerate.utils import gather_object

    return _assemble(gather_object([share]), list(prompts), list(prompt_ids))


def _collect_share(
    roles: Roles,
    reward: CombinedReward,
    monitors: CombinedReward,
    prompts: list[Prompt],
    prompt_ids: list[list[int]],
    seeds: list[int],
    config: PPOStepConfig,
    details: Details,
    budget: PassBudget,
) -> Rollout:
    policy, sampler = roles.policy, roles.sampler
    seconds: dict[str, float] = {}
    gpu_memory: dict[str, int] = {}
    policy.activate()
    with EarlyScoring((reward, monitors), roles.tokenizer, prompts, prompt_ids, details) as early:
        with measured_gpu_memory(gpu_memory, "generation"), policy.precision():
            began = time.perf_counter()
            sampler.take_weights()
            seconds |= {} if sampler.is_local else {"transfer": time.perf_counter() - began}
            began = time.perf_counter()
            generated = sampler.sample(prompt_ids, config.generation, seeds, on_finished=early.on_finished)
        sampler.rest()
        completions = decode_completions(roles.tokenizer, generated)
        mask = generated.response_mask.cpu()
        responses = [ids[kept].tolist() for ids, kept in zip(generated.response_ids.cpu(), mask, strict=True)]
        seconds["generation"] = time.perf_counter() - began

        began = time.perf_counter()
        recompute = recomputes_logprobs(roles, config)
        closing = (mask.sum(dim=1) < config.generation.max_new_tokens) & (config.score_placement == "after")
        retreats = budget.retreats
        with measured_gpu_memory(gpu_memory, "measuring"):
            measured = measure(roles, prompt_ids, responses, closing, budget, recompute=recompute)
        tokens = {name: unflatten(flat, mask) for name, flat in measured.items() if name != "closing"}
        closing_values = torch.zeros(len(prompts)).masked_scatter(closing, measured["closing"])
        seconds["measuring"] = time.perf_counter() - began

        hidden = early.seconds() if early.sources else None
        began = time.perf_counter()
        try:
            with measured_gpu_memory(gpu_memory, "scoring"), roles.offload.awake(*reward.modules(), *monitors.modules()):
                known = Details(details.columns, responses)
                scored = reward.score(prompts, completions, known)
                judged = monitors.score(prompts, completions, known, may_abstain=True) if monitors.sources else Scores(torch.zeros(0), {})
        except TrainingError as error:
            raise ScoringError(str(error), list(zip(prompts, completions, strict=True))) from error
        seconds["scoring"] = time.perf_counter() - began

    sampled = torch.where(mask, generated.logprobs.cpu(), 0.0)
    stopped = generated.stopped.cpu()
    paid = torch.zeros(mask.shape) if scored.spans is None else token_scores(roles.tokenizer, responses, scored.spans, mask.shape[1])
    if config.missing_eos == "replace":  # the penalty stands in for all of a score
        paid[~stopped] = 0.0
    return Rollout(
        prompts=prompts,
        prompt_ids=prompt_ids,
        completions=completions,
        response_ids=generated.response_ids.cpu(),
        response_mask=mask,
        stopped=stopped,
        rollout_logprobs=tokens["sampled"] if recompute else sampled,
        sampler_logprobs=sampled,
        reference_logprobs=tokens["reference"],
        values=tokens["values"],
        closing_values=closing_values,
        closing_mask=closing,
        scores=penalize_missing_eos(scored.total, stopped, how=config.missing_eos, penalty=config.missing_eos_penalty),
        raw_scores=scored.total,
        token_scores=paid,
        parts=scored.parts,
        monitors=judged.parts,
        seconds=seconds,
        sampling_gap=float((tokens["sampled"] - sampled).abs().max()) if recompute else 0.0,
        hidden_seconds=hidden,
        sampled_elsewhere=not sampler.is_local,
        gpu_memory=gpu_memory,
        retreats=budget.retreats - retreats,
    )


def recomputes_logprobs(roles: Roles, config: PPOStepConfig) -> bool:
    """Whether the rollout's log-probabilities come from a pass like the update's, and not from sampling."""
    if config.rollout_logprobs == "auto":
        return roles.policy.autocast is not None or not roles.sampler.is_local
    return config.rollout_logprobs == "recomputed"


def unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Values of counted tokens [N], row by row, at their places in [B, R]; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, flat)


def _assemble(shares: list[Rollout], prompts: list[Prompt], prompt_ids: list[list[int]]) -> Rollout:
    """The whole rollout from the shares of all processes, in the order of the episodes."""
    number, width = len(prompts), max(share.response_ids.shape[1] for share in shares)
    places = [list(range(index, number, len(shares))) for index in range(len(shares))]

    def joined(pick: Any) -> Tensor:
        parts = [pick(share) for share in shares]
        if parts[0].dim() == 2:
            parts = [right_pad(list(part), 0, width) for part in parts]
        whole = torch.empty((number, *parts[0].shape[1:]), dtype=parts[0].dtype)
        for place, part in zip(places, parts, strict=True):
            whole[place] = part
        return whole

    completions = [""] * number
    for place, share in zip(places, shares, strict=True):
        for row, text in zip(place, share.completions, strict=True):
            completions[row] = text
    return Rollout(
        prompts=prompts,
        prompt_ids=prompt_ids,
        completions=completions,
        parts={name: joined(lambda share, name=name: share.parts[name]) for name in shares[0].parts},
        monitors={name: joined(lambda share, name=name: share.monitors[name]) for name in shares[0].monitors},
        seconds={name: max(share.seconds[name] for share in shares) for name in shares[0].seconds},
        sampling_gap=max(share.sampling_gap for share in shares),
        hidden_seconds=max((share.hidden_seconds for share in shares if share.hidden_seconds is not None), default=None),
        sampled_elsewhere=shares[0].sampled_elsewhere,
        gpu_memory={name: max(share.gpu_memory[name] for share in shares) for name in shares[0].gpu_memory},
        retreats=sum(share.retreats for share in shares),
        **{name: joined(lambda share, name=name: getattr(share, name)) for name in TENSORS},
    )


def targets(rollout: Rollout, config: PPOStepConfig, *, kl_coef: float) -> Targets:
    """Rewards (score at the last token, minus the KL penalty), advantages and returns of ``rollout``.

    The KL is that of the rollout's log-probabilities and stays fixed during the update (Ouyang et al. 2022, section 3.5). Returns come
    before the advantages are whitened (openai/lm-human-preferences).
    """
    mask = rollout.response_mask
    kl = estimate_kl(rollout.rollout_logprobs, rollout.reference_logprobs, estimator=config.kl.estimator)
    paid = rollout.token_scores
    states, values = mask, rollout.values  # every state whose value is learned: those before the tokens, ...
    if rollout.closing_mask.any():  # ... and with score_placement: after those behind the last ones
        rows, ends = torch.nonzero(rollout.closing_mask).flatten(), rollout.lengths[rollout.closing_mask]
        kl, states, values, paid = (torch.nn.functional.pad(tensor, (0, 1)) for tensor in (kl, mask, values, paid))
        states[rows, ends], values[rows, ends] = True, rollout.closing_values[rows]
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
    closing_returns = torch.zeros(len(mask))
    if rollout.closing_mask.any():
        closing_returns[rows] = returns[rows, ends]
        rewards, advantages, returns = rewards[:, :-1], torch.where(mask, advantages[:, :-1], 0.0), returns[:, :-1]
        rewards = torch.where(mask, rewards, 0.0)
    if config.whitens_advantages:
        advantages = whiten(advantages, mask)
    if not bool(torch.isfinite(advantages).all() and torch.isfinite(returns).all()):
        raise TrainingError("an advantage or return is not a finite number; look at the scores and values of this rollout")
    return Targets(rewards, advantages, torch.where(mask, returns, 0.0), closing_returns)


def _targets_without_values(rewards: Tensor, mask: Tensor, config: PPOStepConfig) -> Targets:
    """Targets by ``config.advantages`` from the return of each completion; the rollout's rows are whole groups of a prompt."""
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
        raise TrainingError("an advantage is not a finite number; look at the scores of this rollout")
    return Targets(rewards, advantages, torch.zeros_like(advantages), torch.zeros(len(mask)))


def whole_targets(rollout: Rollout, config: PPOStepConfig, *, kl_coef: float, num_processes: int) -> Targets:
    """``targets`` of a whole rollout; with ``whiten.scope: process`` each process's share of it is whitened by itself."""
    if config.whiten.scope != "process" or num_processes == 1:
        return targets(rollout, config, kl_coef=kl_coef)
    places = [torch.arange(index, len(rollout.prompts), num_processes) for index in range(num_processes)]
    parts = [targets(rollout.rows(place), config, kl_coef=kl_coef) for place in places]
    order = torch.cat(places).argsort()
    return Targets(*(torch.cat([getattr(part, name) for part in parts])[order] for name in Targets.__dataclass_fields__))
