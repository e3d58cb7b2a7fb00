"""The fingerprint of a step: everything that its result depends on. The parts are stored, so that a re-run can name its reason."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel

from stages.config import DataSource, ModelInput, Strict
from stages.corpora.files import fingerprint
from stages.errors import some_of
from stages.json_types import JsonObject, by_path, json_object
from stages.process.packages import source_of
from stages.recipe.functions import addresses
from stages.recipe.schema import STAGES, RecipeStep, data_inputs, former_names
from stages.registry.contents import file_sha256
from stages.registry.record import FingerprintParts

PACKAGE = Path(__file__).parents[1]
# Infrastructure that does not influence results: an edit of it must not cause a re-run of all steps.
PLUMBING = {
    *(
        "chain",
        "cli",
        "commands",
        "config",
        "errors",
        "hub",
        "json_types",
        "labelling",
        "process",
        "recipe",
        "registry",
        "run_summary",
        "step",
    ),
    "training.checkpoints",
}
TEXT_SUFFIXES = (".html", ".jinja", ".css", ".js", ".yaml", ".txt")


def parts_of(step: RecipeStep, inputs: Mapping[str, str]) -> FingerprintParts:
    """The parts of a step's fingerprint. ``inputs``: content digest of each model input, by field path."""
    settings = settings_of(step.config)
    return {
        "stage": step.stage,
        "settings": settings,
        "seed": step.seed,
        "inputs": dict(inputs),
        "data": data_fingerprints(step.config),
        "code": code_version(STAGES[step.stage].run.partition(":")[0], [address.partition(":")[0] for address in addresses(settings)]),
    }


def fingerprint_of(parts: Mapping[str, object]) -> str:
    """Hex SHA-256 of the parts in canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def settings_of(config: BaseModel) -> JsonObject:
    """A step's settings without its name and seed.

    Models and data are covered by their digests, so local paths and branch names do not count.
    """
    settings = {name: _setting(getattr(config, name)) for name in type(config).model_fields if name not in ("name", "seed", "stage")}
    if isinstance(config, Strict):
        _leave_out(settings, config.without_effect())
        settings = config.former_settings(settings)
    return settings


def _leave_out(settings: JsonObject, paths: set[str]) -> None:
    """Remove the dotted ``paths`` from nested settings."""
    for path in paths:
        *outer, last = path.split(".")
        inner = settings
        for name in outer:
            inner = json_object(inner[name], path)
        del inner[last]


def _setting(value: object) -> object:
    if isinstance(value, BaseModel):
        settings = {name: _setting(getattr(value, name)) for name in type(value).model_fields}
        if isinstance(value, Strict):
            _leave_out(settings, value.without_effect())
            settings = value.former_settings(settings)
        if isinstance(value, ModelInput):
            del settings["ref"], settings["revision"]
        if isinstance(value, DataSource):
            del settings["revision"]
            if Path(value.path).is_absolute():
                settings["path"] = "".join(Path(value.path).suffixes[-2:])  # the suffix selects the reader
        return settings
    if isinstance(value, dict):
        return {key: _setting(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_setting(item) for item in value]
    return value


def data_fingerprints(config: BaseModel) -> dict[str, str]:
    """Fingerprint of the content of each data input, by field path."""
    inputs = data_inputs(config)
    if not inputs:
        return {}

    return {field_path: fingerprint(sources) for field_path, sources in inputs.items()}


def code_version(module: str, functions: list[str] | None = None) -> str:
    """Hash of the source code of a stage: its module, its imports from this package except PLUMBING, and the named functions' modules."""
    files: set[Path] = set()
    foreign: list[Path] = []
    for name in [module, *(functions or [])]:
        if name == "stages" or name.startswith("stages."):
            _collect(name, files)
        else:
            foreign += [source] if (source := source_of(name)) is not None else []
    hashes = [f"{path.relative_to(PACKAGE).as_posix()} {file_sha256(path)}" for path in sorted(files)]
    hashes += sorted(f"{path.name} {file_sha256(path)}" for path in foreign)
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _collect(module: str, files: set[Path]) -> None:
    """Add the files of ``module`` and, recursively, of the package modules that it imports."""
    names = module.split(".")[1:]
    if not names or {names[0], ".".join(names)} & PLUMBING:
        return
    path = PACKAGE.joinpath(*names)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.exists() or file in files:
        return
    files.add(file)
    if file.parent != PACKAGE:
        files.update(item for item in file.parent.iterdir() if item.suffix in TEXT_SUFFIXES)
    for imported in _imports(file, module if path.is_dir() else module.rpartition(".")[0]):
        _collect(imported, files)


def _imports(file: Path, package: str) -> Iterator[str]:
    """Names that ``file`` imports from this package, including imports inside functions. A name may be an attribute or a module."""
    yield from _imports_of(file.read_text(encoding="utf-8"), package)


@lru_cache(maxsize=512)
def _imports_of(text: str, package: str) -> tuple[str, ...]:
    return tuple(_walk_imports(text, package))


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All statements of a program, also those inside others. Expressions contain none, so they are not visited."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _statements(getattr(node, name, ()))


def _walk_imports(text: str, package: str) -> Iterator[str]:
    for node in _statements(ast.parse(text).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("stages."))
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parent, source] if source else parent)
            if source == "stages" or source.startswith("stages."):
                yield source
                yield from (f"{source}.{alias.name}" for alias in node.names)


def why(old: FingerprintParts, new: FingerprintParts) -> str:
    """Text that names the parts of the fingerprint that changed between two versions of a step."""
    changes = []
    if old.get("stage") != new["stage"]:
        changes.append(f"stage changed ({old.get('stage')} -> {new['stage']})")
    before, after = by_path(old.get("settings", {})), by_path(new["settings"])
    settings = [key for key in sorted({*before, *after}) if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    names = former_names(new["stage"])
    shown = [f"{names.get(key, key)} ({_word(before, key)} -> {_word(after, key)})" for key in settings]
    if settings:
        changes.append(f"setting changed: {some_of(shown, 3)}")
    if old.get("seed") != new["seed"]:
        changes.append(f"seed changed ({old.get('seed')} -> {new['seed']})")
    for noun, then, now in (("input", old.get("inputs", {}), new["inputs"]), ("data", old.get("data", {}), new["data"])):
        changed_fields = [field_path for field_path in sorted({*then, *now}) if then.get(field_path) != now.get(field_path)]
        if changed_fields:
            changes.append(f"{noun} changed: {', '.join(changed_fields)}")
    if old.get("code") != new["code"]:
        changes.append("code of the stage changed")
    return "; ".join(changes) or "no complete version with these settings"


_ABSENT = object()


def _word(settings: Mapping[str, object], key: str) -> str:
    return repr(settings[key]) if key in settings else "absent"
