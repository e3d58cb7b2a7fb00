"""The table of a run's steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stages.report.chain import step_row


def test_accuracy_of_other_rewards_is_shown_with_that_of_the_reward_model() -> None:
    metrics: dict[str, Any] = {"heldout_accuracy": 0.71, "heldout_beside": {"asked": {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6}}}
    step: Any = SimpleNamespace(name="preference", stage="reward_model", metrics=metrics, evaluation=None, entry={}, config={})
    assert step_row(step)["result"] == "accuracy 0.710; asked 0.500"
    metrics.pop("heldout_beside")
    assert step_row(step)["result"] == "accuracy 0.710"
