"""Read a run folder: its summary, and the metrics, samples, evaluation and completions of each step. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from stages.errors import DataError
from stages.json_types import JsonObject
from stages.run_summary import EvaluationFile, RunSummary, StepSummary

Row: TypeAlias = dict[str, Any]
"""An object of a run's log files, whose keys depend on the stage and on the version of Tristage that wrote it."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class StepFolder:
    """The files of one step. A reused step has the files of the run that made it. Files that this run did not keep are missing."""

    entry: StepSummary  # the step's entry in summary.json
    folder: Path

    @property
    def name(self) -> str:
        return str(self.entry["name"])

    @property
    def stage(self) -> str:
        return str(self.entry["stage"])

    @property
    def metrics(self) -> Row:
        """The metrics at the end of the step."""
        return self.entry.get("metrics") or {}

    @property
    def config(self) -> JsonObject:
        """The resolved config of the step. If the run did not record it, the step's settings."""
        return self.entry.get("config") or {**self.entry.get("settings", {}), "name": self.name, "stage": self.stage}

    @cached_property
    def log(self) -> list[Row]:
        """Metrics over time (metrics.jsonl). An incomplete last line is ignored."""
        return read_lines(self.folder / "metrics.jsonl")

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric, in the order they were logged."""
        rows = [(row["step"], row[name]) for row in self.log if isinstance(row.get(name), int | float)]
        return [float(step) for step, _ in rows], [float(value) for _, value in rows]

    @cached_property
    def samples(self) -> list[Row]:
        """Completions that were saved during training."""
        return read_lines(self.folder / "samples.jsonl")

    @cached_property
    def evaluation(self) -> EvaluationFile | None:
        """The content of evaluation.json. None for a step without an evaluation. Raises DataError if the file is damaged."""
        path = self.folder / "evaluation.json"
        if not path.is_file():
            return None
        try:
            content: EvaluationFile = dict(json.loads(path.read_text(encoding="utf-8")))  # type: ignore[assignment]  # raises for another type
            return content
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: not a valid evaluation ({error}); the file was changed or cut off. Run the step again") from error

    @cached_property
    def completions(self) -> list[Row]:
        """The prompts of an evaluation with all completions and scores. Raises DataError for a line without them."""
        path = self.folder / "completions.jsonl"
        rows = read_lines(path)
        for number, row in enumerate(rows, start=1):
            if "prompt" not in row or not all(isinstance(row.get(key), dict) for key in ("completions", "scores")):
                raise DataError(f"{path}:{number}: expected prompt, completions and scores; the file was changed. Run the step again")
        return rows

    @cached_property
    def tokens(self) -> list[Row]:
        """Token details for the first prompts of an evaluation."""
        return read_lines(self.folder / "tokens.jsonl")


@dataclass(frozen=True)
class RunFolder:
    """A run of a recipe."""

    path: Path
    summary: RunSummary
    steps: list[StepFolder] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The recipe and the time of the run."""
        return f"{self.summary['recipe']} {self.path.name}"

    def step(self, name: str) -> StepFolder | None:
        """The step with this name, or None."""
        return next((step for step in self.steps if step.name == name), None)

    @property
    def evaluations(self) -> list[StepFolder]:
        """Steps that evaluated candidates, in order."""
        return [step for step in self.steps if step.evaluation is not None]


def read_run(path: Path) -> RunFolder:
    """Read the run at ``path``. Raises DataError if it is not a run folder."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        steps = [StepFolder(entry, path / entry["name"]) for entry in summary["steps"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a run folder ({reason}); expected a folder with the summary.json that `stages run` writes") from error
    return RunFolder(path.resolve(), summary, steps)


def find_run(name: str, home: Path) -> Path:
    """The folder of a run, given as a path, as ``<recipe>`` (its newest run) or as ``<recipe>/<time>``.

    Raises DataError with a list of known runs.
    """
    written = Path(name).expanduser()
    for path in (written, home / "runs" / name, home / "runs" / name / "latest"):
        if (path / "summary.json").is_file():
            return path.resolve()
    folders = [path.parent for path in (home / "runs").glob("*/*/summary.json")]
    known = sorted(f"{folder.parent.name}/{folder.name}" for folder in folders if not folder.is_symlink())
    shown = ", ".join(known[-10:]) or "none"
    raise DataError(f"{name!r} is not a run: expected a run folder, a recipe's name, or <recipe>/<time>; runs in {home / 'runs'}: {shown}")


def read_lines(path: Path) -> list[Row]:
    """Objects of a JSON-lines file. A missing file has none. An incomplete last line is ignored.

    Raises DataError for any other invalid line.
    """
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


def thinned(rows: Sequence[Item], number: int) -> list[Item]:
    """At most ``number`` of ``rows``, evenly spaced, including the first and the last."""
    if number < 2 or len(rows) <= number:
        return list(rows[:number])
    return [rows[round(index * (len(rows) - 1) / (number - 1))] for index in range(number)]


def shown_memory(entry: RunSummary | StepSummary) -> int | None:
    """Peak memory of a run or a step in bytes: of its GPU if it had one, else of the process."""
    return entry.get("peak_gpu_memory_bytes") or entry.get("peak_memory_bytes")
