"""The registry: immutable models on disk in the Hugging Face format, each with a manifest.

    <root>/models/<name>/<version>/model/...        files for from_pretrained (safetensors)
    <root>/models/<name>/<version>/manifest.json    role, lineage, metrics

``<name>`` may contain one slash (``quickstart/sft``). A reference is ``name`` (newest), ``name@3`` or a digest prefix ``sha256:ab12...``.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from glob import iglob
from pathlib import Path

from stages.errors import RegistryError
from stages.process.storage import sync, write_json
from stages.registry.contents import digest_of, file_sha256, files_of
from stages.registry.manifests import check_allowed, described, described_parents, filled, installed_packages
from stages.registry.names import DIGEST, REFERENCE, check_name
from stages.registry.record import (
    FingerprintParts,
    Lineage,
    Manifest,
    ModelDescription,
    ModelRecord,
    Pulled,
    StoredEvaluation,
    with_shared_parents,
)
from stages.registry.references import ResolvedModel
from stages.registry.staging import Staging

MANIFEST_VERSION = 1
ROLES = ("language_model", "reward_model", "generative_reward_model", "classifier", "value_model")


class _RemovedMeanwhile(RegistryError):
    """Another process removed a version between listing and reading it."""


Merge = Callable[[ModelRecord, Path], None]
"""Merges an adapter's record into its base and writes the result to an empty folder."""


class Registry:
    """The versions under ``root``, which is created on first publish. Safe for concurrent processes."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._models = self.root / "models"
        self._staging = Staging(self.root)

    # Publishing

    def publish(
        self,
        name: str,
        fill: Callable[[Path], None],
        *,
        role: str,
        parents: Sequence[ResolvedModel] = (),
        recipe_step: Mapping[str, object] | None = None,
        data: dict[str, str] | None = None,
        metrics: Mapping[str, object] | None = None,
        fingerprint: str = "",
        fingerprint_parts: FingerprintParts | None = None,
        base: ResolvedModel | None = None,
        extra: Mapping[str, object] | None = None,
        only_new: bool = False,
    ) -> ModelRecord:
        """Add a version of ``name`` with the files that ``fill(folder)`` writes. A crash leaves either nothing or a complete version.

        ``only_new``: if a version of ``name`` has the same files and role, return the newest one and add none.

        ``base`` is the base model of adapter weights: required if ``fill`` writes an adapter, else ignored. Raises RegistryError for an
        invalid name, for weights that are not safetensors, and for an empty folder; the registry is then unchanged.
        """
        check_name(name)
        if role not in ROLES:
            raise RegistryError(f"role {role!r} of {name!r} is not one of {', '.join(ROLES)}")
        with self._staging.folder() as staging:
            files, is_adapter = filled(staging / "model", fill, name, base)
            manifest: Manifest = {
                "manifest_version": MANIFEST_VERSION,
                "name": name,
                "version": 0,
                "role": role,
                "digest": digest_of({file["path"]: file["sha256"] for file in files}),
                "created": _now(),
                "base": described(base) if base is not None and is_adapter else None,
                "parents": described_parents(parents),
                "recipe_step": recipe_step or {},
                "data": data or {},
                "metrics": metrics or {},
                "fingerprint": fingerprint,
                "fingerprint_parts": fingerprint_parts or {},
                "extra": extra or {},
                "packages": installed_packages(),
                "files": files,
            }
            for record in reversed(self.versions(name)) if only_new else ():
                if (record.digest, record.role) == (manifest["digest"], role):
                    return record
            return self._commit(staging, manifest)

    def restore(
        self,
        name: str,
        fill: Callable[[Path], None],
        manifest: Manifest,
        *,
        origin: str,
        lineage: Lineage,
        evaluations: Sequence[StoredEvaluation] = (),
    ) -> ModelRecord:
        """Add a version that another registry made: ``fill(folder)`` writes its files, ``manifest`` is the one it has there.

        ``origin`` is where it comes from, ``lineage`` and ``evaluations`` are those it has there; all are kept under ``pulled``. The
        fingerprint is kept there too, so that no recipe of this registry takes the version for its own result. Raises RegistryError
        unless every file is as the manifest says, and the base of an adapter is here.
        """
        check_name(name)
        with self._staging.folder() as staging:
            model = staging / "model"
            model.mkdir()
            fill(model)
            is_adapter = manifest["base"] is not None
            check_allowed(model, name)
            if ("adapter_config.json" in dict(files_of(model))) != is_adapter:
                raise RegistryError(f"{name!r} from {origin}: the files and the manifest disagree on whether it is an adapter; refused")
            actual = {path: file_sha256(file) for path, file in files_of(model)}
            expected = {file["path"]: file["sha256"] for file in manifest["files"]}
            if differing := sorted(path for path in actual.keys() | expected.keys() if actual.get(path) != expected.get(path)):
                raise RegistryError(f"{name!r} from {origin}: {', '.join(differing[:3])} differs from the manifest; nothing was added")
            pulled: Pulled = {
                "from": origin,
                "at": _now(),
                "fingerprint": manifest["fingerprint"],
                "lineage": lineage,
                "evaluations": list(evaluations),
            }
            return self._commit(staging, {**manifest, "name": name, "fingerprint": "", "pulled": pulled})

    def _commit(self, staging: Path, manifest: Manifest) -> ModelRecord:
        """Make ``staging``, whose model/ is complete, the next version of the manifest's name."""
        base = manifest["base"]
        for _, file in files_of(staging / "model"):
            sync(file)
        with self._staging.lock():
            if base is not None and base["kind"] == "registry":
                self._get_digest(base["digest"], base["digest"].removeprefix("sha256:"))  # raises if the base was removed meanwhile
            folder = self._place(staging, manifest)
        # Do not read it again: another process may already have removed it, but publishing succeeded.
        return ModelRecord(manifest["name"], manifest["version"], manifest["digest"], manifest["role"], folder / "model", manifest)

    def _place(self, staging: Path, manifest: Manifest) -> Path:
        """Write the manifest with the next version number, and move ``staging`` to its place. Returns the version's folder.

        Call it under the lock. A crash leaves either nothing or a complete version.
        """
        folder = self._models / manifest["name"]
        folder.mkdir(parents=True, exist_ok=True)
        self._check_inside(folder)
        manifest["version"] = self._claim_version(folder)
        write_json(staging / "manifest.json", manifest)
        sync(staging)
        os.rename(staging, folder / str(manifest["version"]))
        sync(folder)
        return folder / str(manifest["version"])

    def adopt(self, record: ModelRecord, name: str) -> ModelRecord:
        """Add a version made by another recipe under ``name``, with the models published together with it (``<name>-value``).

        Files are hard-linked if the file system allows it, because versions never change.
        """
        versions = [
            other
            for other in self.records()
            if other.name.startswith(f"{record.name}-") and other.manifest["fingerprint_parts"] == record.manifest["fingerprint_parts"]
        ]
        newest = {other.name: other for other in versions}  # records() sorts versions, so the newest wins
        for other in newest.values():
            self._adopt(other, name + other.name.removeprefix(record.name))
        return self._adopt(record, name)

    def _adopt(self, record: ModelRecord, name: str) -> ModelRecord:
        check_name(name)
        with self._staging.folder() as staging:
            shutil.copytree(record.path, staging / "model", copy_function=_link)
            with self._staging.lock():
                folder = self._place(staging, {**record.manifest, "name": name, "created": _now(), "adopted_from": record.ref})
        return self._read(folder)

    def _claim_version(self, folder: Path) -> int:
        """The next version number. Call it under the lock. Numbers of removed versions are not reused, so old references stay valid."""
        counter = folder / "last_version"
        try:
            last = int(counter.read_text())
        except (OSError, ValueError):  # missing or damaged
            last = 0
        version = max([last, *_versions(folder)]) + 1
        write_json(counter, version)
        return version

    # Reading

    def get(self, ref: str) -> ModelRecord:
        """Find the record of ``name`` (newest), ``name@3`` or ``sha256:prefix``. Raises RegistryError with the nearest names."""
        if match := DIGEST.fullmatch(ref):
            return self._get_digest(ref, match["prefix"])
        match = REFERENCE.fullmatch(ref)
        if match is None:
            raise RegistryError(f"{ref!r} is not a registry reference; expected name, name@3 or sha256:<at least 4 hex digits>")
        name, version = match["name"], match["version"]
        while True:
            versions = _versions(self._models / name)
            if not versions:
                raise RegistryError(f"no model named {name!r} in {self.root}; {self._nearest(name)} Or run its recipe first")
            if version is not None and int(version) not in versions:
                raise RegistryError(f"{name!r} has no version {version} in {self.root}; it has {', '.join(map(str, versions))}")
            try:
                return self._read(self._models / name / (version or str(versions[-1])))
            except _RemovedMeanwhile:
                continue  # list the versions again

    def _get_digest(self, ref: str, prefix: str) -> ModelRecord:
        matches = [record for record in self.records() if record.digest.startswith(f"sha256:{prefix}")]
        if not matches:
            raise RegistryError(f"no model whose digest begins with {ref!r} in {self.root}; `stages models list` shows the digests")
        if len({record.digest for record in matches}) > 1:
            names = ", ".join(f"{record.ref} {record.digest[:23]}" for record in matches)
            raise RegistryError(f"{ref!r} matches several digests: {names}. Give more digits")
        return max(matches, key=lambda record: (record.manifest["created"], record.name, record.version))

    def _nearest(self, name: str) -> str:
        names = sorted({record.name for record in self.records()})
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        if near:
            return f"did you mean {' or '.join(near)}?"
        return f"known: {', '.join(names[:20]) or 'none'}."

    def records(self) -> list[ModelRecord]:
        """All versions, sorted by name and number."""
        patterns = ("*/*/manifest.json", "*/*/*/manifest.json")
        # glob.iglob, not pathlib: it skips folders that another process removes meanwhile.
        paths = [path for pattern in patterns for path in iglob(pattern, root_dir=self._models, include_hidden=True)]
        folders = [(self._models / path).parent for path in paths]
        matches = self._read_all(folder for folder in folders if folder.name.isdigit())
        return sorted(matches, key=lambda record: (record.name, record.version))

    def _read_all(self, folders: Iterable[Path]) -> list[ModelRecord]:
        matches = []
        for folder in folders:
            with suppress(_RemovedMeanwhile):
                matches.append(self._read(folder))
        return matches

    def versions(self, name: str) -> list[ModelRecord]:
        """The versions of one name, oldest first; empty if there are none."""
        check_name(name)
        return self._read_all(self._models / name / str(version) for version in _versions(self._models / name))

    def find_fingerprint(self, fingerprint: str, name: str | None = None) -> ModelRecord | None:
        """The newest version (of ``name``, if given) with this fingerprint."""
        records = self.versions(name) if name is not None else self.records()
        matches = [record for record in records if fingerprint and record.manifest["fingerprint"] == fingerprint]
        if name is not None:
            return matches[-1] if matches else None  # by number, because clocks can go backwards
        return max(matches, key=lambda record: (record.manifest["created"], record.version), default=None)

    def _read(self, folder: Path) -> ModelRecord:
        self._check_inside(folder)
        path = folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            written = int(manifest["manifest_version"])
            if written > MANIFEST_VERSION:
                raise RegistryError(
                    f"{path}: written as manifest version {written} by a newer tristage (this one reads {MANIFEST_VERSION}); upgrade it"
                )
            name, version = manifest["name"], manifest["version"]
            record = ModelRecord(name, version, manifest["digest"], manifest["role"], folder / "model", manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not folder.exists():
                raise _RemovedMeanwhile(f"{folder} was removed in the meantime") from error
            raise RegistryError(f"{path}: not a readable manifest ({error}); the version is damaged, remove {folder}") from error
        if f"{name}/{version}" != folder.relative_to(self._models).as_posix():
            raise RegistryError(f"{path}: describes {name!r} version {version}, which does not match its folder; it was moved or edited")
        return record

    def _check_inside(self, folder: Path) -> None:
        if not folder.resolve().is_relative_to(self._models.resolve()):
            raise RegistryError(f"{folder} is a symbolic link that leads out of the registry {self.root}; refused")

    # Looking after versions

    def lineage(self, ref: str) -> Lineage:
        """The ancestry of a version: ref, digest, role, base, parents (recursive). Models from outside the registry have no parents.

        A model that is an ancestor in several ways is one shared object. Parents of a pulled version that are not here are as the
        repository described them; ``recorded`` names it.
        """
        return self._lineage(self.get(ref), {})

    def _lineage(self, record: ModelRecord, known: dict[str, Lineage]) -> Lineage:
        """The ancestry of ``record``. ``known``: the ancestries so far, by reference."""
        if record.ref in known:
            return known[record.ref]
        parents: list[Lineage] = []
        for parent in record.manifest["parents"]:
            version = self._version_of(parent) if parent["kind"] == "registry" else None
            if version is not None:
                parents.append(self._lineage(version, known))
            else:
                parents.append(_recorded(record, parent) or {**parent, "removed": parent["kind"] == "registry", "parents": []})
        known[record.ref] = {
            "kind": "registry",
            "ref": record.ref,
            "digest": record.digest,
            "role": record.role,
            "created": record.manifest["created"],
            "data": record.manifest["data"],
            "base": record.manifest["base"],
            "parents": parents,
        }
        return known[record.ref]

    def _version_of(self, description: ModelDescription) -> ModelRecord | None:
        """The version that ``description`` names; another one with the same content if that one was removed; None without any."""
        for ref in (description["ref"], description["digest"]):
            with suppress(RegistryError):
                record = self.get(ref)
                if record.digest == description["digest"]:
                    return record
        return None

    def made_from(self, record: ModelRecord) -> list[str]:
        """The versions of which ``record`` is a parent, oldest first."""
        others = sorted(self.records(), key=lambda other: other.manifest["created"])
        wanted = {"kind": "registry", "ref": record.ref, "digest": record.digest}
        return [other.ref for other in others if any(wanted.items() <= parent.items() for parent in other.manifest["parents"])]

    def verify(self, ref: str) -> list[str]:
        """Problems with a version's files, one sentence per file; empty if every byte is as published.

        Raises RegistryError if there is no such version, or if it is removed meanwhile.
        """
        record = self.get(ref)
        try:
            return self._problems(record)
        except FileNotFoundError as error:
            raise RegistryError(f"{record.ref} was removed or changed while it was verified") from error

    def _problems(self, record: ModelRecord) -> list[str]:
        problems = []
        present = dict(files_of(record.path))
        for file in record.manifest["files"]:
            path = present.pop(file["path"], None)
            if path is None:
                problems.append(f"{file['path']} is missing")
            elif path.is_symlink():
                problems.append(f"{file['path']} was replaced by a symbolic link")
            elif path.stat().st_size < file["size"]:
                problems.append(f"{file['path']} is truncated: {path.stat().st_size} bytes of {file['size']}")
            elif file_sha256(path) != file["sha256"]:
                problems.append(f"{file['path']} was changed: its SHA-256 differs from the published one")
        if not record.folder.exists():
            raise RegistryError(f"{record.ref} was removed while it was verified")
        problems += [f"{name} was not published with this version" for name in present]
        if record.digest != digest_of({file["path"]: file["sha256"] for file in record.manifest["files"]}):
            problems.append("manifest.json was changed: its digest does not match its list of files")
        return problems

    def export(self, ref: str, destination: Path | str, *, merge: Merge | None = None) -> Path:
        """Copy a model to ``destination`` for ``from_pretrained``. An adapter is merged by ``merge`` if given, else copied as an adapter.

        Raises RegistryError if the destination is not empty, or if the version is damaged.
        """
        record, destination = self.get(ref), Path(destination).absolute()
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise RegistryError(f"{destination} exists and is not an empty folder; name another one or empty it")
        if problems := self.verify(record.ref):
            raise RegistryError(f"{record.ref} is damaged and was not exported: {'; '.join(problems)}. Remove it and run its recipe again")
        partial = destination.with_name(f".{destination.name[:80]}.{uuid.uuid4().hex}")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RegistryError(f"the folder {destination} cannot be made: {error.strerror}; name another one") from error
        try:
            if record.is_adapter and merge is not None:
                partial.mkdir()
                merge(record, partial)
            else:
                shutil.copytree(record.path, partial)
            for _, file in files_of(partial):
                file.chmod(0o644)  # weights are private to the user, but a server may run as another user
            if destination.exists():
                destination.rmdir()
            partial.rename(destination)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return destination

    def remove(self, ref: str, *, force: bool = False) -> ModelRecord:
        """Remove a version. Refused if adapters depend on it (unless ``force``), or if ``ref`` is a name with several versions."""
        with self._staging.folder() as staging, self._staging.lock():
            record = self._removable(ref, force)
            os.rename(record.folder, staging / "removed")
        return record

    def _removable(self, ref: str, force: bool) -> ModelRecord:
        record = self.get(ref)
        others = self.versions(record.name)
        if ref == record.name and len(others) > 1:
            refs = ", ".join(other.ref for other in others)
            raise RegistryError(f"{ref!r} has several versions ({refs}); name the one to remove")
        records = self.records()
        twins = [other for other in records if other.digest == record.digest and other.ref != record.ref]
        adapters = [other.ref for other in records if other.base is not None and other.base["digest"] == record.digest]
        if adapters and not twins and not force:
            raise RegistryError(f"{record.ref} is the base of {', '.join(adapters)}; remove them first, or use --force and lose them")
        return record


def _recorded(record: ModelRecord, parent: ModelDescription) -> Lineage | None:
    """The ancestry of a parent as a pulled version brought it along; None for a version that was made here."""
    pulled = record.manifest.get("pulled")
    if pulled is None:
        return None
    described = with_shared_parents(pulled["lineage"])
    same = [node for node in described["parents"] if (node["ref"], node["digest"]) == (parent["ref"], parent["digest"])]
    return {**same[0], "recorded": pulled["from"]} if same else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / "manifest.json").exists())


def _link(source: str, target: str) -> None:
    """Hard-link a file that never changes; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
