"""A model input after resolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stages.config import ModelInput
from stages.registry.record import ModelRecord


@dataclass(frozen=True)
class ResolvedModel:
    """A model input after resolution: where ``from_pretrained`` finds it, and what the registry knows of it."""

    ref: str  # as the recipe writes it
    kind: str  # "registry" | "folder" | "hub"
    path: str  # folder, or hub id
    digest: str  # content digest; for a hub id, the id and revision
    input: ModelInput
    record: ModelRecord | None = None
    base: ResolvedModel | None = None  # of an adapter whose own files do not say it, such as one that is about to be published

    def with_quantization(self, other: ModelInput) -> ResolvedModel:
        """The same model, loaded as ``other`` says: quantized or not, and with its attention."""
        fields = {"quantization": other.quantization, "double_quantization": other.double_quantization, "attention": other.attention}
        return replace(self, input=self.input.model_copy(update=fields))
