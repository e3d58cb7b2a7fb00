"""Figures about training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.report.run_folder import StepFolder
from stages.report.training import calibration, training


@pytest.mark.parametrize(("number", "title"), [(12, "accuracy by batch"), (30, "accuracy by batch (the first 12 of 30 values)")])
def test_a_column_with_many_values_says_how_many_are_shown(tmp_path: Path, number: int, title: str) -> None:
    groups = [{"value": f"{batch:02}", "accuracy": 0.5, "pairs": 10} for batch in range(number)]
    bins = [{"confidence": 0.6, "accuracy": 0.5, "count": 40}]
    metrics = {"heldout_calibration": bins, "heldout_accuracy_by_group": {"batch": groups}}
    figure = calibration(StepFolder({"name": "preference", "stage": "reward_model", "metrics": metrics}, tmp_path))
    assert figure is not None
    assert [panel.title for panel in figure.panels] == ["reliability", title]
    assert len([row for row in figure.rows if row[0] == title]) == 12


def test_reward_model_with_several_seeds_has_a_curve_for_each(tmp_path: Path) -> None:
    rows = [{"step": at, f"train_seed_{seed}/loss": 1.0 / (at + seed)} for seed in (3, 4) for at in range(1, 6)]
    (tmp_path / "preference").mkdir()
    (tmp_path / "preference" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = training(StepFolder({"name": "preference", "stage": "reward_model", "metrics": {}}, tmp_path / "preference"))
    assert figure is not None
    assert [panel.title for panel in figure.panels] == ["ranking loss (nats), seed 3", "ranking loss (nats), seed 4"]
