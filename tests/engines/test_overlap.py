"""PPO with ``overlap: 1``: the next rollout is sampled while an update runs, with the policy before this update."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stages.errors import LaunchError, Stopped, TrainingError
from stages.models.adapters.served import updates_of
from stages.ppo.loop import run
from stages.ppo.rollout.sampling import Sampling, check_overlap
from stages.ppo.update.updater import Updater
from stages.sampling.generation import episode_seed
from tests.engines.test_ppo_elsewhere import LORA, metrics_of

ITERATIONS, EPISODES, SEED = 3, 4, 0
FIELDS = {"overlap": 1, "total_episodes": ITERATIONS * EPISODES, "training": {"learning_rate": 1e-2}, **LORA}
EPISODE_OF = {episode_seed(SEED, iteration, row): (iteration, row) for iteration in range(ITERATIONS) for row in range(EPISODES)}


def asked(server: Any) -> list[tuple[tuple[int, int], str]]:
    """((iteration, row), model) of all requests for completions, without probes."""
    bodies = [body for path, body in server.requests if path == "/v1/completions" and body.get("seed") in EPISODE_OF]
    return [(EPISODE_OF[body["seed"]], body["model"]) for body in bodies]


def on_episode(server: Any, act: Callable[[int, int], None]) -> None:
    """Let the server call ``act(iteration, row)`` before it samples an episode."""
    server.before = lambda path, body: act(*EPISODE_OF[body["seed"]]) if body.get("seed") in EPISODE_OF else None


def wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)


class Watched:
    """Records the updates of a run.

    ``policies``: the policy's adapter before each update. ``times``: when each update began and ended. ``before``: called with
    the number of each update when it begins.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policies: list[dict[str, torch.Tensor]] = []
        self.times: list[tuple[float, float]] = []
        self.before: Callable[[int], None] = lambda number: None
        update = Updater.update

        def watch(updater: Updater, rollout: Any, **options: Any) -> Any:
            updater.roles.policy.activate()
            self.policies.append({name: one.b @ one.a for name, (one,) in updates_of(updater.roles.policy.model).items()})
            began = time.monotonic()
            self.before(len(self.policies) - 1)
            result = update(updater, rollout, **options)
            self.times.append((began, time.monotonic()))
            return result

        monkeypatch.setattr(Updater, "update", watch)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.fixture
def start(ppo_context: Any) -> Callable[[Any], Any]:
    """start(config) -> the result of a run. It begins at the last checkpoint if there is one."""

    def make(config: Any) -> Any:
        ppo_context.runtime.begin_step(SEED)  # the seed for the new adapter
        (ppo_context.folder / "metrics.jsonl").unlink(missing_ok=True)
        return run(config, ppo_context)

    return make


def test_the_next_rollout_is_sampled_during_an_update_by_the_policy_before_that_update(stub, config, ppo_context, start, watched) -> None:
    """The server delays the episodes of a rollout until the previous update runs, and this update waits for the first of their requests."""
    server = stub()
    requests: list[tuple[float, int]] = []
    adapters: dict[str, dict[str, torch.Tensor]] = {}

    def hold(iteration: int, row: int) -> None:
        requests.append((time.monotonic(), iteration))
        (name,) = server.adapted  # the previous adapter is unloaded
        adapters[name] = {key: value.clone() for key, value in server.adapted[name].state_dict().items() if "lora_" in key}
        wait_until(lambda: len(watched.policies) >= iteration)

    on_episode(server, hold)
    watched.before = lambda number: wait_until(lambda: number + 1 == ITERATIONS or number + 1 in [one for _, one in requests])
    start(config(server, **FIELDS))

    for (began, ended), (next_began, _), iteration in zip(watched.times, watched.times[1:], (1, 2), strict=False):
        sampled = [when for when, one in requests if one == iteration]
        assert len(sampled) == EPISODES and min(sampled) < ended and max(sampled) < next_began and ended > began
    used = [{model for (one, _), model in asked(server) if one == iteration} for iteration in range(ITERATIONS)]
    assert used[0] == used[1] != used[2] and all(len(names) == 1 for names in used)  # the first two are from the first policy
    for names, policy in ((used[1], watched.policies[0]), (used[2], watched.policies[1])):
        served = adapters[names.pop()]
        for name, product in policy.items():
            (a,), (b,) = ([value for key, value in served.items() if f"{name}.{part}" in key] for part in ("lora_A", "lora_B"))
            torch.testing.assert_close(b @ a, product)
    assert all(not torch.equal(watched.policies[1][name], product) for name, product in watched.policies[0].items())

    first, *others = metrics_of(ppo_context)
    assert first["policy/sampling_lag"] == 0 and first["policy/importance_mean"] == pytest.approx(1, abs=1e-4)
    assert "time/generation_hidden_s" not in first
    for entry in others:
        assert entry["policy/sampling_lag"] == 1 and entry["time/generation_hidden_s"] > 0
        # The sampler had another policy, but the ratios of the update start at 1.
        assert entry["policy/sampling_gap"] > 1e-3 and abs(entry["policy/importance_mean"] - 1) > 1e-4
        assert entry["policy/ratio_first_deviation"] < 1e-4
    assert [entry["time/transfer_s"] > 0 for entry in (first, others[0])] == [True, True] and "time/transfer_s" not in others[1]


@pytest.mark.parametrize("cut", ["signal", "server"])
def test_an_interrupted_run_continues_with_the_finished_episodes_and_the_policy_that_sampled_them(
    stub, config, ppo_context, start, watched, monkeypatch, cut
) -> None:
    """It is interrupted during the second-last update, when half of the last rollout is sampled.

    Its metrics equal those of an uninterrupted run.
    """
    start(config(stub(), **FIELDS))
    uncut = metrics_of(ppo_context)
    shutil.rmtree(ppo_context.checkpoint_folder)  # as the chain does after a step
    watched.policies.clear()

    ahead: list[Sampling] = []
    begin = Sampling.start
    monkeypatch.setattr(Sampling, "start", lambda sampling: (ahead.append(sampling), begin(sampling)))
    server, released = stub(), threading.Event()
    last = ITERATIONS - 1
    done = lambda: len([1 for (iteration, _), _ in asked(server) if iteration == last]) == EPISODES  # noqa: E731

    def hold(iteration: int, row: int) -> None:
        if iteration == last and row >= EPISODES // 2:
            wait_until(lambda: len(watched.policies) == last)  # the update runs
            if cut == "server":
                wait_until(lambda: len(ahead[-1].finished) == EPISODES // 2)
                server.die()
                raise ConnectionError
            released.wait(60)

    on_episode(server, hold)

    def stop(number: int) -> None:
        if number == last - 1:
            wait_until(done)
            if cut == "signal":
                wait_until(lambda: len(ahead[-1].finished) == EPISODES // 2)
                ppo_context.runtime.stop.ask(signal.SIGTERM)

    watched.before = stop
    began = time.monotonic()
    if cut == "signal":
        with pytest.raises(Stopped):
            start(config(server, **FIELDS))
        assert time.monotonic() - began < 30  # the server still delays two answers
        released.set()
        ppo_context.runtime.stop.number = None
    else:
        with pytest.raises(TrainingError, match=r"iteration 2: no vLLM server is left.*The same command continues"):
            start(config(server, **FIELDS))
    assert len(metrics_of(ppo_context)) == (1 if cut == "signal" else 2)

    again = stub()
    watched.before = lambda number: None
    start(config(again, **FIELDS))
    assert {episode for episode, _ in asked(again)} == {(last, 2), (last, 3)}  # the checkpoint has the others
    for after, expected in zip(metrics_of(ppo_context), uncut, strict=True):
        for name, value in expected.items():
            assert name.startswith("time/") or after[name] == value, name


def test_a_failed_update_does_not_wait_for_the_sampling(stub, config, start, watched) -> None:
    server, released = stub(), threading.Event()
    on_episode(server, lambda iteration, row: released.wait(60) and None if iteration else None)

    def fail(number: int) -> None:
        wait_until(lambda: any(iteration for (iteration, _), _ in asked(server)))
        raise TrainingError("the loss is nan")

    watched.before = fail
    began = time.monotonic()
    with pytest.raises(TrainingError, match="the loss is nan"):
        start(config(server, **FIELDS))
    assert time.monotonic() - began < 30
    released.set()
    assert server.adapted == {}  # the run's adapter is unloaded after the failure, too


def test_overlap_is_refused_for_local_sampling_and_on_a_shared_gpu(ppo_config) -> None:
    with pytest.raises(ValueError, match="overlap=1 requires generation.engine: vllm"):
        ppo_config(overlap=1)
    shared = ppo_config(overlap=1, generation={"engine": {"vllm": {"start": {}}}})
    check_overlap(shared, "cpu")
    with pytest.raises(LaunchError, match="shares the run's GPU and sleeps"):
        check_overlap(shared, "cuda")
    check_overlap(ppo_config(overlap=1, generation={"engine": {"vllm": {"start": {"gpus": [1]}}}}), "cuda")


def test_overlap_changes_the_fingerprint_only_when_it_is_on(ppo_config) -> None:
    from stages.chain.fingerprints import settings_of

    engine = {"engine": {"vllm": {"url": "http://here:1"}}}
    assert "overlap" not in settings_of(ppo_config(generation=engine))
    assert settings_of(ppo_config(generation=engine, overlap=1))["overlap"] == 1
