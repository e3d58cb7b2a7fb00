"""The content of a pushed repository: the files of a version, of the adapters and the base below it, and ``tristage.json``.

README.md                 the model card
config.json, ...          the version's own files, where from_pretrained looks for them
bases/1/..., bases/2/...  for an adapter: the registry versions that it was trained on, nearest first
tristage.json             manifests and lineage of all versions; a repository without it was not pushed by `stages models push`
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import cast

from stages.errors import HubError, RegistryError
from stages.json_types import Content, with_values
from stages.registry.contents import UNSAFE_SUFFIXES, digest_of
from stages.registry.ledger import ROLES, Registry
from stages.registry.record import CardRow, Lineage, Manifest, ModelRecord, StoredEvaluation, written_once

FORMAT = 1
DESCRIPTION = "tristage.json"
CARD = "README.md"
BASES = "bases"
LOCAL_PATH = re.compile(r"/[^/\n]+(/[^/\n]+)+/?")
"""An absolute local path with at least two parts. A shared card or manifest contains only its last part."""
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class SharedVersion:
    """One version in a repository. ``folder`` is "" for the model itself and ``bases/N`` for its bases."""

    folder: str
    manifest: Manifest
    lineage: Lineage

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def ref(self) -> str:
        """The reference of the version in the registry that it was pushed from."""
        return f"{self.name}@{self.manifest['version']}"

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def amount(self) -> str:
        """The number of its files and their total size, as text."""
        size = sum(int(file["size"]) for file in self.manifest["files"])
        return f"{len(self.manifest['files'])} files, {size / 2**20:.1f} MiB"

    def path_of(self, name: str) -> str:
        """The path of its file ``name`` in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    @property
    def paths(self) -> list[str]:
        """The paths of its files in the repository."""
        return [self.path_of(file["path"]) for file in self.manifest["files"]]


def versions_to_share(record: ModelRecord, registry: Registry) -> list[tuple[ModelRecord, SharedVersion]]:
    """The version and, for an adapter, the registry versions below it, nearest first.

    Raises RegistryError if an adapter was trained on a local folder, or if a file has a reserved name.
    """
    versions = [record]
    while (base := versions[-1].manifest["base"]) is not None and base["kind"] != "hub":
        if base["kind"] != "registry":
            raise RegistryError(
                f"{versions[-1].ref} is an adapter on the folder {base['ref']}, which other users do not have. Train on a model of the "
                f"registry or of the Hub, or share the merge: `stages models export {record.ref} DIR`"
            )
        versions.append(registry.get(base["digest"]))
    shared = []
    for number, version in enumerate(versions):
        manifest, lineage = without_local_paths(version.manifest), without_local_paths(written_once(registry.lineage(version.ref)))
        # A pulled version is pushed as it was. The note that it was pulled belongs only to this registry.
        if "pulled" in manifest:
            pulled = manifest.pop("pulled")
            manifest["fingerprint"] = manifest["fingerprint"] or pulled["fingerprint"]
        shared.append((version, SharedVersion(f"{BASES}/{number}" if number else "", manifest, _without_origin(lineage))))
    taken = [path for path in shared[0][1].paths if path in (DESCRIPTION, CARD) or path.startswith(f"{BASES}/")]
    if taken:
        raise RegistryError(f"{record.ref} contains {taken[0]}, a name that is reserved in a pushed repository. It cannot be pushed")
    return shared


def describe(versions: list[SharedVersion], evaluations: Sequence[StoredEvaluation]) -> bytes:
    """The content of ``tristage.json``."""
    model, *bases = [{"folder": version.folder, "manifest": version.manifest, "lineage": version.lineage} for version in versions]
    content = {"format": FORMAT, "model": model, "bases": bases, "evaluations": evaluations}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def read_description(text: str, where: str) -> list[SharedVersion]:
    """The versions that a ``tristage.json`` describes, the model first.

    Raises HubError if the content is not valid. The file comes from another person, so everything in it is checked.
    """
    try:
        content = json.loads(text)
        if int(content["format"]) > FORMAT:
            raise HubError(f"{where} was pushed by a newer tristage (format {content['format']}; this one reads {FORMAT}); upgrade it")
        entries = [content["model"], *content["bases"]]
        folders = ["", *(f"{BASES}/{number}" for number in range(1, len(entries)))]
        versions = [SharedVersion(folder, entry["manifest"], entry["lineage"]) for folder, entry in zip(folders, entries, strict=True)]
        for version in versions:
            _check(version, where)
        for version, below in zip(versions, versions[1:], strict=False):
            base = version.manifest["base"]
            if base is None or base["digest"] != below.digest:
                raise HubError(f"{where}: {version.ref} is based on another model than the one in {below.folder}. Push it again")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{DESCRIPTION} of {where} cannot be read ({type(error).__name__}: {error}). Push the model again") from error
    return versions


def read_evaluations(text: str, where: str) -> list[StoredEvaluation]:
    """The evaluations of the model that a ``tristage.json`` describes. Raises HubError if they are not valid."""
    try:
        return [_evaluation(entry) for entry in json.loads(text).get("evaluations", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"the evaluations in {DESCRIPTION} of {where} cannot be read ({type(error).__name__}: {error})") from error


def _evaluation(entry: Mapping[str, object]) -> StoredEvaluation:
    """One evaluation with the types that it must have. Raises ValueError, KeyError or TypeError for others."""
    rows: list[CardRow] = []
    for row in cast("list[dict[str, object]]", entry["rows"]):
        rate, n = str(row["rate"]), int(str(row["n"]))
        float(rate)  # the Hub's metadata need a number
        rows.append({"other": _line(row["other"]), "judge": _line(row["judge"]), "rate": rate, "interval": _line(row["interval"]), "n": n})
    return {"title": _line(entry["title"]), "verdict": str(entry["verdict"]), "rows": rows, "name": _line(entry["name"])}


def _line(value: object) -> str:
    """``value`` on one line. Raises TypeError unless it is a text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return " ".join(value.split())


def _check(version: SharedVersion, where: str) -> None:
    """Raise HubError if a manifest has a role, a digest or file names that no registry version can have.

    Raises TypeError for wrong types.
    """
    manifest = version.manifest
    files = {str(file["path"]): str(file["sha256"]) for file in manifest["files"]}
    strange = [path for path in files if not _is_plain(path)]
    if strange or not files:
        raise HubError(f"{where}: {version.ref} lists {strange[0] if strange else 'no file'!r}; refused")
    unsafe = [path for path in files if path.endswith(UNSAFE_SUFFIXES)]
    if unsafe:
        raise HubError(f"{where}: {version.ref} has {unsafe[0]}, a pickle file, which can run code when it is read; refused")
    if manifest["role"] not in ROLES or DIGEST.fullmatch(version.digest) is None or digest_of(files) != version.digest:
        raise HubError(f"{where}: the digest of {version.ref} does not match its files: {DESCRIPTION} was changed. Push the model again")
    values: Mapping[str, object] = manifest
    for key, kind in (("parents", list), ("metrics", dict), ("recipe_step", dict), ("data", dict), ("packages", dict), ("extra", dict)):
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} is a {type(values[key]).__name__}")
    base = manifest["base"]
    if base is not None and not (base["kind"] == "registry" or (base["kind"] == "hub" and HUB_NAME.fullmatch(base["path"]))):
        raise HubError(f"{where}: {version.ref} is based on {base['ref']!r}, which is neither on the Hub nor in the repository; refused")
    if not isinstance(version.lineage["parents"], list):
        raise TypeError("the lineage has no list of parents")


def _is_plain(path: str) -> bool:
    """Whether a path stays inside its folder and names no hidden file."""
    parts = PurePosixPath(path).parts
    return bool(parts) and "\\" not in path and PurePosixPath(path).as_posix() == path and not any(part[0] in "./" for part in parts)


def without_local_paths(content: Content) -> Content:
    """``content`` with each local path cut to its last part, because the folders mean nothing on another machine."""
    return with_values(content, _last_part)


def _last_part(value: object) -> object:
    return PurePosixPath(value).name if isinstance(value, str) and LOCAL_PATH.fullmatch(value) else value


def local_paths(value: object) -> Iterator[str]:
    """Every local path in ``value``."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from local_paths(item)
    elif isinstance(value, str) and LOCAL_PATH.fullmatch(value):
        yield value


def _without_origin(node: Lineage) -> Lineage:
    """A lineage without the marks on entries that this registry knows only from a pulled model."""
    kept: Lineage = {**node, "parents": [_without_origin(parent) for parent in node["parents"]]}
    kept.pop("recorded", None)
    return kept
