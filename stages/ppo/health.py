"""Alarms of a PPO run: detect silent failures early, explain them in plain words, and record them as metrics.

Every alarm is a function of the metrics so far, so a resumed run raises the same alarms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from pydantic import Field, model_validator

from stages import metric_names
from stages.config import Strict
from stages.json_types import JsonObject
from stages.stats.replicates import normal_equivalent

Metrics = Mapping[str, float]
AlarmName = Literal[
    "negative_kl",
    "exploding_kl",
    "policies_disagree",
    "sampler_disagrees",
    "ratio_blow_up",
    "value_blow_up",
    "entropy_collapse",
    "length_drift",
    "repetition",
    "sameness",
    "missing_eos",
    "weak_eos_penalty",
    "flat_reward",
    "reward_hacking",
]


NEGATIVE_KL_ERRORS = 4.0
"""negative_kl: number of standard errors by which the mean KL is below 0. A normal variable is so low once in 30,000 draws."""
DISAGREEMENT = 0.1
"""policies_disagree: difference between the rollout's log-probabilities and those of the update before its first optimizer step. Both
are values of the same function, so they may differ only by rounding errors. In fp32 this is the largest |ratio - 1|; rounding errors are
about 1e-5.

In half precision it is the root mean square of the log-ratio, in nats. A pass of another width adds its sums in another order, so a logit
may be rounded to the next bf16 number; bf16 numbers between 16 and 32 are 1/8 apart. So single tokens differ by 0.1 to 0.4, but their
root mean square is at most about 0.05. If the policies really differ, for example by dropout or temperature, most tokens differ."""
VALUE_GROWTH = 20.0
"""value_blow_up: value loss divided by its recent median. The loss is a mean over few episodes, so a small factor is noise."""
ENTROPY_SHARE = 0.1
"""entropy_collapse: entropy per token as a share of that at first. A policy that learns a task becomes more certain. With a tenth of the
entropy, it gives almost the same answer every time."""
LENGTH_FACTOR = 2.5
"""length_drift: factor by which completions are longer or shorter than at first. A learned style may change the length. A larger change
suggests that the reward favours a length."""
REPETITION_RISE = 0.25
"""repetition: rise of the share of a completion's 4-grams that repeat an earlier one. Sampled text has some repetition from the start, so
only the rise counts."""
DISTINCT_SHARE = 0.5
"""sameness: share of different completions, relative to that at first. A few short answers are equal by chance, but not half of them."""
STOPPED_DROP = 0.3
"""missing_eos: fall of the share of completions that have an end token. In a batch of 64, this share varies by about 0.06 (one standard
error)."""
UNSTOPPED_SHARE = 0.05
"""weak_eos_penalty: minimum share of completions without an end token. With fewer of them, their mean score is not compared."""

LIMITS: dict[AlarmName, tuple[str, float | None]] = {
    "negative_kl": ("negative_kl_errors", NEGATIVE_KL_ERRORS),
    "exploding_kl": ("kl_limit", None),
    "policies_disagree": ("disagreement", DISAGREEMENT),
    "sampler_disagrees": ("sampler_gap", None),
    "ratio_blow_up": ("ratio_limit", None),
    "value_blow_up": ("value_growth", VALUE_GROWTH),
    "entropy_collapse": ("entropy_share", ENTROPY_SHARE),
    "length_drift": ("length_factor", LENGTH_FACTOR),
    "repetition": ("repetition_rise", REPETITION_RISE),
    "sameness": ("distinct_share", DISTINCT_SHARE),
    "missing_eos": ("stopped_drop", STOPPED_DROP),
    "flat_reward": ("flat_iterations", None),
    "reward_hacking": ("hacking_errors", None),
}
"""Alarm -> (the name of its limit, its value if that is a constant; None: a setting). Earlier versions had a setting for each limit.

Alarms that are not listed are newer."""


class HealthSettings(Strict):
    """Which alarms are raised, and which end the run. "At first" is the mean of the first three iterations."""

    kl_limit: float | None = Field(50.0, gt=0, description="exploding_kl is raised above this KL, in nats per completion; null: off.")
    sampler_gap: float | None = Field(
        0.1,
        gt=0,
        description="sampler_disagrees is raised above this mean difference of the log-probabilities of vLLM and the trainer, in nats per "
        "token; null: off. Not checked for episodes sampled before an update (overlap: 1).",
    )
    ratio_limit: float | None = Field(
        30.0, gt=0, description="ratio_blow_up is raised above this largest |ratio - 1| of an iteration; null: off."
    )
    flat_iterations: int | None = Field(
        3,
        ge=1,
        description="flat_reward is raised after this many iterations in a row in which all completions have the same score; null: off.",
    )
    hacking_errors: float | None = Field(
        5.0,
        gt=0,
        description="reward_hacking is raised if a monitor fell from its best value, and the score rose, both by more than this number of "
        "standard errors; null: off. Lower: more sensitive. docs/alarms.md has the details.",
    )
    window: int = Field(5, ge=3, description="Number of iterations whose mean is compared for value_blow_up and reward_hacking.")
    off: list[AlarmName] = Field([], description="Alarms that are not raised.")
    stop_on: list[AlarmName] = Field([], description="Alarms that end the run; the others are logged and counted.")

    @model_validator(mode="before")
    @classmethod
    def _accept_former_limits(cls, value: object) -> object:
        """Accept a limit that is a constant today if it has the constant's value, or null: then its alarm is off."""
        if not isinstance(value, dict):
            return value
        limits = {name: (alarm, constant) for alarm, (name, constant) in LIMITS.items() if constant is not None}
        kept = {name: item for name, item in value.items() if name not in limits}
        off = []
        for name in (name for name in value if name in limits):
            alarm, constant = limits[name]
            if value[name] is None:
                off.append(alarm)
            elif value[name] != constant:
                raise ValueError(
                    f"{name} is not a setting but a constant ({constant:g}); remove it, or turn its alarm off with health.off: [{alarm}]"
                )
        return {**kept, "off": [*kept.get("off", []), *off]} if off else kept

    def former_settings(self, settings: JsonObject) -> JsonObject:
        """``settings`` with a limit for each alarm, null if it is off, as earlier versions had them."""
        constants = {name: constant for name, constant in LIMITS.values() if constant is not None}
        switched_off = {LIMITS[alarm][0]: None for alarm in self.off if alarm in LIMITS}
        newer = [alarm for alarm in self.off if alarm not in LIMITS]
        kept = {name: item for name, item in settings.items() if name != "off"}
        return {**kept, **constants, **switched_off, **({"off": newer} if newer else {})}


@dataclass(frozen=True)
class Alarm:
    """A detected problem with a message for the user."""

    name: str
    message: str


class RaisedAlarm(TypedDict):
    """An alarm of a run: when it was raised, in how many iterations, and the message of the first one."""

    name: str
    first_iteration: int
    iterations: int
    message: str
    last_iteration: int


class History:
    """The data that the checks need: the first iterations, the last ones, and each monitor's trend. Its size does not grow with the run."""

    def __init__(self, settings: HealthSettings, *, num_episodes: int, is_half: bool = False, is_recomputed: bool = False) -> None:
        self.num_episodes, self.is_half, self.is_recomputed = num_episodes, is_half, is_recomputed
        self.length = 0  # number of iterations
        self.first: list[Metrics] = []
        self.recent: list[Metrics] = []  # the last entry is the current iteration
        self.trends: dict[str, Trend] = {}
        self._window, self._kept = settings.window, max(2 * settings.window, settings.flat_iterations or 0, EARLY) + 1

    def append(self, metrics: Metrics) -> None:
        """Add the next iteration."""
        self.length += 1
        if self.length <= EARLY:
            self.first.append(dict(metrics))
        self.recent = [*self.recent, dict(metrics)][-self._kept :]
        for name in metrics:
            if metric_names.is_monitor(name) and not name.endswith("_std"):
                known = [entry for entry in self.recent if name in entry]  # a monitor may apply to none of an iteration's episodes
                self.trends.setdefault(name, Trend(self._window)).add(
                    [entry[name] for entry in known], [entry[metric_names.SCORE_MEAN] for entry in known]
                )

    @property
    def now(self) -> Metrics:
        """The current iteration."""
        return self.recent[-1]


class Trend:
    """A monitor and the score as means over ``width`` iterations: at the monitor's best (before the last ``width``), and now."""

    def __init__(self, width: int) -> None:
        self.width, self.pairs = width, 0
        self.best = Point(-math.inf, -math.inf)
        self.now = Point(-math.inf, -math.inf)
        self._squares = Point(0.0, 0.0)

    def add(self, monitor: Sequence[float], score: Sequence[float]) -> None:
        """Add an iteration. Both sequences contain the most recent values, at least 2 ``width`` of them in a long enough run."""
        width = self.width
        if len(monitor) > 1:
            self.pairs += 1
            self._squares = Point(*(old + (of[-1] - of[-2]) ** 2 for old, of in zip(self._squares, (monitor, score), strict=True)))
        if len(monitor) >= 2 * width:
            self.now = Point(statistics.fmean(monitor[-width:]), statistics.fmean(score[-width:]))
            before = Point(statistics.fmean(monitor[-2 * width : -width]), statistics.fmean(score[-2 * width : -width]))
            if before.monitor > self.best.monitor:
                self.best = before

    @property
    def full(self) -> bool:
        """Whether there are enough iterations for both means."""
        return self.now.monitor > -math.inf

    @property
    def moved(self) -> Point:
        """How far the monitor fell and the score rose since the best window, in standard errors of a normal distribution.

        The noise is estimated from successive differences, which a trend hardly affects. N iterations estimate it with about
        2 (N - 1)^2 / (3 N - 4) degrees of freedom (von Neumann et al., "The mean square successive difference", 1941), so a move divided by
        its error has Student's distribution.
        """
        count = self.pairs + 1
        freedom = 2 * self.pairs**2 / (3 * count - 4)
        errors = [max(math.sqrt(squares / self.pairs / self.width), 1e-9) for squares in self._squares]
        moves = (self.best.monitor - self.now.monitor, self.now.score - self.best.score)
        return Point(*(normal_equivalent(move / error, freedom) for move, error in zip(moves, errors, strict=True)))


class Point(NamedTuple):
    """A monitor value and a score."""

    monitor: float
    score: float


EARLY = 3  # number of iterations for "at first" and for recent means


class Health:
    """Checks the metrics of one iteration after another."""

    def __init__(self, settings: HealthSettings, *, num_episodes: int, is_half: bool = False, is_recomputed: bool = False) -> None:
        """``num_episodes``: of an iteration. ``is_half``: the models compute in half precision. ``is_recomputed``: the rollout's
        log-probabilities are those of a forward pass, not those of sampling."""
        self.settings = settings
        self.begun: list[Alarm] = []  # new alarms of the last iteration; continuing ones are reported only once
        self._history = History(settings, num_episodes=num_episodes, is_half=is_half, is_recomputed=is_recomputed)
        self._raised: dict[str, RaisedAlarm] = {}

    def observe(self, metrics: Metrics) -> list[Alarm]:
        """Check the next iteration and return its alarms."""
        iteration = self._history.length
        self._history.append(metrics)
        alarms = [alarm for check in CHECKS for alarm in check(self._history, self.settings) if alarm.name not in self.settings.off]
        self.begun = []
        for alarm in alarms:
            entry = self._raised.get(alarm.name)
            if entry is None or entry["last_iteration"] != iteration - 1:
                self.begun.append(alarm)
            self._raised[alarm.name] = {
                "name": alarm.name,
                "first_iteration": iteration if entry is None else entry["first_iteration"],
                "iterations": 1 if entry is None else entry["iterations"] + 1,
                "message": alarm.message if entry is None else entry["message"],
                "last_iteration": iteration,
            }
        return alarms

    def summary(self) -> list[RaisedAlarm]:
        """All raised alarms in order of first occurrence: name, first and last iteration, number of iterations, message."""
        return sorted(self._raised.values(), key=lambda entry: entry["first_iteration"])


def alarm_metrics(alarms: list[Alarm]) -> dict[str, float]:
    """``health/alarms``, and a 1 for each raised alarm."""
    return {metric_names.ALARMS: float(len(alarms)), **{metric_names.alarm_name(alarm.name): 1.0 for alarm in alarms}}


# The checks


def _at_first(history: History, name: str) -> float | None:
    """The mean over the first iterations; None until they are complete."""
    values = [entry[name] for entry in history.first if name in entry]
    return sum(values) / EARLY if len(values) == EARLY and history.length > EARLY else None


def _negative_kl(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    recent = history.recent[-EARLY:]  # single small batches can be far below 0 by chance; a real mismatch shows in all
    freedom = len(recent) * (history.num_episodes - 1)
    if not freedom:
        return  # one episode shows no error
    kl = statistics.fmean(now[metric_names.KL] for now in recent)
    error = math.hypot(*(now[metric_names.KL_STANDARD_ERROR] for now in recent)) / len(recent)
    error *= math.sqrt(history.num_episodes / (history.num_episodes - 1))  # the metric has the biased deviation
    # A few episodes estimate the error badly, so the mean divided by it has Student's distribution.
    errors = normal_equivalent((-kl - 1e-3) / max(error, 1e-9), freedom)
    if errors > NEGATIVE_KL_ERRORS:
        yield Alarm(
            "negative_kl",
            f"the KL to the reference is {kl:.3f} nats, {errors:.0f} standard errors below 0, which is impossible: the "
            "samples do not follow the policy's log-probabilities (check top_k, top_p, padding and stop tokens)",
        )


def _exploding_kl(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    kl = history.now[metric_names.KL]
    if settings.kl_limit is not None and kl > settings.kl_limit:
        yield Alarm(
            "exploding_kl",
            f"the KL to the reference is {kl:.1f} nats per completion (limit {settings.kl_limit:g}): the policy writes texts unlike those "
            "that the reward model was trained on; raise kl.coef, set kl.target, or lower training.learning_rate",
        )


def _policies_disagree(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    if history.is_half:
        difference = history.now.get(metric_names.LOG_RATIO_FIRST_RMS, 0.0)  # runs of earlier versions do not have it
        what = f"the log-probabilities differ by {difference:.3g} nats (root mean square), more than rounding explains"
    else:
        difference = history.now[metric_names.RATIO_FIRST_DEVIATION]
        what = f"a probability ratio differs from 1 by {difference:.3g}"
    if not difference > DISAGREEMENT:
        return
    if history.is_recomputed:
        advice = "the model gives different results each time (dropout, or outputs that depend on the other sequences of a pass)"
        advice += "; try precision: fp32" if history.is_half else ""
    else:
        advice = "sampling and training compute different log-probabilities; set rollout_logprobs: recomputed"
    yield Alarm("policies_disagree", f"before the iteration's first optimizer step {what}: {advice}")


def _sampler_disagrees(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    gap = history.now.get(metric_names.SAMPLING_GAP_MEAN)  # only where another engine samples
    if history.now.get(metric_names.SAMPLING_LAG):
        return  # the gap contains an update (overlap: 1)
    if settings.sampler_gap is not None and gap is not None and gap > settings.sampler_gap:
        yield Alarm(
            "sampler_disagrees",
            f"the sampler's log-probabilities are {gap:.3g} nats per token away from the trainer's (limit {settings.sampler_gap:g}): it "
            "does not compute the trained policy; use the trainer's dtype on the server, check its logprobs mode, or use "
            "generation.engine: local",
        )


def _ratio_blow_up(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    deviation = history.now[metric_names.RATIO_MAX_DEVIATION]
    if settings.ratio_limit is not None and deviation > settings.ratio_limit:
        yield Alarm(
            "ratio_blow_up",
            f"a probability ratio reached {1 + deviation:.3g} within one iteration (limit {1 + settings.ratio_limit:g}): the steps are too "
            "large; lower training.learning_rate or ppo_epochs, or set clip.dual or kl.update_limit",
        )


def _value_blow_up(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    if metric_names.VALUE_LOSS not in history.now:  # no value network
        return
    before = [entry[metric_names.VALUE_LOSS] for entry in history.recent[-1 - settings.window : -1]]
    if len(before) < EARLY:
        return
    loss, usual = history.now[metric_names.VALUE_LOSS], statistics.median(before)
    # A loss up to the variance of the returns is normal for a value network, even if the recent losses were much smaller.
    if loss > VALUE_GROWTH * usual and loss > history.now[metric_names.RETURNS_VARIANCE]:
        yield Alarm(
            "value_blow_up",
            f"the value loss is {loss:.3g}, {loss / max(usual, 1e-9):.0f} times its recent median: lower training.value_learning_rate, or "
            "bound the rewards",
        )


def _entropy_collapse(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, metric_names.ENTROPY), history.now[metric_names.ENTROPY]
    if first is not None and now < ENTROPY_SHARE * first:
        yield Alarm(
            "entropy_collapse",
            f"the entropy fell from {first:.3g} to {now:.3g} nats per token: the policy repeats one answer; raise kl.coef, or lower "
            "training.learning_rate",
        )


def _length_drift(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, metric_names.LENGTH_MEAN), history.now[metric_names.LENGTH_MEAN]
    if first is None:
        return
    if now > LENGTH_FACTOR * first or now < first / LENGTH_FACTOR:
        yield Alarm(
            "length_drift",
            f"completions went from {first:.1f} to {now:.1f} tokens: the reward may favour length. Check samples.jsonl, and a "
            "reward model's accuracy by length",
        )


def _repetition(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, metric_names.REPETITION), history.now[metric_names.REPETITION]
    if first is not None and now > first + REPETITION_RISE:
        yield Alarm(
            "repetition",
            f"{now:.0%} of a completion's 4-grams repeat an earlier one ({first:.0%} at first): the policy repeats itself; raise kl.coef",
        )


def _sameness(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, metric_names.DISTINCT_SHARE), history.now[metric_names.DISTINCT_SHARE]
    if first is not None and now < DISTINCT_SHARE * first:
        yield Alarm(
            "sameness",
            f"only {now:.0%} of an iteration's completions differ ({first:.0%} at first): one answer to every prompt; raise kl.coef",
        )


def _missing_eos(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    first, now = _at_first(history, metric_names.STOPPED_SHARE), history.now[metric_names.STOPPED_SHARE]
    if first is not None and now < first - STOPPED_DROP:
        yield Alarm(
            "missing_eos",
            f"{now:.0%} of the completions have an end token ({first:.0%} at first): set missing_eos: replace, or raise "
            "generation.max_new_tokens",
        )


def _weak_eos_penalty(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    recent = [entry for entry in history.recent[-EARLY:] if metric_names.UNSTOPPED_SCORE in entry]
    if len(recent) < EARLY or history.now[metric_names.STOPPED_SHARE] > 1 - UNSTOPPED_SHARE:
        return
    stopped, unstopped = (
        statistics.fmean(entry[name] for entry in recent) for name in (metric_names.STOPPED_SCORE, metric_names.UNSTOPPED_SCORE)
    )
    if unstopped >= stopped:
        yield Alarm(
            "weak_eos_penalty",
            f"completions without an end token score {unstopped:.3g} after the missing_eos penalty, those with one {stopped:.3g}: the "
            "policy gains nothing by ending its completions; raise missing_eos_penalty",
        )


def _flat_reward(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    num_iterations = settings.flat_iterations
    if num_iterations is None or history.length < num_iterations:
        return
    recent = history.recent[-num_iterations:]
    means = [entry[metric_names.SCORE_MEAN] for entry in recent]
    if max(means) - min(means) < 1e-6 and all(entry[metric_names.SCORE_STD] < 1e-6 for entry in recent):
        yield Alarm(
            "flat_reward",
            f"all completions of {num_iterations} iterations score {history.now[metric_names.SCORE_MEAN]:.3g}: no learning signal; check "
            "that the reward is the right one and reads the completion",
        )


def _reward_hacking(history: History, settings: HealthSettings) -> Iterator[Alarm]:
    for name, trend in sorted(history.trends.items()):
        if settings.hacking_errors is None or not trend.full:
            continue
        best, now = trend.best, trend.now
        if min(trend.moved) > _limit_of_many(settings.hacking_errors, trend.pairs + 1):
            yield Alarm(
                "reward_hacking",
                f"{name} fell from {best.monitor:.3f} to {now.monitor:.3f} while the score rose from {best.score:.3f} to {now.score:.3f}: "
                "the policy exploits an error of the reward; stop earlier, raise kl.coef, or use an ensemble of reward models",
            )
            return


def _limit_of_many(limit: float, iterations: int) -> float:
    """The limit in standard errors for a maximum over the pairs of windows of a run, whose number grows with its square.

    One pair exceeds a limit with a probability of about exp(-limit^2 / 2). From 100 iterations on, this is divided by
    (iterations / 100)^3, so the probability of a false alarm hardly grows with the run.
    """
    return math.sqrt(limit**2 + 6 * math.log(max(1.0, iterations / 100)))


CHECKS: tuple[Callable[[History, HealthSettings], Iterator[Alarm]], ...] = (
    _negative_kl,
    _exploding_kl,
    _policies_disagree,
    _sampler_disagrees,
    _ratio_blow_up,
    _value_blow_up,
    _entropy_collapse,
    _length_drift,
    _repetition,
    _sameness,
    _missing_eos,
    _weak_eos_penalty,
    _flat_reward,
    _reward_hacking,
)
