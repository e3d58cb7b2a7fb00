"""``run`` a recipe or a list of steps from a Python program."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stages.api.functions import unchanged_by_the_run
from stages.api.inputs import as_field
from stages.api.results import Model, Results
from stages.chain import run as chain
from stages.chain.planning import open_registry
from stages.errors import Stopped
from stages.process.environment import default_home
from stages.process.runtime import Runtime
from stages.process.storage import check_home
from stages.recipe.schema import load_recipe
from stages.run_summary import RunSummary

Log = Callable[[str, int, dict[str, float]], None]
"""Called with the model's name, the optimizer step or iteration, and its logged metrics."""


def run(
    recipe: str | Path | Sequence[Mapping[str, object]],
    overrides: Mapping[str, object] | None = None,
    home: str | Path | None = None,
    *,
    name: str = "python",
    seed: int = 0,
    on_log: Log | None = None,
    quiet: bool = False,
    wait: bool = False,
) -> Results:
    """Run a recipe and return its results. Completed steps are reused.

    ``recipe`` is a file, the name of an included recipe, or a list of steps: mappings as in a recipe, whose values may also be models, data
    sets and functions in memory. ``name`` and ``seed`` are then the recipe's. ``overrides`` maps paths to values: ``{"aligned.kl.coef":
    0.1}``. ``home`` is the folder for all results (default: STAGES_HOME, else ``outputs``).

    With ``wait`` the call waits for annotators to rank completions. Without it, it raises Waiting (stages.errors), which says what to do.

    Raises StagesError for invalid input, and KeyboardInterrupt if the run was stopped; the same call then continues it.
    """
    home_folder = Path(home or default_home()).absolute()
    check_home(home_folder)
    runtime = Runtime(quiet=quiet)
    runtime.waits_for_people = wait
    if on_log is not None:
        runtime.listeners.append(on_log)
    try:
        with unchanged_by_the_run(), runtime.stop.installed():
            file = recipe if isinstance(recipe, str | Path) else write_recipe(recipe, name, seed, home_folder / "inputs")
            plain = {path: as_field(path.rpartition(".")[2], value, home_folder / "inputs") for path, value in (overrides or {}).items()}
            changes = [f"{path}={json.dumps(value)}" for path, value in plain.items()]
            summary = chain.run(load_recipe(file, changes, open_registry(home_folder)), home_folder, runtime)
    except Stopped as stop:
        raise KeyboardInterrupt(f"stopped by {stop.name}; completed steps are kept, and the same call continues") from stop
    return results_of(summary, home_folder)


def write_recipe(steps: Sequence[Mapping[str, object]], name: str, seed: int, folder: Path) -> Path:
    """Write ``steps`` as a recipe file named by a hash of its content. Objects in memory are saved next to it."""
    plain = [{key: as_field(key, value, folder) for key, value in step.items()} for step in steps]
    content = json.dumps({"name": name, "seed": seed, "steps": plain}, indent=2, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]", "_", name)  # the recipe is checked after it is written, so the name may be invalid
    path = folder / f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.yaml"  # JSON is YAML
    path.write_text(content, encoding="utf-8")
    return path


def results_of(summary: RunSummary, home: Path) -> Results:
    """The results described by a run's summary."""
    registry, models = open_registry(home), {}
    for step in summary["steps"]:
        if step["model"] is not None:
            record = registry.get(f"{step['model']['ref']}@{step['version']}")
            models[step["name"]] = Model(record.ref, record.role, record.path, dict(record.manifest["metrics"]))
    return Results(
        name=summary["recipe"],
        folder=(home / "runs" / summary["recipe"] / "latest").resolve(),
        models=models,
        metrics={step["name"]: step["metrics"] for step in summary["steps"]},
        win_rates=list(summary["win_rates"]),
        candidates=dict(summary["candidates"]),
        summary=summary,
    )
