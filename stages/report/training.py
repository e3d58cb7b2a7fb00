"""Figures about training: the curves of each stage, the calibration of reward models, data efficiency, and several runs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages import metric_names
from stages.report.figures import (
    LINE,
    SERIES,
    Canvas,
    Figure,
    Panel,
    drawn,
    drawn_text,
    interval_points,
    log_scale,
    number_text,
    short,
    smoothed,
)
from stages.report.run_folder import Row, RunFolder, StepFolder, thinned
from stages.stats.intervals import wilson_interval

STAGE_CURVES = {  # stage -> [(metric, title)]
    "pretraining": [(metric_names.TRAIN_LOSS, "training loss (nats per token)")],
    "sft": [(metric_names.TRAIN_LOSS, "training loss (nats per token)")],
    "reward_model": [(metric_names.TRAIN_LOSS, "ranking loss (nats)")],
    "sentiment": [(metric_names.TRAIN_LOSS, "training loss (nats)")],
    "dpo": [(metric_names.TRAIN_LOSS, "DPO loss (nats)"), (metric_names.TRAIN_MARGINS, "margin of implicit rewards")],
    "ppo": [
        (metric_names.SCORE_MEAN, "score"),
        (metric_names.KL, "KL to the reference (nats)"),
        (metric_names.ENTROPY, "entropy (nats per token)"),
        (metric_names.LENGTH_MEAN, "length (tokens)"),
        (metric_names.EXPLAINED_VARIANCE, "explained variance of values"),
        (metric_names.CLIP_FRACTION, "clipped share of ratios"),
    ],
}
HELDOUT = {  # stage -> (metric before, metric after, title)
    "pretraining": (metric_names.HELDOUT_PERPLEXITY_BEFORE, metric_names.HELDOUT_PERPLEXITY_AFTER, "held-out perplexity"),
    "sft": (metric_names.HELDOUT_LOSS_BEFORE, metric_names.HELDOUT_LOSS_AFTER, "held-out loss"),
    "reward_model": (metric_names.HELDOUT_ACCURACY_BEFORE, metric_names.HELDOUT_ACCURACY, "held-out accuracy"),
    "sentiment": (metric_names.HELDOUT_ACCURACY_BEFORE, metric_names.HELDOUT_ACCURACY, "held-out accuracy"),
    "dpo": ("", metric_names.HELDOUT_ACCURACY, "held-out accuracy"),
}
MOST_GROUPS = 12
"""Maximum number of values of a column in the figure that splits accuracy by it."""


def training(step: StepFolder) -> Figure | None:
    """The curves of one training step as small multiples. None if it has no curves."""
    panels, rows, longest = [], [], 0
    wanted = list(STAGE_CURVES.get(step.stage, [(metric_names.TRAIN_LOSS, "training loss")]))
    seeds = _seed_losses(step)
    wanted += [(metric, f"{wanted[0][1]}, seed {seed}") for metric, seed in seeds.items()]
    if step.stage == "ppo":
        wanted[1:1] = [(name, f"monitor: {metric_names.source_of(name)}") for name in monitors(step)]
    for metric, title in wanted:
        steps, values = step.series(metric)
        if len(values) < 2:
            continue
        canvas = Canvas(3.2, 2.1)
        at, points, smooth = drawn(steps, values, smoothed(values))
        canvas.axes.plot(at, points, color=SERIES[1], linewidth=0.7, alpha=0.45)
        canvas.axes.plot(at, smooth, color=SERIES[1])
        longest = max(longest, len(values))
        if metric in (metric_names.TRAIN_LOSS, *seeds) and 0 < 50 * min(values) < max(values):
            log_scale(canvas.axes, "y")
        canvas.axes.set_xlabel("iteration" if step.stage == "ppo" else "optimizer step")
        panels.append(canvas.panel(title))
        rows += [
            [title, f"{step_number:.0f}", number_text(value)] for step_number, value in thinned(list(zip(steps, values, strict=True)), 6)
        ]
    if not panels:
        return None
    return Figure(
        f"training-{step.name}",
        f"{step.name} ({step.stage})",
        heldout_text(step) + drawn_text(longest),
        panels,
        [],
        ["curve", "step", "value"],
        rows,
        small=True,
    )


def _seed_losses(step: StepFolder) -> dict[str, str]:
    """The training losses of a reward model that was trained with several seeds: metric -> seed."""
    logged = dict.fromkeys(name for row in step.log for name in row)
    return {name: seed for name in logged if (seed := metric_names.seed_of_loss(name)) is not None}


def monitors(step: StepFolder) -> list[str]:
    return sorted({name for row in step.log for name in row if metric_names.is_monitor(name)})


def heldout_text(step: StepFolder) -> str:
    """A sentence with the step's held-out metric before and after training. For PPO: scores, KL and episodes."""
    if step.stage not in HELDOUT:
        first, last = (name(metric_names.SCORE_MEAN) for name in (metric_names.first_tenth, metric_names.last_tenth))
        if step.stage == "ppo" and first in step.metrics:
            metrics = step.metrics
            return (
                f"Score {metrics[first]:.3f} to {metrics[last]:.3f} (first and last tenth), "
                f"KL {metrics[metric_names.last_tenth(metric_names.KL)]:.2f} nats at the end, "
                f"{metrics[metric_names.NUM_EPISODES]:,} episodes. Thick lines are running means."
            )
        return ""
    before, after, title = HELDOUT[step.stage]
    if after not in step.metrics:
        return ""
    start = f"{number_text(float(step.metrics[before]))} to " if before in step.metrics else ""
    return f"{title[0].upper()}{title[1:]} {start}{number_text(float(step.metrics[after]))}.{_beside_text(step)}"


def _beside_text(step: StepFolder) -> str:
    """A sentence with the accuracy of other rewards on the same held-out comparisons. Empty if none was measured."""
    others = step.metrics.get(metric_names.HELDOUT_BESIDE) or {}
    if not others:
        return ""
    shown = [f"{name} {one['accuracy']:.3f} (95 %: {one['ci_low']:.3f} to {one['ci_high']:.3f})" for name, one in others.items()]
    return f" On the same comparisons: {', '.join(shown)}."


# Reward models and classifiers


def calibration(step: StepFolder) -> Figure | None:
    """Calibration of a reward model or classifier: reliability, and accuracy by margin, length and group.

    Returns None if the step did not measure calibration.
    """
    bins = step.metrics.get(metric_names.HELDOUT_CALIBRATION) or step.metrics.get("calibration")
    if not bins:
        return None
    panels = [_reliability(step, bins)]
    rows = [["sure", f"{item['confidence']:.2f}", f"{item['accuracy']:.3f}", f"{item['count']:,}"] for item in bins]
    for split in _splits(step):
        panels.append(_accuracy_panel(split))
        rows += [[split.title, name, f"{item['accuracy']:.3f}", f"{item['pairs']:,}"] for name, item in split.parts]
    pairs = ", which treat pairs of one prompt as independent" if step.stage == "reward_model" else ""
    caption = (
        "Held-out data. On the diagonal, confidence equals accuracy; below it, the model is overconfident. Bars are Wilson's 95 % "
        f"intervals{pairs}."
    )
    return Figure(f"calibration-{step.name}", f"Calibration of {step.name}", caption, panels, [], ["", "value", "accuracy", "count"], rows)


def _reliability(step: StepFolder, bins: Sequence[Row]) -> Panel:
    """The accuracy by predicted probability, one point per bin, and the diagonal."""
    canvas = Canvas()
    low = 0.5 if step.stage == "reward_model" else 0.0
    canvas.axes.plot([low, 1], [low, 1], color=LINE, linewidth=1)
    _accuracies(canvas, [item["confidence"] for item in bins], [(item["accuracy"], item["count"]) for item in bins])
    canvas.axes.set_xlabel("predicted probability")
    error = step.metrics.get(metric_names.HELDOUT_CALIBRATION_ERROR)
    return canvas.panel("reliability" + (f" (calibration error {error:.3f})" if error is not None else ""))


@dataclass(frozen=True)
class _Split:
    """The held-out pairs divided into parts: (name of a part, its ``accuracy`` and number of ``pairs``)."""

    title: str
    label: str  # of the x axis
    parts: list[tuple[str, Row]]


def _splits(step: StepFolder) -> list[_Split]:
    """The divisions that the step measured: by margin, by length, and by each column of ``group_by``."""
    margins = step.metrics.get(metric_names.HELDOUT_ACCURACY_BY_MARGIN) or []
    edges = [f"{item['from']:g} to {item['to']:g}" if item["to"] is not None else f"above {item['from']:g}" for item in margins]
    lengths = step.metrics.get(metric_names.HELDOUT_ACCURACY_BY_LENGTH) or []
    splits = [
        _Split("accuracy by margin", "difference of the two scores", list(zip(edges, margins, strict=True))),
        _Split("accuracy by length", "the better completion is", [(item["better_is"], item) for item in lengths]),
    ]
    for column, items in (step.metrics.get(metric_names.HELDOUT_ACCURACY_BY_GROUP) or {}).items():
        shown = f" (the first {MOST_GROUPS} of {len(items):,} values)" if len(items) > MOST_GROUPS else ""
        parts = [(str(item["value"]), item) for item in items[:MOST_GROUPS]]
        splits.append(_Split(f"accuracy by {column}{shown}", column, parts))
    return [split for split in splits if split.parts]


def _accuracy_panel(split: _Split) -> Panel:
    canvas = Canvas()
    canvas.axes.axhline(0.5, color=LINE, linewidth=1)
    places = list(range(len(split.parts)))
    _accuracies(canvas, places, [(item["accuracy"], item["pairs"]) for _, item in split.parts])
    canvas.axes.set_xticks(places, [short(name, 60 // len(split.parts)) for name, _ in split.parts])
    canvas.axes.set_xlabel(split.label)
    return canvas.panel(split.title)


def _accuracies(canvas: Canvas, at: Sequence[float], measured: Sequence[tuple[float, int]]) -> None:
    """Draw accuracies with Wilson's 95 % intervals at the x values ``at``. ``measured``: (accuracy, number of trials)."""
    intervals = [wilson_interval(accuracy * trials, trials) for accuracy, trials in measured]
    lows, highs = [low for low, _ in intervals], [high for _, high in intervals]
    interval_points(canvas.axes, at, [accuracy for accuracy, _ in measured], lows, highs, SERIES[1])
    canvas.axes.set_ylabel("accuracy")


# Data efficiency

EXAMPLES = {
    "sft": metric_names.NUM_DEMONSTRATIONS,
    "reward_model": metric_names.NUM_COMPARISONS,
    "sentiment": metric_names.NUM_REVIEWS,
    "dpo": metric_names.NUM_PAIRS,
}


def data_efficiency(runs: Sequence[RunFolder]) -> Figure | None:
    """Held-out results against the number of training examples, one line per starting model.

    A stage needs at least three different numbers of examples. Returns None if no stage has them.
    """
    panels, rows = [], []
    legend: dict[str, int] = {}
    for stage, key in EXAMPLES.items():
        points: dict[str, list[tuple[float, float]]] = {}
        _, after, title = HELDOUT[stage]
        for run in runs:
            for step in run.steps:
                if step.stage == stage and isinstance(step.metrics.get(key), int | float) and after in step.metrics:
                    points.setdefault(_start_of(step), []).append((float(step.metrics[key]), float(step.metrics[after])))
        if len({count for measured in points.values() for count, _ in measured}) < 3:
            continue
        canvas = Canvas()
        for name, measured in points.items():
            color = legend.setdefault(name, 1 + len(legend))
            measured = sorted(set(measured))
            canvas.axes.plot(*zip(*measured, strict=True), "-o", color=SERIES[color % len(SERIES)], markersize=4)
            rows += [[stage, name, f"{count:,.0f}", number_text(value)] for count, value in measured]
        log_scale(canvas.axes, "x")
        canvas.axes.set_xlabel(f"training {key}")
        canvas.axes.set_ylabel(title)
        panels.append(canvas.panel(f"{stage}: {title}"))
    if not panels:
        return None
    caption = "Result against the number of training examples, by starting model."
    return Figure("efficiency", "Data efficiency", caption, panels, list(legend.items()), ["stage", "start", "examples", "held-out"], rows)


def _start_of(step: StepFolder) -> str:
    model = step.config.get("model")
    ref = model.get("ref") if isinstance(model, dict) else model
    return f"from {ref}" if ref else "from random weights"


# Several runs


def overlay(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Figure]:
    """The PPO curves of all runs in shared axes. One figure per step name."""
    figures = []
    for name in dict.fromkeys(step.name for run in runs for step in run.steps if step.stage == "ppo"):
        panels, rows, longest = [], [], 0
        shown_runs = set()
        for metric, title in STAGE_CURVES["ppo"][:4]:
            canvas, lines = Canvas(3.2, 2.1), 0
            for number, (run, shown) in enumerate(zip(runs, names, strict=True)):
                step = run.step(name)
                steps, values = step.series(metric) if step is not None else ([], [])
                if len(values) < 2:
                    continue
                canvas.axes.plot(*drawn(steps, smoothed(values)), color=SERIES[number % len(SERIES)], linewidth=1.4)
                longest = max(longest, len(values))
                rows.append([title, shown, number_text(values[0]), number_text(values[-1])])
                shown_runs.add(number)
                lines += 1
            canvas.axes.set_xlabel("iteration")
            panel = canvas.panel(title)
            if lines:
                panels.append(panel)
        if panels:
            legend = [(names[number], number % len(SERIES)) for number in sorted(shown_runs)]
            headings = ["curve", "run", "first", "last"]
            caption = "Running means of each run." + drawn_text(longest)
            figures.append(Figure(f"overlay-{name}", f"{name} (ppo)", caption, panels, legend, headings, rows, small=True))
    return figures
