"""Metrics of unequal forward passes: each pass counts by its tokens or examples, as if the step were one pass."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from stages.training.pass_metrics import WeightedMetrics


class Logged:
    """Replaces a trainer of TRL: it logs the mean over passes."""

    def __init__(self) -> None:
        self._metrics: Any = {"train": defaultdict(list)}
        self.logged: dict[str, float] = {}

    def log(self, logs: dict[str, float]) -> None:
        self.logged = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics["train"].items()}}


class Weighted(WeightedMetrics, Logged):
    weighed_by = {"accuracy": "pairs", "entropy": "tokens"}


def test_passes_count_by_their_size() -> None:
    trainer: Any = Weighted()
    for accuracy, entropy, pairs, tokens in ((1.0, 2.0, 3, 10), (0.0, 5.0, 1, 30)):
        trainer._metrics["train"]["accuracy"].append(accuracy)
        trainer._metrics["train"]["entropy"].append(entropy)
        trainer.count_pass(pairs=pairs, tokens=tokens)
    trainer._metrics["train"]["num_tokens"] = [40]
    trainer.log({"loss": 0.5})
    # 3 of 4 pairs; (2 * 10 + 5 * 30) / 40
    assert trainer.logged == {"loss": 0.5, "accuracy": pytest.approx(0.75), "entropy": pytest.approx(4.25), "num_tokens": 40}
    assert all(not name.startswith("count/") for name in trainer.logged)


def test_passes_without_counted_tokens_keep_the_plain_mean() -> None:
    trainer: Any = Weighted()
    trainer._metrics["train"]["accuracy"] += [1.0, 0.0]
    trainer.count_pass(pairs=0)
    trainer.count_pass(pairs=0)
    trainer.log({})
    assert trainer.logged == {"accuracy": 0.5}
