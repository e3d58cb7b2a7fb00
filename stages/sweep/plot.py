"""A sweep as a picture: every metric against what varies, one line per combination of the rest, bars for the interval over seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stages.errors import RecipeError
from stages.sweep.grid import shown_value
from stages.sweep.metrics import Estimate
from stages.sweep.run import SweepResult, shortened

MOST_TICKS = 6  # places along the x axis that are named one by one
WIDE = 10  # an axis whose largest value is this many times its smallest is drawn with a logarithmic scale


def write_plot(result: SweepResult, path: Path, x: str | None = None) -> None:
    """Draw ``result`` to ``path``. ``x`` is an axis or a metric; default: the first axis whose values are numbers, else the first."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    metrics = [name for name in result.metrics if name != x]
    if not metrics:
        return
    lines = sweep_lines(result, x)
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for panel in panels.flat[len(metrics) :]:
        panel.set_axis_off()
    common, short = shortened(metrics)
    if common:
        figure.suptitle(common)
    for name, title, panel in zip(metrics, short, panels.flat, strict=False):
        for label, points in lines.items():
            drawn = [(where, estimates[name]) for where, estimates in points if name in estimates]
            _draw(panel, drawn, label)
        if x is None or x in [axis.label for axis in result.grid.axes]:
            _scale(panel, [where for points in lines.values() for where, _ in points])
        panel.set(title=title, xlabel=x or _default_axis(result))
        panel.title.set_size("medium")
        if len(lines) > 1:
            panel.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def sweep_lines(result: SweepResult, x: str | None) -> dict[str, list[tuple[Any, dict[str, Estimate]]]]:
    """Label of a line -> its points (place on the x axis, estimates). Raises RecipeError where ``x`` is neither axis nor metric."""
    labels = [axis.label for axis in result.grid.axes]
    x = x or _default_axis(result)
    if x not in [*labels, *result.metrics, ""]:
        raise RecipeError(f"--x {x!r}: expected an axis or a metric of the sweep: {', '.join([*labels, *result.metrics])}")
    along = x if x in labels else _default_axis(result)
    lines: dict[str, list[tuple[Any, dict[str, Estimate]]]] = {}
    for values, estimates, _ in result.combinations():
        rest = "  ".join(f"{label}={shown_value(value)}" for label, value in values.items() if label != along)
        where: Any = values[x] if x in labels else estimates[x].mean if x in estimates else ""
        numeric = isinstance(where, int | float) and not isinstance(where, bool)
        lines.setdefault(rest, []).append((where if numeric else shown_value(where), estimates))
    return lines


def _default_axis(result: SweepResult) -> str:
    axes = result.grid.axes
    numeric = [axis for axis in axes if all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values)]
    return (numeric or axes)[0].label if axes else ""


def _draw(panel: Any, points: list[tuple[Any, Estimate]], label: str) -> None:
    where = [place for place, _ in points]
    means = [item.mean for _, item in points]
    # Without a second run there is no interval: a bar of length zero is not drawn.
    below = [0.0 if math.isnan(item.low) else item.mean - item.low for _, item in points]
    above = [0.0 if math.isnan(item.high) else item.high - item.mean for _, item in points]
    is_line = all(isinstance(place, int | float) for place in where)  # between two names there is nothing
    panel.errorbar(where, means, yerr=[below, above], marker="o", linestyle="-" if is_line else "", capsize=3, label=label)
    panel.grid(alpha=0.3)


def _scale(panel: Any, places: list[Any]) -> None:
    """A logarithmic scale for places far apart, and ticks at the places themselves where they are few."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    if not places or not all(isinstance(place, int | float) for place in places):
        return
    positive = [place for place in places if place > 0]
    is_wide = bool(positive) and min(places) >= 0 and max(positive) >= WIDE * min(positive)
    if is_wide and len(positive) == len(places):
        panel.set_xscale("log")
    elif is_wide:
        panel.set_xscale("symlog", linthresh=min(positive))
    distinct = sorted(set(places))
    if len(distinct) <= MOST_TICKS:
        panel.xaxis.set_major_locator(FixedLocator(distinct))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticklabels([shown_value(place) for place in distinct])
    elif not is_wide:
        panel.xaxis.set_major_locator(MaxNLocator(5))
