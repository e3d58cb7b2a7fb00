"""The recipe schema: strict and typed, checked completely before a model is loaded. Errors name the line, the value and the next move."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from stages.config import HUB, LARGEST_SEED, DataSource, ModelInput, StepConfig, Strict, as_written, default_at
from stages.errors import DataError, RecipeError, RegistryError, StagesError
from stages.hub.ids import is_hub_id, names_hub_repository
from stages.json_types import JsonObject
from stages.process.redaction import find_secret
from stages.process.trackers import Tracker, check_trackers
from stages.recipe.functions import addresses, check_function
from stages.recipe.preset_defaults import Applied, apply_preset
from stages.recipe.source import RecipeSource, Steps, find_recipe, named, nearest, parse_path, read, show
from stages.recipe.validation import Block, validate
from stages.registry.ledger import Registry
from stages.registry.names import DIGEST, REFERENCE, check_name

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True)
class Stage:
    """Import paths of a stage. They are imported only if a recipe uses the stage."""

    config: str  # module:class of the step's config
    run: str  # module:function
    memory: str | None = None  # module that plans its memory
    makes_model: bool = True


def _stage(name: str, config: str, *, run: str = "run", makes_model: bool = True) -> Stage:
    """The parts of a stage in the folder ``stages/<name>``."""
    folder = f"stages.{name}"
    return Stage(f"{folder}.config:{config}", f"{folder}.{run}:run", f"{folder}.memory", makes_model)


STAGES: dict[str, Stage] = {
    "pretraining": _stage("pretraining", "PretrainingConfig"),
    "sft": _stage("sft", "SFTStepConfig"),
    "reward_model": _stage("reward_model", "RewardModelConfig"),
    "sentiment": _stage("sentiment", "SentimentConfig"),
    "dpo": _stage("dpo", "DPOStepConfig"),
    "ppo": _stage("ppo", "PPOStepConfig", run="loop"),
    "evaluation": _stage("evaluation", "EvaluationConfig", makes_model=False),
}


def imported(address: str) -> Any:
    """The object at ``address`` (module:name) of a stage. Imports the module."""
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)


def config_class(stage: str) -> type[StepConfig]:
    """The class of the step configs of a stage. Imports the stage's ``config`` module."""
    config: type[StepConfig] = imported(STAGES[stage].config)
    return config


class RecipeHeader(Strict):
    """The fields of a recipe outside its steps."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the recipe; its models are <recipe>/<step>.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Random seed of every step that does not set its own.")
    description: str | None = Field(None, description="Purpose of the recipe in one sentence.")
    trackers: Annotated[list[Tracker], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        ["tensorboard"], description="Metric trackers besides metrics.jsonl: tensorboard, wandb, trackio, or several of them; []: none."
    )
    steps: list[JsonObject] = Field(description="The steps in the order of execution.")


@dataclass(frozen=True)
class Reference:
    """A resolved model reference: ``kind`` step | folder | registry | hub, and ``target``, the step name, path, reference or Hub id.

    ``advice``: similar local names, for the message if the Hub does not have the id. ``base``: for an adapter, its base model on the Hub at
    a commit; known after the recipe is pinned (chain/pins.py).
    """

    kind: str
    target: str
    input: ModelInput
    advice: str | None = None
    base: Reference | None = None


@dataclass(frozen=True)
class RecipeStep:
    """One validated step: its config (with absolute data paths) and its model inputs by field path."""

    index: int
    config: StepConfig  # of the subclass of its stage
    models: dict[str, Reference]
    seed: int
    preset: Applied | None = None  # the applied preset

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def stage(self) -> str:
        return self.config.stage


@dataclass(frozen=True)
class Recipe:
    """A completely validated recipe."""

    name: str
    seed: int
    description: str | None
    steps: list[RecipeStep]
    source: RecipeSource = field(repr=False)
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    is_pinned: bool = False  # whether models and data of the Hub are pinned to commits (chain/pins.py)

    def model_name(self, step: RecipeStep) -> str:
        """The registry name of the step's model."""
        return f"{self.name}/{step.name}"

    def notices(self) -> list[str]:
        """One line for each field that is written with the name of an earlier version: its location, and its name today."""
        notices = []
        for path, former in self.source.former.items():
            location = self.source.location(path).removesuffix(f" (written as {former})")
            notices.append(f"{location} is the name of {former} today; the former name still works")
        return notices

    def check_data(self, step: RecipeStep) -> None:
        """Check the functions that a step names, and its data (columns, empty splits). No model is loaded.

        Raises RecipeError or DataError with the location in the recipe.
        """
        check: Callable[[], None] | None = getattr(step.config, "check_data", None)
        path: Steps = ("steps", step.index)
        address = ""
        try:
            for address in addresses(step.config):
                check_function(address)
            address = ""
            if check is not None:
                check()
        except (DataError, RecipeError) as error:
            overrides = self.source.overrides_with(path, address) or self.source.overrides_of(path, data_inputs(step.config))
            location = f"{named(overrides)}: {show(path)}" if overrides else self.source.location(path)
            raise type(error)(f"{location} ({step.name}): {error}") from error


def load_recipe(path: Path | str, overrides: Sequence[str] = (), registry: Registry | None = None) -> Recipe:
    """Read, override and validate a recipe. Nothing is run and no model is loaded.

    Raises RecipeError with location, value and next move. If the recipe is valid without the overrides, the location is the override.
    """
    path = find_recipe(path)
    try:
        return _load(path, overrides, registry)
    except RecipeError as error:
        if not overrides or str(error).startswith("override "):
            raise
        guilty = _faulty_overrides(str(error), path, overrides, registry)
        if not guilty:
            raise
        raise RecipeError(f"{named(guilty)}: {str(error).removeprefix(str(path)).lstrip(':0123456789 ')}") from error


def _faulty_overrides(message: str, path: Path | str, overrides: Sequence[str], registry: Registry | None) -> list[str]:
    """The overrides that cause the error ``message``; empty if the file alone causes it."""

    def fails_so(kept: Sequence[str]) -> bool:
        try:
            _load(path, kept, registry)
        except RecipeError as error:
            return str(error) == message
        return False

    if fails_so(()):
        return []
    return [text for index, text in enumerate(overrides) if not fails_so([*overrides[:index], *overrides[index + 1 :]])] or list(overrides)


def _load(path: Path | str, overrides: Sequence[str], registry: Registry | None) -> Recipe:
    source = read(path)
    _refuse_secrets(source, overrides)
    _rename_fields(source)
    for text in overrides:
        source.override(text, rename=partial(_current_path, source))
    header = validate(RecipeHeader, source.content, (), source)
    read_steps = [_step_config(content, index, source) for index, content in enumerate(header.steps)]
    configs = [config for config, _ in read_steps]
    _check_names(header.name, configs, source)
    folders = [Path.cwd(), Path(path).resolve().parent]
    configs = [
        with_sources(
            config, ("steps", index), lambda data, at: data.model_copy(update={"path": _data_path(data.path, at, folders, source)})
        )
        for index, config in enumerate(configs)
    ]
    _check_order(header.name, configs, source)
    steps = []
    for index, config in enumerate(configs):
        models = {}
        for field_path, model in model_inputs(config).items():
            step = _step_named(model.ref, header.name, configs)
            if step is not None:
                models[field_path] = Reference("step", step, model)
                continue
            try:
                models[field_path] = find_model(model, registry, folders, [other.name for other in configs[:index]], header.name)
            except StagesError as error:
                raise source.error(("steps", index, *parse_path(field_path)), str(error)) from error
        seed = header.seed if config.seed is None else config.seed
        steps.append(RecipeStep(index, config, models, seed, read_steps[index][1]))
    check_trackers(header.trackers)
    return Recipe(header.name, header.seed, header.description, steps, source, list(header.trackers))


def former_names(stage: object) -> dict[str, str]:
    """The flat field names of earlier versions, and their path today; empty for an unknown stage."""
    if not isinstance(stage, str) or stage not in STAGES:
        return {}
    return config_class(stage).former_names


def _rename_fields(source: RecipeSource) -> None:
    """Move fields with names of earlier versions to their path today. Raises RecipeError if a field is set under both names."""
    for index, step in enumerate(source.steps):
        if not isinstance(step, dict):
            continue
        for former, path in former_names(step.get("stage")).items():
            if former in step:
                source.move(("steps", index, former), ("steps", index, *parse_path(path)))


def _current_path(source: RecipeSource, path: Steps) -> Steps:
    """The path today of a step's field that is written with the name of an earlier version; other paths are unchanged."""
    step = source.steps[path[1]] if len(path) > 2 and isinstance(path[1], int) and path[1] < len(source.steps) else {}
    names = former_names(step.get("stage")) if isinstance(step, dict) else {}
    return (*path[:2], *parse_path(names[str(path[2])]), *path[3:]) if names and path[2] in names else path


def _refuse_secrets(source: RecipeSource, overrides: Sequence[str]) -> None:
    """Raise RecipeError if a text of the recipe is a secret. The message gives its location, not the text."""
    advice = "recipes are stored in manifests and logs. Put the secret into an environment variable, and revoke this one"
    for path, text in _texts(source.content, ()):
        if (kind := find_secret([text])) is not None:
            raise source.error(path, f"contains {kind}; {advice}")
    for text in overrides:
        if (kind := find_secret([text])) is not None:
            raise RecipeError(f"override {text.partition('=')[0]!r}: contains {kind}; {advice}")


def _texts(value: object, path: Steps) -> Iterator[tuple[Steps, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _texts(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, index))


def model_inputs(config: BaseModel) -> dict[str, ModelInput]:
    """The models that a step reads, by field path."""
    return config.model_inputs() if hasattr(config, "model_inputs") else {}


def data_inputs(config: BaseModel) -> dict[str, list[DataSource]]:
    """The data that a step reads, by field path."""
    return config.data_inputs() if hasattr(config, "data_inputs") else {}


def _step_config(content: Mapping[str, object], index: int, source: RecipeSource) -> tuple[StepConfig, Applied | None]:
    """Return (the step's config with preset values, the applied preset)."""
    path: Steps = ("steps", index)
    if "stage" not in content:
        raise source.error(path, f"the field stage is missing; expected one of {', '.join(STAGES)}")
    if not isinstance(content["stage"], str) or content["stage"] not in STAGES:
        raise source.error((*path, "stage"), f"got {content['stage']!r}, which is not a stage; {nearest(content['stage'], STAGES)}")
    schema = config_class(content["stage"])
    filled, preset = apply_preset(content, path, source) if "preset" in schema.model_fields else (content, None)
    try:
        return validate(schema, filled, path, source), preset
    except RecipeError as error:
        raise RecipeError(f"{error}{_from_preset(str(error), preset, schema)}") from error


def _from_preset(message: str, preset: Applied | None, schema: type[StepConfig]) -> str:
    """The end of a message about settings (``value=shared``) that says which of them the preset made; empty if it made none of them."""
    made = [path for path in (preset.values if preset is not None else ()) if re.search(rf"(?<![\w.]){re.escape(path)}=", message)]
    if preset is None or not made:
        return ""
    comes = f"{made[0]} comes" if len(made) == 1 else f"{', '.join(made)} come"
    try:
        defaults = ", ".join(f"{path}: {as_written(default_at(schema, path))}" for path in made)
    except LookupError:
        return f". {comes} from preset: {preset.name}; set another value in the step"
    return f". {comes} from preset: {preset.name}; to do without, write the default into the step ({defaults})"


def _check_names(recipe: str, configs: list[StepConfig], source: RecipeSource) -> None:
    first: dict[str, int] = {}
    for index, config in enumerate(configs):
        path: Steps = ("steps", index, "name")
        if config.name in first:
            raise source.error(path, f"got {config.name!r}, which is already the name of steps[{first[config.name]}]; names must differ")
        if config.name in RecipeHeader.model_fields:
            raise source.error(path, f"got {config.name!r}, a field of the recipe itself; choose another name")
        first[config.name] = index
        try:
            check_name(f"{recipe}/{config.name}")
        except RegistryError as error:
            raise source.error(path, str(error)) from error


# Model references


def _step_named(ref: str, recipe: str, configs: list[StepConfig]) -> str | None:
    name = ref.removeprefix(f"{recipe}/")
    return name if name in {config.name for config in configs} else None


def _check_order(recipe: str, configs: list[StepConfig], source: RecipeSource) -> None:
    """Check that every step reads only models of earlier steps."""
    order = {config.name: index for index, config in enumerate(configs)}
    reads = {config.name: [_step_named(model.ref, recipe, configs) for model in model_inputs(config).values()] for config in configs}
    for index, config in enumerate(configs):
        for field_path, model in model_inputs(config).items():
            target = _step_named(model.ref, recipe, configs)
            if target is None:
                continue
            path: Steps = ("steps", index, *parse_path(field_path))
            if target == config.name:
                raise source.error(path, f"got {model.ref!r}, a cycle: the step {target!r} refers to itself; expected an earlier step")
            if order[target] > index:
                cycle = " -> ".join([config.name, *_path_between(target, config.name, reads)])
                if cycle.endswith(f"-> {config.name}"):
                    raise source.error(path, f"got {model.ref!r}, a cycle: {cycle}; a step reads earlier steps only")
                later = f"a later step (steps[{order[target]}])"
                raise source.error(path, f"got {model.ref!r}, {later}; move it before {config.name!r}")
            if not STAGES[configs[order[target]].stage].makes_model:
                raise source.error(path, f"got {model.ref!r}, a step of stage {configs[order[target]].stage!r}, which makes no model")


def _path_between(start: str, target: str, reads: dict[str, list[str | None]]) -> list[str]:
    """A path of steps from ``start`` to ``target`` along their inputs; empty if there is none."""
    trail: list[list[str]] = [[start]]
    seen = {start}
    while trail:
        path = trail.pop()
        if path[-1] == target:
            return path
        for name in reads[path[-1]]:
            if name is not None and name not in seen:
                seen.add(name)
                trail.append([*path, name])
    return []


def find_model(
    model: ModelInput, registry: Registry | None, folders: Sequence[Path], steps: Sequence[str] = (), recipe: str | None = None
) -> Reference:
    """Resolve a reference that is not a step: an existing model folder, a registry reference, or a Hub id.

    Only exact names count. An id that is merely similar to a step or version is a Hub id; ``Reference.advice`` keeps the similar name for
    the message if the Hub does not have the id. ``steps`` are the step names to suggest. Raises RecipeError or RegistryError.
    """
    ref = model.ref
    if ref.startswith(HUB):
        return Reference("hub", _hub_id(ref), model)
    looks_like_path = ref.startswith((".", "/", "~"))
    bare_folder = None
    for folder in folders:
        path = _local(folder, ref)
        if path is None:
            continue
        if path.is_dir() and ((path / "config.json").exists() or (path / "adapter_config.json").exists()):
            return Reference("folder", str(path), model)
        if path.is_dir() and looks_like_path:
            raise RecipeError(f"got {ref!r}, a folder without config.json; expected a model as save_pretrained writes it")
        bare_folder = path if path.is_dir() else bare_folder
    if looks_like_path:
        raise RecipeError(f"got {ref!r}, a folder that does not exist (looked in {' and '.join(map(str, dict.fromkeys(folders)))})")
    names = {record.name for record in registry.records()} if registry is not None else set()
    is_known = (match := REFERENCE.fullmatch(ref)) is not None and match["name"] in names
    if registry is not None and (is_known or DIGEST.fullmatch(ref) or "@" in ref):
        return Reference("registry", registry.get(ref).ref, model)
    known = [*steps, *(f"{recipe}/{step}" for step in steps if recipe), *sorted(names)]
    near = difflib.get_close_matches(ref, known, n=1, cutoff=0.75)
    advice = f"did you mean {near[0]!r}?" if near else None
    if advice is None and bare_folder is not None:
        advice = f"the folder {bare_folder} has that name but no config.json"
    if names_hub_repository(ref):
        return Reference("hub", ref, model, advice)
    advice = advice or f"earlier steps: {', '.join(steps) or 'none'}; registry: {', '.join(sorted(names)[:10]) or 'empty'}"
    raise RecipeError(f"got {ref!r}, which is not an earlier step, folder, registry reference or Hub id; {advice}")


def _hub_id(written: str) -> str:
    """The id in ``hub:owner/name``. Raises RecipeError if it is invalid."""
    identifier = written.removeprefix(HUB)
    if not is_hub_id(identifier):
        raise RecipeError(f"got {written!r}, expected hub:owner/name")
    return identifier


def _local(folder: Path, written: str) -> Path | None:
    """The path ``written`` relative to ``folder``; None if it cannot be a path (NUL byte, too long, unknown home folder)."""
    try:
        path = (folder / Path(written).expanduser()).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError):
        return None
    return path


# Data paths


def with_sources(block: Block, path: Steps, change: Callable[[DataSource, Steps], DataSource]) -> Block:
    """``block`` (at ``path`` in the recipe) with every data source below it replaced by ``change(source, path)``."""
    fields = {name: getattr(block, name) for name in type(block).model_fields}
    changed = {name: _with_sources(item, (*path, name), change) for name, item in fields.items()}
    return block.model_copy(update={name: item for name, item in changed.items() if item is not fields[name]})


def _with_sources(value: object, path: Steps, change: Callable[[DataSource, Steps], DataSource]) -> object:
    if isinstance(value, DataSource):
        return change(value, path)
    if isinstance(value, BaseModel):
        return with_sources(value, path, change)
    if isinstance(value, list):
        items = [_with_sources(item, (*path, index), change) for index, item in enumerate(value)]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, dict):
        entries = {key: _with_sources(item, (*path, key), change) for key, item in value.items()}
        return entries if any(entries[key] is not value[key] for key in value) else value
    return value


def _data_path(written: str, path: Steps, folders: Sequence[Path], source: RecipeSource) -> str:
    """The absolute path of local data; other names are unchanged. Raises RecipeError for a missing file."""
    if written.startswith("world:"):
        return written
    if written.startswith(HUB):
        try:
            _hub_id(written)
        except RecipeError as error:
            raise source.error(path, str(error)) from error
        return written
    for folder in folders:
        local = _local(folder, written)
        if local is not None and local.exists():
            return str(local)
    if not written.endswith(DATA_SUFFIXES) and (names_hub_repository(written) or (is_hub_id(written) and written.isidentifier())):
        return written  # a data set of the Hub
    raise source.error(path, f"got {written!r}, a file that does not exist{_where_it_may_be(written, folders)}")


def _where_it_may_be(written: str, folders: Sequence[Path]) -> str:
    """The end of a message about a missing data file: the next move."""
    if "$" in written:
        return (
            "; a recipe does not replace environment variables. Write the path, or set the field on the command line: STEP.FIELD=$NAME/..."
        )
    if any(mark in written for mark in "*?["):
        folder, _, pattern = written.rpartition("/")
        return f"; to select files of a folder by a pattern, write {{path: {folder or '.'}, data_files: {pattern!r}}}"
    files = dict.fromkeys(path for folder in folders if (path := _local(folder, written)) is not None)
    near = [name for path in files if path.parent.is_dir() for name in difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)]
    hint = f"; did you mean {str(Path(written).with_name(near[0]))!r}?" if near else "; expected a file, a folder, a Hub id or world:PART"
    return f" (looked for {' and '.join(map(str, files)) or 'nothing, because it is no path'}){hint}"
