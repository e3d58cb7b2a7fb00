"""``stages models push``: upload a version of the registry to a Hub repository, with its card, lineage and evaluation results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stages.errors import HubError, RegistryError
from stages.hub.repositories import Repository, fetch
from stages.hub.uploads import check_identifier, check_may_upload, commit_files, create_repository, look_up_own
from stages.registry.card import evaluations_of, joined, model_card
from stages.registry.ledger import Registry
from stages.registry.record import ModelRecord, StoredEvaluation
from stages.sharing.shared import (
    CARD,
    DESCRIPTION,
    SharedVersion,
    describe,
    local_paths,
    read_description,
    read_evaluations,
    versions_to_share,
)

ALWAYS_THERE = (".gitattributes", CARD)
"""Files that a repository may contain and still count as empty, because the Hub creates them."""


@dataclass(frozen=True)
class Pushed:
    """Where a version was pushed to. ``is_new``: whether the push created the repository."""

    repository: str
    commit: str
    is_new: bool


def push(
    ref: str, identifier: str, registry: Registry, *, message: str | None = None, private: bool = True, say: Callable[[str], None]
) -> Pushed:
    """Push the version ``ref`` to the repository ``identifier``. Creates the repository if it does not exist, ``private`` or public.

    ``say`` gets a description of the upload and its size before the upload starts. Raises RegistryError for a version that is damaged or
    cannot be shared. Raises HubError if the repository contains something else, or if the Hub refuses.
    """
    check_identifier(identifier)
    check_may_upload()
    record = registry.get(ref)
    versions = versions_to_share(record, registry)
    for source, _ in versions:
        if problems := registry.verify(source.ref):
            raise RegistryError(f"{source.ref} is damaged and was not pushed: {'; '.join(problems)}. Remove it and run its recipe again")
    repository = look_up_own(identifier)
    before, stored = _version_there(repository, record, registry) if repository is not None else (None, [])
    shared = [version for _, version in versions]
    evaluations = joined(evaluations_of(record, registry), stored)
    visibility = "exists; its visibility does not change" if repository is not None else f"new, {'private' if private else 'public'}"
    for line in [*_contents(shared, f"{identifier} ({visibility})", len(evaluations)), *_changes(record, before), *_cut_paths(versions)]:
        say(line)
    files: dict[str, Path | bytes] = {
        CARD: model_card(record, registry, merged=False, repository=identifier, evaluations=evaluations).encode(),
        DESCRIPTION: describe(shared, evaluations),
    }
    for source, version in versions:
        files |= {version.path_of(file["path"]): source.path / file["path"] for file in source.manifest["files"]}
    stale = {path for version in before or [] for path in version.paths} - set(files)
    delete = sorted(stale & set(repository.files)) if repository is not None else []
    if repository is None:
        create_repository(identifier, private=private)
    commit = commit_files(
        identifier,
        files,
        delete,
        message=message or f"{record.ref} ({record.digest[:19]})",
        parent=repository.commit if repository is not None else None,
        say=say,
    )
    return Pushed(identifier, commit, repository is None)


def _version_there(
    repository: Repository, record: ModelRecord, registry: Registry
) -> tuple[list[SharedVersion] | None, list[StoredEvaluation]]:
    """Return (the versions that the repository contains, None for an empty one; its evaluations of ``record``).

    Raises HubError unless they are a version with the same name in this registry.
    """
    others = [name for name in repository.files if name not in ALWAYS_THERE]
    if not others:
        return None, []
    if DESCRIPTION not in others:
        raise HubError(
            f"{repository.id!r} contains files that `stages models push` did not write ({', '.join(others[:3])}). Push to another name"
        )
    description = fetch(repository, DESCRIPTION).read_text(encoding="utf-8")
    before = read_description(description, repository.ref)
    if before[0].digest not in {version.digest for version in registry.versions(record.name)}:
        raise HubError(
            f"{repository.id!r} contains {before[0].ref} ({before[0].digest[:19]}), which is not a version of {record.name!r} in this "
            f"registry. Push to another name, or pull that version first: `stages models pull {repository.id} --as {record.name}`"
        )
    return before, read_evaluations(description, repository.ref) if before[0].digest == record.digest else []


def _contents(shared: list[SharedVersion], target: str, evaluations: int) -> list[str]:
    """A description of the upload, one line per part."""
    model, *bases = shared
    lines = [
        f"{model.ref} ({model.manifest['role']}, {model.digest[:19]}) to {target}: {model.amount}",
        *(f"with its base {base.ref}, in {base.folder}: {base.amount}" for base in bases),
        f"with its card, its lineage and the results of {evaluations} evaluation{'' if evaluations == 1 else 's'}",
    ]
    if base := shared[-1].manifest["base"]:
        lines.append(f"without {base['ref']}, which is on the Hub")
    return lines


def _changes(record: ModelRecord, before: list[SharedVersion] | None) -> list[str]:
    """A line about the version that the repository contains. Empty if it contains none."""
    if before is None:
        return []
    if before[0].digest == record.digest:
        return ["the repository already has the files of this version"]
    return [f"replaces {before[0].ref} ({before[0].digest[:19]})"]


def _cut_paths(versions: list[tuple[ModelRecord, SharedVersion]]) -> list[str]:
    """A line with the number of local paths that are shared without their folders."""
    paths = sorted({path for record, _ in versions for path in local_paths(record.manifest)})
    return [f"{len(paths)} local paths, such as {paths[0]}, are shared without their folders"] if paths else []
