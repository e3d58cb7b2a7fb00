"""The figures of a run: what was trained and how, how rewards pay for KL, how scores spread, how far a reward model can be trusted."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stages.report.figures import LINE, PAPER, SERIES, SOFT, Canvas, Figure, interval_points, number_text, smoothed
from stages.report.run_folder import RunFolder, StepFolder, thinned

Row = dict[str, Any]
TABLE_ROWS = 12  # rows of the table beside a curve


def series_of(candidates: Sequence[str]) -> dict[str, int]:
    """The colour number of each candidate: grey for the first, the accent for the last, others in between."""
    if not candidates:
        return {}
    middle = list(candidates[1:-1])
    return {candidates[0]: 0, **{name: 2 + place % (len(SERIES) - 2) for place, name in enumerate(middle)}, candidates[-1]: 1}


# Reward against KL


def frontier(evaluation: Row, colors: Mapping[str, int], ancestors: Collection[str] = ()) -> Figure | None:
    """Mean score against KL to the reference, by each judge that scores: candidates with intervals, and best-of-n as a curve.

    ``ancestors``: models that the reference was made from. They did not spend KL to get where they are, and are left out.
    """
    reference = evaluation.get("kl_reference")
    points = {
        name: row
        for name, row in evaluation["candidates"].items()
        if isinstance(row.get("kl"), int | float) and row.get("model") not in ancestors
    }
    if reference is None or len(points) < 2:
        return None
    judges = [judge["name"] for judge in evaluation["judges"] if any(judge["name"] in row["scores"] for row in points.values())]
    digest = evaluation["candidates"][reference]["digest"]
    curves = {name: curve for name, curve in evaluation.get("best_of_n", {}).items() if evaluation["candidates"][name]["digest"] == digest}
    panels, rows = [], []
    for judge in judges:
        canvas = Canvas()
        axes = canvas.axes
        for name, curve in curves.items():
            known = [point for point in curve if judge in point["scores"]]
            kls, means = [point["kl"] for point in known], [point["scores"][judge]["mean"] for point in known]
            axes.fill_between(
                kls, [point["scores"][judge]["ci_low"] for point in known], [point["scores"][judge]["ci_high"] for point in known],
                color=SERIES[colors[name]], alpha=0.15, linewidth=0,
            )  # fmt: skip
            axes.plot(kls, means, "-", color=SERIES[colors[name]])
            axes.plot(kls, means, "o", color=SERIES[colors[name]], markersize=3)
            for point in known[1:]:
                axes.annotate(
                    f"{point['n']}", (point["kl"], point["scores"][judge]["mean"]), xytext=(0, 6), textcoords="offset points",
                    ha="center", fontsize=8, color=SOFT,
                )  # fmt: skip
            rows += [[judge, f"best of {point['n']} ({name})", f"{point['kl']:.2f}", _mean_text(point["scores"][judge])] for point in known]
        for name, row in points.items():
            if judge not in row["scores"] or name in curves:
                continue
            low, high = row.get("score_intervals", {}).get(judge, (None, None))
            mean, color = row["scores"][judge], SERIES[colors[name]]
            interval_points(axes, [row["kl"]], [mean], [mean if low is None else low], [mean if high is None else high], color, size=7)
            if row.get("kl_interval") and None not in row["kl_interval"]:
                axes.hlines([mean], row["kl_interval"][0], row["kl_interval"][1], color=color, linewidth=1.4)
            rows.append([judge, name, f"{row['kl']:.2f}", _mean_text({"mean": mean, "ci_low": low, "ci_high": high})])
        axes.set_xlabel(f"KL to {reference}, nats per completion")
        axes.set_ylabel("mean score")
        axes.margins(x=0.12, y=0.15)
        panels.append(canvas.panel(f"by {judge}"))
    best = " The line is best-of-n, with its n, from one set of samples (unbiased; KL log n - (n - 1)/n)." if curves else ""
    caption = (
        f"What each way of spending KL buys on held-out prompts: up is better, left is nearer to {reference}. Bars are 95 % intervals over "
        f"prompts.{best}"
    )
    legend = [(name, colors[name]) for name in points]
    return Figure("frontier", "Reward for KL", caption, panels, legend, ["judge", "candidate", "KL", "mean score"], rows)


def _mean_text(point: Mapping[str, Any]) -> str:
    if point.get("ci_low") is None or point.get("ci_high") is None:
        return f"{point['mean']:.3f}"
    return f"{point['mean']:.3f} ({point['ci_low']:.3f} to {point['ci_high']:.3f})"


def over_optimisation(step: StepFolder, evaluation: Row | None = None) -> Figure | None:
    """The trained reward and every monitor of a PPO step against the square root of KL (Gao et al. 2023), with best-of-n where it is."""
    kl_steps, kls = step.series("policy/kl")
    if len(kls) < 5:
        return None
    trained = _rewards(step)
    names = {"rewards/score_mean": trained[0] if len(trained) == 1 else "trained reward"}
    names |= {name: name.removeprefix("monitors/") for name in _monitors(step)}
    if len(names) < 2:
        return None
    roots = [math.sqrt(max(0.0, value)) for value in smoothed(kls, 0.1)]
    panels, rows = [], []
    has_best_of_n = False
    for metric, name in names.items():
        steps, values = step.series(metric)
        if steps != kl_steps:
            continue
        smooth = smoothed(values, 0.1)
        canvas = Canvas(4.9, 2.6)
        for _, curve in (evaluation or {}).get("best_of_n", {}).items():
            points = [(math.sqrt(point["kl"]), point["scores"][name]["mean"]) for point in curve if name in point["scores"]]
            if points:
                has_best_of_n = True
                canvas.axes.plot(*zip(*points, strict=True), "--o", color=SERIES[0], markersize=3, linewidth=1.2)
        canvas.axes.plot(roots, values, ".", color=SERIES[1], markersize=2.5, alpha=0.5)
        canvas.axes.plot(roots, smooth, color=SERIES[1])
        best = max(range(len(smooth)), key=lambda place, smooth=smooth: smooth[place])  # type: ignore[misc]
        canvas.axes.plot([roots[best]], [smooth[best]], "o", color=SERIES[1], markersize=6, markeredgecolor=PAPER)
        canvas.axes.set_xlabel("square root of the KL to the reference (nats)")
        canvas.axes.set_ylabel("mean score")
        panels.append(canvas.panel(f"{name}, {'trained on' if metric.startswith('rewards/') else 'only watched'}"))
        for place in thinned(range(len(roots)), TABLE_ROWS):
            rows.append([name, f"{steps[place]:.0f}", f"{roots[place]:.2f}", f"{smooth[place]:.3f}"])
    caption = (
        "PPO's iterations on training prompts: dots are iterations, lines running means, the ring is their best. Where the trained reward "
        "still rises and a judge that was only watched has turned down, the policy exploits its reward model."
    )
    legend = [(f"{step.name}, iteration by iteration", 1)]
    if has_best_of_n:
        legend.append(("best-of-n on held-out prompts", 0))
    headings = ["score", "iteration", "root of KL", "mean"]
    return Figure(f"over-optimisation-{step.name}", f"Over-optimisation ({step.name})", caption, panels, legend, headings, rows)


def _rewards(step: StepFolder) -> list[str]:
    """Names of the reward sources that were trained on."""
    own = ("score_mean", "score_std", "total_mean")
    return sorted({name.removeprefix("rewards/") for row in step.log[:1] for name in row if name.startswith("rewards/")} - set(own))


# Training

STAGE_CURVES = {  # stage -> metric, title
    "pretraining": [("train/loss", "training loss (nats per token)")],
    "sft": [("train/loss", "training loss (nats per token)")],
    "reward_model": [("train/loss", "ranking loss (nats)")],
    "sentiment": [("train/loss", "training loss (nats)")],
    "dpo": [("train/loss", "DPO loss (nats)"), ("train/rewards/margins", "margin of implicit rewards")],
    "ppo": [
        ("rewards/score_mean", "score"),
        ("policy/kl", "KL to the reference (nats)"),
        ("policy/entropy", "entropy (nats per token)"),
        ("responses/length_mean", "length (tokens)"),
        ("value/explained_variance", "explained variance of values"),
        ("policy/clip_fraction", "clipped share of ratios"),
    ],
}
HELDOUT = {  # stage -> (key before, key after, title)
    "pretraining": ("heldout_perplexity_before", "heldout_perplexity_after", "held-out perplexity"),
    "sft": ("heldout_loss_before", "heldout_loss_after", "held-out loss"),
    "reward_model": ("heldout_accuracy_before", "heldout_accuracy", "held-out accuracy"),
    "sentiment": ("heldout_accuracy_before", "heldout_accuracy", "held-out accuracy"),
    "dpo": ("", "heldout_accuracy", "held-out accuracy"),
}


def training(step: StepFolder) -> Figure | None:
    """The curves of one training step, small multiples."""
    panels, rows = [], []
    wanted = list(STAGE_CURVES.get(step.stage, [("train/loss", "training loss")]))
    if step.stage == "ppo":
        wanted[1:1] = [(name, f"monitor: {name.removeprefix('monitors/')}") for name in _monitors(step)]
    for metric, title in wanted:
        steps, values = step.series(metric)
        if len(values) < 2:
            continue
        canvas = Canvas(3.2, 2.1)
        canvas.axes.plot(steps, values, color=SERIES[1], linewidth=0.7, alpha=0.45)
        canvas.axes.plot(steps, smoothed(values), color=SERIES[1])
        if metric.startswith("train/loss") and 0 < 50 * min(values) < max(values):
            canvas.axes.set_yscale("log")
        canvas.axes.set_xlabel("iteration" if step.stage == "ppo" else "optimizer step")
        panels.append(canvas.panel(title))
        rows += [[title, f"{at:.0f}", number_text(value)] for at, value in thinned(list(zip(steps, values, strict=True)), 6)]
    if not panels:
        return None
    return Figure(
        f"training-{step.name}", f"{step.name} ({step.stage})", heldout_text(step), panels, [], ["curve", "step", "value"], rows, small=True
    )


def _monitors(step: StepFolder) -> list[str]:
    return sorted({name for row in step.log for name in row if name.startswith("monitors/")})


def heldout_text(step: StepFolder) -> str:
    """The step's held-out number before and after, in words."""
    if step.stage not in HELDOUT:
        if step.stage == "ppo" and "score_mean_first" in step.metrics:
            metrics = step.metrics
            return (
                f"Score {metrics['score_mean_first']:.3f} to {metrics['score_mean_last']:.3f} (first and last tenth), "
                f"KL {metrics['kl_last']:.2f} nats at the end, {metrics['episodes']:,} episodes. Thick lines are running means."
            )
        return ""
    before, after, title = HELDOUT[step.stage]
    if after not in step.metrics:
        return ""
    start = f"{number_text(float(step.metrics[before]))} to " if before in step.metrics else ""
    return f"{title[0].upper()}{title[1:]} {start}{number_text(float(step.metrics[after]))}."


# Scores


def distributions(step: StepFolder, colors: Mapping[str, int]) -> Figure | None:
    """How the scores of each candidate spread, by each judge that scores: the share of completions at or above a score."""
    evaluation = step.evaluation or {}
    panels, rows = [], []
    for judge in [entry["name"] for entry in evaluation.get("judges", [])]:
        found = {
            name: sorted(line["scores"][judge][name] for line in step.completions if name in line["scores"].get(judge, {}))
            for name in evaluation["candidates"]
        }
        found = {name: values for name, values in found.items() if len(values) > 1}
        if not found:
            continue
        canvas = Canvas()
        for name, values in found.items():
            shares = [1 - place / len(values) for place in range(len(values))]
            canvas.axes.step(values, shares, where="pre", color=SERIES[colors[name]], linewidth=2 if colors[name] == 1 else 1.4)
            quartiles = [values[round(share * (len(values) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
            rows.append([judge, name, *(f"{value:.3f}" for value in quartiles)])
        canvas.axes.set_ylim(0, 1.02)
        canvas.axes.set_xlabel(f"score by {judge}")
        canvas.axes.set_ylabel("share at or above")
        panels.append(canvas.panel(f"by {judge}"))
    if not panels:
        return None
    caption = "The share of a candidate's completions that score at least so much: a line further right is better, a steep one less varied."
    legend = [(name, colors[name]) for name in evaluation["candidates"]]
    headings = ["judge", "candidate", "lowest", "lower quartile", "median", "upper quartile", "highest"]
    return Figure("distributions", "Scores of every completion", caption, panels, legend, headings, rows)


# Reward models and classifiers


def calibration(step: StepFolder) -> Figure | None:
    """Is a reward model (or classifier) as sure as it is right? Reliability, and accuracy by margin."""
    bins = step.metrics.get("heldout_calibration") or step.metrics.get("calibration")
    if not bins:
        return None
    panels, rows = [], []
    canvas = Canvas()
    axes = canvas.axes
    low = 0.5 if step.stage == "reward_model" else 0.0
    axes.plot([low, 1], [low, 1], color=LINE, linewidth=1)
    intervals = [_wilson(item["accuracy"], item["count"]) for item in bins]
    interval_points(
        axes, [item["confidence"] for item in bins], [item["accuracy"] for item in bins],
        [end[0] for end in intervals], [end[1] for end in intervals], SERIES[1],
    )  # fmt: skip
    axes.set_xlabel("how sure it is")
    axes.set_ylabel("how often it is right")
    error = step.metrics.get("heldout_calibration_error")
    panels.append(canvas.panel("reliability" + (f" (calibration error {error:.3f})" if error is not None else "")))
    rows += [["sure", f"{item['confidence']:.2f}", f"{item['accuracy']:.3f}", f"{item['count']:,}"] for item in bins]
    splits = []  # title, x axis, [(name, accuracy and pairs)]
    margins = step.metrics.get("heldout_accuracy_by_margin") or []
    edges = [f"{item['from']:g} to {item['to']:g}" if item["to"] is not None else f"above {item['from']:g}" for item in margins]
    splits.append(("accuracy by margin", "difference of the two scores", list(zip(edges, margins, strict=True))))
    lengths = step.metrics.get("heldout_accuracy_by_length") or []
    splits.append(("accuracy by length", "the better completion is", [(item["better_is"], item) for item in lengths]))
    for column, items in (step.metrics.get("heldout_accuracy_by_group") or {}).items():
        splits.append((f"accuracy by {column}", column, [(str(item["value"]), item) for item in items[:12]]))
    for split, label, named in splits:
        if not named:
            continue
        canvas = Canvas()
        intervals = [_wilson(item["accuracy"], item["pairs"]) for _, item in named]
        canvas.axes.axhline(0.5, color=LINE, linewidth=1)
        interval_points(
            canvas.axes, list(range(len(named))), [item["accuracy"] for _, item in named],
            [end[0] for end in intervals], [end[1] for end in intervals], SERIES[1],
        )  # fmt: skip
        canvas.axes.set_xticks(range(len(named)), [name for name, _ in named])
        canvas.axes.set_xlabel(label)
        canvas.axes.set_ylabel("accuracy")
        panels.append(canvas.panel(split))
        rows += [[split, name, f"{item['accuracy']:.3f}", f"{item['pairs']:,}"] for name, item in named]
    pairs = ", which take pairs of one prompt as independent" if step.stage == "reward_model" else ""
    caption = (
        f"Held-out data. On the diagonal it is as sure as it is right; below, it is too sure. Bars are Wilson's 95 % intervals{pairs}."
    )
    return Figure(
        f"calibration-{step.name}", f"Can {step.name} be trusted?", caption, panels, [], ["", "value", "accuracy", "count"], rows
    )


def _wilson(share: float, number: int) -> tuple[float, float]:
    from stages.numerics.intervals import wilson_interval

    return wilson_interval(share * number, number)


# Alignment tax


def alignment_tax(evaluation: Row, colors: Mapping[str, int]) -> Figure | None:
    """What alignment costs elsewhere: held-out perplexity and the tasks of the recipe, candidate by candidate."""
    candidates = evaluation["candidates"]
    panels, rows = [], []
    measures: list[tuple[str, dict[str, tuple[float, Any, Any]], str]] = []
    bits = {name: (row["bits_per_byte"], None, None) for name, row in candidates.items() if row.get("bits_per_byte") is not None}
    if len(set(candidates[name]["digest"] for name in bits)) > 1:
        measures.append(("held-out text", bits, "bits per byte (less is better)"))
    for task in dict.fromkeys(task for row in candidates.values() for task in row.get("tasks", {})):
        found = {name: _task_value(row["tasks"][task]) for name, row in candidates.items() if task in row.get("tasks", {})}
        measures.append((task, {name: value for name, value in found.items() if value is not None}, "accuracy (more is better)"))
    for title, values, unit in measures:
        if not values:
            continue
        canvas = Canvas(3.4, 0.55 + 0.3 * len(values) + 0.35)
        chances = {row["tasks"][title].get("chance") for row in candidates.values() if isinstance(row.get("tasks", {}).get(title), dict)}
        for chance in chances - {None}:
            canvas.axes.axvline(chance, color=LINE, linewidth=1.6, linestyle=":")
        names = list(values)[::-1]
        for place, name in enumerate(names):
            value, low, high = values[name]
            color = SERIES[colors[name]]
            if low is not None and high is not None:
                canvas.axes.hlines([place], [low], [high], color=color, linewidth=1.4)
            canvas.axes.plot([value], [place], "o", color=color, markersize=7, markeredgecolor=PAPER)
            rows.append([title, name, number_text(value), f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""])
        canvas.axes.set_yticks(range(len(names)), names)
        canvas.axes.set_ylim(-0.6, len(names) - 0.4)
        canvas.axes.margins(x=0.12)
        canvas.axes.set_xlabel(unit)
        panels.append(canvas.panel(title))
    if not panels:
        return None
    caption = (
        "What candidates still can do beside what they were aligned to. The first is the measure: fine-tuning has its price, too. "
        "Dotted: what guessing would give."
    )
    return Figure("tax", "Alignment tax", caption, panels, [], ["measure", "candidate", "value", "interval"], rows, small=True)


def _task_value(task: Any) -> tuple[float, Any, Any] | None:
    """(value, low, high) of a task's result, a number or a block with one."""
    if isinstance(task, int | float):
        return float(task), None, None
    if not isinstance(task, dict):
        return None
    for key in ("accuracy", "score", "value", "exact_match", "f1"):
        if isinstance(task.get(key), int | float):
            return float(task[key]), task.get("ci_low"), task.get("ci_high")
    return None


# Data efficiency

EXAMPLES = {"sft": "demonstrations", "reward_model": "comparisons", "sentiment": "reviews", "dpo": "pairs"}


def data_efficiency(runs: Sequence[RunFolder]) -> Figure | None:
    """Held-out results against the number of training examples, a line per starting model, where steps differ in both or either."""
    panels, rows = [], []
    legend: dict[str, int] = {}
    for stage, key in EXAMPLES.items():
        points: dict[str, list[tuple[float, float]]] = {}
        _, after, title = HELDOUT[stage]
        for run in runs:
            for step in run.steps:
                if step.stage == stage and isinstance(step.metrics.get(key), int | float) and after in step.metrics:
                    points.setdefault(_start_of(step), []).append((float(step.metrics[key]), float(step.metrics[after])))
        if len({count for found in points.values() for count, _ in found}) < 3:
            continue
        canvas = Canvas()
        for name, found in points.items():
            color = legend.setdefault(name, 1 + len(legend))
            found = sorted(set(found))
            canvas.axes.plot(*zip(*found, strict=True), "-o", color=SERIES[color % len(SERIES)], markersize=4)
            rows += [[stage, name, f"{count:,.0f}", number_text(value)] for count, value in found]
        canvas.axes.set_xscale("log")
        canvas.axes.set_xlabel(f"training {key}")
        canvas.axes.set_ylabel(title)
        panels.append(canvas.panel(f"{stage}: {title}"))
    if not panels:
        return None
    caption = "How many examples it takes, by the model that training started from."
    return Figure("efficiency", "Data efficiency", caption, panels, list(legend.items()), ["stage", "start", "examples", "held-out"], rows)


def _start_of(step: StepFolder) -> str:
    model = step.config.get("model")
    ref = model.get("ref") if isinstance(model, dict) else model
    return f"from {ref}" if ref else "from random weights"


# Several runs


def overlay(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Figure]:
    """The PPO curves of all runs in common axes, by the name of the step."""
    figures = []
    for name in dict.fromkeys(step.name for run in runs for step in run.steps if step.stage == "ppo"):
        panels, rows, drawn = [], [], set()
        for metric, title in STAGE_CURVES["ppo"][:4]:
            canvas, lines = Canvas(3.2, 2.1), 0
            for number, (run, shown) in enumerate(zip(runs, names, strict=True)):
                step = run.step(name)
                steps, values = step.series(metric) if step is not None else ([], [])
                if len(values) < 2:
                    continue
                canvas.axes.plot(steps, smoothed(values), color=SERIES[number % len(SERIES)], linewidth=1.4)
                rows.append([title, shown, number_text(values[0]), number_text(values[-1])])
                drawn.add(number)
                lines += 1
            canvas.axes.set_xlabel("iteration")
            panel = canvas.panel(title)
            if lines:
                panels.append(panel)
        if panels:
            legend = [(names[number], number % len(SERIES)) for number in sorted(drawn)]
            headings = ["curve", "run", "first", "last"]
            caption = "Running means of each run."
            figures.append(Figure(f"overlay-{name}", f"{name} (ppo)", caption, panels, legend, headings, rows, small=True))
    return figures
