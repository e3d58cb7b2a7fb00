"""``run`` a recipe, or a list of steps, from a Python program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.api.inputs import as_field
from stages.api.results import Model, Results
from stages.errors import Stopped

Log = Callable[[str, int, dict[str, float]], None]
"""Called with the model's name, the optimizer step or iteration, and the metrics that were logged there."""


def run(
    recipe: str | Path | Sequence[Mapping[str, Any]],
    overrides: Mapping[str, Any] | None = None,
    home: str | Path | None = None,
    *,
    name: str = "python",
    seed: int = 0,
    on_log: Log | None = None,
    quiet: bool = False,
    wait: bool = False,
) -> Results:
    """Run a recipe and return its results. Steps that are there already are reused.

    ``recipe`` is a file, the name of a recipe that ships, or a list of steps: mappings as in a recipe, whose values may be models, data
    sets and functions in memory. ``name`` and ``seed`` are the recipe's in that case. ``overrides`` are by path:
    ``{"aligned.kl_coef": 0.1}``. ``home`` is where everything is kept (default: STAGES_HOME, else ``outputs``).

    With ``wait`` the call waits where people have to rank completions; without, it raises Waiting (stages.errors), which says what to do.

    Raises StagesError for bad input, and KeyboardInterrupt if the run was stopped; the same call then continues it.
    """
    from stages.chain import run as chain
    from stages.process.environment import default_home
    from stages.process.runtime import Runtime
    from stages.recipe.schema import load_recipe

    place = Path(home or default_home()).absolute()
    file = recipe if isinstance(recipe, str | Path) else write_recipe(recipe, name, seed, place / "inputs")
    plain = {path: as_field(path.rpartition(".")[2], value, place / "inputs") for path, value in (overrides or {}).items()}
    changes = [f"{path}={json.dumps(value)}" for path, value in plain.items()]
    runtime = Runtime(quiet=quiet)
    runtime.waits_for_people = wait
    if on_log is not None:
        runtime.listeners.append(on_log)
    try:
        with runtime.stop.installed():
            summary = chain.run(load_recipe(file, changes, chain.open_registry(place)), place, runtime)
    except Stopped as stop:
        raise KeyboardInterrupt(f"stopped by {stop.name}; what is done is kept, and the same call continues") from stop
    return results_of(summary, place)


def write_recipe(steps: Sequence[Mapping[str, Any]], name: str, seed: int, folder: Path) -> Path:
    """Write ``steps`` as a recipe file under the hash of its content; objects in memory are saved beside it."""
    plain = [{key: as_field(key, value, folder) for key, value in step.items()} for step in steps]
    content = json.dumps({"name": name, "seed": seed, "steps": plain}, indent=2, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.yaml"  # JSON is YAML
    path.write_text(content, encoding="utf-8")
    return path


def results_of(summary: Mapping[str, Any], home: Path) -> Results:
    """The results that a run's summary describes."""
    from stages.chain.run import open_registry

    registry, models = open_registry(home), {}
    for step in summary["steps"]:
        if step["model"] is not None:
            record = registry.get(f"{step['model']['ref']}@{step['version']}")
            models[step["name"]] = Model(record.ref, record.role, record.path, record.manifest["metrics"])
    return Results(
        name=summary["recipe"],
        folder=(home / "runs" / summary["recipe"] / "latest").resolve(),
        models=models,
        metrics={step["name"]: step["metrics"] for step in summary["steps"]},
        win_rates=list(summary["win_rates"]),
        candidates=dict(summary["candidates"]),
        summary=dict(summary),
    )
