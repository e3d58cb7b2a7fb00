"""Plan a recipe: which steps run, resume or are reused, and why; check models and data before any step runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.markup import escape

from stages.chain.conversations import check_template_arguments, check_texts, tokenizer_digests
from stages.chain.fingerprints import fingerprint_of, parts_of, why
from stages.chain.fitness import ModelChecks
from stages.chain.pins import hub_inputs, is_known, pinned, resolve_commits
from stages.chain.resolving import content_of, resolve
from stages.chain.results import last_result, load_result
from stages.chain.roles import check_roles
from stages.chain.work import is_begun, other_attempt, work_folder
from stages.corpora.files import WORLD_ROWS, first_rows_of_world
from stages.corpora.world.parts import PREFIX
from stages.engines.checks import check_installed
from stages.errors import DataError, RecipeError, doing
from stages.json_types import JsonObject
from stages.labelling.waiting import WAITING
from stages.models.adapters.stacks import check_folder
from stages.process.logs import held_log, without_repeats
from stages.process.packages import missing_attention_package, missing_quantization_package
from stages.process.storage import check_home
from stages.process.tables import Table
from stages.recipe.schema import STAGES, Recipe, RecipeStep, data_inputs, model_inputs
from stages.registry.contents import remembered_hashes
from stages.registry.ledger import Registry
from stages.registry.record import FingerprintParts, ModelRecord
from stages.registry.references import ResolvedModel

ACTION_STYLES = {"reuse": "green", "run": "yellow", "resume": "cyan"}


@dataclass(frozen=True)
class StepPlan:
    """The plan for one step: whether it runs, resumes or is reused, and why."""

    name: str
    stage: str
    action: str  # reuse | run | resume
    reason: str
    fingerprint: str | None  # None until all inputs exist
    inputs: dict[str, str]  # field path -> model reference, if known
    hub: dict[str, str] = field(default_factory=dict)  # field path -> owner/name@commit of Hub inputs
    parts: FingerprintParts = field(default_factory=lambda: FingerprintParts())
    models: dict[str, ResolvedModel] = field(default_factory=dict)
    record: ModelRecord | None = None  # the reused version

    def as_json(self) -> JsonObject:
        return {key: getattr(self, key) for key in ("name", "stage", "action", "reason", "fingerprint", "inputs", "hub")}


def open_registry(home: Path) -> Registry:
    """The registry of a home. Raises StorageError if the home cannot be a folder."""
    check_home(home)
    return Registry(home / "registry")


def plan(recipe: Recipe, home: Path, *, download: bool = True) -> list[StepPlan]:
    """Plan every step of the recipe, and check the data of every step that would run. Loads no model.

    Hub inputs are first resolved to commits and checked from metadata, unless the recipe is already pinned. ``download=False`` does not
    download Hub data sets, so steps that read them are not checked.
    """
    if not recipe.is_pinned:
        recipe = pinned(recipe, resolve_commits(recipe))
    registry = open_registry(home)
    models = ModelChecks(registry)
    made: dict[str, ModelRecord | None] = {}
    plans = []
    with without_repeats(), remembered_hashes(home / "cache" / "plan.json") as memo:
        for step in recipe.steps:
            with doing(f"planning step {step.name!r} ({step.stage})"):
                check_folders(step)
                planned = plan_step(recipe, step, home, registry, made)
            plans.append(planned)
            made[step.name] = planned.record
            if planned.action == "reuse":
                continue
            check_roles(recipe, step, registry)
            check_attention(step)
            check_quantization(step)
            check_installed(step.config)
            if not is_known(step):
                continue
            with doing(f"checking the models of step {step.name!r} ({step.stage})"):
                models.check(recipe, step)
            if download or not on_hub(step):
                with doing(f"checking the data of step {step.name!r} ({step.stage})"):
                    checked = fingerprint_of(parts_of(step, tokenizer_digests(recipe, step, registry)))
                    memo.check_once(checked, partial(_check_data, recipe, step, registry))
    return plans


def _check_data(recipe: Recipe, step: RecipeStep, registry: Registry) -> None:
    """Raise RecipeError or DataError for data that a step or one of its models cannot read.

    Of the embedded world, the first rows are enough to see that they can be read. If they fail, all rows decide. Warnings of the failed
    check are not shown, because the second one repeats them.
    """
    if not any(source.path.startswith(PREFIX) for sources in data_inputs(step.config).values() for source in sources):
        _check_rows(recipe, step, registry)
        return
    try:
        with first_rows_of_world(WORLD_ROWS), held_log():
            _check_rows(recipe, step, registry)
    except (DataError, RecipeError):
        _check_rows(recipe, step, registry)


def _check_rows(recipe: Recipe, step: RecipeStep, registry: Registry) -> None:
    recipe.check_data(step)
    check_template_arguments(recipe, step, registry)
    check_texts(recipe, step, registry)


def check_folders(step: RecipeStep) -> None:
    """Raise ModelError if a folder that the step reads contains an adapter that cannot be loaded."""
    for model in step.models.values():
        if model.kind == "folder":
            check_folder(ResolvedModel(model.input.ref, "folder", model.target, "", model.input))


def check_attention(step: RecipeStep) -> None:
    """Raise RecipeError if a model of the step needs an attention package that is not installed."""
    for field_path, model in model_inputs(step.config).items():
        if missing := missing_attention_package(model.attention):
            raise RecipeError(
                f"step {step.name}: {field_path}.attention={model.attention} cannot be used: {missing}. Write attention: auto"
            )


def check_quantization(step: RecipeStep) -> None:
    """Raise RecipeError if the step quantizes a model, or has an optimizer, whose package is not installed."""
    optimizer = getattr(getattr(step.config, "training", None), "optimizer", "adamw")
    needed = {"training": ("none", optimizer)} | {name: (model.quantization, "adamw") for name, model in model_inputs(step.config).items()}
    for field_path, (quantization, own) in needed.items():
        if missing := missing_quantization_package(quantization, own):
            raise RecipeError(f"step {step.name}: {field_path}: {missing}")


def on_hub(step: RecipeStep) -> bool:
    """Whether the step reads data from the Hub."""
    return any(source.on_hub for sources in data_inputs(step.config).values() for source in sources)


def plan_step(recipe: Recipe, step: RecipeStep, home: Path, registry: Registry, made: Mapping[str, ModelRecord | None]) -> StepPlan:
    """Plan one step. ``made``: the models of earlier steps (None: not made yet)."""
    read_on_hub = hub_inputs(step)
    waiting = sorted({model.target for model in step.models.values() if model.kind == "step" and made[model.target] is None})
    if waiting:
        known = {field_path: model.target for field_path, model in step.models.items()}
        subject = f"its input {waiting[0]} is" if len(waiting) == 1 else f"its inputs {', '.join(waiting)} are"
        return StepPlan(step.name, step.stage, "run", f"{subject} made in this run", None, known, read_on_hub)
    if not is_known(step):
        known = {field_path: model.input.ref for field_path, model in step.models.items()}
        return StepPlan(step.name, step.stage, "run", "its inputs on the Hub could not be looked up", None, known, read_on_hub)
    models = {field_path: resolve(model, registry, made) for field_path, model in step.models.items()}
    parts = parts_of(step, {field_path: content_of(model) for field_path, model in models.items()})
    fingerprint = fingerprint_of(parts)
    inputs = {field_path: model.record.ref if model.record is not None else model.ref for field_path, model in models.items()}
    makes_model, name = STAGES[step.stage].makes_model, recipe.model_name(step)
    before = _model_before(registry, name, fingerprint) if makes_model else _result_before(home, name, fingerprint)
    action, reason = ("reuse", before.reuse) if before.reuse else _action(before, name, parts, work_folder(home, fingerprint))
    return StepPlan(step.name, step.stage, action, reason, fingerprint, inputs, read_on_hub, parts, models, before.record)


@dataclass(frozen=True)
class _Before:
    """What earlier runs of a step have left."""

    reuse: str = ""  # why its outcome can be reused; empty if it cannot
    record: ModelRecord | None = None  # the model to reuse
    damage: str = ""  # what is wrong with a model that otherwise could be reused
    parts: FingerprintParts | None = None  # of the last complete version, with other settings, inputs, data or code


def _model_before(registry: Registry, name: str, fingerprint: str) -> _Before:
    # A model that another recipe or sweep made with the same fingerprint is adopted under this step's name.
    record = registry.find_fingerprint(fingerprint, name) or registry.find_fingerprint(fingerprint)
    damage = "; ".join(registry.verify(record.ref)) if record is not None else ""
    if record is not None and not damage:
        return _Before(f"{record.ref} was made with the same settings, inputs, data and code", record)
    versions = [version.manifest["fingerprint_parts"] for version in registry.versions(name) if version.manifest["fingerprint"]]
    return _Before(damage=damage, parts=versions[-1] if versions else None)


def _result_before(home: Path, name: str, fingerprint: str) -> _Before:
    if load_result(home, fingerprint) is not None:
        return _Before("its result exists with the same settings, inputs, data and code")
    stored = last_result(home, name)
    return _Before(parts=stored["fingerprint_parts"] if stored is not None else None)


def _action(before: _Before, name: str, parts: FingerprintParts, work: Path) -> tuple[str, str]:
    """(run or resume, the reason) for a step without a reusable outcome. ``work``: the folder with the files of an interrupted run."""
    reason = why(before.parts, parts) if before.parts is not None else "never completed before"
    if before.damage:
        reason = f"{name} is damaged: {before.damage}"
    if (note := work / WAITING).is_file():
        return "resume", f"it waits for annotators: {note.read_text(encoding='utf-8')}"
    if is_begun(work):
        return "resume", f"an earlier run was interrupted; {reason}"
    if (other := other_attempt(work, name)) is not None:
        return "run", f"{reason}. Not continued: an interrupted run ({why(other.parts, parts)})"
    return "run", reason


def plan_table(plans: list[StepPlan], recipe: str) -> Table:
    """The plan as a terminal table. ``recipe`` is its name."""
    title = f"{recipe}: {len(plans)} step{'s' if len(plans) != 1 else ''}"
    table = Table("step", "stage", "action", "why", title=title, title_justify="left")
    for step in plans:
        table.add_row(step.name, step.stage, f"[{ACTION_STYLES[step.action]}]{step.action}[/]", escape(step.reason))
    return table


def plans_json(recipe: Recipe, plans: list[StepPlan], settings: Mapping[str, object] | None = None) -> str:
    """The plan as JSON. ``settings`` are added per step."""
    steps = [{**step.as_json(), **({"settings": settings[step.name]} if settings and step.name in settings else {})} for step in plans]
    return json.dumps({"recipe": recipe.name, "seed": recipe.seed, "steps": steps}, indent=2)
