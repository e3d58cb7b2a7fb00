"""Rewards that use a server: completions are scored while others are sampled, with the same scores."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stages.errors import Stopped, TrainingError
from stages.ppo.loop import run
from tests.ppo.conftest import PROMPTS
from tests.rewards.conftest import Server, lengths


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.server.shutdown()


@pytest.fixture
def prompts(tmp_path: Any) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{prompt} {row}", "row": row}) + "\n" for row, prompt in enumerate(PROMPTS * 2)))
    return str(path)


def remote(server: Server, **fields: Any) -> dict[str, Any]:
    return {"endpoint": server.url, "name": "far", "concurrency": 1, "batch_size": 2, "columns": ["row"], "retries": 2, **fields}


def collected(config: Any, context: Any, *, overlap: bool, monkeypatch: pytest.MonkeyPatch, seconds_per_step: float = 0.0) -> Any:
    """A rollout of twelve episodes with a slow policy; the argument is its time for each token."""
    from stages.corpora.templates import encode_prompt
    from stages.ppo.roles import load_roles
    from stages.ppo.rollout.collecting import collect
    from stages.ppo.rollout.early_scoring import EarlyScoring
    from stages.ppo.rollout.episodes import Episodes
    from stages.rewards.building import build_reward
    from stages.rewards.details import Details

    if not overlap:
        monkeypatch.setattr(EarlyScoring, "on_finished", None)
    roles = load_roles(config, context)
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    reward, monitors = (build_reward(sources, {}, "reward", **cpu) for sources in (config.reward, config.monitors))
    asked = PROMPTS * 2
    ids = [encode_prompt(roles.tokenizer, prompt) for prompt in asked]
    forward = roles.policy.model.forward
    roles.policy.model.forward = lambda *given, **named: (time.sleep(seconds_per_step), forward(*given, **named))[1]
    return collect(roles, reward, monitors, Episodes(asked, ids, range(12), Details({"row": list(range(12))})), config)


def test_scores_with_and_without_overlap_are_equal(server, ppo_config, ppo_context, monkeypatch) -> None:
    server.reply = lambda body, number: (
        200,
        {"rewards": [length + 100 * row for length, row in zip(lengths(body), body["columns"]["row"], strict=True)]},
    )
    ensemble = {"ensemble": [remote(server, name="one"), {"function": "letters_reward:letters"}], "name": "both"}
    config = ppo_config(reward=[remote(server), ensemble], monitors=[remote(server, name="watch")], generation={"batch_size": 3})
    early = collected(config, ppo_context, overlap=True, monkeypatch=monkeypatch)
    assert sum(len(body["completions"]) for body in server.bodies) == 3 * 12  # each source gets one request for each completion
    late = collected(config, ppo_context, overlap=False, monkeypatch=monkeypatch)
    assert early.completions == late.completions and len(set(early.completions)) > 6
    expected = [100.0 * row + len(text) for row, text in enumerate(early.completions)]
    for rollout in (early, late):
        assert rollout.parts["far"].tolist() == rollout.parts["both.one"].tolist() == rollout.monitors["watch"].tolist() == expected
    assert early.scores.tolist() == late.scores.tolist() and list(early.parts) == list(late.parts)
    assert early.hidden_seconds > 0 and late.hidden_seconds == 0


def test_scoring_overlaps_with_sampling(server, ppo_config, ppo_context, monkeypatch) -> None:
    def slow(body: dict[str, Any], number: int) -> tuple[int, Any]:
        time.sleep(0.1)
        return 200, {"rewards": lengths(body)}

    server.reply = slow
    generation = {"batch_size": 3, "max_new_tokens": 10}
    config = ppo_config(reward=[remote(server, batch_size=64)], generation=generation)
    rollout = collected(config, ppo_context, overlap=True, monkeypatch=monkeypatch, seconds_per_step=0.02)
    assert len(server.bodies) >= 2 and len(server.bodies[0]["completions"]) < 12  # the first request did not wait for the last completion
    spent = 0.1 * len(server.bodies)
    assert rollout.hidden_seconds > 0.5 * spent > rollout.seconds["scoring"]


def test_a_server_that_fails_ends_the_run_with_all_its_episodes(server, prompts, ppo_config, ppo_context) -> None:
    server.reply = lambda body, number: (503, {}) if number > 1 else (200, {"rewards": lengths(body)})
    reward = [remote(server, backoff_seconds=0.0)]
    config = ppo_config(data=prompts, reward=reward, generation={"batch_size": 3})
    with pytest.raises(TrainingError, match="gave no score for 1[01] of 12 completions: status 503.*episodes are in"):
        run(config, ppo_context)
    assert len(server.bodies) == 1 + 3  # after three attempts for the second batch, there are no further requests
    assert len((ppo_context.folder / "failed_rollout.jsonl").read_text().splitlines()) == 12


def test_run_stopped_during_sampling_requests_only_one_stored_score_again(
    server, prompts, ppo_config, step_context, resolve_folder, tiny_llama_folder
) -> None:
    def stopping(body: dict[str, Any], number: int) -> tuple[int, Any]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return 200, {"rewards": lengths(body)}

    server.reply = stopping
    models = {"policy": resolve_folder(tiny_llama_folder)}
    config = ppo_config(data=prompts, reward=[remote(server)], generation={"batch_size": 2}, total_episodes=12, checkpoint_seconds=1e9)
    context = step_context("test/cut", 1, models)
    with pytest.raises(Stopped), context.runtime.stop.installed():
        run(config, context)
    before = [text for body in server.bodies[:1] for text in body["columns"]["row"]]
    run(config, step_context("test/cut", 1, models))
    asked = [row for body in server.bodies for row in body["columns"]["row"]]
    assert sorted(set(asked)) == list(range(12))
    assert sum(asked.count(row) for row in before) == len(before) + 1  # by one of them the run learns which model the server has now


def test_with_local_rewards_sampling_reports_nothing(ppo_config, ppo_context, make_rollout) -> None:
    from stages.ppo.roles import load_roles

    config = ppo_config()
    rollout = make_rollout(load_roles(config, ppo_context), config)
    assert rollout.hidden_seconds is None
