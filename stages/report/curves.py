"""Figures about the results: reward against KL, over-optimisation, score distributions, and alignment tax."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from stages.metric_names import KL, SCORE_MEAN, is_monitor, is_reward, monitor_name, reward_name, source_of
from stages.report.figures import (
    LINE,
    PAPER,
    SERIES,
    SOFT,
    Canvas,
    Figure,
    Panel,
    drawn,
    drawn_text,
    interval_points,
    number_text,
    root_scale,
    short,
    smoothed,
)
from stages.report.run_folder import StepFolder, thinned
from stages.report.training import monitors
from stages.run_summary import BestOfPoint, Candidate, EvaluationFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE_ROWS = 12  # rows of the table next to a curve
Measured = tuple[float, float | None, float | None]  # a value and the ends of its interval, if it has one


def series_of(candidates: Sequence[str]) -> dict[str, int]:
    """The colour index of each candidate: grey for the first, the accent colour for the last, other colours for the rest."""
    if not candidates:
        return {}
    middle = list(candidates[1:-1])
    return {candidates[0]: 0, **{name: 2 + index % (len(SERIES) - 2) for index, name in enumerate(middle)}, candidates[-1]: 1}


# Reward against KL


def frontier(
    evaluation: EvaluationFile, colors: Mapping[str, int], ancestors: Collection[str] = (), trained: Mapping[str, StepFolder] | None = None
) -> Figure | None:
    """Mean score against KL to the reference, one panel per judge that gives scores: candidates with intervals, best-of-n as a curve.

    ``ancestors``: the models that the reference was made from. They are left out, because no training moved them away from the reference.

    ``trained``: candidate -> the PPO step of this run that made it. A thin line shows the iterations of this step if the judge scored them.

    Returns None if there is no reference, or if fewer than two candidates have a KL.
    """
    reference = evaluation.get("kl_reference")
    points = {
        name: row
        for name, row in evaluation["candidates"].items()
        if isinstance(row.get("kl"), int | float) and row.get("model") not in ancestors
    }
    if reference is None or len(points) < 2:
        return None
    digest = evaluation["candidates"][reference]["digest"]
    curves = {name: curve for name, curve in evaluation.get("best_of_n", {}).items() if evaluation["candidates"][name]["digest"] == digest}
    ways = {name: step for name, step in (trained or {}).items() if name in points}
    judges = [judge["name"] for judge in evaluation["judges"] if any(judge["name"] in row["scores"] for row in points.values())]
    panels, rows = [], []
    for judge in judges:
        panel, texts = _draw_frontier(judge, reference, points, curves, ways, colors)
        panels.append(panel)
        rows += texts
    has_way = any(_way(step, judge) is not None for step in ways.values() for judge in judges)
    best = " The line is best-of-n for several n, computed from one set of samples (unbiased; KL = log n - (n - 1)/n)." if curves else ""
    way = " Thin lines are PPO iterations on the training prompts, as running means." if has_way else ""
    caption = (
        f"Score against KL on held-out prompts: higher is better, left is closer to {reference}. Bars are 95 % intervals over "
        f"prompts. The axis shows the square root (Gao et al. 2023).{best}{way}"
    )
    legend = [(name, colors[name]) for name in points]
    return Figure("frontier", "Reward against KL", caption, panels, legend, ["judge", "candidate", "KL", "mean score"], rows)


def _draw_frontier(
    judge: str,
    reference: str,
    points: Mapping[str, Candidate],
    curves: Mapping[str, Sequence[BestOfPoint]],
    ways: Mapping[str, StepFolder],
    colors: Mapping[str, int],
) -> tuple[Panel, list[list[str]]]:
    """(the panel of one judge, its rows of the table: judge, candidate, KL, mean score)."""
    rows = []
    canvas = Canvas()
    known = {name: [point for point in curve if judge in point["scores"]] for name, curve in curves.items()}
    for name, curve in known.items():
        rows += _draw_best_of_n(canvas.axes, judge, name, curve, SERIES[colors[name]])
    for name, row in points.items():
        if judge in row["scores"] and name not in curves:
            rows.append(_draw_candidate(canvas.axes, judge, name, row, SERIES[colors[name]]))
    for name, step in ways.items():
        if (path := _way(step, judge)) is not None:
            canvas.axes.plot(*drawn(*path), color=SERIES[colors[name]], linewidth=1, alpha=0.7)
    canvas.axes.set_xlabel(f"KL to {reference}, nats per completion")
    canvas.axes.set_ylabel("mean score")
    canvas.axes.margins(x=0.08, y=0.15)
    root_scale(canvas.axes)
    numbered = [point for curve in known.values() for point in curve[1:]]
    _number(canvas.axes, [(point["n"], point["kl"], point["scores"][judge]["mean"]) for point in numbered])
    return canvas.panel(f"by {judge}"), rows


def _draw_best_of_n(axes: Axes, judge: str, name: str, curve: Sequence[BestOfPoint], color: str) -> list[list[str]]:
    """Draw the best-of-n curve of a candidate with its interval. Returns the rows of the table: judge, candidate, KL, mean score."""
    kls, scores = [point["kl"] for point in curve], [point["scores"][judge] for point in curve]
    means = [score["mean"] for score in scores]
    # Without an interval (one prompt), the band has no width.
    lows = [score["mean"] if score["ci_low"] is None else score["ci_low"] for score in scores]
    highs = [score["mean"] if score["ci_high"] is None else score["ci_high"] for score in scores]
    axes.fill_between(kls, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.plot(kls, means, "-", color=color)
    axes.plot(kls, means, "o", color=color, markersize=3)
    texts = [_mean_text(score["mean"], score.get("ci_low"), score.get("ci_high")) for score in scores]
    return [[judge, f"best of {point['n']} ({name})", f"{point['kl']:.2f}", text] for point, text in zip(curve, texts, strict=True)]


def _draw_candidate(axes: Axes, judge: str, name: str, row: Candidate, color: str) -> list[str]:
    """Draw a candidate as a point with its intervals. Returns its row of the table: judge, candidate, KL, mean score."""
    low, high = row.get("score_intervals", {}).get(judge, (None, None))
    mean = row["scores"][judge]
    interval_points(axes, [row["kl"]], [mean], [mean if low is None else low], [mean if high is None else high], color, size=7)
    if row.get("kl_interval") and None not in row["kl_interval"]:
        axes.hlines([mean], row["kl_interval"][0], row["kl_interval"][1], color=color, linewidth=1.4)
    return [judge, name, f"{row['kl']:.2f}", _mean_text(mean, low, high)]


def _mean_text(mean: float, low: float | None, high: float | None) -> str:
    """A mean with its interval, if there is one."""
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _number(axes: Axes, points: Sequence[tuple[int, float, float]]) -> None:
    """Write n next to the best-of-n points (n, KL, score). Numbers that would overlap are left out."""
    room, before = 0.045 * math.sqrt(axes.get_xlim()[1]), math.inf
    for number, kl, score in reversed(points):  # the largest n is always written
        if before - math.sqrt(kl) >= room:
            axes.annotate(f"{number}", (kl, score), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8, color=SOFT)
            before = math.sqrt(kl)


def _way(step: StepFolder, judge: str) -> tuple[list[float], list[float]] | None:
    """KL and a judge's mean score over the iterations of a PPO step, as running means. None if the judge did not score every iteration."""
    steps, kls = step.series(KL)
    for metric in (monitor_name(judge), reward_name(judge)):
        scored, values = step.series(metric)
        if len(values) > 1 and scored == steps:
            return smoothed(kls, 0.1), smoothed(values, 0.1)
    return None


def over_optimisation(step: StepFolder, evaluation: EvaluationFile | None = None) -> Figure | None:
    """The trained reward and every monitor of a PPO step against the square root of KL (Gao et al. 2023).

    With best-of-n if the evaluation has it. Returns None if the step has fewer than five iterations or no monitor.
    """
    kl_steps, kls = step.series(KL)
    if len(kls) < 5:
        return None
    trained = _rewards(step)
    names = {SCORE_MEAN: trained[0] if len(trained) == 1 else "trained reward"}
    names |= {name: source_of(name) for name in monitors(step)}
    if len(names) < 2:
        return None
    roots = [math.sqrt(max(0.0, value)) for value in smoothed(kls, 0.1)]
    curves = list(evaluation.get("best_of_n", {}).values()) if evaluation is not None else []
    panels, rows = [], []
    has_best_of_n = False
    for metric, name in names.items():
        steps, values = step.series(metric)
        if steps != kl_steps:
            continue
        points = [[(math.sqrt(one["kl"]), one["scores"][name]["mean"]) for one in curve if name in one["scores"]] for curve in curves]
        has_best_of_n = has_best_of_n or any(points)
        smooth = smoothed(values, 0.1)
        title = f"{name}, {'monitor' if is_monitor(metric) else 'trained on'}"
        panels.append(_draw_over_optimisation(title, roots, values, smooth, points))
        for index in thinned(range(len(roots)), TABLE_ROWS):
            rows.append([name, f"{steps[index]:.0f}", f"{roots[index]:.2f}", f"{smooth[index]:.3f}"])
    caption = (
        "PPO on training prompts: dots are iterations, lines are running means, the ring is their maximum. Where the trained reward "
        f"still rises while a monitor falls, the policy exploits its reward model.{drawn_text(len(kls))}"
    )
    legend = [(f"{step.name}, by iteration", 1)]
    if has_best_of_n:
        legend.append(("best-of-n on held-out prompts", 0))
    headings = ["score", "iteration", "root of KL", "mean"]
    return Figure(f"over-optimisation-{step.name}", f"Over-optimisation ({step.name})", caption, panels, legend, headings, rows)


def _draw_over_optimisation(
    title: str, roots: list[float], values: list[float], smooth: list[float], best_of_n: Sequence[Sequence[tuple[float, float]]]
) -> Panel:
    """The panel of one score by iteration. ``roots``: of the KL. ``best_of_n``: (root of the KL, mean score) of each curve."""
    canvas = Canvas(4.9, 2.6)
    for points in best_of_n:
        if points:
            canvas.axes.plot(*zip(*points, strict=True), "--o", color=SERIES[0], markersize=3, linewidth=1.2)
    at, rewards, line = drawn(roots, values, smooth)
    canvas.axes.plot(at, rewards, ".", color=SERIES[1], markersize=2.5, alpha=0.5)
    canvas.axes.plot(at, line, color=SERIES[1])
    best = max(range(len(smooth)), key=lambda index: smooth[index])
    canvas.axes.plot([roots[best]], [smooth[best]], "o", color=SERIES[1], markersize=6, markeredgecolor=PAPER)
    canvas.axes.set_xlabel("square root of the KL to the reference (nats)")
    canvas.axes.set_ylabel("mean score")
    return canvas.panel(title)


def _rewards(step: StepFolder) -> list[str]:
    """Names of the reward sources that the policy was trained on."""
    return sorted({source_of(name) for row in step.log[:1] for name in row if is_reward(name)})


# Scores


def distributions(step: StepFolder, colors: Mapping[str, int]) -> Figure | None:
    """Score distribution of each candidate, one panel per judge that gives scores: the share of completions at or above a score."""
    evaluation = step.evaluation
    if evaluation is None:
        return None
    panels, rows = [], []
    for judge in [entry["name"] for entry in evaluation.get("judges", [])]:
        scores = {
            name: sorted(line["scores"][judge][name] for line in step.completions if name in line["scores"].get(judge, {}))
            for name in evaluation["candidates"]
        }
        scores = {name: values for name, values in scores.items() if len(values) > 1}
        if not scores:
            continue
        canvas = Canvas()
        for name, values in scores.items():
            shares = [1 - index / len(values) for index in range(len(values))]
            canvas.axes.step(*drawn(values, shares), where="pre", color=SERIES[colors[name]], linewidth=2 if colors[name] == 1 else 1.4)
            quartiles = [values[round(share * (len(values) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
            rows.append([judge, name, *(f"{value:.3f}" for value in quartiles)])
        canvas.axes.set_ylim(0, 1.02)
        canvas.axes.set_xlabel(f"score by {judge}")
        canvas.axes.set_ylabel("share at or above the score")
        panels.append(canvas.panel(f"by {judge}"))
    if not panels:
        return None
    caption = "The share of a candidate's completions with at least this score. A line further right is better; a steeper line varies less."
    caption += drawn_text(len(step.completions))
    legend = [(name, colors[name]) for name in evaluation["candidates"]]
    headings = ["judge", "candidate", "lowest", "lower quartile", "median", "upper quartile", "highest"]
    return Figure("distributions", "Scores of all completions", caption, panels, legend, headings, rows)


# Alignment tax


def alignment_tax(evaluation: EvaluationFile, colors: Mapping[str, int]) -> Figure | None:
    """The price of alignment: held-out bits per byte and the recipe's tasks, for each candidate."""
    panels, rows = [], []
    for title, values, unit, chances in _abilities(evaluation["candidates"]):
        panel, texts = _draw_ability(title, values, unit, chances, colors)
        panels.append(panel)
        rows += texts
    if not panels:
        return None
    caption = (
        "Abilities that alignment may reduce. Compare with the first candidate, because fine-tuning has a cost, too. "
        "Dotted: the result of guessing."
    )
    return Figure("tax", "Alignment tax", caption, panels, [], ["measure", "candidate", "value", "interval"], rows, small=True)


def _abilities(candidates: Mapping[str, Candidate]) -> Iterator[tuple[str, dict[str, Measured], str, set[float]]]:
    """(title, value of each candidate, unit, results of guessing) of each measure that has a value."""
    bits: dict[str, Measured] = {
        name: (number, None, None) for name, row in candidates.items() if (number := row.get("bits_per_byte")) is not None
    }
    if len({candidates[name]["digest"] for name in bits}) > 1:
        yield "held-out text", bits, "bits per byte (less is better)", set()
    for task in dict.fromkeys(task for row in candidates.values() for task in row.get("tasks", {})):
        results = {name: row["tasks"][task] for name, row in candidates.items() if task in row.get("tasks", {})}
        values = {name: value for name, result in results.items() if (value := _task_value(result)) is not None}
        chances = {result["chance"] for result in results.values() if isinstance(result, dict) and result.get("chance") is not None}
        if values:
            yield task, values, "accuracy (more is better)", chances


def _draw_ability(
    title: str, values: Mapping[str, Measured], unit: str, chances: Iterable[float], colors: Mapping[str, int]
) -> tuple[Panel, list[list[str]]]:
    """(the panel of one measure, its rows of the table: measure, candidate, value, interval)."""
    rows = []
    canvas = Canvas(3.4, 0.55 + 0.3 * len(values) + 0.35)
    for chance in chances:
        canvas.axes.axvline(chance, color=LINE, linewidth=1.6, linestyle=":")
    names = list(values)[::-1]
    for height, name in enumerate(names):
        value, low, high = values[name]
        color = SERIES[colors[name]]
        if low is not None and high is not None:
            canvas.axes.hlines([height], [low], [high], color=color, linewidth=1.4)
        canvas.axes.plot([value], [height], "o", color=color, markersize=7, markeredgecolor=PAPER)
        rows.append([title, name, number_text(value), f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""])
    canvas.axes.set_yticks(range(len(names)), [short(name) for name in names])
    canvas.axes.set_ylim(-0.6, len(names) - 0.4)
    canvas.axes.margins(x=0.12)
    canvas.axes.set_xlabel(unit)
    return canvas.panel(title), rows


def _task_value(task: object) -> Measured | None:
    """(value, low, high) of a task's result, which is a number or a dict with a number. None if it has no number."""
    if isinstance(task, int | float):
        return float(task), None, None
    if not isinstance(task, dict):
        return None
    for key in ("accuracy", "score", "value", "exact_match", "f1"):
        if isinstance(task.get(key), int | float):
            return float(task[key]), task.get("ci_low"), task.get("ci_high")
    return None
