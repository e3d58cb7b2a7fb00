"""Select values from a run's summary by dotted path, and average them over seeds.

candidates.aligned.scores.gold            steps.preference.metrics.heldout_accuracy
win_rates.aligned.sft.gold.win_rate       candidates.*.perplexity
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.errors import RecipeError
from stages.run_summary import Candidate, RunSummary, StepSummary, WinRate
from stages.stats.replicates import mean_interval

if TYPE_CHECKING:
    from stages.recipe.schema import Recipe


@dataclass(frozen=True)
class Estimate:
    """A metric's mean over the seeds of one combination. ``low``, ``high``: Student's 95 % interval; NaN for a single run."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.n < 2 else f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"

    def as_json(self) -> dict[str, float | int | None]:
        low, high = (None, None) if math.isnan(self.low) else (self.low, self.high)
        return {"mean": self.mean, "low": low, "high": high, "n": self.n}


def numbers_of(summary: RunSummary) -> dict[str, float]:
    """Every number of a summary by dotted path. Steps and win rates are addressed by name instead of index."""
    rates: dict[str, dict[str, dict[str, WinRate]]] = {}
    for row in summary.get("win_rates", []):
        rates.setdefault(row["a"], {}).setdefault(row["b"], {})[row["judge"]] = row
    steps = {step["name"]: step for step in summary.get("steps", [])}
    return dict(_flat({**summary, "win_rates": rates, "steps": steps}, ""))


def _flat(value: object, prefix: str) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [item for key, below in value.items() for item in _flat(below, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [(prefix, float(value))]
    return []


def chosen_numbers(summary: RunSummary, patterns: Sequence[str]) -> dict[str, float]:
    """The values that match ``patterns`` (``*`` matches any part), in order. Raises RecipeError if a pattern matches nothing."""
    known = numbers_of(summary)
    chosen: dict[str, float] = {}
    for pattern in patterns:
        expression = re.compile(".+".join(re.escape(part) for part in pattern.split("*")))
        matches = {path: number for path, number in known.items() if expression.fullmatch(path)}
        if not matches:
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(known)[:20])}, ..."
            raise RecipeError(f"the summary has no number at {pattern!r}; {hint}")
        chosen |= matches
    return chosen


def check_patterns(patterns: Iterable[str], recipe: Recipe) -> None:
    """Raise RecipeError for a pattern that cannot match a number of a run of ``recipe``.

    The names below a step's metrics, a candidate's scores and similar are known only after the run, so any name is accepted there.
    """
    candidates = list(dict.fromkeys(name for step in recipe.steps for name in getattr(step.config, "candidates", {})))
    known = [
        *(f"steps.{step.name}.{part}" for step in recipe.steps for part in StepSummary.__annotations__),
        *(f"candidates.{name}.{part}" for name in candidates for part in Candidate.__annotations__),
        *(f"win_rates.{a}.{b}" for a in candidates for b in candidates if a != b),
        *(name for name in RunSummary.__annotations__ if name not in ("steps", "candidates", "win_rates")),
    ]
    for pattern in patterns:
        beginning, star, _ = pattern.partition("*")
        if not any(f"{path}.".startswith(beginning) if star else pattern == path for path in known) and not any(
            beginning.startswith(f"{path}.") for path in known
        ):
            near = difflib.get_close_matches(".".join(pattern.split(".")[:3]), known, n=1)
            parts = [*(f"steps.{step.name}" for step in recipe.steps), *(f"candidates.{name}" for name in candidates)]
            hint = f"did you mean {near[0]}?" if near else f"expected a path such as {', '.join(f'{part}.*' for part in parts)}"
            raise RecipeError(f"--metric {pattern!r}: the summary of a run will have no such number; {hint}")


def default_patterns(summary: RunSummary) -> list[str]:
    """Each candidate's mean score by the first judge; without an evaluation, the steps' held-out metrics."""
    scored = {name: row["scores"] for name, row in summary["candidates"].items() if row.get("scores")}
    patterns = [f"candidates.{name}.scores.{next(iter(scores))}" for name, scores in scored.items()]
    return patterns or [path for path in numbers_of(summary) if path.startswith("steps.") and ".metrics.heldout" in path]


def estimate(values: Sequence[float]) -> Estimate:
    mean, low, high = mean_interval(values)
    return Estimate(mean, low, high, len(values))
