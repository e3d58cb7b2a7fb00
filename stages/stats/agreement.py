"""Chance-corrected agreement of raters over units. None is a missing rating. Results are floats.

Kappa and alpha are 1 for perfect agreement and 0 for the agreement expected by chance. Alpha supports missing ratings and any number of
raters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from typing import Literal

Rating = float | int | str | None


def pair_agreement(units: Sequence[Sequence[Rating]]) -> float:
    """Share of agreeing pairs of raters, over all pairs of ratings of the same unit; NaN if no unit has two ratings."""
    agreeing = pairs = 0
    for unit in units:
        rated = [rating for rating in unit if rating is not None]
        agreeing += sum(a == b for a, b in combinations(rated, 2))
        pairs += len(rated) * (len(rated) - 1) // 2
    return agreeing / pairs if pairs else math.nan


def cohens_kappa(first: Sequence[Rating], second: Sequence[Rating]) -> float:
    """Cohen's kappa (1960) of two raters, over units rated by both; 1 if both always give the same single rating."""
    rated = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not rated:
        return math.nan
    observed = sum(a == b for a, b in rated) / len(rated)
    firsts, seconds = Counter(a for a, _ in rated), Counter(b for _, b in rated)
    expected = sum(firsts[value] * seconds[value] for value in firsts) / len(rated) ** 2
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(units: Sequence[Sequence[Rating]]) -> float:
    """Fleiss' kappa (1971). Every unit must have the same number of ratings; the raters may differ. Raises ValueError for other units."""
    sizes = {len(unit) for unit in units}
    if len(sizes) != 1 or min(sizes) < 2 or any(rating is None for unit in units for rating in unit):
        raise ValueError("Fleiss' kappa needs the same number of ratings, at least two, for every unit; use krippendorff_alpha")
    (ratings,) = sizes
    counts = [Counter(unit) for unit in units]
    observed = sum((sum(count * count for count in unit.values()) - ratings) / (ratings * (ratings - 1)) for unit in counts) / len(units)
    total = sum(counts, Counter())
    expected = sum((count / (ratings * len(units))) ** 2 for count in total.values())
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


Level = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(units: Sequence[Sequence[Rating]], level: Level = "nominal") -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability"). Units with one rating do not count.

    ``level`` defines the distance of two ratings: nominal, 1 if they differ; interval, their squared difference; ordinal, the squared
    number of ratings between them, with each end counted half. Ordinal and interval ratings must be numbers.
    """
    paired = [[rating for rating in unit if rating is not None] for unit in units]
    paired = [unit for unit in paired if len(unit) > 1]
    total: Counter[Rating] = Counter(rating for unit in paired for rating in unit)
    num_ratings = sum(total.values())
    if not num_ratings:
        return math.nan
    distance = _distances(total, level)
    disagreeing = sum(_disagreement(Counter(unit), distance) / (len(unit) - 1) for unit in paired)
    expected = _disagreement(total, distance) / (num_ratings - 1)
    return 1.0 if expected == 0 else 1 - disagreeing / expected


def _disagreement(counts: Counter[Rating], distance: Callable[[Rating, Rating], float]) -> float:
    """Sum of distances over all ordered pairs of ratings."""
    return sum(counts[a] * counts[b] * distance(a, b) for a, b in permutations(counts, 2))


def _distances(total: Counter[Rating], level: Level) -> Callable[[Rating, Rating], float]:
    if level == "nominal":
        return lambda a, b: 1.0
    if level == "interval":
        return lambda a, b: (a - b) ** 2  # type: ignore[operator]
    middle: dict[Rating, float] = {}
    below = 0
    for value in sorted(total):  # type: ignore[type-var]
        middle[value] = below + total[value] / 2
        below += total[value]
    return lambda a, b: (middle[a] - middle[b]) ** 2
