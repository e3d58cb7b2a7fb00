"""A model input with its resolved path and content digest."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stages.config import ModelInput
from stages.registry.record import ModelRecord


@dataclass(frozen=True)
class ResolvedModel:
    """A resolved model input: the path for ``from_pretrained``, and the registry record if there is one."""

    ref: str  # as written in the recipe
    kind: str  # "registry" | "folder" | "hub"
    path: str  # folder, or Hub id
    digest: str  # content digest; for a Hub id, the id and revision
    input: ModelInput
    record: ModelRecord | None = None
    base: ResolvedModel | None = None  # for an adapter whose own files do not name it, e.g. one that is about to be published

    @classmethod
    def of_record(cls, record: ModelRecord, options: ModelInput | None = None) -> ResolvedModel:
        """A version of the registry. ``options``: the model input that names it; None: its reference, with the default options."""
        given = options or ModelInput(ref=record.ref)
        return cls(given.ref, "registry", str(record.path), record.digest, given, record)

    def with_quantization(self, other: ModelInput) -> ResolvedModel:
        """The same model with the loading options of ``other``: quantization and attention."""
        fields = {"quantization": other.quantization, "double_quantization": other.double_quantization, "attention": other.attention}
        return replace(self, input=self.input.model_copy(update=fields))
