"""One iteration's data: sample completions, score them, and keep everything that the update needs.

B episodes, R response tokens (right padded). Tensors are on the CPU, and every process has those of all episodes: they are small compared
with the models, and whitening, the KL controller, minibatches and metrics are then global.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
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
from stages.ppo.sampling import Sampling
from stages.process.gpus import measured_gpu_memory
from stages.rewards.details import Details
from stages.rewards.source import CombinedReward, Scores
from stages.rl.baselines import batch_baseline, group_relative, leave_one_out, spread
from stages.rl.gae import gae
from stages.rl.kl import estimate_kl
from stages.rl.losses import importance_weights
from stages.rl.masking import scale_to_unit_variance, whiten
from stages.rl.shaping import penalize_length, penalize_missing_eos, shape_rewards
from stages.sampling.generation import decode_completions
from stages.sampling.padding import right_pad


class ScoringError(TrainingError):
    """A reward source failed or returned a non-finite score. ``episodes``: the prompts and completions that it received."""

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
    response_mask: Tensor  # [B, R] bool, True up to and including the stop token
    stopped: Tensor  # [B] bool: ended with a stop token
    rollout_logprobs: Tensor  # [B, R] by the policy at the start of the update, at the sampling temperature
    sampler_logprobs: Tensor  # [B, R] as returned by the sampler, which may be another engine, or have the policy of an earlier update
    reference_logprobs: Tensor  # [B, R]
    values: Tensor  # [B, R] value before each token, by the value network of the rollout
    bootstrap_values: Tensor  # [B] value after the last token, where bootstrap_mask is True
    bootstrap_mask: Tensor  # [B] bool: the score is added one state after the last token (score_placement: after, if there is room)
    scores: Tensor  # [B] weighted sum of the reward sources, after the penalties for the length and for a missing stop token
    raw_scores: Tensor  # [B] before these penalties
    token_scores: Tensor  # [B, R] the parts of scores with a position in the text; the rest of a score is added at the end
    parts: dict[str, Tensor]  # [B] by source, NaN if it does not apply; and additional measurements (stages.rewards.source.Scores)
    monitors: dict[str, Tensor]  # [B] by judge, in the same way
    seconds: dict[str, float]  # by phase, on this process
    sampling_gap: float  # largest difference between sampled and recomputed log-probabilities; 0 if they are not recomputed
    hidden_seconds: float | None = None  # remote scoring in parallel with sampling and measuring; None without a remote source
    sampled_elsewhere: bool = False  # by another engine, whose log-probabilities differ slightly from the policy's
    lag: int = 0  # number of updates between the policy that sampled and the policy that trains on these episodes
    hidden_sampling_seconds: float | None = None  # of sampling while the update before ran; None without such sampling
    gpu_memory: dict[str, int] = field(default_factory=dict)  # peak bytes of GPU memory by phase, maximum over processes
    retreats: int = 0  # number of times that memory ran out while measuring, on all processes

    @property
    def kl(self) -> Tensor:
        """k1 estimate per token [B, R] for the policy that sampled, 0 outside the mask.

        With a lag, this is the policy of an earlier update: the estimate is unbiased only for the policy whose samples these are.
        """
        logprobs = self.sampler_logprobs if self.lag else self.rollout_logprobs
        return torch.where(self.response_mask, logprobs - self.reference_logprobs, 0.0)

    @property
    def lengths(self) -> Tensor:
        """Number of response tokens [B]."""
        return self.response_mask.sum(dim=1)

    def importance(self, cap: float) -> Tensor | None:
        """Weights of the tokens' losses [B, R], 1 outside the mask; None if the local engine sampled."""
        if not self.sampled_elsewhere:
            return None
        return importance_weights(self.rollout_logprobs, self.sampler_logprobs, cap=cap)

    def response(self, row: int) -> list[int]:
        """Token ids of response ``row``."""
        return self.response_ids[row][self.response_mask[row]].tolist()

    def rows(self, chosen: Tensor) -> Rollout:
        """The episodes ``chosen`` [M]."""
        chosen_rows = chosen.tolist()
        tensors = {name: getattr(self, name)[chosen] for name in TENSORS}
        return Rollout(
            prompts=[self.prompts[row] for row in chosen_rows],
            prompt_ids=[self.prompt_ids[row] for row in chosen_rows],
            completions=[self.completions[row] for row in chosen_rows],
            parts={name: part[chosen] for name, part in self.parts.items()},
            monitors={name: part[chosen] for name, part in self.monitors.items()},
            seconds=self.seconds,
            sampling_gap=self.sampling_gap,
            hidden_seconds=self.hidden_seconds,
            sampled_elsewhere=self.sampled_elsewhere,
            lag=self.lag,
            hidden_sampling_seconds=self.hidden_sampling_seconds,
            gpu_memory=self.gpu_memory,
            retreats=self.retreats,
            **tensors,
        )


TOKEN_TENSORS = ("response_ids", "response_mask", "rollout_logprobs", "sampler_logprobs", "reference_logprobs", "values", "token_scores")
TENSORS = (*TOKEN_TENSORS, "bootstrap_values", "bootstrap_mask", "stopped", "scores", "raw_scores")


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


def collect(
    roles: Roles,
    reward: CombinedReward,
    monitors: CombinedReward,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    seeds: Sequence[int],
    config: PPOStepConfig,
    *,
    columns: Mapping[str, Sequence[object]] | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    budget: PassBudget | None = None,
    sampling: Sampling | None = None,
) -> Rollout:
    """Sample a completion for every prompt and measure it. Each process takes every ``num_processes``-th episode.

    ``sampling``: samples this process's episodes by an engine outside this process, and may already run; None: the local sampler samples.
    ``budget``: token budget of the measuring passes, kept from one rollout to the next (None: a new one from the config). ``columns``:
    further columns of the prompts' rows, for reward functions that request them. Raises ScoringError if a reward source returns a
    non-finite score, SamplerLost if the sampler is no longer available.
    """
    own = list(range(process_index, len(prompts), num_processes))
    details = Details(columns or {}).rows(own)
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
        sampling,
    )
    if num_processes == 1:
        return share

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
    sampling: Sampling | None,
) -> Rollout:
    policy, sampler = roles.policy, roles.sampler
    seconds: dict[str, float] = {}
    gpu_memory: dict[str, int] = {}
    policy.activate()
    early = sampling.early if sampling is not None else EarlyScoring((reward, monitors), roles.tokenizer, prompts, prompt_ids, details)
    with early:
        with measured_gpu_memory(gpu_memory, "generation"), policy.precision():
            began = time.perf_counter()
            if sampling is not None:
                generated = sampling.result(roles.tokenizer.pad_token_id)
            else:
                # The processes sample at their own pace, so each needs the complete policy. No other model is gathered.
                with unsharded(policy.model):
                    generated = sampler.sample(prompt_ids, config.generation, seeds, on_finished=early.on_finished)
        waited = time.perf_counter() - began
        sampler.rest()
        completions = decode_completions(roles.tokenizer, generated)
        mask = generated.response_mask.cpu()
        responses = [ids[kept].tolist() for ids, kept in zip(generated.response_ids.cpu(), mask, strict=True)]
        seconds["generation"] = time.perf_counter() - began

        began = time.perf_counter()
        recompute = recomputes_logprobs(roles, config)
        bootstrap = (mask.sum(dim=1) < config.generation.max_new_tokens) & (config.score_placement == "after")
        retreats = budget.retreats
        with measured_gpu_memory(gpu_memory, "measuring"):
            measured = measure(roles, prompt_ids, responses, bootstrap, budget, recompute=recompute)
        tokens = {name: unflatten(flat, mask) for name, flat in measured.items() if name != "bootstrap"}
        bootstrap_values = torch.zeros(len(prompts)).masked_scatter(bootstrap, measured["bootstrap"])
        seconds["measuring"] = time.perf_counter() - began

        hidden = early.seconds() if early.sources else None
        began = time.perf_counter()
        try:
            judges = [*reward.modules(), *monitors.modules()]
            # A reward model on the policy's backbone is sharded with it, and each process scores at its own pace.
            with measured_gpu_memory(gpu_memory, "scoring"), roles.offload.awake(*judges), unsharded(*judges):
                known = Details(details.columns, responses)
                scored = reward.score(prompts, completions, known)
                judged = monitors.score(prompts, completions, known, may_abstain=True) if monitors.sources else Scores(torch.zeros(0), {})
        except TrainingError as error:
            raise ScoringError(str(error), list(zip(prompts, completions, strict=True))) from error
        seconds["scoring"] = time.perf_counter() - began

    sampled = torch.where(mask, generated.logprobs.cpu(), 0.0)
    stopped = generated.stopped.cpu()
    paid = torch.zeros(mask.shape) if scored.spans is None else token_scores(roles.tokenizer, responses, scored.spans, mask.shape[1])
    shorter = penalize_length(scored.total, mask.sum(dim=1), penalty=config.length_penalty)
    if config.missing_eos == "replace":  # the penalty replaces the complete score
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
        bootstrap_values=bootstrap_values,
        bootstrap_mask=bootstrap,
        scores=penalize_missing_eos(shorter, stopped, how=config.missing_eos, penalty=config.missing_eos_penalty),
        raw_scores=scored.total,
        token_scores=paid,
        parts=scored.parts,
        monitors=judged.parts,
        seconds=seconds,
        sampling_gap=float((tokens["sampled"] - sampled).abs().max()) if recompute else 0.0,
        hidden_seconds=hidden,
        sampled_elsewhere=not sampler.is_local,
        lag=sampling.lag if sampling is not None else 0,
        hidden_sampling_seconds=max(0.0, sampling.seconds - waited) if sampling is not None and sampling.lag else None,
        gpu_memory=gpu_memory,
        retreats=budget.retreats - retreats,
    )


def recomputes_logprobs(roles: Roles, config: PPOStepConfig) -> bool:
    """Whether the rollout's log-probabilities come from a forward pass like the update's instead of from sampling."""
    if config.rollout_logprobs == "auto":
        return roles.policy.autocast is not None or not roles.sampler.is_local
    return config.rollout_logprobs == "recomputed"


def unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Write values of counted tokens [N], in row order, to their positions in [B, R]; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, flat)


def _assemble(shares: list[Rollout], prompts: list[Prompt], prompt_ids: list[list[int]]) -> Rollout:
    """Join the shares of all processes to the complete rollout, in the order of the episodes."""
    num_episodes, width = len(prompts), max(share.response_ids.shape[1] for share in shares)
    rows_of = [list(range(index, num_episodes, len(shares))) for index in range(len(shares))]

    def joined(parts: list[Tensor]) -> Tensor:
        if parts[0].dim() == 2:
            parts = [right_pad(list(part), 0, width) for part in parts]
        full = torch.empty((num_episodes, *parts[0].shape[1:]), dtype=parts[0].dtype)
        for own_rows, part in zip(rows_of, parts, strict=True):
            full[own_rows] = part
        return full

    completions = [""] * num_episodes
    for own_rows, share in zip(rows_of, shares, strict=True):
        for row, text in zip(own_rows, share.completions, strict=True):
            completions[row] = text
    return Rollout(
        prompts=prompts,
        prompt_ids=prompt_ids,
        completions=completions,
        parts={name: joined([share.parts[name] for share in shares]) for name in shares[0].parts},
        monitors={name: joined([share.monitors[name] for share in shares]) for name in shares[0].monitors},
        seconds={name: max(share.seconds[name] for share in shares) for name in shares[0].seconds},
        sampling_gap=max(share.sampling_gap for share in shares),
        hidden_seconds=_largest(share.hidden_seconds for share in shares),
        sampled_elsewhere=shares[0].sampled_elsewhere,
        lag=shares[0].lag,
        hidden_sampling_seconds=_largest(share.hidden_sampling_seconds for share in shares),
        gpu_memory={name: max(share.gpu_memory[name] for share in shares) for name in shares[0].gpu_memory},
        retreats=sum(share.retreats for share in shares),
        **{name: joined([getattr(share, name) for share in shares]) for name in TENSORS},
    )


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def targets(rollout: Rollout, config: PPOStepConfig, *, kl_coef: float) -> Targets:
    """Rewards (score at the last token, minus the KL penalty), advantages and returns of ``rollout``.

    The KL is that of the rollout's log-probabilities and stays fixed during the update (Ouyang et al. 2022, section 3.5). Returns are
    computed before the advantages are whitened (openai/lm-human-preferences).
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
