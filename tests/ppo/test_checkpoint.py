"""Resuming PPO after any interruption is bitwise exact: weights, metrics and samples equal those of an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.errors import Stopped
from stages.models.layers import compiled as compiled_layers
from stages.ppo import loop
from stages.ppo.loop import run
from stages.ppo.records.checkpoint import HistoryLog, RunKeeper, RunState
from stages.ppo.records.history import RunHistory
from stages.ppo.update.updater import Updater
from stages.rewards.source import CombinedReward
from stages.training.checkpoints import Checkpoints

SETTINGS: dict[str, dict[str, Any]] = {
    "average, adaptive KL": {"ema_decay": 0.9, "kl_target": 1.0, "kl_horizon": 100},
    "shared value head": {"value": "shared", "training": {"learning_rate": 1e-3, "adam_style": "tensorflow"}},
    "adapter, random reward": {"lora": {"r": 2}, "whiten_rewards": True, "reward": [{"function": "letters_reward:noisy"}]},
    "8-bit moments": {"training": {"learning_rate": 1e-3, "optimizer": "adamw_8bit"}},
    "leave-one-out": {"advantages": "rloo", "samples_per_prompt": 2, "value": None},
    "pretraining mix": {"value_warmup_iterations": 2, "target_update_kl": 1e-4},
}


WHOLE: dict[str, dict[str, Any]] = {}


class Killed(BaseException):
    """As SIGKILL: nothing may catch it."""


def at_call(number: int, then: Callable[[], None], original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` with one change: its ``number``th call calls ``then`` first."""
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            then()
        return original(*arguments, **options)

    return counted


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def six_iterations(ppo_config, prompts, tmp_path) -> Callable[[str], Any]:
    """The config of a run of six iterations of four minibatches each."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"the film number {n} was warm"}) + "\n" for n in range(40)))

    def make(name: str) -> Any:
        settings = dict(SETTINGS[name])
        if name == "pretraining mix":
            settings["pretraining_mix"] = {"data": str(tmp_path / "texts.jsonl"), "examples_per_episode": 1, "block_size": 8}
        return ppo_config(data=prompts, total_episodes=72, checkpoint_seconds=1e9, **settings)

    return make


@pytest.fixture
def undisturbed(six_iterations, step_context, resolve_folder, tiny_llama_folder) -> Callable[[str], dict[str, Any]]:
    """The results of an uninterrupted run, computed once for each setting."""

    def make(name: str) -> dict[str, Any]:
        if name not in WHOLE:
            context = step_context("test/uninterrupted", 5, {"policy": resolve_folder(tiny_llama_folder)})
            WHOLE[name] = outcome(run(six_iterations(name), context), context)
        return WHOLE[name]

    return make


@pytest.fixture
def every(monkeypatch) -> Callable[[int], None]:
    """every(3): a checkpoint is due at every third safe point, independent of the clock."""

    def make(number: int) -> None:
        ticks = itertools.count(1)
        monkeypatch.setattr(Checkpoints, "is_due", lambda self: next(ticks) % number == 0)

    return make


def outcome(result: Any, context: Any) -> dict[str, Any]:
    """Weights, metrics without times, samples."""
    lines = [json.loads(line) for line in (context.folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(next(result.model.path.glob("*.safetensors"))),
        "metrics": [json.dumps({key: value for key, value in line.items() if not key.startswith("time/")}) for line in lines],
        "samples": (context.folder / "samples.jsonl").read_text(),
    }


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["weights"].keys() == two["weights"].keys()
    for name, expected in one["weights"].items():
        assert torch.equal(expected, two["weights"][name]), name
    assert one["metrics"] == two["metrics"] and one["samples"] == two["samples"]


CUTS = {
    "killed between": ("collect", 4, kill),  # three iterations are done
    "killed inside": ("minibatch", 15, kill),  # in the fourth, after two of its four minibatches
    "SIGTERM in the update": ("minibatch", 10, terminate),
    "SIGTERM in the rollout": ("score", 3, terminate),  # while the third is scored
}
ONCE = {"killed between": "average, adaptive KL"}  # an interruption that is tested with one setting only
# settings that are tested with one interruption only: bitsandbytes is slow on CPUs
SLOW = {"8-bit moments": "killed inside", "leave-one-out": "killed inside"}
CASES = [(cut, settings) for cut in CUTS for settings in SETTINGS if ONCE.get(cut, settings) == settings and SLOW.get(settings, cut) == cut]


@pytest.mark.detail("P18")
@pytest.mark.parametrize(("cut", "settings"), CASES)
def test_run_interrupted_anywhere_ends_like_an_uninterrupted_one(
    six_iterations, undisturbed, every, step_context, resolve_folder, tiny_llama_folder, monkeypatch, cut, settings
) -> None:
    method, number, then = CUTS[cut]
    models = {"policy": resolve_folder(tiny_llama_folder)}
    context = step_context("test/cut", 5, models)
    with monkeypatch.context() as patch:
        every(3)  # the newest checkpoint is sometimes inside an iteration, sometimes between two, and rarely at the interruption
        target: Any = {"collect": loop, "minibatch": Updater, "score": CombinedReward}[method]
        patch.setattr(target, method, at_call(number, then, getattr(target, method)))
        with pytest.raises(Killed if then is kill else Stopped), context.runtime.stop.installed():
            run(six_iterations(settings), context)
    context.close()
    again = step_context("test/again", 5, models)  # the chain makes a new run folder for every attempt
    again.checkpoint_folder = context.checkpoint_folder
    torch.manual_seed(999)  # as if the process had used random numbers in between
    assert_equal(undisturbed(settings), outcome(run(six_iterations(settings), again), again))


def test_run_interrupted_three_times_ends_like_an_uninterrupted_one(
    six_iterations, undisturbed, every, step_context, resolve_folder, tiny_llama_folder, monkeypatch
) -> None:
    models = {"policy": resolve_folder(tiny_llama_folder)}
    context = step_context("test/cut", 5, models)
    for number in (13, 5, 4):
        every(7)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Updater, "minibatch", at_call(number, kill, Updater.minibatch))
            run(six_iterations("average, adaptive KL"), context)
        context.close()
    again = step_context("test/again", 5, models)
    again.checkpoint_folder = context.checkpoint_folder
    assert_equal(undisturbed("average, adaptive KL"), outcome(run(six_iterations("average, adaptive KL"), again), again))


def test_a_checkpoint_of_compiled_layers_continues_without_them(
    ppo_config, prompts, every, step_context, resolve_folder, tiny_llama_folder, monkeypatch
) -> None:
    """The run is killed in its second iteration, after compiled updates. It samples and ends like a run that never compiled."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")  # it traces the passes, but generates no code: fast
    models = {"policy": resolve_folder(tiny_llama_folder)}

    def config(compiles: bool) -> Any:
        # With this epsilon, Adam does not make full steps for rounding errors.
        training = {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "gradient_checkpointing": True, "torch_compile": compiles}
        fields = {"advantages": "rloo", "samples_per_prompt": 2, "value": None, "lora": {"r": 2, "target_modules": ["q_proj"]}}
        return ppo_config(data=prompts, checkpoint_seconds=1e9, ema_decay=0.5, training=training, **fields)

    usual = step_context("test/usual", 5, models)
    expected = outcome(run(config(False), usual), usual)
    every(2)
    context = step_context("test/cut", 5, models)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Updater, "minibatch", at_call(7, kill, Updater.minibatch))
        run(config(True), context)
    context.close()
    newest = max((context.checkpoint_folder / "ppo").glob("checkpoint-*"))
    names = [name for path in newest.glob("*.safetensors") for name in load_file(path)]
    assert names and not [name for name in names if "_orig_mod" in name]
    again = step_context("test/again", 5, models)
    again.checkpoint_folder = context.checkpoint_folder
    result = outcome(run(config(False), again), again)
    assert result["samples"] == expected["samples"] and result["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=1e-3, atol=1e-6)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(ppo_config, ppo_context, prompts, capsys) -> None:
    config = ppo_config(data=prompts, total_episodes=60)
    finished = outcome(run(config, ppo_context), ppo_context)
    newest, older = sorted((ppo_context.checkpoint_folder / "ppo").glob("checkpoint-*"), reverse=True)
    weights = bytearray((newest / "policy.safetensors").read_bytes())
    weights[-1] ^= 1  # one bit
    (newest / "policy.safetensors").write_bytes(weights)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (ppo_context.folder / name).unlink()
    ppo_context.runtime.console.quiet = False
    assert_equal(finished, outcome(run(config, ppo_context), ppo_context))
    said = capsys.readouterr().out
    assert f"{newest.name} is skipped: policy.safetensors was changed" in said and "resuming after iteration" in said


def test_the_best_iteration_is_published_in_addition_to_the_last(ppo_config, ppo_context, prompts) -> None:
    result = run(ppo_config(data=prompts, total_episodes=60, keep_best=2, keep_last=1, checkpoint_seconds=1e9), ppo_context)
    lines = [json.loads(line) for line in (ppo_context.folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line["rewards/total_mean"] for line in lines]
    best = ppo_context.registry.get("test/step-best")
    assert best.manifest["metrics"] == {"total_mean": max(scores), "iteration": scores.index(max(scores)) + 1}
    folders = sorted((ppo_context.checkpoint_folder / "ppo").glob("checkpoint-*"))
    kept = [json.loads((path / "checkpoint.json").read_text())["score"] for path in folders]
    assert set(sorted(scores)[-2:]) <= set(kept) and len(kept) <= 3
    last = load_file(result.model.path / "model.safetensors")
    assert (best.digest == result.model.digest) == (scores.index(max(scores)) == len(scores) - 1)
    assert last.keys() == load_file(best.path / "model.safetensors").keys()


def test_only_adapters_are_stored_if_only_adapters_train(ppo_config, ppo_context, prompts) -> None:
    run(ppo_config(data=prompts, lora={"r": 2}), ppo_context)
    newest = max((ppo_context.checkpoint_folder / "ppo").glob("checkpoint-*"))
    assert all("lora_" in name for name in load_file(newest / "policy.safetensors"))
    assert sum(path.stat().st_size for path in newest.glob("*.safetensors")) < (ppo_context.models["policy"].path and 200_000)
    assert not [path for path in newest.iterdir() if path.suffix not in (".safetensors", ".json")]


def test_history_is_appended_and_truncated_at_the_resumed_iteration(tmp_path: Path) -> None:
    entries = [{"metrics": {"a": number / 3}, "samples": ["…"]} for number in range(5)]
    log = HistoryLog(tmp_path / "history.jsonl")
    log.append(entries[:2])
    mark = log.append(entries[2:3])
    log.append(entries[3:])  # by a run that is interrupted before its checkpoint is complete
    again = HistoryLog(tmp_path / "history.jsonl")
    assert again.first(mark) == entries[:3]
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 3
    assert HistoryLog(tmp_path / "history.jsonl").first(again.append(entries[3:])) == entries
    (tmp_path / "history.jsonl").write_text((tmp_path / "history.jsonl").read_text().replace("0.0", "0.1"))
    assert HistoryLog(tmp_path / "history.jsonl").first(mark) is None


def test_summary_data_is_stored_as_columns_until_it_is_written() -> None:
    told = {"metrics": {"monitors/a": 1.0, "policy/kl": 2.0, "time/update": 9.0}, "samples": []}
    made = {"metrics": {"monitors/a": 3.0, "time/update": 9.0}, "samples": ["x"]}
    history = RunHistory([told])
    history.append(made)
    assert (len(history), history.names(), list(history.values("monitors/a"))) == (2, ["monitors/a"], [1.0, 3.0])
    assert list(history.values("policy/kl")) == [2.0] and "time/update" not in history._columns
    assert history.take_new() == [made] and history.take_new() == []
    assert history.take_resumed() == [told] and history.take_resumed() == []


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_checkpoints(
    six_iterations, every, step_context, resolve_folder, tiny_llama_folder, monkeypatch
) -> None:
    from stages.errors import TrainingError

    context = step_context("test/broken", 5, {"policy": resolve_folder(tiny_llama_folder)})
    every(1)
    seen: list[dict[str, torch.Tensor]] = []

    def poison(self: Updater, *arguments: Any, **options: Any) -> Any:
        outcome = original(self, *arguments, **options)
        seen.append({name: value.detach().clone() for name, value in self.roles.policy.model.named_parameters()})
        if len(seen) == 6:
            next(iter(self.roles.policy.model.parameters())).grad[0, 0] = float("inf")
            seen.append(dict(self.roles.policy.model.named_parameters()))
        return outcome

    original = Updater.accumulate
    monkeypatch.setattr(Updater, "accumulate", poison)
    with pytest.raises(TrainingError, match="iteration 1: the gradient norm of the policy is inf"):
        run(six_iterations("average, adaptive KL"), context)
    before, after = seen[-2:]
    assert all(torch.equal(before[name], after[name]) for name in before)
    newest = max((context.checkpoint_folder / "ppo").glob("checkpoint-*"))
    kept = load_file(newest / "policy.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert all(torch.equal(kept[name], before[name]) for name in kept)


def test_a_stop_while_adapters_are_switched_still_saves_every_trained_weight(step_context: Any, tmp_path: Path) -> None:
    """Switching adapters clears ``requires_grad`` for a moment. A stop signal can arrive at that moment."""
    network = torch.nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    keeper = RunKeeper(tmp_path / "ppo", step_context().runtime, {"policy": network}, {"policy": optimizer}, None)
    network.requires_grad_(False)
    keeper.save(RunState(iteration=1))
    saved = load_file(next((tmp_path / "ppo").rglob("policy.safetensors")))
    assert torch.equal(saved["weight"], network.weight)
    moments = load_file(next((tmp_path / "ppo").rglob("policy-optimizer.safetensors")))
    assert "weight/exp_avg" in moments
