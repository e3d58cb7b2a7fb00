"""Names of models in the registry, and references to their versions."""

from __future__ import annotations

import re

from stages.errors import RegistryError

SEGMENT = r"(?=[^/]*[A-Za-z_-])[A-Za-z0-9][A-Za-z0-9_.-]*"  # a digits-only segment could be confused with a version folder
NAME = re.compile(rf"{SEGMENT}(/{SEGMENT})?")
REFERENCE = re.compile(rf"(?P<name>{NAME.pattern})(@(?P<version>[1-9][0-9]*))?")
DIGEST = re.compile(r"sha256:(?P<prefix>[0-9a-f]{4,64})")


def check_name(name: str) -> None:
    """Raise RegistryError unless ``name`` is a valid registry name. Valid names cannot lead out of the registry."""
    if NAME.fullmatch(name) is None:
        raise RegistryError(
            f"{name!r} is not a model name; expected <step> or <recipe>/<step> of letters, digits, '_', '-' and '.', not digits alone"
        )
