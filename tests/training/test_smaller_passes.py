"""After memory ran out in a pass that takes all processes, the next start of the step makes smaller passes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.config import OptimizerSettings
from stages.errors import MemoryExhausted, TrainingError
from stages.models.passes.budget import PassBudget, PassTooLarge
from stages.ppo.loop import PPORun
from stages.training.arguments import EXAMPLES, split_batch
from stages.training.microbatches import PassesByTokens
from stages.training.smaller_passes import read_limit, write_limit


class Step:
    """A step's context on one of two machines. ``other``: the limit in the file of the other machine."""

    def __init__(self, folder: Path, other: int | None = None) -> None:
        self.name, self.checkpoint_folder, self.said = "r/step", folder, list[str]()
        theirs = float("-inf") if other is None else -other
        console = SimpleNamespace(print=self.said.append)
        self.runtime = SimpleNamespace(largest=lambda own: [max(own, theirs)], console=console)


def test_every_process_reads_the_smallest_limit_and_says_it(tmp_path: Path) -> None:
    step: Any = Step(tmp_path)
    assert read_limit(step, EXAMPLES) is None and not step.said
    for size in (8, 4, 6):
        write_limit(step, EXAMPLES, size)
    write_limit(step, "PPO update", 100)
    assert read_limit(step, EXAMPLES) == 4 and "at most 4" in step.said[0]
    other: Any = Step(tmp_path / "other machine", other=3)
    assert read_limit(other, EXAMPLES) == 3


class Failing:
    """A Trainer whose pass raises an error."""

    error: Exception

    def training_step(self, *_: object) -> None:
        raise self.error


class FailingTrainer(PassesByTokens, Failing):
    pass


def trainer(folder: Path, examples: int, error: Exception) -> Any:
    made: Any = object.__new__(FailingTrainer)
    made.args, made.context, made.error = SimpleNamespace(by_tokens=False, per_device_train_batch_size=examples), Step(folder), error
    return made


def test_a_training_pass_of_several_processes_is_half_as_large_after_the_next_start(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="r/step: training: memory ran out in a pass over 8 examples.* Run the same command again"):
        trainer(tmp_path, 8, torch.OutOfMemoryError("CUDA out of memory")).training_step(None, {})
    limit = read_limit(Step(tmp_path), EXAMPLES)  # type: ignore[arg-type]
    settings = OptimizerSettings(batch_size=48)
    assert split_batch(settings, 2) == (24, 1) and split_batch(settings, 2, most=limit) == (4, 6)


def test_a_pass_over_one_example_cannot_be_divided_and_other_errors_propagate(tmp_path: Path) -> None:
    with pytest.raises(MemoryExhausted, match="one example.*max_length"):
        trainer(tmp_path, 1, torch.OutOfMemoryError("CUDA out of memory")).training_step(None, {})
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer(tmp_path, 8, RuntimeError("shapes differ")).training_step(None, {})
    assert not list(tmp_path.iterdir())


def test_passes_of_ppo_through_sharded_weights_are_half_as_large_after_the_next_start(tmp_path: Path) -> None:
    step: Any = Step(tmp_path)
    run: Any = SimpleNamespace(context=step, state=SimpleNamespace(iteration=3))

    def budget() -> PassBudget:
        return PassBudget("PPO update", "cuda", "auto", rows=16, trains=True)

    failed = budget()
    with failed.one_pass(4, 2000):
        pass
    error = PPORun._smaller_next_time(run, PassTooLarge("x"), failed)
    assert "iteration 3: PPO update: memory ran out in a pass of 2000 tokens" in str(error) and "half the size" in str(error)
    again = budget()
    again.lower_to(read_limit(step, "PPO update"))
    again._taken = [(1000, 1)]  # a pass that took hardly any memory
    again.settle(0, free=lambda: 1 << 40)
    assert again.tokens == 1000
    assert again.groups(range(4), [500] * 4) == [[0, 1], [2, 3]]
