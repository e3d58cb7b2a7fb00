"""The interface between the chain and a stage: the context that a stage gets, and the result that it returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

from stages.errors import doing
from stages.json_types import JsonObject
from stages.process.runtime import Runtime
from stages.process.trackers import StepTrackers
from stages.registry.ledger import Registry
from stages.registry.record import FingerprintParts, ModelRecord
from stages.registry.references import ResolvedModel
from stages.run_summary import CutTexts, EvaluationResult


class Publication(TypedDict):
    """How a step publishes a model: arguments of ``StepContext.publish``."""

    role: str
    base: ResolvedModel | None
    extra: NotRequired[Mapping[str, object] | None]


@dataclass
class StepResult:
    """The result that a stage returns to the chain."""

    model: ModelRecord | None
    metrics: JsonObject
    evaluation: EvaluationResult | None = None  # evaluation stage only


@dataclass
class StepContext:
    """What a stage gets besides its config: resolved inputs, output folders, logging and publishing."""

    name: str  # registry name of the step's model, <recipe>/<step>
    seed: int
    runtime: Runtime
    registry: Registry
    models: dict[str, ResolvedModel]  # keyed by field path, as config.model_inputs()
    folder: Path  # run folder of this step: metrics.jsonl, samples.jsonl, tensorboard/
    checkpoint_folder: Path  # survives an interruption; the chain removes it when the step is done
    fingerprint: str = ""
    fingerprint_parts: FingerprintParts = field(default_factory=lambda: FingerprintParts())
    recipe_step: JsonObject = field(default_factory=dict)  # the resolved step
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    run: str = ""  # name of the run folder; trackers use it as the run's name
    trackers: Sequence[str] = ("tensorboard",)
    sampling: list[JsonObject] = field(default_factory=list)  # engines outside of this process that sampled, for the summary
    compiled_layers: JsonObject = field(default_factory=dict)  # facts of models/layers/compiled.py, for the summary; empty: no training
    cut_texts: dict[str, CutTexts] = field(default_factory=dict)  # by the field of the reward source that cut them, for the summary
    recorded: list[tuple[int, dict[str, float]]] | None = None  # log entries to store in checkpoints, for a resumed run
    _trackers: StepTrackers | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics (named ``group/name``) to metrics.jsonl and the trackers. Only rank zero writes."""
        if self.recorded is not None:
            self.recorded.append((step, metrics))
        if not self.runtime.is_main:
            return
        for listener in self.runtime.listeners:
            listener(self.name, step, metrics)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._trackers is None:
            _ = self.runtime.state  # accelerate's trackers need its process index
            recipe, _, own = self.name.rpartition("/")
            names = {"recipe": recipe or own, "run": self.run, "step": own}
            self._trackers = StepTrackers(self.trackers, **names, folder=self.folder, settings=self.recipe_step)
        self._trackers.log(step, metrics)

    @property
    def cache_folder(self) -> Path:
        """A folder for data that may be lost but is expensive to compute. It belongs to the home, not to the step."""
        return self.registry.root.parent / "cache"

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None

    def publish(
        self,
        save: Callable[[Path], None],
        *,
        role: str,
        metrics: Mapping[str, object],
        base: ResolvedModel | None = None,
        extra: Mapping[str, object] | None = None,
        name: str | None = None,
    ) -> ModelRecord:
        """Publish the files that ``save(folder)`` writes. ``base`` is the base model of an adapter. Every process gets the record."""
        name = name or self.name
        fingerprint = self.fingerprint if name == self.name else f"{self.fingerprint}:{name}"
        # An additional model is published before the step's own one, so a resumed step must not publish it again.
        is_there = name != self.name and bool(self.fingerprint) and self.registry.find_fingerprint(fingerprint, name) is not None
        if self.runtime.is_main and not is_there:
            with doing(f"saving {name}"):
                self.registry.publish(
                    name,
                    save,
                    role=role,
                    parents=list(self.models.values()),
                    recipe_step=self.recipe_step,
                    data=self.data_fingerprints,
                    metrics=metrics,
                    fingerprint=fingerprint,
                    fingerprint_parts=self.fingerprint_parts,
                    base=base,
                    extra=extra,
                )
        self.runtime.wait_for_everyone()
        return self.registry.get(name)
