"""Run, reuse or resume each step of a recipe, and write the run folder with its summary.

<home>/registry/                          models made by steps
<home>/runs/<recipe>/<UTC time>/<step>/   metrics and samples of a step; next to them summary.json and report.html;
                                          ``latest`` links to the newest run
<home>/work/<fingerprint>/                checkpoints of a running step (work.py)
<home>/results/<fingerprint>/             results and logs of steps, for runs that reuse them
<home>/cache/plan.json                    cached results of planning; may be deleted
"""

from __future__ import annotations

import fcntl
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.markup import escape
from rich.text import Text

from stages.chain.fingerprints import settings_of
from stages.chain.pins import Commits, apart_from_folders, pinned, resolve_commits
from stages.chain.planning import StepPlan, open_registry, plan, plan_step, plan_table
from stages.chain.results import StoredResult, load_result, restore_files, save_result
from stages.chain.work import beside, clear, first_start_time, note_step, other_attempt, work_folder
from stages.config import StepConfig
from stages.errors import doing
from stages.json_types import JsonObject
from stages.memory_plan.plan import check_adapters
from stages.models.precision import auto_precision, width_of
from stages.process.console import announcing, showing
from stages.process.environment import launched_processes, wants_cpu
from stages.process.gpus import peak_gpu_memory, visible_gpus
from stages.process.hardware import cpu_name
from stages.process.logs import without_repeats
from stages.process.runtime import AutoPrecision, Runtime
from stages.process.storage import make_home, point_to, write_json
from stages.recipe.schema import STAGES, Recipe, RecipeStep, imported
from stages.registry.contents import remembered_hashes
from stages.registry.manifests import installed_packages
from stages.registry.record import ModelRecord
from stages.report.circumstances import bytes_text
from stages.report.run_folder import read_run
from stages.run_summary import Environment, RunSummary
from stages.step import StepContext, StepResult
from stages.tokens.dates import templates_at

T = TypeVar("T")


def run(recipe: Recipe, home: Path, runtime: Runtime, *, command: str | None = None) -> RunSummary:
    """Run or reuse the recipe's steps in order. Returns the summary, which is also written to <run folder>/summary.json.

    ``command`` is what the user typed to start the run; the summary and the report show it.
    """
    with without_repeats(), showing(runtime.console):
        chain = _Run(recipe, home.absolute(), runtime, command)
        chain.start()
        for step, planned in zip(chain.recipe.steps, chain.plans, strict=True):
            chain.do(step, planned)
        return chain.finish()


class _Run:
    """One run of a recipe. With several processes, rank zero decides and writes, and broadcasts its decisions."""

    def __init__(self, recipe: Recipe, home: Path, runtime: Runtime, command: str | None) -> None:
        self.recipe, self.home, self.runtime = recipe, home, runtime
        self.registry = open_registry(home)
        self.began = time.monotonic()
        self._announced: set[str] = set()
        self.made: dict[str, ModelRecord | None] = {}
        self.circumstances: dict[str, JsonObject] = {}  # by step; those of a reused step are of the run that made it
        if not recipe.is_pinned:
            commits: Commits = self.runtime.decide(lambda: resolve_commits(recipe))
            self.recipe = recipe = pinned(recipe, commits)
        self.plans: list[StepPlan] = self.runtime.decide(lambda: plan(recipe, home))
        reused = [planned.name for planned in self.plans if planned.action == "reuse"]
        device = "cuda" if visible_gpus() and not wants_cpu() else "cpu"
        self.runtime.decide(lambda: check_adapters(recipe, self.registry, device, reused=reused))
        self.folder: Path = self.runtime.decide(self._new_run_folder)
        self.summary: RunSummary = {
            "recipe": recipe.name,
            "recipe_file": recipe.source.file,
            "description": recipe.description,
            "seed": recipe.seed,
            "overrides": list(recipe.source.overrides.values()),
            "command": command,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": False,
            "wall_seconds": 0.0,
            "peak_memory_bytes": 0,
            "peak_gpu_memory_bytes": None,
            "environment": {**environment(), "sharded": runtime.shards},
            "steps": [],
            "candidates": {},
            "win_rates": [],
        }

    def start(self) -> None:
        self._write_summary()
        if self.runtime.is_main:
            point_to(self.folder.parent / "latest", self.folder.name)
        self.runtime.console.print(plan_table(self.plans, self.recipe.name))

    def do(self, step: RecipeStep, planned: StepPlan) -> None:
        began = time.monotonic()
        if planned.fingerprint is None:
            # The earlier steps are done, so the inputs are known. They may equal those of an earlier run.
            with remembered_hashes(self.home / "cache" / "plan.json"):
                planned = self.runtime.decide(lambda: plan_step(self.recipe, step, self.home, self.registry, self.made))
        if planned.action == "reuse":
            result = self._reuse(step, planned)
        else:
            planned, result = self._run_alone(step, planned)
        self.made[step.name] = result.model
        if planned.action == "reuse":
            self.runtime.console.print(f"[bold]{step.name}[/] reused: {escape(planned.reason)}", markup=True)
        else:
            outcome = f"published {result.model.ref} ({result.model.digest[:19]})" if result.model is not None else "done"
            self.runtime.console.print(f"[bold]{step.name}[/] {outcome} after {time.monotonic() - began:.1f} s", markup=True)
        self._record(step, planned, result, time.monotonic() - began)

    def finish(self) -> RunSummary:
        self.summary["finished"] = True
        self._write_summary()
        console = self.runtime.console
        console.print(f"{self.recipe.name} finished in {self.summary['wall_seconds']:.1f} s: {_shown(self.folder / 'summary.json')}")
        if self.runtime.is_main and self.summary["candidates"]:
            self._write_report()
        return self.summary

    def _write_report(self) -> None:
        """Write the run's report page. All results are already stored, so an error here does not fail the run."""
        from stages.report.page import write_report

        try:
            written = write_report(read_run(self.folder))
        except Exception as error:
            again = f"stages report {_shown(self.folder)} --debug"
            self.runtime.console.print(f"The report could not be written ({type(error).__name__}: {error}); try `{again}`", style="yellow")
        else:
            self.runtime.console.print(f"The report: {_shown(written.path)}", style="bold", soft_wrap=True)
            for note in written.notes:
                self.runtime.console.print(note, soft_wrap=True)

    # One step

    def _reuse(self, step: RecipeStep, planned: StepPlan) -> StepResult:
        assert planned.fingerprint is not None
        if self.runtime.is_main:  # left over if a run was interrupted between publishing and cleanup
            clear(work_folder(self.home, planned.fingerprint))
        if self.runtime.is_main:
            restore_files(self.home, planned.fingerprint, self.folder / step.name)
        kept = self.runtime.decide(lambda: load_result(self.home, str(planned.fingerprint)))
        self.circumstances[step.name] = kept.get("circumstances") or {} if kept is not None else {}
        if planned.record is not None:
            record, name = planned.record, self.recipe.model_name(step)
            if record.name != name:
                record = self.runtime.decide(lambda: self.registry.adopt(record, name))
            return StepResult(record, dict(record.manifest["metrics"]))
        assert kept is not None, "the plan reuses only a step whose result exists"
        return StepResult(None, kept["metrics"], kept["evaluation"])

    def _run_alone(self, step: RecipeStep, planned: StepPlan) -> tuple[StepPlan, StepResult]:
        """Run a step under its lock. If another ``stages`` process has just finished the same step, reuse its result."""
        assert planned.fingerprint is not None
        work = work_folder(self.home, planned.fingerprint)
        with self._held(work):
            # Decide again without the cache: every byte of the inputs is read.
            planned = self.runtime.decide(lambda: plan_step(self.recipe, step, self.home, self.registry, self.made))
            if planned.action == "reuse":
                return planned, self._reuse(step, planned)
            self._print_heading(f"[bold]{step.name}[/] ({step.stage}): {planned.action}, {escape(planned.reason)}")
            if self.runtime.is_main and planned.action == "run":
                self._report_other_attempt(step, work)
            result = self._run_stage(step, planned, work)
            if self.runtime.is_main:
                self._keep(step, planned, result)
                clear(work)
            self.runtime.wait_for_everyone()
        return planned, result

    def _print_heading(self, heading: str) -> None:
        """Print a line across the terminal. A heading that is too long for it is wrapped, because a rule would cut it."""
        if Text.from_markup(heading).cell_len + len(" ─") > self.runtime.console.width:
            self.runtime.console.print(heading, markup=True)
        else:
            self.runtime.console.rule(heading, align="left")

    def _report_other_attempt(self, step: RecipeStep, work: Path) -> None:
        """Print where the checkpoints of an interrupted run with other settings are: they can be large, and nothing removes them."""
        if (other := other_attempt(work, self.recipe.model_name(step))) is None:
            return
        self._announce(
            step,
            f"an interrupted run with other settings, data or code left {bytes_text(other.size())} of checkpoints in {_shown(other.work)}. "
            "They are used again only with exactly those; otherwise delete the folder",
        )

    def _run_stage(self, step: RecipeStep, planned: StepPlan, work: Path) -> StepResult:
        began = time.monotonic()
        folder = self.folder / step.name
        if self.runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            work.mkdir(parents=True, exist_ok=True)
            note_step(work, self.recipe.model_name(step), planned.parts)
        self.runtime.begin_step(step.seed, self._auto_precision(step, planned, work))
        self.runtime.wait_for_everyone()
        context = StepContext(
            name=self.recipe.model_name(step),
            seed=step.seed,
            runtime=self.runtime,
            registry=self.registry,
            models={field_path: apart_from_folders(model) for field_path, model in planned.models.items()},
            folder=folder,
            checkpoint_folder=work,
            fingerprint=str(planned.fingerprint),
            fingerprint_parts=planned.parts,
            recipe_step=step.config.model_dump(mode="json"),
            data_fingerprints=planned.parts["data"],
            run=self.folder.name,
            trackers=self.recipe.trackers,
        )
        try:
            at, announced = (
                templates_at(self.runtime.decide(lambda: first_start_time(work))),
                announcing(partial(self._announce, step)),
            )
            with doing(f"step {step.name!r} ({step.stage})", folder), announced, at:
                result = run_function(step.stage)(step.config, context)
        finally:
            context.close()
            _free_memory()
        if context.sampling:
            result.metrics["sampling"] = context.sampling
        assert (result.model is not None) == STAGES[step.stage].makes_model, f"stage {step.stage} must return the model it published"
        self.circumstances[step.name] = self._circumstances(step, time.monotonic() - began)
        if context.compiled_layers:
            self.circumstances[step.name]["compiled_layers"] = context.compiled_layers
        return result

    def _auto_precision(self, step: RecipeStep, planned: StepPlan, work: Path) -> AutoPrecision | None:
        """The meaning of ``precision: auto`` if the step computes on a CPU; None on a GPU. A resumed step keeps its first one."""
        if step.config.precision != "auto" or visible_gpus() and not wants_cpu():
            return None
        trained = [planned.models[name] for name in ("policy", "model") if name in planned.models]
        architecture = getattr(step.config, "architecture", None)
        kept = beside(work, ".precision.json")
        return self.runtime.decide(
            lambda: auto_precision(lambda: width_of(trained or planned.models.values(), architecture), self.home / "cache", kept=kept)
        )

    def _announce(self, step: RecipeStep, line: str) -> None:
        """Print a line of a step, unless an earlier step of this run has printed the same line."""
        if line not in self._announced:
            self._announced.add(line)
            self.runtime.console.print(f"{step.name}: {line}")

    def _circumstances(self, step: RecipeStep, seconds: float) -> JsonObject:
        """How this process computed a step: facts about the machine, which are no part of the step's fingerprint."""
        return {
            "run": self.folder.name,
            **self.runtime.describe_compute(step.config.precision),
            "wall_seconds": round(seconds, 3),
            "peak_memory_bytes": self.runtime.measure_peak_memory(),  # of the process until now
            "peak_gpu_memory_bytes": peak_gpu_memory(),  # of its GPU; None without a GPU
            "packages": installed_packages(),
        }

    def _keep(self, step: RecipeStep, planned: StepPlan, result: StepResult) -> None:
        kept: StoredResult = {
            "name": self.recipe.model_name(step),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint_parts": planned.parts,
            "metrics": result.metrics,
            "evaluation": result.evaluation,
            "circumstances": self.circumstances[step.name],
        }
        save_result(self.home, str(planned.fingerprint), kept, self.folder / step.name)

    @contextmanager
    def _held(self, work: Path) -> Iterator[None]:
        """Hold the step's lock in rank zero. The lock is released when the process ends in any way."""
        if not self.runtime.is_main:
            yield
            return
        work.parent.mkdir(parents=True, exist_ok=True)
        lock = beside(work, ".lock")
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.runtime.console.print("Another process runs this step with the same settings; waiting for it.")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # The run folder

    def _record(self, step: RecipeStep, planned: StepPlan, result: StepResult, seconds: float) -> None:
        model = result.model
        self.summary["steps"].append(
            {
                "name": step.name,
                "stage": step.stage,
                # Content only, so that two runs with equal files agree here even if their version numbers differ.
                "model": {"ref": model.name, "digest": model.digest} if model is not None else None,
                "version": model.version if model is not None else None,
                "wall_seconds": round(seconds, 3),
                "reused": planned.action == "reuse",
                "action": planned.action,
                "reason": planned.reason,
                "inputs": planned.inputs,
                "hub": planned.hub,
                "data": planned.parts.get("data", {}),
                "peak_memory_bytes": self.runtime.measure_peak_memory(),  # of the process until now
                "peak_gpu_memory_bytes": peak_gpu_memory(),  # of its GPU; None without a GPU
                "seed": step.seed,
                "circumstances": self.circumstances[step.name],
                "fingerprint": planned.fingerprint,
                "settings": settings_of(step.config),
                "config": step.config.model_dump(mode="json"),
                "metrics": {**(model.manifest["metrics"] if model is not None else {}), **result.metrics},
            }
        )
        if result.evaluation is not None:
            self.summary["candidates"].update(result.evaluation["candidates"])
            self.summary["win_rates"].extend(result.evaluation["win_rates"])
        self._write_summary()

    def _write_summary(self) -> None:
        self.summary["wall_seconds"] = round(time.monotonic() - self.began, 3)
        self.summary["peak_memory_bytes"] = self.runtime.measure_peak_memory()
        self.summary["peak_gpu_memory_bytes"] = peak_gpu_memory()
        if self.runtime.is_main:
            write_json(self.folder / "summary.json", self.summary)

    def _new_run_folder(self) -> Path:
        runs = self.home / "runs" / self.recipe.name
        make_home(runs)
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        suffix = 1
        while True:
            folder = runs / (stamp if suffix == 1 else f"{stamp}-{suffix}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # another run began in the same second
                suffix += 1


def run_function(stage: str) -> Callable[[StepConfig, StepContext], StepResult]:
    """The function that runs a step of a stage. Imports its module."""
    function: Callable[[StepConfig, StepContext], StepResult] = imported(STAGES[stage].run)
    return function


def environment() -> Environment:
    """Facts besides the recipe that can influence a run's numbers."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "num_processes": launched_processes(),
        "gpus": visible_gpus(),
        "packages": installed_packages(),
    }


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
