"""The licence of a version: that of the models from outside the registry from which its weights come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from stages.errors import RegistryError
from stages.registry.licence import stated_licence
from stages.registry.record import Licence, Lineage, ModelRecord, imported_from

if TYPE_CHECKING:
    from stages.registry.ledger import Registry

STARTS = ("policy", "model")  # the fields of a step with the model whose weights it trains


def licence_of(record: ModelRecord, registry: Registry) -> tuple[Licence | None, str]:
    """The licence for the card of a version, and sentences that explain it. None: no licence follows from what is known."""
    stated = dict(_origins(registry.lineage(record.ref), registry, set()))
    if not stated:
        return None, (
            "This card names no licence: the registry knows no model from which the weights were trained. The licences of the data above "
            "decide. Find them out before you share this model."
        )
    named = "; ".join(
        f"`{ref}`: {licence.get('license_name', licence['license']) if licence else 'not known'}" for ref, licence in stated.items()
    )
    first = next(iter(stated.values()))
    if first is None or any(licence != first for licence in stated.values()):
        return None, (
            "This card names no licence, because the licences of the models from which the weights come differ, or are not all known "
            f"({named}). The licences of the data count, too. Find them out before you share this model."
        )
    return first, (
        f"The licence is that of the model from which the weights come, as its model card names it ({named}). The data, and the models "
        "that only gave rewards, may have other conditions. Check them before you share this model."
    )


def _origins(node: Lineage, registry: Registry, seen: set[tuple[str, str]]) -> Iterator[tuple[str, Licence | None]]:
    """The models from outside the registry whose weights went into a model, each with its licence if it is known.

    ``seen``: (reference, digest) of the models that were visited.
    """
    if (node["ref"], node["digest"]) in seen:
        return
    seen.add((node["ref"], node["digest"]))
    if node["kind"] != "registry":
        yield node["ref"], node.get("licence") or stated_licence(node["kind"], node.get("path", ""), node.get("revision"))
        return
    parents = node["parents"]
    with suppress(RegistryError):  # it was removed, or only a pulled model knows it; then all parents count
        record = registry.get(node["digest"])
        imported = imported_from(record.manifest)
        if imported is not None:
            yield str(imported.get("base") or node["ref"]), cast("Licence | None", imported.get("licence"))
        inputs = record.manifest["fingerprint_parts"].get("inputs", {})
        starts = {inputs[name] for name in STARTS if name in inputs}
        started = [parent for parent in parents if parent["digest"] in starts]
        parents = started if started and record.role != "value_model" else parents  # PPO may start a value network from other models
    for parent in parents:
        yield from _origins(parent, registry, seen)
