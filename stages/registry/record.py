"""The record of one version of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelRecord:
    """One immutable version of a model."""

    name: str
    version: int
    digest: str  # sha256:... of the files of model/, independent of time and path
    role: str
    path: Path  # the model/ folder, for from_pretrained
    manifest: dict[str, Any]

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def folder(self) -> Path:
        """The version's folder: model/ and manifest.json."""
        return self.path.parent

    @property
    def is_adapter(self) -> bool:
        return self.manifest["base"] is not None
