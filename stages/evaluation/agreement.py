"""Agreement between the judges of an evaluation, and between the annotators of a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from stages.json_types import JsonObject
from stages.stats.agreement import cohens_kappa, fleiss_kappa, krippendorff_alpha, pair_agreement
from stages.stats.comparing import prompt_means
from stages.stats.intervals import share_interval

if TYPE_CHECKING:
    from stages.evaluation.answers import Question
    from stages.evaluation.judging import Judged, Pair

    Unit = tuple[Pair, int]  # a pair of candidates, and the index of a question


def agreement(judges: Sequence[Judged], questions: Sequence[Question]) -> JsonObject:
    """Agreement between judges, and between the annotators of a judge.

    A unit is a pair of candidates on a question, rated first, second or tie (a mean over annotators or orders counts by its side of 1/2).
    ``alpha``: Krippendorff's, nominal. For each two judges: Cohen's kappa, and the share of agreement where neither ties, with an interval
    over prompts.
    """
    rated = {judge.name: _ratings(judge) for judge in judges}
    units = sorted({unit for ratings in rated.values() for unit in ratings})
    pairs = [
        {"a": first, "b": second, **_between_judges(rated[first], rated[second], questions)}
        for first, second in combinations(rated, 2)
        if rated[first].keys() & rated[second].keys()
    ]
    result: JsonObject = {"pairs": pairs, "units": len(units)}
    if len(judges) > 1 and pairs:
        result["alpha"] = krippendorff_alpha([[ratings.get(unit) for ratings in rated.values()] for unit in units])
    return {**result, "annotators": {judge.name: _between_annotators(judge.annotators) for judge in judges if judge.annotators}}


def _ratings(judge: Judged) -> dict[Unit, str]:
    return {
        (pair, row): _side(value) for pair, values in judge.preferences.items() for row, value in enumerate(values) if value is not None
    }


def _side(preference: float) -> str:
    return "first" if preference > 0.5 else "second" if preference < 0.5 else "tie"


def _between_judges(first: Mapping[Unit, str], second: Mapping[Unit, str], questions: Sequence[Question]) -> JsonObject:
    """The agreement of two judges on the units that both rated."""
    both = sorted(first.keys() & second.keys())
    decided = [unit for unit in both if "tie" not in (first[unit], second[unit])]
    agreeing = [float(first[unit] == second[unit]) for unit in decided]
    means = prompt_means(agreeing, [questions[row].prompt_number for _, row in decided])
    low, high = share_interval(means)
    return {
        "n": len(both),
        "agreement": pair_agreement([(first[unit], second[unit]) for unit in both]),
        "kappa": cohens_kappa([first[unit] for unit in both], [second[unit] for unit in both]),
        "decided": len(decided),
        "agreement_decided": sum(means) / len(means) if means else None,
        "ci_low": low,
        "ci_high": high,
    }


def _between_annotators(preferences: Sequence[Sequence[float]]) -> JsonObject:
    """The agreement of annotators. ``preferences``: those of each unit that several of them judged."""
    rows = [[_side(value) for value in votes] for votes in preferences]
    complete = len({len(row) for row in rows}) == 1
    return {
        "units": len(rows),
        "votes": sum(len(row) for row in rows),
        "agreement": pair_agreement(rows),
        "alpha": krippendorff_alpha(rows),
        "fleiss_kappa": fleiss_kappa(rows) if complete else None,
        "unanimous": sum(len(set(row)) == 1 for row in rows) / len(rows),
    }
