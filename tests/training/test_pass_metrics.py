"""Metrics of unequal forward passes: each pass counts by its tokens or examples, as if the step were one pass."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

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


class Gathering:
    """Replaces an accelerator of one process."""

    def gather(self, values: Any) -> Any:
        return values

    def gather_for_metrics(self, values: Any) -> Any:
        return self.gather(values)


class Losses(Logged):
    """Computes metrics as TRL's trainers do."""

    def __init__(self) -> None:
        super().__init__()
        self.accelerator = Gathering()
        self._total_train_tokens = 0

    def compute_loss(self, correct: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        total = self.accelerator.gather_for_metrics(counted.sum()).sum()
        right = self.accelerator.gather_for_metrics((correct * counted).sum()).sum()
        self._metrics["train"]["accuracy"].append((right / total).item() if total > 0 else 0.0)
        self._total_train_tokens += self.accelerator.gather(counted.sum()).sum().item() // 1
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return (correct * 2.0).sum()


class Computed(WeightedMetrics, Losses):
    weighed_by = {"accuracy": "tokens"}


def test_metrics_are_not_read_before_they_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes, the second without counted tokens. The values are those that TRL's code computes itself."""
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        usual = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, usual=usual, name=name: (reads.append(name), usual(self))[1])
    trainer: Any = Computed()
    correct = torch.tensor([1.0, 1.0, 0.0, 1.0], requires_grad=True)
    for counted in ([1.0, 1.0, 1.0, 1.0], [0.0] * 4, [0.0, 0.0, 1.0, 0.0]):
        loss = trainer.compute_loss(correct, torch.tensor(counted))
        trainer.count_pass(tokens=torch.tensor(counted).sum())
        assert type(loss) is torch.Tensor and loss.requires_grad
    kept = trainer._metrics["train"]["accuracy"]
    assert reads == [] and not any(value.requires_grad for value in kept)  # they would keep the graph of their pass
    assert vars(trainer.accelerator) == {}  # as before
    trainer.log({})
    assert trainer.logged == {"accuracy": pytest.approx(3 / 5), "num_tokens": 5.0}
    assert reads == ["tolist"] and int(trainer._total_train_tokens) == 5


def test_a_pass_that_is_repeated_begins_with_the_earlier_number_of_tokens() -> None:
    trainer: Any = Computed()
    ones = torch.ones(4)
    trainer.compute_loss(ones, ones)
    before = trainer._total_train_tokens
    trainer.compute_loss(ones, ones)
    assert (int(before), int(trainer._total_train_tokens)) == (4, 8)


def test_passes_without_counted_tokens_keep_the_plain_mean() -> None:
    trainer: Any = Weighted()
    trainer._metrics["train"]["accuracy"] += [1.0, 0.0]
    trainer.count_pass(pairs=0)
    trainer.count_pass(pairs=0)
    trainer.log({})
    assert trainer.logged == {"accuracy": 0.5}
