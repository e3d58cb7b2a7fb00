"""Label quality: rate, time per task, agreement between annotators, position bias, and agreement with the last round's reward model.

A pair is two completions of one task. An annotator decides a pair if they do not tie it. Screening tasks are used only for the screening.
Skipped and flagged tasks are used only for the counts and the rate.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import combinations
from statistics import median
from typing import TypedDict

from stages.corpora.labels import LabelAnswer
from stages.json_types import finite
from stages.labelling.store import Labels, screen
from stages.stats.agreement import cohens_kappa, krippendorff_alpha
from stages.stats.intervals import share_interval

# Ouyang et al. 2022, section 3.4: share of pairs on which two labellers agreed, for training labellers and for held-out labellers.
PAPER_AGREEMENT = {"training": 0.726, "held-out": 0.773}


class Share(TypedDict):
    """A share over pairs, with its 95 % interval over tasks; None without data."""

    share: float | None
    ci_low: float | None
    ci_high: float | None
    pairs: int
    tasks: int


class ModelShare(Share):
    """How often a reward model orders a pair as people do."""

    model: str


class Reasons(TypedDict):
    """A number of answers, and the most frequent reasons with their counts."""

    count: int
    reasons: dict[str, int]


class Rate(TypedDict):
    """The number of answers in the last hour, and per hour of work."""

    last_hour: int
    per_hour_of_work: float | None
    hours_of_work: float


class Times(TypedDict):
    """Seconds per task."""

    median: float | None
    p90: float | None
    mean: float | None


class Agreement(TypedDict):
    """Agreement on the tasks that several annotators ranked."""

    overlap_tasks: int
    alpha: float | None
    pairwise: Share
    with_ties: Share


class RatingQuality(TypedDict):
    """The answers to one Likert scale."""

    text: str
    mean: float | None
    n: int
    alpha: float | None


class CheckQuality(TypedDict):
    """The answers to one check box."""

    text: str
    share: float | None
    n: int
    kappa: float | None
    compared: int
    agreement: float | None


class PositionRate(TypedDict):
    """How often the completion at a position (from 1) was best, and how often that happens by chance."""

    position: int
    best: float
    chance: float
    n: int


class PositionBias(TypedDict):
    """How the position on the page influences the rank."""

    earlier_wins: Share
    best: list[PositionRate]


class ScreeningState(TypedDict):
    """An annotator's answers to the screening tasks. ``passed`` is None until all are answered."""

    answered: int
    of: int
    ranking_agreement: float | None
    check_agreement: float | None
    passed: bool | None


class AnnotatorQuality(TypedDict):
    """The results of one annotator."""

    name: str
    answers: int
    skipped: int
    flagged: int
    corrected: int
    median_seconds: float | None
    against_the_rest: Share
    against_reward_model: Share | None
    ties: float | None
    screening: ScreeningState | None
    last: str | None  # ISO 8601, UTC


class Quality(TypedDict):
    """All values of the report."""

    name: str
    tasks: int
    target: int
    ranked_tasks: int
    answers: int
    skipped: Reasons
    flagged: Reasons
    rate: Rate
    seconds: Times
    agreement: Agreement
    paper_agreement: dict[str, float]
    ratings: dict[str, RatingQuality]
    checks: dict[str, CheckQuality]
    position: PositionBias
    reward_model: ModelShare | None
    annotators: list[AnnotatorQuality]


def quality(labels: Labels, now: datetime | None = None) -> Quality:
    """All values of the report, as JSON types. A share without data is None."""
    given = [answer for own in labels.answers.values() for name, answer in own.items() if name in labels.tasks]
    used = [answer for answer in given if answer.is_used]
    ranked = {answer.task for answer in used}
    content: Quality = {
        "name": labels.settings.name,
        "tasks": len(labels.tasks),
        "target": labels.settings.target,
        "ranked_tasks": len(ranked),
        "answers": len(given),
        "skipped": _reasons(answer.skipped for answer in given),
        "flagged": _reasons(answer.flagged for answer in given),
        "rate": _rate(given, now or datetime.now(UTC)),
        "seconds": _times(used),
        "agreement": agreement(used),
        "paper_agreement": PAPER_AGREEMENT,
        "ratings": {rating.name: _rating(used, rating.name, rating.text) for rating in labels.settings.questions.ratings},
        "checks": {check.name: _check(used, check.name, check.text) for check in labels.settings.questions.checks},
        "position": position_bias([answer for answer in used if answer.seconds > 0]),
        "reward_model": _reward_model(labels, used),
        "annotators": [_annotator(labels, name, used) for name in sorted(labels.answers)],
    }
    return finite(content)


def _reasons(given: Iterable[str | None]) -> Reasons:
    counted = Counter(reason for reason in given if reason is not None)
    return {"count": sum(counted.values()), "reasons": dict(counted.most_common(10))}


def _rate(given: Sequence[LabelAnswer], now: datetime) -> Rate:
    """Number of answers in the last hour, and answers per hour of work (the time during which tasks were visible)."""
    times = [datetime.fromisoformat(answer.time) for answer in given]
    hours = sum(answer.seconds for answer in given) / 3600
    recent = sum((now - moment).total_seconds() < 3600 for moment in times)
    return {"last_hour": recent, "per_hour_of_work": len(given) / hours if hours else math.nan, "hours_of_work": hours}


def _times(used: Sequence[LabelAnswer]) -> Times:
    seconds = sorted(answer.seconds for answer in used if answer.seconds > 0)  # imported answers have no time
    if not seconds:
        return {"median": math.nan, "p90": math.nan, "mean": math.nan}
    return {"median": median(seconds), "p90": seconds[min(len(seconds) - 1, int(0.9 * len(seconds)))], "mean": sum(seconds) / len(seconds)}


# Agreement


def _by_task(used: Iterable[LabelAnswer]) -> dict[str, list[LabelAnswer]]:
    """The answers by task, only for tasks that several annotators ranked."""
    tasks: dict[str, list[LabelAnswer]] = defaultdict(list)
    for answer in used:
        tasks[answer.task].append(answer)
    return {name: answers for name, answers in tasks.items() if len(answers) > 1}


def _side(ranks: Sequence[float], first: int, second: int) -> int:
    """1 if ``first`` is better, -1 if ``second`` is better, 0 for a tie."""
    return (ranks[first] < ranks[second]) - (ranks[first] > ranks[second])


def _agreeing(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """For each pair that both annotators decide: 1.0 if they agree, 0.0 if not."""
    sides = [(_side(one, i, j), _side(other, i, j)) for i, j in combinations(range(len(one)), 2)]
    return [float(a == b) for a, b in sides if a and b]


def _share(groups: Iterable[Sequence[float]]) -> Share:
    """Share over all values, with a 95 % interval.

    The interval is computed over groups (tasks), because the values within a group are not independent.
    """
    kept = [group for group in groups if group]
    number = sum(len(group) for group in kept)
    if not number:
        return {"share": math.nan, "ci_low": math.nan, "ci_high": math.nan, "pairs": 0, "tasks": 0}
    share = sum(sum(group) for group in kept) / number
    low, high = share_interval([sum(group) / len(group) for group in kept], share)
    return {"share": share, "ci_low": low, "ci_high": high, "pairs": number, "tasks": len(kept)}


def agreement(used: Sequence[LabelAnswer]) -> Agreement:
    """Agreement on the tasks that several annotators ranked.

    ``pairwise``: share of agreement over the pairs that both annotators decide. ``with_ties``: the same over all pairs; a tie agrees only
    with a tie. ``alpha``: Krippendorff's ordinal alpha over the mid-ranks of the completions.
    """
    tasks = _by_task(used)
    decided, everything = [], []
    units: list[list[float]] = []
    for answers in tasks.values():
        rankings = [answer.ranks for answer in answers if answer.ranks is not None]
        both = list(combinations(rankings, 2))
        decided.append([value for one, other in both for value in _agreeing(one, other)])
        pairs = list(combinations(range(len(rankings[0])), 2))
        everything.append([float(_side(one, i, j) == _side(other, i, j)) for one, other in both for i, j in pairs])
        middles = [_mid_ranks(ranks) for ranks in rankings]
        units.extend([ranks[index] for ranks in middles] for index in range(len(rankings[0])))
    return {
        "overlap_tasks": len(tasks),
        "alpha": krippendorff_alpha(units, "ordinal"),
        "pairwise": _share(decided),
        "with_ties": _share(everything),
    }


def _mid_ranks(ranks: Sequence[int]) -> list[float]:
    """Mid-ranks: tied completions share the mean of the ranks that they occupy. Ranks start at 0."""
    return [sum(other < own for other in ranks) + (ranks.count(own) - 1) / 2 for own in ranks]


def _rating(used: Sequence[LabelAnswer], name: str, text: str) -> RatingQuality:
    """Mean of a Likert scale, and Krippendorff's ordinal alpha over the completions that several annotators rated."""
    values = [value for answer in used for value in answer.ratings.get(name, []) if value is not None]
    units = [
        [answer.ratings[name][index] for answer in answers if name in answer.ratings]
        for answers in _by_task(used).values()
        for index in range(len(answers[0].order))
    ]
    mean = sum(values) / len(values) if values else math.nan
    return {"text": text, "mean": mean, "n": len(values), "alpha": krippendorff_alpha(units, "ordinal")}


def _check(used: Sequence[LabelAnswer], name: str, text: str) -> CheckQuality:
    """Share of ticked boxes, and Cohen's kappa.

    With more than two annotators, kappa is the mean over pairs of annotators, weighted by the number of boxes that both answered.
    """
    ticked = [value for answer in used for value in answer.checks.get(name, [])]
    columns: dict[tuple[str, str], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for answers in _by_task(used).values():
        for one, other in combinations(sorted(answers, key=lambda answer: answer.annotator), 2):
            if name in one.checks and name in other.checks:
                first, second = columns[one.annotator, other.annotator]
                first.extend(int(value) for value in one.checks[name])
                second.extend(int(value) for value in other.checks[name])
    number = sum(len(first) for first, _ in columns.values())
    kappa = sum(cohens_kappa(first, second) * len(first) for first, second in columns.values()) / number if number else math.nan
    same = sum(a == b for first, second in columns.values() for a, b in zip(first, second, strict=True))
    return {
        "text": text,
        "share": sum(ticked) / len(ticked) if ticked else math.nan,
        "n": len(ticked),
        "kappa": kappa,
        "compared": number,
        "agreement": same / number if number else math.nan,
    }


# Bias


def position_bias(used: Sequence[LabelAnswer]) -> PositionBias:
    """Whether the position of a completion on the page influences its rank.

    Orders are shuffled, so ``earlier_wins`` is near 0.5 if there is no bias. ``best``: for each position, how often the completion there
    was best (tied completions share the win), and how often that happens by chance.
    """
    earlier = []
    best: dict[int, list[float]] = defaultdict(list)
    chance: dict[int, list[float]] = defaultdict(list)
    for answer in used:
        shown = [answer.ranks[index] for index in answer.order] if answer.ranks is not None else []
        earlier.append([float(side > 0) for i, j in combinations(range(len(shown)), 2) if (side := _side(shown, i, j))])
        winners = shown.count(0)
        for position, rank in enumerate(shown):
            best[position].append((rank == 0) / winners)
            chance[position].append(1 / len(shown))
    by_position: list[PositionRate] = []
    for position, wins in sorted(best.items()):
        number = len(wins)
        by_position.append({"position": position + 1, "best": sum(wins) / number, "chance": sum(chance[position]) / number, "n": number})
    return {"earlier_wins": _share(earlier), "best": by_position}


# Single annotators and the reward model


def _annotator(labels: Labels, name: str, used: Sequence[LabelAnswer]) -> AnnotatorQuality:
    """Results of one annotator: the amount of work, and the agreement with other annotators and with the last reward model."""
    own = labels.answers[name]
    mine = [answer for answer in used if answer.annotator == name]
    others: dict[str, list[LabelAnswer]] = defaultdict(list)
    for answer in used:
        if answer.annotator != name:
            others[answer.task].append(answer)
    shared = [
        [value for other in others[answer.task] for value in _agreeing(answer.ranks or [], other.ranks or [])]
        for answer in mine
        if answer.task in others
    ]
    gold = [(task, own[key]) for key, task in labels.gold.items() if key in own]
    screening = screen(gold, len(labels.gold), labels.settings.pass_mark)
    return {
        "name": name,
        "answers": sum(key in labels.tasks for key in own),
        "skipped": sum(own[key].skipped is not None for key in own if key in labels.tasks),
        "flagged": sum(own[key].flagged is not None for key in own if key in labels.tasks),
        "corrected": sum(answer.replaces is not None for answer in own.values()),
        "median_seconds": _times(mine)["median"],
        "against_the_rest": _share(shared),
        "against_reward_model": _against_scores(labels, mine),
        "ties": _ties(mine),
        "screening": {
            "answered": screening.answered,
            "of": screening.of,
            "ranking_agreement": screening.ranking_agreement,
            "check_agreement": screening.check_agreement,
            "passed": screening.passed,
        }
        if labels.gold
        else None,
        "last": max((answer.time for answer in own.values()), default=None),
    }


def _ties(mine: Sequence[LabelAnswer]) -> float:
    """Share of pairs that the annotator tied."""
    sides = [_side(answer.ranks, i, j) for answer in mine if answer.ranks for i, j in combinations(range(len(answer.ranks)), 2)]
    return sides.count(0) / len(sides) if sides else math.nan


def _against_scores(labels: Labels, answers: Sequence[LabelAnswer]) -> Share | None:
    if labels.scores is None:
        return None
    groups = []
    for answer in answers:
        scores = labels.scores["scores"].get(answer.task)
        if scores is not None and answer.ranks is not None:
            groups.append(_agreeing(answer.ranks, [-score for score in scores]))
    return _share(groups)


def _reward_model(labels: Labels, used: Sequence[LabelAnswer]) -> ModelShare | None:
    """How often the last round's reward model orders a pair as people do."""
    agreement = _against_scores(labels, used)
    return None if agreement is None or labels.scores is None else {"model": labels.scores["model"], **agreement}
