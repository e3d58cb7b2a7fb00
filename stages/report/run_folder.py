"""A run folder, read: its summary, and of every step the metrics, samples, evaluation and completions. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class StepFolder:
    """What one step left. A step that was reused has its files from the run that made it; what that run did not keep is missing."""

    entry: Row  # the step's entry in summary.json
    folder: Path

    @property
    def name(self) -> str:
        return str(self.entry["name"])

    @property
    def stage(self) -> str:
        return str(self.entry["stage"])

    @property
    def metrics(self) -> Row:
        """The numbers at the end."""
        return self.entry.get("metrics") or {}

    @property
    def config(self) -> Row:
        """The step as resolved; of a run that did not record it, its settings."""
        return self.entry.get("config") or {**self.entry.get("settings", {}), "name": self.name, "stage": self.stage}

    @cached_property
    def log(self) -> list[Row]:
        """Metrics over time (metrics.jsonl); a step cut off in mid-line loses that line."""
        return read_lines(self.folder / "metrics.jsonl")

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric, in the order they were logged."""
        rows = [(row["step"], row[name]) for row in self.log if isinstance(row.get(name), int | float)]
        return [float(step) for step, _ in rows], [float(value) for _, value in rows]

    @cached_property
    def samples(self) -> list[Row]:
        """Completions kept during training."""
        return read_lines(self.folder / "samples.jsonl")

    @cached_property
    def evaluation(self) -> Row | None:
        """evaluation.json; None for a step that evaluated nothing."""
        path = self.folder / "evaluation.json"
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: no evaluation ({error}); the file was changed or cut off. Run the step again") from error

    @cached_property
    def completions(self) -> list[Row]:
        """The questions of an evaluation with all answers and scores."""
        return read_lines(self.folder / "completions.jsonl")

    @cached_property
    def tokens(self) -> list[Row]:
        """Token details of an evaluation's first questions."""
        return read_lines(self.folder / "tokens.jsonl")


@dataclass(frozen=True)
class RunFolder:
    """A run of a recipe."""

    path: Path
    summary: Row
    steps: list[StepFolder] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The recipe and when it ran."""
        return f"{self.summary['recipe']} {self.path.name}"

    def step(self, name: str) -> StepFolder | None:
        """The step of that name; None where there is none."""
        return next((step for step in self.steps if step.name == name), None)

    @property
    def evaluations(self) -> list[StepFolder]:
        """Steps that evaluated candidates, in order."""
        return [step for step in self.steps if step.evaluation is not None]


def read_run(path: Path) -> RunFolder:
    """The run at ``path``. Raises DataError where it is no run folder."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        steps = [StepFolder(entry, path / entry["name"]) for entry in summary["steps"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: no run folder ({reason}); expected one with the summary.json that `stages run` writes") from error
    return RunFolder(path.resolve(), summary, steps)


def find_run(name: str, home: Path) -> Path:
    """The folder of a run: a path, ``<recipe>`` (its newest run) or ``<recipe>/<time>``. Raises DataError that lists what there is."""
    written = Path(name).expanduser()
    for path in (written, home / "runs" / name, home / "runs" / name / "latest"):
        if (path / "summary.json").is_file():
            return path.resolve()
    folders = [path.parent for path in (home / "runs").glob("*/*/summary.json")]
    known = sorted(f"{folder.parent.name}/{folder.name}" for folder in folders if not folder.is_symlink())
    shown = ", ".join(known[-10:]) or "none"
    raise DataError(f"{name!r} is no run: expected a run folder, a recipe's name, or <recipe>/<time>; runs in {home / 'runs'}: {shown}")


def read_lines(path: Path) -> list[Row]:
    """Objects of a JSON-lines file; an absent file has none, and a last line that was cut off does not count."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number >= len(lines) - 2:
                break
            raise DataError(f"{path}:{number + 1}: bad JSON ({error}); the file was changed") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number + 1}: expected an object")
        rows.append(row)
    return rows


def thinned(rows: Sequence[Any], number: int) -> list[Any]:
    """At most ``number`` of ``rows``, evenly spread, the first and the last among them."""
    if number < 2 or len(rows) <= number:
        return list(rows[:number])
    return [rows[round(place * (len(rows) - 1) / (number - 1))] for place in range(number)]


def shown_memory(entry: dict[str, Any]) -> int | None:
    """Peak memory in bytes of a run or a step: that of its GPU where it had one, else that of the process."""
    return entry.get("peak_gpu_memory_bytes") or entry.get("peak_memory_bytes")
