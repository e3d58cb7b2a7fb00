"""Each alarm fires on its planted case and not on a healthy run; a resumed run raises the same alarms."""

from __future__ import annotations

import json
import math
import pickle
import random
import statistics
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from stages.errors import TrainingError
from stages.ppo.health import CHECKS, Health, HealthSettings, alarm_metrics
from stages.ppo.loop import run


def healthy(iteration: int, **fields: float) -> dict[str, float]:
    """A healthy run: score and KL rise, entropy falls by half, everything else stays within its noise."""
    wave = math.sin(7.0 * iteration)  # imitates the noise of a batch
    done = min(1.0, iteration / 40)
    return {
        "policy/kl": 8 * done + 0.1 * wave,
        "policy/kl_standard_error": 0.2,
        "policy/ratio_first_deviation": 1e-6,
        "policy/ratio_max_deviation": 1.5 + wave,
        "policy/entropy": 1.2 - 0.6 * done,
        "value/loss": 0.2 + 0.05 * wave,
        "value/returns_variance": 1.0,
        "responses/length_mean": 25 + 8 * done + wave,
        "responses/repetition": 0.02 + 0.05 * done,
        "responses/distinct_share": 1.0 - 0.1 * done,
        "responses/stopped_share": 0.97 + 0.02 * wave,
        "rewards/score_std": 0.8,
        "rewards/score_mean": 2 * done + 0.1 * wave,
        "monitors/taste": 0.6 + 0.1 * done + 0.02 * wave,
        "monitors/taste_std": 0.3,
        **fields,
    }


@pytest.mark.parametrize(
    ("metrics", "is_half", "is_recomputed", "said"),
    [
        ({"policy/ratio_first_deviation": 0.3, "policy/log_ratio_first_rms": 0.04}, True, True, None),  # bf16 rounds single logits
        ({"policy/ratio_first_deviation": 0.3}, True, True, None),  # an entry of a run of an earlier version
        ({"policy/ratio_first_deviation": 0.9, "policy/log_ratio_first_rms": 0.2}, True, True, "dropout"),
        ({"policy/ratio_first_deviation": 0.9, "policy/log_ratio_first_rms": 0.2}, True, False, "set rollout_logprobs: recomputed"),
        ({"policy/ratio_first_deviation": 0.3, "policy/log_ratio_first_rms": 0.04}, False, False, "set rollout_logprobs: recomputed"),
        ({"policy/ratio_first_deviation": 0.3, "policy/log_ratio_first_rms": 0.04}, False, True, "dropout"),
    ],
)
def test_half_precision_rounding_raises_no_alarm_and_advice_is_not_the_current_setting(
    metrics: dict[str, float], is_half: bool, is_recomputed: bool, said: str | None
) -> None:
    alarms = Health(HealthSettings(), num_episodes=64, is_half=is_half, is_recomputed=is_recomputed).observe(healthy(0, **metrics))
    assert [alarm.name for alarm in alarms] == ([] if said is None else ["policies_disagree"])
    if said is not None:
        assert said in alarms[0].message and ("recomputed" in alarms[0].message) == (not is_recomputed)


def observed(history: list[dict[str, float]], **settings: Any) -> Health:
    health = Health(HealthSettings(**settings), num_episodes=64)
    for metrics in history:
        health.observe(metrics)
    return health


PLANTED: dict[str, Any] = {
    "negative_kl": lambda i: {"policy/kl": -1.5},
    "exploding_kl": lambda i: {"policy/kl": 60.0},
    "policies_disagree": lambda i: {"policy/ratio_first_deviation": 0.3},
    "sampler_disagrees": lambda i: {"policy/sampling_gap_mean": 0.2},
    "ratio_blow_up": lambda i: {"policy/ratio_max_deviation": 1000.0},
    "value_blow_up": lambda i: {"value/loss": 40.0},
    "entropy_collapse": lambda i: {"policy/entropy": 0.01},
    "length_drift": lambda i: {"responses/length_mean": 3.0},
    "repetition": lambda i: {"responses/repetition": 0.6},
    "sameness": lambda i: {"responses/distinct_share": 0.1},
    "missing_eos": lambda i: {"responses/stopped_share": 0.2},
    "weak_eos_penalty": lambda i: {"responses/stopped_share": 0.9, "responses/stopped_score": -1.0, "responses/unstopped_score": -1.0},
    "flat_reward": lambda i: {"rewards/score_std": 0.0, "rewards/score_mean": 2.0},
    "reward_hacking": lambda i: {
        "rewards/score_mean": 2 + 0.1 * (i - 40),
        "monitors/taste": 0.7 - 0.02 * (i - 40) + 0.02 * math.sin(7.0 * i),
    },
}


def test_negative_kl_alarm_ignores_one_small_batch_but_not_all() -> None:
    def kls(low: set[int]) -> list[dict[str, float]]:
        return [healthy(i, **{"policy/kl": -0.9 if i in low else 0.1, "policy/kl_standard_error": 0.2}) for i in range(20)]

    assert observed(kls({10})).summary() == []  # 4.5 errors below 0, once in twenty iterations; with its neighbours two
    assert [entry["name"] for entry in observed(kls(set(range(10, 20)))).summary()] == ["negative_kl"]


@pytest.mark.parametrize("num_episodes", [1, 2, 4])
def test_iterations_of_few_episodes_raise_no_alarm_by_chance(num_episodes: int) -> None:
    generator = random.Random(0)
    health = Health(HealthSettings(), num_episodes=num_episodes)
    for iteration in range(1000):
        # a KL of 0.02 nats: log-ratios with this mean and a deviation of 0.2
        kls = [generator.gauss(0.02, 0.2) for _ in range(num_episodes)]
        scores = [generator.gauss(0, 1) for _ in range(num_episodes)]
        error = statistics.pstdev(kls) / math.sqrt(num_episodes)
        measured = {"policy/kl": statistics.fmean(kls), "policy/kl_standard_error": error}
        score = {"rewards/score_mean": statistics.fmean(scores), "rewards/score_std": statistics.pstdev(scores)}
        health.observe(healthy(iteration, **measured, **score))
    assert health.summary() == []


def test_history_of_a_long_run_has_constant_size() -> None:
    sizes = {len(pickle.dumps(observed([healthy(i) for i in range(number)])._history)) for number in (50, 500)}
    assert max(sizes) - min(sizes) < 40  # pickle needs more bytes for a larger number


def test_reward_hacking_equals_the_check_over_all_windows_of_the_run() -> None:
    draw, width = random.Random(3), 4
    score, taste = [0.0], [0.0]
    for iteration in range(300):  # the monitor falls, rises and falls again while the score rises
        score.append(score[-1] + 0.05 + draw.gauss(0, 0.1))
        taste.append(taste[-1] + (0.06 if iteration % 120 < 60 else -0.08) + draw.gauss(0, 0.1))
    raised = hacking_alarms(score, taste, window=width)
    expected = [end >= 2 * width and hacked(score[:end], taste[:end], width, 5.0) for end in range(1, len(score) + 1)]
    # Student's distribution is computed in two ways here, which may differ at the limit.
    assert sum(one != other for one, other in zip(raised, expected, strict=True)) <= 1 and 50 < sum(raised) < 250


def hacking_alarms(score: list[float], monitor: list[float], **settings: Any) -> list[bool]:
    """For each iteration, whether the alarm is raised."""
    health = Health(HealthSettings(**settings), num_episodes=64)
    alarms = [
        health.observe({**healthy(0), "rewards/score_mean": one, "monitors/taste": other})
        for one, other in zip(score, monitor, strict=True)
    ]
    return ["reward_hacking" in [alarm.name for alarm in raised] for raised in alarms]


def hacked(score: list[float], monitor: list[float], width: int, limit: float) -> bool:
    """The check with numpy over the full run: the best window mean before the last, and differences of means by Student's distribution."""
    scores, monitors = np.array(score), np.array(monitor)
    starts = range(len(score) - 2 * width + 1)
    best = max(starts, key=lambda start: monitors[start : start + width].mean())
    freedom = 2 * (len(score) - 1) ** 2 / (3 * len(score) - 4)

    def moved(values: np.ndarray) -> float:
        """The move in standard errors, as a point of the normal distribution with the same tail."""
        error = math.sqrt(2 * np.mean(np.diff(values) ** 2) / 2 / width)
        # With t = sqrt(freedom) tan(angle), Student's density is proportional to cos(angle)^(freedom - 1).
        angle = math.atan((values[-width:].mean() - values[best : best + width].mean()) / error / math.sqrt(freedom))
        tail, total = (
            np.trapezoid(np.cos(grid) ** (freedom - 1), grid)
            for grid in (np.linspace(angle, math.pi / 2, 20001), np.linspace(-math.pi / 2, math.pi / 2, 20001))
        )
        return -NormalDist().inv_cdf(min(max(float(tail / total), 1e-200), 1 - 1e-9))

    corrected = math.sqrt(limit**2 + 6 * math.log(max(1.0, len(score) / 100)))
    return min(moved(-monitors), moved(scores)) > corrected


def test_reward_hacking_is_rarely_raised_by_noise_alone() -> None:
    draw = random.Random(0)
    rising = [float(i) for i in range(80)]
    runs = [hacking_alarms(rising, [draw.gauss(0.5, 0.06) for _ in rising], hacking_errors=3.5) for _ in range(150)]
    # A simulation of 40,000 runs: 0.08. If the noise of the first iterations counted as known: 0.20.
    assert sum(map(any, runs)) / len(runs) < 0.13


def test_reward_hacking_ignores_a_fall_in_early_iterations_that_look_less_noisy_than_they_are() -> None:
    # From a run of the quickstart: a mean over 64 completions varies by 0.06, but the first ones happen to differ by 0.02.
    taste = [0.573, 0.592, 0.566, 0.544, 0.546, 0.468, 0.436, 0.453, 0.468, 0.515, 0.437, 0.483, 0.422, 0.546, 0.561, 0.484]
    score = [-0.564, -0.712, -0.654, -0.352, -0.290, -0.258, -0.071, -0.184, 0.110, 0.106, 0.030, -0.237, 0.023, 0.052, 0.006, -0.062]
    assert not any(hacking_alarms(score, taste))


def test_reward_hacking_is_raised_for_the_planted_exploit_in_the_recorded_iteration() -> None:
    recorded = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "planted_exploit.json").read_text())
    raised = hacking_alarms(recorded["rewards/score_mean"], recorded["monitors/gold"])
    assert raised.index(True) == recorded["first_alarm"] and all(raised[recorded["first_alarm"] :])


def test_every_check_has_a_planted_case() -> None:
    assert [f"_{name}" for name in PLANTED] == [check.__name__ for check in CHECKS]


def test_healthy_run_raises_no_alarm() -> None:
    health = observed([healthy(iteration) for iteration in range(80)])
    assert health.summary() == []
    # also a run whose completions never have an end token, as when a plain language model is steered
    endless = [healthy(iteration, **{"responses/stopped_share": 0.0, "responses/length_mean": 48.0}) for iteration in range(80)]
    assert observed(endless).summary() == []


@pytest.mark.parametrize("name", PLANTED)
def test_only_the_planted_alarm_fires(name: str) -> None:
    history = [healthy(iteration, **(PLANTED[name](iteration) if iteration >= 40 else {})) for iteration in range(60)]
    health = observed(history)
    alarms = health.summary()
    assert [entry["name"] for entry in alarms] == [name]
    assert 40 <= alarms[0]["first_iteration"] <= 58 and alarms[0]["last_iteration"] <= 59 and alarms[0]["iterations"] >= 1
    assert len(alarms[0]["message"]) > 60 and not alarms[0]["message"].endswith(".")


def test_lasting_alarm_is_logged_once_and_a_returning_one_again() -> None:
    health = Health(HealthSettings(), num_episodes=64)
    said = []
    for iteration, kl in enumerate([1.0, 99.0, 99.0, 1.0, 99.0]):
        alarms = health.observe(healthy(iteration, **{"policy/kl": kl}))
        said.append(len(health.begun))
        assert alarm_metrics(alarms) == ({"health/alarms": 1.0, "health/exploding_kl": 1.0} if kl > 50 else {"health/alarms": 0.0})
    assert said == [0, 1, 0, 0, 1]
    assert health.summary()[0] | {"message": ""} == {
        "name": "exploding_kl",
        "first_iteration": 1,
        "last_iteration": 4,
        "iterations": 3,
        "message": "",
    }


def test_null_disables_an_alarm() -> None:
    assert observed([healthy(0, **{"policy/kl": 1e3})], kl_limit=None).summary() == []
    with pytest.raises(ValidationError, match="stop_on"):
        HealthSettings(stop_on=["no_such_alarm"])


def test_hacking_needs_a_rising_score() -> None:
    falls = [
        healthy(i, **({"monitors/taste": 0.7 - 0.02 * (i - 40), "rewards/score_mean": 2 - 0.1 * (i - 40)} if i >= 40 else {}))
        for i in range(60)
    ]
    assert observed(falls).summary() == []  # both fall: the run gets worse, but this is not reward hacking


def test_alarms_reach_metrics_summary_and_terminal(ppo_config, ppo_context, tmp_path, monkeypatch, prompts) -> None:
    (tmp_path / "flat_rewards.py").write_text("def flat(p, c): return [1.0 for _ in c]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said: list[str] = []
    monkeypatch.setattr(ppo_context.runtime.console, "print", lambda *parts, **_: said.append(" ".join(map(str, parts))))
    config = ppo_config(data=prompts, reward=[{"function": "flat_rewards:flat"}], total_episodes=48)
    metrics = run(config, ppo_context).metrics
    assert [alarm["name"] for alarm in metrics["alarms"]] == ["flat_reward"] and metrics["alarms"][0]["iterations"] == 2
    lines = [json.loads(line) for line in (ppo_context.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["health/alarms"] for line in lines] == [0.0, 0.0, 1.0, 1.0] and lines[3]["health/flat_reward"] == 1.0
    assert sum("flat_reward: all completions of 3 iterations score 1" in text for text in said) == 1
    assert "alarms: flat_reward" in said[-1]


def test_an_alarm_may_end_the_run(ppo_config, ppo_context, prompts) -> None:
    config = ppo_config(data=prompts, total_episodes=48, health={"kl_limit": 1e-5, "stop_on": ["exploding_kl"]})
    with pytest.raises(TrainingError, match=r"iteration 2: stopped on exploding_kl .health.stop_on.: the KL .* checkpoint is kept in"):
        run(config, ppo_context)
    assert list((ppo_context.checkpoint_folder / "ppo").glob("checkpoint-*/checkpoint.json"))


def test_an_alarm_that_is_off_is_not_raised() -> None:
    history = [healthy(iteration, **{"responses/length_mean": 3.0 if iteration > 40 else 25.0}) for iteration in range(50)]
    assert [entry["name"] for entry in observed(history).summary()] == ["length_drift"]
    assert observed(history, off=["length_drift"]).summary() == []
