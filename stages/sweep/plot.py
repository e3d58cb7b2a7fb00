"""Plot a sweep: each metric against a varied field, one line per combination of the others, error bars for the interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from stages.errors import RecipeError
from stages.sweep.grid import shown_value
from stages.sweep.metrics import Estimate
from stages.sweep.run import SweepResult, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TICKS = 6  # maximum number of x values with their own ticks
WIDE = 10  # ratio of largest to smallest value above which the x axis is logarithmic


def write_plot(result: SweepResult, path: Path, x: str | None = None) -> None:
    """Draw ``result`` to ``path``. ``x`` is an axis or a metric; default: the first axis with numeric values, else the first axis."""
    metrics = [name for name in result.metrics if name != x]
    if not metrics:
        return
    lines = sweep_lines(result, x)
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")  # needs no display, unlike pyplot
    panels = figure.subplots(rows, columns, squeeze=False)
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


def sweep_lines(result: SweepResult, x: str | None) -> dict[str, list[tuple[float | str, dict[str, Estimate]]]]:
    """Points (x value, estimates) by line label. Raises RecipeError if ``x`` is neither an axis nor a metric."""
    labels = [axis.label for axis in result.grid.axes]
    x = x or _default_axis(result)
    if x not in [*labels, *result.metrics, ""]:
        raise RecipeError(f"--x {x!r}: expected an axis or a metric of the sweep: {', '.join([*labels, *result.metrics])}")
    along = x if x in labels else _default_axis(result)
    lines: dict[str, list[tuple[float | str, dict[str, Estimate]]]] = {}
    for values, estimates, _ in result.combinations():
        rest = "  ".join(f"{label}={shown_value(value)}" for label, value in values.items() if label != along)
        where = values[x] if x in labels else estimates[x].mean if x in estimates else ""
        x_value = where if isinstance(where, int | float) and not isinstance(where, bool) else shown_value(where)
        lines.setdefault(rest, []).append((x_value, estimates))
    return lines


def _default_axis(result: SweepResult) -> str:
    axes = result.grid.axes
    numeric = [axis for axis in axes if all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values)]
    return (numeric or axes)[0].label if axes else ""


def _draw(panel: Axes, points: list[tuple[float | str, Estimate]], label: str) -> None:
    xs = [x for x, _ in points]
    means = [item.mean for _, item in points]
    # A single run has no interval, so its error bar has length zero.
    below = [0.0 if math.isnan(item.low) else item.mean - item.low for _, item in points]
    above = [0.0 if math.isnan(item.high) else item.high - item.mean for _, item in points]
    is_line = all(isinstance(x, int | float) for x in xs)  # no line between categories
    panel.errorbar(xs, means, yerr=[below, above], marker="o", linestyle="-" if is_line else "", capsize=3, label=label)
    panel.grid(alpha=0.3)


def _scale(panel: Axes, values: Sequence[float | str]) -> None:
    """Use a logarithmic scale for widely spread values, and put ticks at the values themselves if there are few."""
    xs = [x for x in values if isinstance(x, int | float)]
    if not xs or len(xs) < len(values):
        return
    positive = [x for x in xs if x > 0]
    is_wide = bool(positive) and min(xs) >= 0 and max(positive) >= WIDE * min(positive)
    if is_wide and len(positive) == len(xs):
        panel.set_xscale("log")
    elif is_wide:
        panel.set_xscale("symlog", linthresh=min(positive))
    distinct = sorted(set(xs))
    if len(distinct) <= MOST_TICKS:
        panel.xaxis.set_major_locator(FixedLocator(distinct))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticklabels([shown_value(x) for x in distinct])
    elif not is_wide:
        panel.xaxis.set_major_locator(MaxNLocator(5))
