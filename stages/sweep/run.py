"""Run a sweep. All runs share one home, so equal steps are made once and an interrupted sweep continues.

    <home>/sweeps/<recipe>/<name>/results.jsonl    one row per run: varied values, chosen metrics, models by pinned reference
    <home>/sweeps/<recipe>/<name>/results.csv      one row per combination: mean and interval over seeds of each metric
    <home>/sweeps/<recipe>/<name>/plot.png

Models are published as <recipe>.<name>/<step>, so that the newest version of <recipe>/<step> stays the recipe's own.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape

from stages.chain import planning
from stages.chain import run as chain
from stages.chain.pins import Commits, pinned, resolve_commits
from stages.errors import RecipeError, StagesError
from stages.json_types import JsonObject
from stages.process.ending import explain, lost_the_others
from stages.process.runtime import Runtime
from stages.process.storage import write_file
from stages.process.tables import Table
from stages.recipe.schema import Recipe, RecipeStep, load_recipe
from stages.recipe.source import nearest
from stages.run_summary import RunSummary
from stages.sweep.grid import Grid, Point, read_grid, shown_value
from stages.sweep.metrics import Estimate, check_patterns, chosen_numbers, default_patterns, estimate


@dataclass(frozen=True)
class SweepRun:
    """One run and its outcome. ``error`` is None if it finished."""

    point: Point
    metrics: dict[str, float]
    error: str | None
    details: JsonObject  # run folder, models, seconds, fingerprints
    exit_status: int = 0  # of the error: 2 if the user can fix it, 1 if it is unexpected

    def as_json(self) -> JsonObject:
        point = {"values": self.point.values, "seeds": self.point.seeds, "overrides": list(self.point.overrides)}
        return {**point, "status": "failed" if self.error else "done", "error": self.error, "metrics": self.metrics, **self.details}


@dataclass
class SweepResult:
    """All runs of a sweep, and the means over seeds."""

    grid: Grid
    folder: Path
    runs: list[SweepRun] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0 if every run finished; 1 if there was an unexpected error, else 2."""
        return min((run.exit_status for run in self.runs if run.error is not None), default=0)

    @property
    def metrics(self) -> list[str]:
        """Paths of all metrics in the requested order."""
        return list(dict.fromkeys(name for run in self.runs for name in run.metrics))

    def combinations(self) -> list[tuple[JsonObject, dict[str, Estimate], int]]:
        """(values, estimate by metric, number of failed runs) of each combination, in grid order."""
        groups: dict[str, list[SweepRun]] = {}
        for run in self.runs:
            groups.setdefault(json.dumps(run.point.values, sort_keys=True), []).append(run)
        rows = []
        for group in groups.values():
            estimates = {}
            for name in self.metrics:
                values = [run.metrics[name] for run in group if name in run.metrics]
                if values:
                    estimates[name] = estimate(values)
            rows.append((group[0].point.values, estimates, sum(run.error is not None for run in group)))
        return rows

    def as_json(self) -> JsonObject:
        rows = [
            {"values": values, "metrics": {name: item.as_json() for name, item in estimates.items()}, "failed": failed}
            for values, estimates, failed in self.combinations()
        ]
        return {"folder": str(self.folder), "combinations": rows}


@dataclass(frozen=True)
class Sweep:
    """A validated sweep: the recipe of each of its runs."""

    name: str
    grid: Grid
    recipes: list[tuple[Point, Recipe]]
    folder: Path


def load_sweep(
    path: str, arguments: Sequence[str], home: Path, name: str | None = None, until: str | None = None, metrics: Sequence[str] = ()
) -> Sweep:
    """Validate every combination, and the paths ``metrics``, before anything runs. Steps after ``until`` are removed.

    Raises RecipeError for the first invalid one.
    """
    registry = planning.open_registry(home)
    grid = read_grid(path, arguments, registry)
    name = name or grid.name
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is None:
        raise RecipeError(f"--name {name!r}: expected letters, digits and _-. after a first letter or digit")
    recipes = []
    for point in grid.points():
        recipe = load_recipe(path, point.overrides, registry)
        recipe = dataclasses.replace(recipe, name=f"{recipe.name}.{name}", steps=_steps(recipe, until))
        check_patterns(metrics, recipe)
        recipes.append((point, recipe))
    return Sweep(name, grid, recipes, home / "sweeps" / load_recipe(path, grid.fixed, registry).name / name)


def _steps(recipe: Recipe, until: str | None) -> list[RecipeStep]:
    names = [step.name for step in recipe.steps]
    if until is not None and until not in names:
        raise RecipeError(f"--until {until!r}: the recipe has no such step; {nearest(until, names)}")
    return recipe.steps[: len(names) if until is None else names.index(until) + 1]


def plan_table(sweep: Sweep, home: Path) -> Table:
    """A table of what each run would make and reuse. A step shared by several runs is made by the first of them."""
    table = Table("run", "makes", "reuses", title=f"{sweep.name}: {len(sweep.recipes)} runs", title_justify="left")
    commits = Commits()
    for point, recipe in sweep.recipes:
        plans = planning.plan(pinned(recipe, resolve_commits(recipe, commits)), home)
        made = [plan.name for plan in plans if plan.action != "reuse"]
        table.add_row(escape(str(point)), ", ".join(made) or "nothing", str(len(plans) - len(made)))
    return table


def run_sweep(sweep: Sweep, home: Path, runtime: Runtime, metrics: Sequence[str] = ()) -> SweepResult:
    """Run everything that is not complete. A failed run is recorded, and the others continue."""
    result = SweepResult(sweep.grid, sweep.folder)
    earlier = runtime.decide(lambda: _earlier_runs(sweep.folder))
    commits = Commits()  # the same commits for all runs, even if the Hub changes meanwhile
    for number, (point, recipe) in enumerate(sweep.recipes, 1):
        runtime.console.rule(f"[bold]run {number} of {len(sweep.recipes)}[/]: {escape(str(point))}", align="left", characters="=")
        result.runs.append(_run_point(point, recipe, home, runtime, metrics, earlier, commits))
        if runtime.is_main:
            _write_rows(result)
    if runtime.is_main:
        _write_table(result)
    return result


def _run_point(
    point: Point,
    recipe: Recipe,
    home: Path,
    runtime: Runtime,
    metrics: Sequence[str],
    earlier: Mapping[str, str],
    commits: Commits,
) -> SweepRun:
    try:
        recipe = pinned(recipe, runtime.decide(lambda: resolve_commits(recipe, commits)))
    except StagesError as error:
        runtime.console.print(f"failed: {error}", style="red")
        return SweepRun(point, {}, str(error), {}, error.exit_status)
    finished = runtime.decide(lambda: _finished(recipe, home, earlier))
    if finished is not None:
        summary, folder = finished
        runtime.console.print(f"already done: {folder}")
    else:
        try:
            summary, folder = chain.run(recipe, home, runtime), runtime.decide(lambda: _newest_run(recipe, home))
        except (Exception, SystemExit) as error:
            if isinstance(error, Exception) and lost_the_others(error):
                raise
            explained = explain(error, f"run {point}", home)
            runtime.console.print(f"failed: {explained}", style="red")
            return SweepRun(point, {}, str(explained), {}, explained.exit_status)
    models = {step["name"]: f"{step['model']['ref']}@{step['version']}" for step in summary["steps"] if step["model"] is not None}
    fingerprints = {step["name"]: step["fingerprint"] for step in summary["steps"]}
    details = {"run": folder, "models": models, "wall_seconds": summary["wall_seconds"], "fingerprints": fingerprints}
    return SweepRun(point, chosen_numbers(summary, metrics or default_patterns(summary)), None, details)


def _finished(recipe: Recipe, home: Path, earlier: Mapping[str, str]) -> tuple[RunSummary, str] | None:
    """(summary, run folder) of an earlier run of this sweep with the same result; None if there is none."""
    plans = planning.plan(recipe, home)
    if any(plan.action != "reuse" for plan in plans):
        return None
    folder = earlier.get(_key({plan.name: plan.fingerprint for plan in plans}))
    if folder is None:
        return None
    try:
        summary: RunSummary = json.loads((home / folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (summary, folder) if summary["finished"] else None


def _newest_run(recipe: Recipe, home: Path) -> str:
    return str((home / "runs" / recipe.name / "latest").resolve().relative_to(home.resolve()))


def _key(fingerprints: Mapping[str, object]) -> str:
    return json.dumps(fingerprints, sort_keys=True)


def _earlier_runs(folder: Path) -> dict[str, str]:
    """Run folders of an earlier start of this sweep, by the fingerprints of their steps."""
    try:
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return {}
    return {_key(row["fingerprints"]): row["run"] for row in rows if row.get("status") == "done"}


# Output


def _write_rows(result: SweepResult) -> None:
    result.folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(run.as_json(), ensure_ascii=False) + "\n" for run in result.runs]
    write_file(result.folder / "results.jsonl", "".join(lines))


def _write_table(result: SweepResult) -> None:
    labels = [axis.label for axis in result.grid.axes]
    metrics = result.metrics
    with (result.folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*labels, *(f"{name}.{part}" for name in metrics for part in ("mean", "low", "high", "n")), "failed"])
        for values, estimates, failed in result.combinations():
            cells: list[str | float | None] = [shown_value(values[label]) for label in labels]
            for name in metrics:
                cells += list(estimates[name].as_json().values()) if name in estimates else [None] * 4
            writer.writerow([*cells, failed])


def result_table(result: SweepResult) -> Table:
    """The sweep as a terminal table with one row per combination. The common prefix of the metric paths is in the title."""
    metrics = result.metrics
    common, short = shortened(metrics)
    labels = [axis.label for axis in result.grid.axes]
    seeds = f", mean and 95 % interval over {result.grid.num_replicates} seeds" if result.grid.num_replicates > 1 else ""
    table = Table(title=f"{len(result.runs)} runs{seeds}{f'; {common}' if common else ''}", title_justify="left")
    for heading in [*labels, *short, "failed"]:
        table.add_column(heading, overflow="fold")
    for values, estimates, failed in result.combinations():
        shown = [str(estimates[name]) if name in estimates else "-" for name in metrics]
        table.add_row(*(shown_value(values[label]) for label in labels), *shown, str(failed or ""))
    return table


def shortened(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return (the common prefix of all paths, the paths without it)."""
    parts = [path.split(".") for path in paths]
    num_common = 0
    while len(parts) > 1 and all(len(path) > num_common + 1 and path[num_common] == parts[0][num_common] for path in parts):
        num_common += 1
    return ".".join(parts[0][:num_common]) if num_common else "", [".".join(path[num_common:]) for path in parts]
