"""The licence that the model card of a model from outside the registry names.

It is kept with the parents of a version, so a card can name it when the folder is gone or the Hub cannot be reached.
"""

from __future__ import annotations

import json
from pathlib import Path

from stages.registry.record import Licence


def stated_licence(kind: str, path: str, revision: str | None = None) -> Licence | None:
    """The licence in the model card of a folder or of a Hub repository; None if there is no card, or if it names no licence.

    An adapter in a folder has the licence of its base.
    """
    if kind == "hub":
        return _read(_card_on_hub(path, revision))
    if kind != "folder":
        return None
    base = _base_of_adapter(Path(path))
    if base is not None:
        return stated_licence("folder" if Path(base).is_dir() else "hub", base) if base else None
    return _read(Path(path) / "README.md")


def _base_of_adapter(folder: Path) -> str | None:
    """The base that an adapter in ``folder`` names, maybe empty; None if there is no adapter."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(config.get("base_model_name_or_path") or "") if isinstance(config, dict) else ""


def _card_on_hub(repository: str, revision: str | None) -> Path | None:
    """The model card of a repository in the local cache, downloaded if necessary; None if there is none, or without a connection."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            repository,
            "README.md",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):  # no such repository
        return None
    return Path(path) if path is not None else None


def _read(card: Path | None) -> Licence | None:
    """The licence in the metadata of a model card."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if card is None or not card.is_file():
        return None
    try:
        data = ModelCard(card.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):
        return None
    named = data.get("license")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(named, str) or named.strip().lower() in ("", "unknown"):
        return None
    stated: Licence = {"license": named.strip()}
    if isinstance(data.get("license_name"), str):
        stated["license_name"] = data["license_name"]
    if isinstance(data.get("license_link"), str) and data["license_link"].startswith("https://"):  # others are files of that repository
        stated["license_link"] = data["license_link"]
    return stated
