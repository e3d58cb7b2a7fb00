"""Metrics of an iteration and of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from stages.json_types import JsonObject
from stages.ppo.metric_names import FIRST_AND_LAST
from stages.ppo.speed import speed_metrics
from stages.rewards.details import applies
from stages.stats.comparing import repeated_ngrams

if TYPE_CHECKING:
    from torch import Tensor

    from stages.ppo.health import RaisedAlarm
    from stages.ppo.history import RunHistory
    from stages.ppo.rollout import Rollout
    from stages.ppo.update import UpdateResult


def group_metrics(scores: Tensor, samples_per_prompt: int) -> dict[str, float]:
    """Mean spread of the scores [B] among completions of one prompt, and the share of prompts whose completions all score the same.

    For such prompts rloo and grpo learn only from the KL. Empty if each prompt has one completion.
    """
    if samples_per_prompt == 1:
        return {}
    spreads = scores.view(-1, samples_per_prompt).std(dim=1, correction=0)
    return {"rewards/prompt_std": float(spreads.mean()), "rewards/flat_prompt_share": float((spreads < 1e-6).float().mean())}


def iteration_metrics(
    rollout: Rollout,
    result: UpdateResult,
    *,
    kl_coef: float,
    samples_per_prompt: int = 1,
    importance_cap: float = math.inf,
    matmul_peak: float = math.inf,
    penalizes_missing_eos: bool = False,
) -> dict[str, float]:
    """Of one iteration. KL is summed over tokens and averaged over episodes, in nats; ``matmul_peak`` in operations/s.

    ``importance_cap``: that of the weights of tokens that another engine sampled.
    """
    sequence_kl = rollout.kl.sum(dim=1)
    lengths = rollout.lengths.float()
    return {
        "rewards/score_mean": float(rollout.scores.mean()),
        "rewards/score_std": float(rollout.scores.std(correction=0)),
        **group_metrics(rollout.scores, samples_per_prompt),
        **_means("rewards", rollout.parts),
        **_means("monitors", rollout.monitors),
        "rewards/total_mean": float((rollout.scores - kl_coef * sequence_kl).mean()),
        "policy/kl": float(sequence_kl.mean()),
        "policy/kl_standard_error": float(sequence_kl.std(correction=0)) / math.sqrt(len(sequence_kl)),
        "policy/kl_coef": kl_coef,
        **result.metrics,
        "responses/length_mean": float(lengths.mean()),
        "responses/length_max": float(lengths.max()),
        "responses/stopped_share": float(rollout.stopped.float().mean()),
        **(_scores_by_ending(rollout) if penalizes_missing_eos else {}),
        "responses/repetition": repeated_ngrams([rollout.response(row) for row in range(len(rollout.prompts))], 4),
        "responses/distinct_share": len(set(rollout.completions)) / len(rollout.completions),
        "policy/sampling_gap": rollout.sampling_gap,
        **_importance_metrics(rollout, importance_cap),
        **speed_metrics(
            rollout.seconds,
            episodes=len(rollout.prompts),
            response_tokens=int(lengths.sum()),
            trained_tokens=result.tokens,
            flops=result.flops,
            peak=matmul_peak,
        ),
        **({"time/scoring_hidden_s": rollout.hidden_seconds} if rollout.hidden_seconds is not None else {}),
        **_hidden_sampling_metrics(rollout),
        "time/update_pass_tokens": float(result.pass_tokens),
        "passes/retreats": float(rollout.retreats + result.retreats),
        **{f"memory/{phase}_gpu_gib": peak / 2**30 for phase, peak in rollout.gpu_memory.items()},
    }


def _scores_by_ending(rollout: Rollout) -> dict[str, float]:
    """Mean score, after all penalties, of the completions with a stop token and of those without. Empty if one of the groups is empty."""
    stopped = rollout.stopped
    if stopped.all() or not stopped.any():
        return {}
    return {
        "responses/stopped_score": float(rollout.scores[stopped].mean()),
        "responses/unstopped_score": float(rollout.scores[~stopped].mean()),
    }


def _importance_metrics(rollout: Rollout, cap: float) -> dict[str, float]:
    """The gap between another engine's log-probabilities and the trainer's, and the importance weights. Empty for the local engine."""
    weights = rollout.importance(cap)
    if weights is None:
        return {}
    mask = rollout.response_mask
    gaps, counted = (rollout.rollout_logprobs - rollout.sampler_logprobs).abs()[mask], weights[mask]
    return {
        "policy/sampling_gap_mean": float(gaps.mean()),
        "policy/importance_mean": float(counted.mean()),
        "policy/importance_capped_share": float((counted >= cap).float().mean()),
        "policy/sampling_lag": float(rollout.lag),
    }


def _hidden_sampling_metrics(rollout: Rollout) -> dict[str, float]:
    """Seconds of sampling during the update before, and the sampler's tokens per second. Empty without such sampling.

    ``time/generation_s`` is then only the time that the run waited, so the speed must count the hidden time, too.
    """
    hidden = rollout.hidden_sampling_seconds
    if hidden is None:
        return {}
    seconds = hidden + rollout.seconds["generation"]
    return {
        "time/generation_hidden_s": hidden,
        "time/generation_tokens_per_second": int(rollout.lengths.sum()) / max(seconds, 1e-9),
    }


def _means(room: str, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each part [B] over the episodes that it applies to, and the number of other episodes if there are any.

    A part whose name already contains a room (``scoring/...``) keeps its name.
    """
    means: dict[str, float] = {}
    for name, part in parts.items():
        present = part[applies(part)]
        if len(present):
            means[name if "/" in name else f"{room}/{name}"] = float(present.mean())
        if len(present) < len(part):
            means[f"scoring/{name}_not_applied"] = float(len(part) - len(present))
    return means


def run_metrics(history: RunHistory, *, episodes_per_iteration: int, optimizer_steps: int) -> JsonObject:
    """Metrics of a run: means over its first and last tenth."""
    tenth = max(1, len(history) // 10)
    metrics: JsonObject = {"iterations": len(history), "episodes": len(history) * episodes_per_iteration}
    metrics["optimizer_steps"] = optimizer_steps
    for name in [*FIRST_AND_LAST, *(name for name in history.names() if name.startswith("monitors/"))]:
        values = history.values(name)
        short = name.rpartition("/")[2]
        metrics[f"{short}_first"], metrics[f"{short}_last"] = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    if "value/explained_variance" in history.names():
        metrics["value_explained_variance"] = history.values("value/explained_variance")[-1]
    metrics["episodes_per_second"] = sum(history.values("time/episodes_per_second")) / len(history)
    return metrics


def run_line(metrics: JsonObject) -> str:
    """``run_metrics`` as one line for the terminal."""
    alarms = cast("list[RaisedAlarm]", metrics["alarms"])
    return (
        f"score {metrics['score_mean_first']:.3f} -> {metrics['score_mean_last']:.3f}, "
        f"KL {metrics['kl_last']:.2f} nats, entropy {metrics['entropy_first']:.2f} -> {metrics['entropy_last']:.2f}, "
        f"length {metrics['length_mean_first']:.1f} -> {metrics['length_mean_last']:.1f}, {metrics['episodes_per_second']:.1f} episodes/s"
        + (f"; alarms: {', '.join(alarm['name'] for alarm in alarms)}" if alarms else "")
    )
