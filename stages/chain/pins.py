"""Resolve what a recipe reads on the Hub to commits when it is planned, so that later changes on the Hub have no effect.

Uses only metadata, before any training. Checks that a model exists, is accessible and has loadable weights, and that a data set has the
config, the split and the columns that the recipe names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stages.config import DataSource, ModelInput
from stages.corpora.tables.hub import check_source
from stages.errors import DataError, HubError, HubMissing, HubUnreachable, ModelError
from stages.hub.models import adapter_base, check_model, download
from stages.hub.repositories import COMMIT, Kind, Repository, look_up
from stages.models.adapters.stacks import ADAPTER_CONFIG, check_adapter
from stages.recipe.schema import Recipe, RecipeStep, Reference, data_inputs, with_sources
from stages.recipe.source import Steps, parse_path
from stages.registry.references import ResolvedModel

Key = tuple[Kind, str, str | None]  # kind, id, revision as written


@dataclass
class Commits:
    """The resolved repositories. During the lifetime of this object, a name always means the same commit."""

    repositories: dict[Key, Repository] = field(default_factory=dict)
    bases: dict[str, tuple[str, Repository]] = field(default_factory=dict)  # base models of adapters, by ref or folder of the adapter
    unreached: list[str] = field(default_factory=list)  # messages; only if the caller continues without the Hub

    def look_up(self, kind: Kind, identifier: str, revision: str | None) -> Repository:
        """The repository at the commit of ``revision``. Asks the Hub once. Raises an error for a model that cannot be loaded."""
        key: Key = (kind, identifier, revision)
        if key not in self.repositories:
            repository = look_up(kind, identifier, revision)
            if kind == "model":
                check_model(repository)
            self.repositories[key] = repository
        return self.repositories[key]


def pinned(recipe: Recipe, commits: Commits) -> Recipe:
    """``recipe`` with branches and tags replaced by the resolved commits. Unresolved references are unchanged."""
    steps = [_pinned_step(step, commits) for step in recipe.steps]
    return dataclasses.replace(recipe, steps=steps, is_pinned=True)


def resolve_commits(recipe: Recipe, commits: Commits | None = None, *, needs_hub: bool = True) -> Commits:
    """Look up and check every Hub model and data set that the recipe reads. A recipe without any makes no request.

    Raises HubError or DataError with the location in the recipe. ``needs_hub=False``: if the Hub cannot be reached, store the reason in
    ``unreached`` and skip the remaining checks.
    """
    commits = commits if commits is not None else Commits()
    for step in recipe.steps:
        try:
            _resolve_models(recipe, step, commits)
            _resolve_data(recipe, step, commits)
        except HubUnreachable as error:
            if needs_hub:
                raise
            commits.unreached.append(str(error))
            if not _is_offline():
                break  # avoid a timeout for every repository
    return commits


def _is_offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def hub_inputs(step: RecipeStep) -> dict[str, str]:
    """``owner/name@commit`` of everything that a pinned step reads on the Hub, by field path; ``...@?`` if the commit is unknown."""
    commits_by_field = {}
    for field_path, model in step.models.items():
        if model.kind == "hub":
            commits_by_field[field_path] = _at(model.target, model.input.revision)
        below, name = model.base, field_path
        while below is not None:
            name = f"{name}.base"
            commits_by_field[name] = _at(below.target, below.input.revision)
            below = below.base
    commits_by_field.update({field_path: _at(source.hub_id, source.revision) for field_path, source in _hub_sources(step)})
    return commits_by_field


def is_known(step: RecipeStep) -> bool:
    """Whether the commit of everything that the step reads on the Hub is known."""
    return not any(ref.endswith("@?") for ref in hub_inputs(step).values())


def _at(identifier: str, revision: str | None) -> str:
    return f"{identifier}@{revision if revision is not None and COMMIT.fullmatch(revision) else '?'}"


def _hub_sources(step: RecipeStep) -> Iterator[tuple[str, DataSource]]:
    for field_path, sources in data_inputs(step.config).items():
        for index, source in enumerate(sources):
            if source.on_hub and not Path(source.path).is_absolute():
                yield (f"{field_path}[{index}]" if len(sources) > 1 else field_path), source


def apart_from_folders(model: ResolvedModel) -> ResolvedModel:
    """If a Hub model's id is also a local path, replace it by the path of its copy in the cache.

    Otherwise transformers would load the local folder. The copy is downloaded if the cache does not have it.
    """
    base = apart_from_folders(model.base) if model.base is not None else None
    model = dataclasses.replace(model, base=base)
    if model.kind != "hub" or not Path(model.path).exists():
        return model
    return dataclasses.replace(model, path=str(download(look_up("model", model.path, model.input.revision))))


# Looking up


def pinned_model(model: Reference) -> Reference:
    """``model`` at the commit of its revision. Raises HubError if the Hub does not have it or it cannot be loaded."""
    commits = Commits()
    _resolve_model(model, commits)
    return _pinned_model(model, commits)


def _resolve_models(recipe: Recipe, step: RecipeStep, commits: Commits) -> None:
    for field_path, model in step.models.items():
        try:
            _resolve_model(model, commits)
        except (HubError, ModelError) as error:
            raise type(error)(f"{_location(recipe, step, field_path)}: got {model.input.ref!r}: {error}") from error


def _resolve_model(model: Reference, commits: Commits) -> None:
    if model.kind == "folder" and (named := _base_of_folder(Path(model.target))) is not None:
        _resolve_base(model.target, named, commits)
    if model.kind != "hub":
        return
    try:
        repository = commits.look_up("model", model.target, model.input.revision)
    except (HubMissing, HubUnreachable) as error:
        raise type(error)(f"{error}. Here, {model.advice}" if model.advice else str(error)) from error
    if ADAPTER_CONFIG in repository.files:
        at_commit = model.input.model_copy(update={"revision": repository.commit})
        check_adapter(ResolvedModel(model.input.ref, "hub", model.target, "", at_commit))
    _resolve_base(repository.ref, adapter_base(repository), commits)


def _resolve_base(adapter: str, named: tuple[str, str | None] | None, commits: Commits) -> None:
    """Look up an adapter's base model, if it is on the Hub, at the revision that the adapter names."""
    if named is None or Path(named[0]).exists() or named[0].startswith((".", "/", "~", "sha256:")):
        return
    try:
        repository = commits.look_up("model", *named)
        commits.bases[adapter] = (named[0], repository)
        _resolve_base(repository.ref, adapter_base(repository), commits)
    except HubError as error:
        raise type(error)(f"the base of the adapter {adapter}: {error}") from error


def _base_of_folder(folder: Path) -> tuple[str, str | None] | None:
    try:
        config: dict[str, str | None] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    base = config.get("base_model_name_or_path")
    if not base or (folder / str(base)).exists():
        return None
    return str(base), config.get("revision")


def _resolve_data(recipe: Recipe, step: RecipeStep, commits: Commits) -> None:
    for field_path, source in _hub_sources(step):
        try:
            repository = commits.look_up("dataset", source.hub_id, source.revision)
            check_source(repository, source, default_split(step.stage, field_path))
        except HubMissing as error:
            raise HubMissing(f"{_location(recipe, step, field_path)}: got {source.path!r}: {error}{_beside(recipe, source)}") from error
        except (HubError, DataError) as error:
            raise type(error)(f"{_location(recipe, step, field_path)}: {error}") from error


def _beside(recipe: Recipe, source: DataSource) -> str:
    """Hint about a local folder that could have been meant instead of the Hub id."""
    owner, _, name = source.path.partition("/")
    for folder in (Path.cwd(), Path(recipe.source.file).resolve().parent):
        if name and (folder / owner).is_dir():
            return f". The folder {folder / owner} has no {name!r} either"
    return ""


def default_split(stage: str, field_path: str) -> str:
    """The split that a stage reads if a source names none."""
    fields = field_path.replace("[", ".").replace("]", "").split(".")
    if {"validation", "choose", "selection"} & set(fields):
        return "validation"
    trained_on = {"few_shot", "exclude"} & set(fields)
    return "test" if stage == "evaluation" and not trained_on else "train"


def _location(recipe: Recipe, step: RecipeStep, field_path: str) -> str:
    return recipe.source.location(("steps", step.index, *parse_path(field_path)))


# Writing commits into a recipe


def _pinned_step(step: RecipeStep, commits: Commits) -> RecipeStep:
    def at_commit(source: DataSource, _: Steps) -> DataSource:
        repository = commits.repositories.get(("dataset", source.hub_id, source.revision)) if source.on_hub else None
        return source if repository is None else source.model_copy(update={"revision": repository.commit})

    models = {field_path: _pinned_model(model, commits) for field_path, model in step.models.items()}
    return dataclasses.replace(step, config=with_sources(step.config, (), at_commit), models=models)


def _pinned_model(model: Reference, commits: Commits) -> Reference:
    adapter = model.target
    if model.kind == "hub":
        repository = commits.repositories.get(("model", model.target, model.input.revision))
        if repository is None:
            return model
        adapter = repository.ref
        model = dataclasses.replace(model, input=model.input.model_copy(update={"revision": repository.commit}))
    return dataclasses.replace(model, base=_base_reference(model.input, commits.bases, adapter))


def _base_reference(adapter: ModelInput, bases: Mapping[str, tuple[str, Repository]], key: str) -> Reference | None:
    if key not in bases:
        return None
    name, repository = bases[key]
    source = ModelInput(ref=name, revision=repository.commit, trust_remote_code=adapter.trust_remote_code)
    return Reference("hub", repository.id, source, base=_base_reference(source, bases, repository.ref))
