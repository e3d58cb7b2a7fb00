"""The Trainer of the installed transformers has each method that Tristage overrides, and calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

from stages.training.microbatches import PassesByTokens
from stages.training.reproducible import BatchesByRow, LosslessCheckpoints, ShardedGradients, reproducible

NEW = (
    "blank",
    "restore_generators",
    "_sharded_grad_norm",
    "_step_by_tokens",
    "_all_passes",
    "sizes_of",
    "part_of",
    "lengths_of",
    "_pending_moments",
    "_refuse_alone",
)
OVERRIDDEN = [
    (mixin, name)
    for mixin in (BatchesByRow, PassesByTokens, ShardedGradients, LosslessCheckpoints)
    for name, value in vars(mixin).items()
    if inspect.isfunction(value) and name not in NEW
]


def test_these_private_methods_are_overridden() -> None:
    assert sorted(name for _, name in OVERRIDDEN if name.startswith("_")) == [
        "_clip_grad_norm",
        "_get_grad_norm",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_prepare_inputs",
        "_save_checkpoint",
        "_sync_replicated_trainable_parameters",
    ]


@pytest.mark.parametrize(("mixin", "name"), OVERRIDDEN, ids=lambda value: getattr(value, "__name__", value))
def test_the_trainer_has_the_method_with_these_parameters(mixin: type, name: str) -> None:
    ours, theirs = _parameters(getattr(mixin, name)), _parameters(getattr(Trainer, name))
    assert ours == theirs


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", [name for _, name in OVERRIDDEN])
def test_the_training_loop_calls_the_method(name: str) -> None:
    calls = inspect.getsource(Trainer).count(f"self.{name}(")
    assert calls >= 1


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer, DPOTrainer])
def test_overridden_methods_come_before_those_of_the_trainer(kind: type) -> None:
    made = reproducible(kind)
    assert made.__name__ == f"Reproducible{kind.__name__}"
    assert made is reproducible(kind)
    for mixin, name in OVERRIDDEN:
        assert getattr(made, name) is getattr(mixin, name)
