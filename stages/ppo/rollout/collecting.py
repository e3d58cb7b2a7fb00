"""Collect a rollout: sample completions, measure their log-probabilities and values, and score them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.corpora.conversations.messages import Prompt
from stages.errors import TrainingError
from stages.models.layers.compiled import compiled_passes
from stages.models.passes.budget import PassBudget
from stages.models.sharding import unsharded
from stages.ppo.config import PPOStepConfig
from stages.ppo.roles import Roles
from stages.ppo.rollout.credit import token_scores
from stages.ppo.rollout.early_scoring import EarlyScoring
from stages.ppo.rollout.episodes import Episodes
from stages.ppo.rollout.measuring import measure, measuring_budget
from stages.ppo.rollout.rollout import Rollout
from stages.ppo.rollout.sampling import Sampling
from stages.process.gpus import measured_gpu_memory
from stages.rewards.details import Details
from stages.rewards.source import CombinedReward, Scores
from stages.rl.shaping import penalize_length, penalize_missing_eos
from stages.sampling.generation import decode_completions


class ScoringError(TrainingError):
    """A reward source failed or returned a non-finite score. ``episodes``: the prompts and completions that it received."""

    def __init__(self, message: str, episodes: list[tuple[Prompt, str]]) -> None:
        super().__init__(message)
        self.episodes = episodes


def collect(
    roles: Roles,
    reward: CombinedReward,
    monitors: CombinedReward,
    episodes: Episodes,
    config: PPOStepConfig,
    *,
    budget: PassBudget | None = None,
    sampling: Sampling | None = None,
) -> Rollout:
    """Sample a completion for every episode, measure and score it.

    ``sampling``: samples the episodes by an engine outside this process, and may already run; None: the local sampler samples.
    ``budget``: token budget of the measuring passes, kept from one rollout to the next (None: a new one from the config). Raises
    ScoringError if a reward source returns a non-finite score, SamplerLost if the sampler is no longer available.
    """
    budget = budget or measuring_budget(config, roles.policy.device)
    phases, retreats = _Phases(), budget.retreats
    roles.policy.activate()
    early = EarlyScoring((reward, monitors), roles.tokenizer, episodes) if sampling is None else sampling.early
    with early:
        with phases.phase("generation"):
            sampled = _sample(roles, episodes, config, sampling, early)
        with phases.phase("measuring"):
            measured = _measure(roles, episodes, sampled, config, budget)
        hidden_seconds = early.seconds() if early.sources else None
        with phases.phase("scoring"):
            scored, judged = _score(roles, reward, monitors, episodes, sampled)
    scores, paid = _penalized(roles, episodes, scored, sampled, config)
    is_ahead = sampling is not None and sampling.lag > 0
    return Rollout(
        prompts=list(episodes.prompts),
        prompt_ids=list(episodes.prompt_ids),
        completions=sampled.completions,
        response_ids=sampled.response_ids,
        response_mask=sampled.mask,
        stopped=sampled.stopped,
        rollout_logprobs=sampled.logprobs if measured.logprobs is None else measured.logprobs,
        sampler_logprobs=sampled.logprobs,
        reference_logprobs=measured.reference_logprobs,
        values=measured.values,
        bootstrap_values=measured.bootstrap_values,
        bootstrap_mask=measured.bootstrap_mask,
        scores=scores,
        raw_scores=scored.total,
        token_scores=paid,
        parts=scored.parts,
        monitors=judged.parts,
        seconds=phases.seconds,
        sampling_gap=0.0 if measured.logprobs is None else float((measured.logprobs - sampled.logprobs).abs().max()),
        hidden_seconds=hidden_seconds,
        sampled_elsewhere=not roles.sampler.is_local,
        lag=0 if sampling is None else sampling.lag,
        hidden_sampling_seconds=max(0.0, sampling.seconds - sampled.waited) if sampling is not None and is_ahead else None,
        gpu_memory=phases.gpu_memory,
        retreats=budget.retreats - retreats,
    )


class _Phases:
    """Seconds and peak GPU memory (bytes) of the phases of a rollout, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.gpu_memory: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with measured_gpu_memory(self.gpu_memory, name):
            yield
        self.seconds[name] = time.perf_counter() - began


@dataclass(frozen=True)
class _Sampled:
    """Sampled completions on the CPU."""

    response_ids: Tensor  # [B, R]
    mask: Tensor  # [B, R] bool
    logprobs: Tensor  # [B, R], 0 outside the mask
    stopped: Tensor  # [B] bool
    completions: list[str]
    waited: float  # seconds that this process waited for the sampler

    def responses(self) -> list[list[int]]:
        """The token ids of each response."""
        return [ids[kept].tolist() for ids, kept in zip(self.response_ids, self.mask, strict=True)]


def _sample(roles: Roles, episodes: Episodes, config: PPOStepConfig, sampling: Sampling | None, early: EarlyScoring) -> _Sampled:
    """Sample a completion for each episode, by the engine of ``sampling`` or by the local sampler."""
    began = time.perf_counter()
    with roles.policy.precision():
        if sampling is not None:
            generated = sampling.result(roles.tokenizer.pad_token_id)
        else:
            # The processes sample at their own pace, so each needs the complete policy. No other model is gathered.
            with unsharded(roles.policy.model):
                generated = roles.sampler.sample(episodes.prompt_ids, config.generation, episodes.seeds, on_finished=early.on_finished)
    waited = time.perf_counter() - began
    roles.sampler.sleep()
    completions = decode_completions(roles.tokenizer, generated)
    mask = generated.response_mask.cpu()
    logprobs = torch.where(mask, generated.logprobs.cpu(), 0.0)
    return _Sampled(generated.response_ids.cpu(), mask, logprobs, generated.stopped.cpu(), completions, waited)


@dataclass(frozen=True)
class _Measured:
    """Measurements of the sampled completions by forward passes without gradient. Fields as in ``Rollout``."""

    logprobs: Tensor | None  # [B, R] of the policy; None if those of sampling are used
    reference_logprobs: Tensor
    values: Tensor
    bootstrap_mask: Tensor
    bootstrap_values: Tensor


def _measure(roles: Roles, episodes: Episodes, sampled: _Sampled, config: PPOStepConfig, budget: PassBudget) -> _Measured:
    """Compute the log-probabilities and values of the sampled completions."""
    bootstrap = (sampled.mask.sum(dim=1) < config.generation.max_new_tokens) & (config.score_placement == "after")
    recompute = recomputes_logprobs(roles, config)
    measured = measure(roles, episodes.prompt_ids, sampled.responses(), bootstrap, budget, recompute=recompute)
    tokens = {name: unflatten(flat, sampled.mask) for name, flat in measured.items() if name != "bootstrap"}
    bootstrap_values = torch.zeros(len(episodes.prompts)).masked_scatter(bootstrap, measured["bootstrap"])
    return _Measured(tokens["sampled"] if recompute else None, tokens["reference"], tokens["values"], bootstrap, bootstrap_values)


def _score(roles: Roles, reward: CombinedReward, monitors: CombinedReward, episodes: Episodes, sampled: _Sampled) -> tuple[Scores, Scores]:
    """The scores of the reward and of the monitors. Raises ScoringError with the episodes if a source fails."""
    judges = [*reward.modules(), *monitors.modules()]
    known = Details(episodes.details.columns, sampled.responses())
    try:
        with roles.offload.awake(*judges), compiled_passes():
            scored = reward.score(episodes.prompts, sampled.completions, known)
            if not monitors.sources:
                return scored, Scores(torch.zeros(0), {})
            return scored, monitors.score(episodes.prompts, sampled.completions, known, may_abstain=True)
    except TrainingError as error:
        raise ScoringError(str(error), list(zip(episodes.prompts, sampled.completions, strict=True))) from error


def _penalized(roles: Roles, episodes: Episodes, scored: Scores, sampled: _Sampled, config: PPOStepConfig) -> tuple[Tensor, Tensor]:
    """(scores [B] after the penalties for length and for a missing stop token, the parts of them with a position in the text [B, R])."""
    paid = torch.zeros(sampled.mask.shape)
    if scored.spans is not None:
        paid = token_scores(roles.tokenizer, episodes.prompt_ids, sampled.responses(), scored.spans, sampled.mask.shape[1])
    if config.missing_eos == "replace":  # the penalty replaces the complete score
        paid[~sampled.stopped] = 0.0
    shorter = penalize_length(scored.total, sampled.mask.sum(dim=1), penalty=config.length_penalty)
    return penalize_missing_eos(shorter, sampled.stopped, how=config.missing_eos, penalty=config.missing_eos_penalty), paid


def recomputes_logprobs(roles: Roles, config: PPOStepConfig) -> bool:
    """Whether the rollout's log-probabilities come from a forward pass like the update's instead of from sampling."""
    if config.rollout_logprobs == "auto":
        return roles.policy.autocast is not None or not roles.sampler.is_local
    return config.rollout_logprobs == "recomputed"


def unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Write values of counted tokens [N], in row order, to their positions in [B, R]; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, flat)
