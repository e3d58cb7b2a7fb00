"""Several runs on one page: their results, the settings that differ, their scores side by side, and their curves in shared axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stages.errors import some_of
from stages.json_types import JsonObject, by_path
from stages.report import training
from stages.report.circumstances import command, facts, packages
from stages.report.figures import SERIES, Figure
from stages.report.page import Page, Written, fit_figures, render, shortened, write
from stages.report.run_folder import Row, RunFolder
from stages.run_summary import Candidate

LONGEST_CELL = 200
"""Maximum number of characters of a setting in the table of differences."""


def write_comparison(runs: Sequence[RunFolder], path: Path) -> Written:
    """Write the page that compares runs to ``path``. Raises StorageError if it cannot be written."""
    return write(render_comparison(runs), path)


def render_comparison(runs: Sequence[RunFolder]) -> Page:
    """The page that compares runs. It has no completions: they are on the page of each run."""
    names = run_names(runs)
    recipes = list(dict.fromkeys(run.summary["recipe"] for run in runs))
    figures: list[Figure | None] = [*training.overlay(runs, names), training.data_efficiency(runs)]
    differing = differing_settings(runs)
    blocks = [block for block in (_scores(runs, names), *_win_rates(runs, names)) if block is not None]
    values = {
        "title": f"{len(runs)} runs: {', '.join(recipes)}",
        "recipes": recipes,
        "headline": f"{len(runs)} runs of {' and '.join(recipes)}, side by side.",
        "lede": _lede(differing),
        "runs": [_run(run, name, number) for number, (run, name) in enumerate(zip(runs, names, strict=True))],
        "versions": _versions(runs, names),
        "settings": {
            "headings": ["step", "setting", *names],
            "rows": [[shortened(cell, LONGEST_CELL) for cell in row] for row in differing],
        },
        "scores": blocks,
    }

    def draw(groups: list[Row], left_out: str) -> str:
        return render(
            "comparison.html.jinja", **values, figures=[figure for group in groups for figure in group["figures"]], left_out=left_out
        )

    html, note = fit_figures([{"figures": [figure for figure in figures if figure is not None]}], draw)
    return Page(html, [note] if note else [])


def run_names(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its time, and its recipe if there are several recipes. If two names are equal, all names are full paths."""
    several = len({run.summary["recipe"] for run in runs}) > 1
    names = [f"{run.summary['recipe']} {run.path.name}" if several else run.path.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    return names


def _lede(differing: Sequence[Sequence[str]]) -> str:
    if not differing:
        return "Their settings are equal. Only hardware, data, code or the run's seed may differ."
    return f"They differ in {some_of([f'{row[0]}.{row[1]}' for row in differing])}."


def _run(run: RunFolder, name: str, number: int) -> Row:
    evaluation = run.evaluations[-1].evaluation if run.evaluations else None
    return {
        "name": name,
        "color": number % len(SERIES),
        "started": run.summary.get("started", "")[:16].replace("T", " "),
        "seconds": run.summary.get("wall_seconds"),
        "facts": facts(run),
        "finished": run.summary.get("finished", False),
        "verdict": evaluation["verdict"] if evaluation is not None else "No evaluation.",
        "command": command(run.summary),
    }


def _versions(runs: Sequence[RunFolder], names: Sequence[str]) -> list[tuple[str, str]]:
    """Each set of package versions, with the names of the runs that used it."""
    runs_by_versions: dict[str, list[str]] = {}
    for run, name in zip(runs, names, strict=True):
        runs_by_versions.setdefault(packages(run.summary.get("environment", {})), []).append(name)
    return [("all runs" if len(runs_by_versions) == 1 else ", ".join(those), versions) for versions, those in runs_by_versions.items()]


def differing_settings(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Rows (step, setting, value in each run) of the settings that differ. The seed of the run counts as a setting of each step."""
    rows = []
    for name in dict.fromkeys(step.name for run in runs for step in run.steps):
        steps = [run.step(name) for run in runs]
        if None in steps:
            rows.append([name, "the step itself", *("absent" if step is None else "present" for step in steps)])
            continue
        flat = []
        for run, step in zip(runs, steps, strict=True):
            flat.append({**by_path(step.config), "seed of the run": run.summary.get("seed")} if step is not None else {})
        for key in dict.fromkeys(key for settings in flat for key in settings):
            values = [_word(settings, key) for settings in flat]
            if len(set(values)) > 1:
                rows.append([name, key, *values])
    return rows


def _word(settings: JsonObject, key: str) -> str:
    return str(settings[key]) if key in settings else "absent"


def _scores(runs: Sequence[RunFolder], names: Sequence[str]) -> Row | None:
    """Mean score of each candidate by each judge. One column per run."""
    rows = []
    candidates = dict.fromkeys(name for run in runs for name in run.summary.get("candidates", {}))
    judges = dict.fromkeys(judge for run in runs for row in run.summary.get("candidates", {}).values() for judge in row.get("scores", {}))
    for judge in judges:
        for candidate in candidates:
            cells = [_score_cell(run.summary["candidates"].get(candidate), judge) for run in runs]
            if any(cells):
                rows.append({"name": f"{candidate}, by {judge}", "cells": cells})
    return {"caption": "Mean score, with 95 % interval over prompts.", "headings": ["", *names], "rows": rows} if rows else None


def _score_cell(candidate: Candidate | None, judge: str) -> Row | None:
    if candidate is None or candidate.get("scores", {}).get(judge) is None:
        return None
    low, high = candidate.get("score_intervals", {}).get(judge) or (None, None)
    interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
    return {"text": f"{candidate['scores'][judge]:.3f}", "interval": interval}


def _win_rates(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Row]:
    """Win rates of the last candidate against each other candidate. One column per run, one block per judge."""
    blocks = []
    for judge in dict.fromkeys(row["judge"] for run in runs for row in run.summary.get("win_rates", [])):
        rows = []
        for pair in dict.fromkeys(
            (row["a"], row["b"])
            for run in runs
            for row in run.summary.get("win_rates", [])
            if row["judge"] == judge and row["a"] == list(run.summary["candidates"])[-1]
        ):
            cells = [_rate_cell(run, pair, judge) for run in runs]
            rows.append({"name": f"{pair[0]} against {pair[1]}", "cells": cells})
        if rows:
            blocks.append({"caption": f"Win rate by {judge}, with 95 % interval.", "headings": ["", *names], "rows": rows})
    return blocks


def _rate_cell(run: RunFolder, pair: tuple[str, str], judge: str) -> Row | None:
    for row in run.summary.get("win_rates", []):
        if (row["a"], row["b"], row["judge"]) == (*pair, judge):
            return {"text": f"{row['win_rate']:.2f}", "interval": f"{row['ci_low']:.2f} to {row['ci_high']:.2f}"}
    return None
