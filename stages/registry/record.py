"""The record of one version of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from stages.json_types import JsonObject


class Licence(TypedDict):
    """A licence as the metadata of a model card names it: the Hub's identifier, and name and link if that is ``other``."""

    license: str
    license_name: NotRequired[str]
    license_link: NotRequired[str]


class ModelDescription(TypedDict):
    """A parent or base model as a manifest records it."""

    kind: str  # "registry" | "folder" | "hub"
    ref: str  # with the version, for a model of the registry
    digest: str
    path: NotRequired[str]  # folder or Hub id; only for a model from outside of the registry
    revision: NotRequired[str]
    quantization: NotRequired[str]
    double_quantization: NotRequired[bool]
    trust_remote_code: NotRequired[bool]
    template_arguments: NotRequired[JsonObject]
    licence: NotRequired[Licence]  # of a parent from outside of the registry, if its model card names one


class Lineage(TypedDict):
    """A model with its ancestors. Only a version of the registry has ``role``, ``created``, ``data`` and ``base``."""

    kind: str  # "registry" | "folder" | "hub"
    ref: str
    digest: str
    parents: list[Lineage]
    role: NotRequired[str]
    created: NotRequired[str]
    data: NotRequired[dict[str, str]]
    base: NotRequired[ModelDescription | None]
    path: NotRequired[str]
    revision: NotRequired[str]
    quantization: NotRequired[str]
    double_quantization: NotRequired[bool]
    trust_remote_code: NotRequired[bool]
    template_arguments: NotRequired[JsonObject]
    licence: NotRequired[Licence]
    removed: NotRequired[bool]  # the version was removed from the registry
    repeated: NotRequired[bool]  # its parents are written where it occurs first (``written_once``)
    recorded: NotRequired[str]  # the repository that described this ancestor of a pulled version


def written_once(node: Lineage, seen: set[tuple[str, str]] | None = None) -> Lineage:
    """A copy of a lineage in which only the first occurrence of a model has its parents; the others have ``repeated``.

    In memory, all occurrences share one object. Written out, the tree of a chain of n rounds would have 2^n entries.
    """
    seen = set() if seen is None else seen
    if node["parents"] and (node["ref"], node["digest"]) in seen:
        return {**node, "parents": [], "repeated": True}
    seen.add((node["ref"], node["digest"]))
    return {**node, "parents": [written_once(parent, seen) for parent in node["parents"]]}


def with_shared_parents(node: Lineage) -> Lineage:
    """The lineage that ``written_once`` was applied to: every occurrence of a model has its parents again, as one shared object."""
    first: dict[tuple[str, str], Lineage] = {}
    waiting = [node]
    while waiting:
        entry = waiting.pop()
        if not entry.get("repeated"):
            first[entry["ref"], entry["digest"]] = entry
        waiting += entry["parents"]
    made: dict[tuple[str, str], Lineage] = {}

    def shared(entry: Lineage) -> Lineage:
        key = entry["ref"], entry["digest"]
        if key not in made:
            written = first.get(key, entry)
            made[key] = {**written, "parents": []}  # stays so inside a cycle, which only a damaged description has
            made[key] = {**written, "parents": [shared(parent) for parent in written["parents"]]}
        return made[key]

    return shared(node)


class FileEntry(TypedDict):
    """A file of a version: its path relative to model/, its size in bytes and the SHA-256 of its content."""

    path: str
    size: int
    sha256: str


class CardRow(TypedDict):
    """One win rate of a model, as its card prints it."""

    other: str
    judge: str
    rate: str
    interval: str
    n: int


class StoredEvaluation(TypedDict):
    """A stored evaluation of a model."""

    title: str
    verdict: str
    rows: list[CardRow]
    name: str  # of the evaluation step


Pulled = TypedDict(
    "Pulled", {"from": str, "at": str, "fingerprint": str, "lineage": Lineage, "evaluations": NotRequired[list[StoredEvaluation]]}
)
"""Where a pulled version comes from, when it was pulled, and its fingerprint, lineage and evaluations there."""


class FingerprintParts(TypedDict, total=False):
    """Everything that the result of a step depends on. A key can be missing in a version of an earlier Tristage."""

    stage: str
    settings: JsonObject
    seed: int
    inputs: dict[str, str]  # content digest of each model input, by field path
    data: dict[str, str]  # fingerprint of each data input, by field path
    code: str


class Manifest(TypedDict):
    """The content of manifest.json."""

    manifest_version: int
    name: str
    version: int
    role: str
    digest: str
    created: str  # ISO 8601, UTC
    base: ModelDescription | None  # None for full weights
    parents: list[ModelDescription]
    recipe_step: Mapping[str, object]
    data: dict[str, str]  # fingerprints by field path
    metrics: Mapping[str, object]
    fingerprint: str
    fingerprint_parts: FingerprintParts
    extra: Mapping[str, object]
    packages: dict[str, str]
    files: list[FileEntry]
    pulled: NotRequired[Pulled]
    adopted_from: NotRequired[str]


@dataclass(frozen=True)
class ModelRecord:
    """One immutable version of a model."""

    name: str
    version: int
    digest: str  # sha256:... of the files of model/, independent of time and path
    role: str
    path: Path  # the model/ folder, for from_pretrained
    manifest: Manifest

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def folder(self) -> Path:
        """The version's folder: model/ and manifest.json."""
        return self.path.parent

    @property
    def base(self) -> ModelDescription | None:
        """The model below an adapter; None for full weights."""
        return self.manifest["base"]

    @property
    def is_adapter(self) -> bool:
        return self.manifest["base"] is not None


def imported_from(manifest: Manifest) -> JsonObject | None:
    """The ``imported`` entry of a version that another library made: library, head, notes, base. None for a version made by a step."""
    imported = manifest["extra"].get("imported")
    return imported if isinstance(imported, dict) else None
