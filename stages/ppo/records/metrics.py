"""Metrics of an iteration and of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from stages import metric_names
from stages.json_types import JsonObject
from stages.ppo.records.speed import speed_metrics
from stages.rewards.details import applies
from stages.stats.comparing import repeated_ngrams

if TYPE_CHECKING:
    from torch import Tensor

    from stages.ppo.config import PPOStepConfig
    from stages.ppo.health import RaisedAlarm
    from stages.ppo.records.history import RunHistory
    from stages.ppo.rollout.rollout import Rollout
    from stages.ppo.update.updater import UpdateResult


def group_metrics(scores: Tensor, samples_per_prompt: int) -> dict[str, float]:
    """Mean spread of the scores [B] among completions of one prompt, and the share of prompts whose completions all score the same.

    For such prompts rloo and grpo learn only from the KL. Empty if each prompt has one completion.
    """
    if samples_per_prompt == 1:
        return {}
    spreads = scores.double().view(-1, samples_per_prompt).std(dim=1, correction=0)  # in fp32, equal scores can have a spread
    return {metric_names.PROMPT_STD: float(spreads.mean()), metric_names.FLAT_PROMPT_SHARE: float((spreads < 1e-6).float().mean())}


def iteration_metrics(
    rollout: Rollout,
    result: UpdateResult,
    config: PPOStepConfig,
    *,
    kl_coef: float,
    matmul_peak: float = math.inf,
) -> dict[str, float]:
    """Metrics of one iteration. KL is summed over tokens and averaged over episodes, in nats. ``matmul_peak`` is in flops per second."""
    sequence_kl = rollout.kl.sum(dim=1)
    lengths = rollout.lengths.float()
    return {
        metric_names.SCORE_MEAN: float(rollout.scores.mean()),
        metric_names.SCORE_STD: float(rollout.scores.std(correction=0)),
        **group_metrics(rollout.scores, config.samples_per_prompt),
        **_means(metric_names.reward_name, rollout.parts),
        **_means(metric_names.monitor_name, rollout.monitors),
        metric_names.TOTAL_MEAN: float((rollout.scores - kl_coef * sequence_kl).mean()),
        metric_names.KL: float(sequence_kl.mean()),
        metric_names.KL_STANDARD_ERROR: float(sequence_kl.std(correction=0)) / math.sqrt(len(sequence_kl)),
        metric_names.KL_COEF: kl_coef,
        **result.metrics,
        metric_names.LENGTH_MEAN: float(lengths.mean()),
        metric_names.LENGTH_MAX: float(lengths.max()),
        metric_names.STOPPED_SHARE: float(rollout.stopped.float().mean()),
        **(_scores_by_ending(rollout) if config.missing_eos != "none" else {}),
        metric_names.REPETITION: repeated_ngrams([rollout.response(row) for row in range(len(rollout.prompts))], 4),
        metric_names.DISTINCT_SHARE: len(set(rollout.completions)) / len(rollout.completions),
        metric_names.SAMPLING_GAP: rollout.sampling_gap,
        **_importance_metrics(rollout, config.importance_cap),
        **speed_metrics(
            rollout.seconds,
            episodes=len(rollout.prompts),
            response_tokens=int(lengths.sum()),
            trained_tokens=result.tokens,
            flops=result.flops,
            peak=matmul_peak,
        ),
        **({metric_names.SCORING_HIDDEN_SECONDS: rollout.hidden_seconds} if rollout.hidden_seconds is not None else {}),
        **_hidden_sampling_metrics(rollout),
        metric_names.UPDATE_PASS_TOKENS: float(result.pass_tokens),
        metric_names.RETREATS: float(rollout.retreats + result.retreats),
        **{metric_names.gpu_memory_name(phase): peak / 2**30 for phase, peak in rollout.gpu_memory.items()},
    }


def _scores_by_ending(rollout: Rollout) -> dict[str, float]:
    """Mean score, after all penalties, of the completions with a stop token and of those without. Empty if one of the groups is empty."""
    stopped = rollout.stopped
    if stopped.all() or not stopped.any():
        return {}
    return {
        metric_names.STOPPED_SCORE: float(rollout.scores[stopped].mean()),
        metric_names.UNSTOPPED_SCORE: float(rollout.scores[~stopped].mean()),
    }


def _importance_metrics(rollout: Rollout, cap: float) -> dict[str, float]:
    """The gap between another engine's log-probabilities and the trainer's, and the importance weights. Empty for the local engine."""
    weights = rollout.importance(cap)
    if weights is None:
        return {}
    mask = rollout.response_mask
    gaps, counted = (rollout.rollout_logprobs - rollout.sampler_logprobs).abs()[mask], weights[mask]
    return {
        metric_names.SAMPLING_GAP_MEAN: float(gaps.mean()),
        metric_names.IMPORTANCE_MEAN: float(counted.mean()),
        metric_names.IMPORTANCE_CAPPED_SHARE: float((counted >= cap).float().mean()),
        metric_names.SAMPLING_LAG: float(rollout.lag),
    }


def _hidden_sampling_metrics(rollout: Rollout) -> dict[str, float]:
    """Seconds of sampling during the previous update, and the sampler's tokens per second. Empty without such sampling.

    ``time/generation_s`` is then only the time that the run waited, so the speed must count the hidden time, too.
    """
    hidden = rollout.hidden_sampling_seconds
    if hidden is None:
        return {}
    seconds = hidden + rollout.seconds["generation"]
    return {
        metric_names.GENERATION_HIDDEN_SECONDS: hidden,
        metric_names.tokens_per_second_name("generation"): int(rollout.lengths.sum()) / max(seconds, 1e-9),
    }


def _means(metric_of: Callable[[str], str], parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each part [B] over the episodes that it applies to, and the number of other episodes if there are any.

    ``metric_of``: the metric of a source's score. Other measurements (``scoring/...``) are metrics already and keep their name.
    """
    means: dict[str, float] = {}
    for name, part in parts.items():
        present = part[applies(part)]
        if len(present):
            means[name if "/" in name else metric_of(name)] = float(present.mean())
        if len(present) < len(part):
            means[metric_names.scoring_name(name, metric_names.NOT_APPLIED)] = float(len(part) - len(present))
    return means


def run_metrics(history: RunHistory, *, episodes_per_iteration: int, optimizer_steps: int) -> JsonObject:
    """Metrics of a run: means over its first and last tenth."""
    tenth = max(1, len(history) // 10)
    metrics: JsonObject = {
        metric_names.NUM_ITERATIONS: len(history),
        metric_names.NUM_EPISODES: len(history) * episodes_per_iteration,
        metric_names.NUM_OPTIMIZER_STEPS: optimizer_steps,
    }
    for name in [*metric_names.FIRST_AND_LAST, *filter(metric_names.is_monitor, history.names())]:
        values = history.values(name)
        metrics[metric_names.first_tenth(name)] = sum(values[:tenth]) / tenth
        metrics[metric_names.last_tenth(name)] = sum(values[-tenth:]) / tenth
    if metric_names.EXPLAINED_VARIANCE in history.names():
        metrics["value_explained_variance"] = history.values(metric_names.EXPLAINED_VARIANCE)[-1]
    metrics["episodes_per_second"] = sum(history.values(metric_names.EPISODES_PER_SECOND)) / len(history)
    return metrics


def run_line(metrics: JsonObject) -> str:
    """``run_metrics`` as one line for the terminal."""
    alarms = cast("list[RaisedAlarm]", metrics[metric_names.RAISED_ALARMS])

    def moved(name: str, digits: int) -> str:
        return f"{metrics[metric_names.first_tenth(name)]:.{digits}f} -> {metrics[metric_names.last_tenth(name)]:.{digits}f}"

    return (
        f"score {moved(metric_names.SCORE_MEAN, 3)}, KL {metrics[metric_names.last_tenth(metric_names.KL)]:.2f} nats, "
        f"entropy {moved(metric_names.ENTROPY, 2)}, length {moved(metric_names.LENGTH_MEAN, 1)}, "
        f"{metrics['episodes_per_second']:.1f} episodes/s" + (f"; alarms: {', '.join(alarm['name'] for alarm in alarms)}" if alarms else "")
    )
