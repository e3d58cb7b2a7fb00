"""Alarms of a PPO run: what usually goes wrong in silence, said in plain words when it begins, and kept as metrics.

Every alarm is a function of the metrics of the iterations so far, so a run that was resumed raises the same ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from stages.config import Strict

Metrics = Mapping[str, float]
History = list[dict[str, float]]
AlarmName = Literal[
    "negative_kl", "exploding_kl", "policies_disagree", "ratio_blow_up", "value_blow_up", "entropy_collapse", "length_drift", "repetition",
    "sameness", "missing_eos", "flat_reward", "reward_hacking",
]  # fmt: skip


class HealthSettings(Strict):
    """Limits beyond which an alarm is raised; null switches one off. "At first" is the mean of the first three iterations."""

    negative_kl_errors: float | None = Field(4.0, gt=0, description="negative_kl: standard errors by which the mean KL lies below 0.")
    kl_limit: float | None = Field(50.0, gt=0, description="exploding_kl: nats per completion.")
    disagreement: float | None = Field(
        0.1, gt=0, description="policies_disagree: |ratio - 1| in an iteration's first minibatch, before any step was made."
    )
    ratio_limit: float | None = Field(30.0, gt=0, description="ratio_blow_up: largest |ratio - 1| of an iteration.")
    value_growth: float | None = Field(20.0, gt=1, description="value_blow_up: value loss, as a multiple of its recent median.")
    entropy_share: float | None = Field(0.1, gt=0, lt=1, description="entropy_collapse: entropy per token, as a share of that at first.")
    length_factor: float | None = Field(2.5, gt=1, description="length_drift: times longer or shorter than at first.")
    repetition_rise: float | None = Field(0.25, gt=0, description="repetition: rise of the share of 4-grams that a completion has twice.")
    distinct_share: float | None = Field(0.5, gt=0, lt=1, description="sameness: share of different completions, against that at first.")
    stopped_drop: float | None = Field(0.3, gt=0, description="missing_eos: fall of the share of completions that end by themselves.")
    flat_iterations: int | None = Field(3, ge=1, description="flat_reward: iterations in a row in which every completion scored the same.")
    hacking_errors: float | None = Field(
        5.0, gt=0, description="reward_hacking: standard errors by which a monitor fell from its best while the score rose as clearly."
    )
    window: int = Field(5, ge=3, description="Iterations that are averaged for value_blow_up and reward_hacking.")
    stop_on: list[AlarmName] = Field([], description="Alarms that end the run; the others are said and counted.")


@dataclass(frozen=True)
class Alarm:
    """Something that is wrong, in words for the one who watches the run."""

    name: str
    message: str


class Health:
    """Looks at every iteration's metrics in turn."""

    def __init__(self, settings: HealthSettings) -> None:
        self.settings = settings
        self.begun: list[Alarm] = []  # alarms of the last iteration that the one before it did not raise: what goes on is said once
        self._history: History = []
        self._raised: dict[str, dict[str, Any]] = {}

    def observe(self, metrics: Metrics) -> list[Alarm]:
        """The alarms of the next iteration."""
        place = len(self._history)
        self._history.append(dict(metrics))
        self._forget()
        alarms = [alarm for check in CHECKS for alarm in check(self._history, self.settings)]
        self.begun = []
        for alarm in alarms:
            entry = self._raised.setdefault(alarm.name, {"first_iteration": place, "iterations": 0, "message": alarm.message})
            if entry.get("last_iteration") != place - 1:
                self.begun.append(alarm)
            entry |= {"last_iteration": place, "iterations": entry["iterations"] + 1}
        return alarms

    def _forget(self) -> None:
        """Of iterations neither early nor recent keep the score and the monitors, which are all that a check looks back for that far."""
        past = len(self._history) - 1 - max(2 * self.settings.window, self.settings.flat_iterations or 0, EARLY)
        if past >= EARLY:
            entry = self._history[past]
            self._history[past] = {name: entry[name] for name in entry if name == "rewards/score_mean" or name.startswith("monitors/")}

    def summary(self) -> list[dict[str, Any]]:
        """Every alarm that was raised, as it began: name, first and last iteration, in how many it was raised, message."""
        return sorted(({"name": name, **entry} for name, entry in self._raised.items()), key=lambda entry: entry["first_iteration"])


def alarm_metrics(alarms: list[Alarm]) -> dict[str, float]:
    """``health/alarms`` and a 1 for each alarm raised."""
    return {"health/alarms": float(len(alarms)), **{f"health/{alarm.name}": 1.0 for alarm in alarms}}


# The checks. Each sees the whole history, the last entry being the iteration that is judged.

EARLY = 3  # iterations that make up "at first", and "lately"


def _at_first(history: History, name: str) -> float | None:
    """The mean over the first iterations; None while they are not over."""
    values = [entry[name] for entry in history[:EARLY] if name in entry]
    return sum(values) / EARLY if len(values) == EARLY and len(history) > EARLY else None


def _negative_kl(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    recent = history[-EARLY:]  # a few small batches by chance lie far below 0; what samples from something else does so in all
    kl = statistics.fmean(now["policy/kl"] for now in recent)
    error = math.hypot(*(now["policy/kl_standard_error"] for now in recent)) / len(recent)
    if settings.negative_kl_errors is not None and kl < -settings.negative_kl_errors * error - 1e-3:
        yield Alarm(
            "negative_kl",
            f"the KL to the reference is {kl:.3f} nats, {-kl / max(error, 1e-9):.0f} standard errors below 0, which no KL can be: the "
            "policy samples from something else than the log-probabilities say (top_k, top_p, padding or stop tokens?)",
        )


def _exploding_kl(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    kl = history[-1]["policy/kl"]
    if settings.kl_limit is not None and kl > settings.kl_limit:
        yield Alarm(
            "exploding_kl",
            f"the KL to the reference is {kl:.1f} nats per completion (limit {settings.kl_limit:g}): the policy has left what the reward "
            "model knows; raise kl_coef, set kl_target, or lower training.learning_rate",
        )


def _policies_disagree(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    deviation = history[-1]["policy/ratio_first_deviation"]
    if settings.disagreement is not None and deviation > settings.disagreement:
        yield Alarm(
            "policies_disagree",
            f"before any step of the iteration a probability ratio is {deviation:.3g} away from 1: sampling and training disagree about "
            "the same tokens; set rollout_logprobs: recomputed, or precision: fp32",
        )


def _ratio_blow_up(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    deviation = history[-1]["policy/ratio_max_deviation"]
    if settings.ratio_limit is not None and deviation > settings.ratio_limit:
        yield Alarm(
            "ratio_blow_up",
            f"a probability ratio reached {1 + deviation:.3g} within one iteration (limit {1 + settings.ratio_limit:g}): the steps are too "
            "large; lower training.learning_rate or ppo_epochs, or set dual_clip or target_update_kl",
        )


def _value_blow_up(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    before = [entry["value/loss"] for entry in history[-1 - settings.window : -1]]
    if settings.value_growth is None or len(before) < EARLY:
        return
    loss, usual = history[-1]["value/loss"], statistics.median(before)
    # A value network may be wrong by the spread of the returns; below that no loss is a blow-up, however small the last ones were.
    if loss > settings.value_growth * usual and loss > history[-1]["value/returns_variance"]:
        yield Alarm(
            "value_blow_up",
            f"the value loss is {loss:.3g}, {loss / max(usual, 1e-9):.0f} times its recent median: lower training.value_learning_rate, or "
            "bound the rewards",
        )


def _entropy_collapse(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, "policy/entropy"), history[-1]["policy/entropy"]
    if settings.entropy_share is not None and first is not None and now < settings.entropy_share * first:
        yield Alarm(
            "entropy_collapse",
            f"the entropy fell from {first:.3g} to {now:.3g} nats per token: the policy says one thing only; raise kl_coef, or lower "
            "training.learning_rate",
        )


def _length_drift(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, "responses/length_mean"), history[-1]["responses/length_mean"]
    if settings.length_factor is None or first is None:
        return
    if now > settings.length_factor * first or now < first / settings.length_factor:
        yield Alarm(
            "length_drift",
            f"completions went from {first:.1f} to {now:.1f} tokens: does the reward pay for length? Look at samples.jsonl, and at a "
            "reward model's accuracy by length",
        )


def _repetition(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, "responses/repetition"), history[-1]["responses/repetition"]
    if settings.repetition_rise is not None and first is not None and now > first + settings.repetition_rise:
        yield Alarm(
            "repetition",
            f"{now:.0%} of a completion's 4-grams occur in it twice ({first:.0%} at first): the policy repeats itself; raise kl_coef",
        )


def _sameness(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, "responses/distinct_share"), history[-1]["responses/distinct_share"]
    if settings.distinct_share is not None and first is not None and now < settings.distinct_share * first:
        yield Alarm(
            "sameness",
            f"only {now:.0%} of an iteration's completions differ ({first:.0%} at first): one answer to every prompt; raise kl_coef",
        )


def _missing_eos(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, "responses/stopped_share"), history[-1]["responses/stopped_share"]
    if settings.stopped_drop is not None and first is not None and now < first - settings.stopped_drop:
        yield Alarm(
            "missing_eos",
            f"{now:.0%} of the completions end by themselves ({first:.0%} at first): set missing_eos: replace, or raise "
            "generation.max_new_tokens",
        )


def _flat_reward(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    number = settings.flat_iterations
    if number is None or len(history) < number:
        return
    if all(entry["rewards/score_std"] < 1e-6 for entry in history[-number:]):
        yield Alarm(
            "flat_reward",
            f"every completion of {number} iterations scored {history[-1]['rewards/score_mean']:.3g}: there is nothing to learn from; is "
            "the right reward named, and does it read the completion?",
        )


def _reward_hacking(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    width = settings.window
    if settings.hacking_errors is None or len(history) < 2 * width:
        return
    windows = [slice(end - width, end) for end in range(width, len(history) - width + 1)]
    scores = [entry["rewards/score_mean"] for entry in history]
    for name in sorted(name for name in history[-1] if name.startswith("monitors/") and not name.endswith("_std")):
        values = [entry[name] for entry in history]
        means = [statistics.fmean(values[window]) for window in windows]
        best = windows[means.index(max(means))]
        fallen = (statistics.fmean(values[best]) - statistics.fmean(values[-width:])) / _error(values, width)
        risen = (statistics.fmean(scores[-width:]) - statistics.fmean(scores[best])) / _error(scores, width)
        if min(fallen, risen) > settings.hacking_errors:
            yield Alarm(
                "reward_hacking",
                f"{name} fell from {statistics.fmean(values[best]):.3f} to {statistics.fmean(values[-width:]):.3f} while the score rose "
                f"from {statistics.fmean(scores[best]):.3f} to {statistics.fmean(scores[-width:]):.3f}: the policy has found what the "
                "reward overrates; stop earlier, raise kl_coef, or use an ensemble of reward models",
            )
            return


def _error(values: list[float], width: int) -> float:
    """Standard error of the difference of two windows' means. The noise is read off neighbours, whose differences a trend hardly moves."""
    noise = statistics.fmean((after - before) ** 2 for before, after in zip(values, values[1:], strict=False)) / 2
    return max(math.sqrt(2 * noise / width), 1e-9)


CHECKS: tuple[Callable[[History, HealthSettings], Iterator[Alarm]], ...] = (
    _negative_kl, _exploding_kl, _policies_disagree, _ratio_blow_up, _value_blow_up, _entropy_collapse, _length_drift, _repetition,
    _sameness, _missing_eos, _flat_reward, _reward_hacking,
)  # fmt: skip
