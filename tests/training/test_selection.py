"""The model with the highest reward is kept, for any held-out loss. An interrupted run evaluates the lost models again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.sft.config import SFTStepConfig
from stages.sft.run import run
from stages.training.selection import Selector, Tried, best_of, selection_callback
from stages.training.selection_config import Selection

REWARDS = """
def fewest_e(prompts, completions):
    return [-text.count("e") for text in completions]

calls = []

def third_is_best(prompts, completions):
    calls.append(len(completions))
    return [{3: 1.0}.get(len(calls), 0.0)] * len(completions)
"""


@pytest.mark.detail("S4")
def test_selection_uses_the_reward_instead_of_the_loss() -> None:
    # the loss prefers the first, the reward the second
    tried = [Tried(10, score=0.1, heldout_loss=1.0), Tried(20, score=0.7, heldout_loss=1.5), Tried(30, score=0.4, heldout_loss=2.0)]
    assert best_of(tried).optimizer_step == 20
    assert best_of([*tried, Tried(40, score=0.7, heldout_loss=0.1)]).optimizer_step == 20  # of equal models the earliest one


@pytest.fixture
def demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "sft_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "sft_rewards", raising=False)
    path = tmp_path / "demonstrations.jsonl"
    rows = [
        {"prompt": f"write a line about the {thing} {number}:", "completion": f"the {thing} was a joy"}
        for number in range(5)
        for thing in ("film", "plot", "music", "ending")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(path: str, reward: str, **fields: Any) -> SFTStepConfig:
    settings = {
        "name": "sft",
        "model": "base",
        "precision": "fp32",
        "data": {"train": path, "validation_fraction": 0.2},
        "training": {"epochs": 4.0, "batch_size": 4, "learning_rate": 1e-2},
        "selection": {"reward": [{"function": f"sft_rewards:{reward}"}], "num_prompts": 4, "generation": {"max_new_tokens": 8}},
    }
    return SFTStepConfig.model_validate({**settings, **fields})


def weights(result: Any) -> dict[str, torch.Tensor]:
    return load_file(next(result.model.path.glob("*.safetensors")))


@pytest.mark.detail("S4")
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_best_model_of_the_run_is_published(demonstrations, step_context, resolve_folder, tiny_llama_folder, lora) -> None:
    models = {"model": resolve_folder(tiny_llama_folder)}
    result = run(config(demonstrations, "third_is_best", lora=lora), step_context("test/chosen", 3, models))
    # 16 rows in batches of 4: four optimizer steps an epoch, four tries
    assert [one["optimizer_step"] for one in result.metrics["selection"]] == [4, 8, 12, 16]
    assert result.metrics["selected_optimizer_step"] == 12
    losses = [one["heldout_loss"] for one in result.metrics["selection"]]
    assert result.metrics["heldout_loss_after"] == pytest.approx(losses[2], rel=1e-4) and losses[2] != losses[3]
    # the same run without a selection, cut after the same step, has the same weights
    plain = config(demonstrations, "third_is_best", lora=lora, selection=None)
    context = step_context("test/plain", 3, models)
    last = weights(run(plain, context))
    chosen = weights(result)
    assert any(not torch.equal(chosen[name], last[name]) for name in chosen)
    assert (step_context("test/chosen", 3, models).folder / "metrics.jsonl").read_text().count("selection/score") == 4


def test_interrupted_run_keeps_its_measurements(demonstrations, step_context, resolve_folder, tiny_llama_folder) -> None:
    models = {"model": resolve_folder(tiny_llama_folder)}
    settings = config(demonstrations, "fewest_e")
    uninterrupted = run(settings, step_context("test/uninterrupted", 3, models))
    calls = 0
    original = Selector.try_out

    class PowerCut(BaseException):
        """No code may catch this exception."""

    def cut_in_the_third(self: Selector, optimizer_step: int) -> None:
        nonlocal calls
        calls += 1
        original(self, optimizer_step)
        if calls == 3:
            raise PowerCut

    context = step_context("test/cut", 3, models)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Selector, "try_out", cut_in_the_third)
        run(settings, context)
    again = run(settings, context)
    assert again.metrics["selection"] == uninterrupted.metrics["selection"]
    one, two = weights(uninterrupted), weights(again)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_reward_model_is_an_input_of_the_step(demonstrations) -> None:
    step = config(demonstrations, "fewest_e", selection={"reward": [{"model": "preference"}]})
    assert list(step.model_inputs()) == ["model", "selection.reward[0].model"]
    assert Selection.model_validate({"reward": [{"function": "a:b"}]}).every_epochs == 1.0


def test_a_run_of_a_fraction_of_epochs_is_evaluated_after_each_epoch_and_at_the_end() -> None:
    tried: list[int] = []
    selector: Any = SimpleNamespace(selection=SimpleNamespace(every_epochs=1.0), resume=lambda step: None, try_out=tried.append)
    trainer: Any = SimpleNamespace(is_deepspeed_enabled=False, steps_per_epoch=10)
    callback = selection_callback(selector, trainer)
    state: Any = SimpleNamespace(max_steps=25, num_train_epochs=3, global_step=0)  # as the Trainer rounds 2.5 epochs
    callback.on_train_begin(None, state, None)
    for state.global_step in range(1, 26):
        callback.on_step_end(None, state, None)
    assert tried == [10, 20, 25]
