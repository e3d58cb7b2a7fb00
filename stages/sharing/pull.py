"""``stages models pull``: copy a pushed version into this registry, with the same files, digest, role, settings, metrics and lineage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.errors import HubError
from stages.hub.repositories import Repository, fetch, look_up
from stages.hub.uploads import check_identifier
from stages.registry.ledger import Registry
from stages.registry.names import check_name
from stages.registry.record import ModelRecord, StoredEvaluation
from stages.sharing.shared import DESCRIPTION, SharedVersion, read_description, read_evaluations


@dataclass(frozen=True)
class Pulled:
    """A version in this registry, and the base versions that were pulled with it.

    ``was_here``: whether the registry had the version before.
    """

    record: ModelRecord
    bases: list[ModelRecord]
    was_here: bool


def pull(
    identifier: str,
    registry: Registry,
    *,
    revision: str | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None],
) -> Pulled:
    """Add the model of a pushed repository to the registry, as ``name`` or with the name that it has in the repository.

    The bases of an adapter are added first, unless the registry has them. Every file is compared with the manifest before the registry
    commits. A base on the Hub that runs its own code needs ``trust_remote_code``.

    Raises HubError for a repository that was not pushed from a registry or is incomplete, RegistryError for files that differ from the
    manifest.
    """
    check_identifier(identifier)
    repository = look_up("model", identifier, revision)
    description = _description(repository, identifier)
    versions, evaluations = read_description(description, repository.ref), read_evaluations(description, repository.ref)
    if not trust_remote_code:
        _refuse_own_code(versions, repository.ref)
    model, *bases = versions
    check_name(name or model.name)
    here = {record.digest for record in registry.records()}
    known = [record for record in registry.versions(name or model.name) if record.digest == model.digest]
    needed = [version for version in reversed(bases) if version.digest not in here]
    if not known:
        needed.append(model)
    missing = sorted({path for version in needed for path in version.paths} - set(repository.files))
    if missing:
        raise HubError(f"{repository.ref} is incomplete: {missing[0]} is missing ({len(missing)} missing files). Push the model again")
    taken = []
    for version in needed:
        chosen = name or version.name if version is model else version.name
        say(f"{version.ref} ({version.manifest['role']}, {version.digest[:19]}) from {repository.ref}: {version.amount}")
        taken.append(_take(repository, version, registry, chosen, evaluations if version is model else []))
    if known:
        return Pulled(known[-1], taken, was_here=True)
    return Pulled(taken[-1], taken[:-1], was_here=False)


def _description(repository: Repository, identifier: str) -> str:
    """The text of the repository's description. Raises HubError if it has none."""
    if DESCRIPTION not in repository.files:
        raise HubError(
            f"{repository.ref} was not pushed by `stages models push`: it has no {DESCRIPTION}. A recipe can use any model of the Hub by "
            f"its name, {{ref: {identifier}}}"
        )
    return fetch(repository, DESCRIPTION).read_text(encoding="utf-8")


def _refuse_own_code(versions: Iterable[SharedVersion], ref: str) -> None:
    """Raise HubError if a base of the model in the repository ``ref`` runs its own code."""
    coded = [base["ref"] for version in versions if (base := version.manifest["base"]) is not None and base.get("trust_remote_code")]
    if coded:
        raise HubError(f"{ref} is based on {coded[0]}, which runs its own code when it is loaded. If you trust it, add --trust-remote-code")


def _take(
    repository: Repository, version: SharedVersion, registry: Registry, name: str, evaluations: list[StoredEvaluation]
) -> ModelRecord:
    def fill(folder: Path) -> None:
        for file in version.manifest["files"]:
            target = folder / file["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetch(repository, version.path_of(file["path"])), target)

    return registry.restore(name, fill, version.manifest, origin=repository.ref, lineage=version.lineage, evaluations=evaluations)
