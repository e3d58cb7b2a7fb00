"""Metric trackers besides metrics.jsonl: TensorBoard, Weights & Biases or trackio, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.errors import RecipeError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Tracker = Literal["tensorboard", "wandb", "trackio"]


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker whose package is not installed, before anything runs."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"trackers: {name} is not installed; `pip install {name}`, or remove it")


class StepTrackers:
    """The trackers of one step, opened with the first metrics.

    In W&B and trackio, the recipe is a project, and each step of a run is a run.
    """

    def __init__(self, names: Sequence[str], *, recipe: str, run: str, step: str, folder: Path, settings: Mapping[str, object]) -> None:
        self.names, self.recipe, self.run, self.step, self.folder, self.settings = names, recipe, run, step, folder, settings
        self._open: list[GeneralTracker] | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics to every tracker."""
        if self._open is None:
            self._open = [self._start(name) for name in self.names]
        for tracker in self._open:
            tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flush buffers. The trackers can be opened again."""
        for tracker in self._open or []:
            tracker.finish()
        self._open = None

    def _start(self, name: str) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        run = f"{self.run} {self.step}".strip()
        tracker: GeneralTracker
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", logging_dir=self.folder)
        elif name == "wandb":
            tracker = WandBTracker(self.recipe, name=run, group=self.run or None, dir=str(self.folder))
        else:
            tracker = TrackioTracker(self.recipe, name=run)
        tracker.start()
        if name != "tensorboard":  # TensorBoard supports only flat numeric settings, and writes extra files
            tracker.store_init_configuration(dict(self.settings))
        return tracker
