"""The trackers setting: real TensorBoard, W&B and trackio as mocks of their packages; a missing package is reported immediately."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from stages.errors import RecipeError
from stages.process.trackers import StepTrackers, check_trackers
from stages.recipe.schema import load_recipe


@pytest.fixture(autouse=True)
def process() -> None:
    from accelerate import PartialState

    PartialState()  # runtime.state exists before a step logs


def trackers(folder: Path, *names: str) -> StepTrackers:
    return StepTrackers(names, recipe="toy", run="20261124T203818Z", step="sft", folder=folder, settings={"stage": "sft", "rate": 0.1})


def test_tensorboard_has_every_logged_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = trackers(tmp_path, "tensorboard")
    made.log(0, {"train/loss": 2.0})
    made.log(5, {"train/loss": 1.5, "policy/kl": 0.25})
    made.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(0, 2.0), (5, 1.5)]
    assert [(event.step, event.value) for event in read.Scalars("policy/kl")] == [(5, 0.25)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_calls_that_they_expect(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            calls.append(("log", step, values))

        def finish(self) -> None:
            calls.append(("finish",))

    Run.config = types.SimpleNamespace(update=lambda values, **_: calls.append(("config", values)))  # type: ignore[attr-defined]
    module = types.ModuleType(name)
    module.init = lambda **given: calls.append(("init", given)) or Run()  # type: ignore[attr-defined]
    module.config = Run.config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    made = trackers(tmp_path, name)
    made.log(3, {"train/loss": 2.0})
    made.close()
    (_, given), config, logged, finished = calls
    assert given["project"] == "toy" and given["name"] == "20261124T203818Z sft"
    assert config == ("config", {"stage": "sft", "rate": 0.1})
    assert logged == ("log", 3, {"train/loss": 2.0}) and finished == ("finish",)


def test_nothing_is_opened_without_metrics(tmp_path: Path) -> None:
    trackers(tmp_path, "tensorboard").close()
    assert list(tmp_path.iterdir()) == []
    none = trackers(tmp_path)
    none.log(0, {"train/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_missing_tracker_package_is_reported_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="trackers: wandb is not installed; `pip install wandb`"):
        check_trackers(["wandb"])


def test_recipe_selects_trackers(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    (tmp_path / "a.txt").write_text("text")
    path.write_text("name: toy\nsteps:\n  - {stage: pretraining, name: base, architecture: {type: llama}, data: {train: a.txt}}\n")
    assert load_recipe(path).trackers == ["tensorboard"]
    assert load_recipe(path, ["trackers=[]"]).trackers == []
    assert load_recipe(path, ["trackers=tensorboard"]).trackers == ["tensorboard"]
    with pytest.raises(RecipeError, match="trackers.*got 'paper', expected one of 'tensorboard', 'wandb' or 'trackio'"):
        load_recipe(path, ["trackers=paper"])
