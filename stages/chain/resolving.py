"""The path and the content digest of a model that a step reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.config import ModelInput
from stages.errors import RegistryError
from stages.hub.contents import model_content
from stages.hub.repositories import COMMIT
from stages.models.adapters.stacks import find_base, is_adapter
from stages.recipe.schema import Reference
from stages.registry.contents import digest_folder, digest_of
from stages.registry.ledger import Registry
from stages.registry.record import ModelRecord
from stages.registry.references import ResolvedModel


def resolve(model: Reference, registry: Registry, made: Mapping[str, ModelRecord | None] | None = None) -> ResolvedModel:
    """Determine the path and the content digest of a model.

    Raises RegistryError for a version with damaged files, and HubError for a Hub model that cannot be loaded.
    """
    if model.kind == "step":
        record = (made or {})[model.target]
        assert record is not None, f"step {model.target} must run before its model is read"
        return ResolvedModel.of_record(record, model.input)
    if model.kind == "registry":
        record = registry.get(model.target)
        if problems := registry.verify(record.ref):
            raise RegistryError(f"{record.ref} is damaged: {'; '.join(problems)}. Remove it and run its recipe again")
        return ResolvedModel.of_record(record, model.input)
    base = resolve(model.base, registry) if model.base is not None else None
    below = f" on {base.digest}" if base is not None else ""
    if model.kind == "folder":
        digest = digest_folder(Path(model.target)) + below if base is not None else _folder_digest(Path(model.target), model.input)
        return ResolvedModel(model.input.ref, "folder", model.target, digest, model.input, base=base)
    digest = f"hub:{model.target}@{model.input.revision or 'main'}{below}"
    return ResolvedModel(model.input.ref, "hub", model.target, digest, model.input, base=base)


def content_of(model: ResolvedModel) -> str:
    """What the fingerprint of a step says about a model: its digest; for a Hub model the content of its files instead of the commit."""
    commit = model.input.revision
    if model.kind != "hub" or commit is None or not COMMIT.fullmatch(commit):
        return model.digest
    below = f" on {content_of(model.base)}" if model.base is not None else ""
    return f"hub:{model.path} {model_content(model.path, commit)}{below}"


def _folder_digest(folder: Path, model: ModelInput) -> str:
    """The digest of a model folder. For an adapter it covers its own files and its base, because both affect the output."""
    own = digest_folder(folder)
    adapter = ResolvedModel(model.ref, "folder", str(folder), "", model)
    if not is_adapter(adapter):
        return own
    base = find_base(adapter)
    below = _folder_digest(Path(base.path), base.input) if base.kind == "folder" else base.digest
    return digest_of({"adapter": own, "base": below})
