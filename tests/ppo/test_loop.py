"""The complete stage: the reward rises, a resumed run equals an uninterrupted one, LoRA, weight averages, files of the run folder."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from stages.errors import DataError, RecipeError, TrainingError
from stages.ppo.loop import cut_message, run
from stages.ppo.update.targets import targets


def weights(result: Any) -> dict[str, torch.Tensor]:
    return load_file(next(result.model.path.glob("*.safetensors")))


def test_a_process_without_an_episode_is_refused(ppo_config) -> None:
    context: Any = SimpleNamespace(runtime=SimpleNamespace(num_processes=13))
    with pytest.raises(
        RecipeError, match="rollout_batch_size=12 is less than one episode for each of 13 processes; raise it to 13 or more"
    ):
        run(ppo_config(), context)


@pytest.mark.detail("P35")
def test_reward_or_penalty_of_a_token_changes_its_share(ppo_config, ppo_context, prompts) -> None:
    config = ppo_config(
        data=prompts,
        reward=[{"function": "letters_reward:vowels"}],
        total_episodes=24 * 64,
        rollout_batch_size=64,
        minibatch_size=32,
        microbatch_size=32,
        ppo_epochs=2,
        kl_coef=0.0,
        training={"learning_rate": 3e-3, "schedule": "constant"},
        generation={"max_new_tokens": 8},
    )
    metrics = run(config, ppo_context).metrics
    assert metrics["score_mean_last"] > metrics["score_mean_first"] + 0.1
    assert metrics["kl_last"] > metrics["kl_first"] >= 0
    lines = [json.loads(line) for line in (ppo_context.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and all(math.isfinite(value) for line in lines for value in line.values())
    samples = [json.loads(line) for line in (ppo_context.folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 48 and set(samples[0]) == {"iteration", "prompt", "completion", "score"}


def test_lora_publishes_an_adapter_on_the_policy(ppo_config, ppo_context, prompts) -> None:
    result = run(ppo_config(data=prompts, lora={"r": 2}), ppo_context)
    assert result.model.is_adapter and all("lora_" in name for name in weights(result))
    from stages.models.loading import load_language_model
    from stages.registry.references import ResolvedModel

    source = ResolvedModel.of_record(result.model)
    assert load_language_model(source, dtype=torch.float32) is not None


@pytest.mark.detail("P18")
def test_weight_average_is_published(ppo_config, step_context, resolve_folder, tiny_llama_folder, prompts) -> None:
    models = {"policy": resolve_folder(tiny_llama_folder)}
    start = load_file(tiny_llama_folder / "model.safetensors")
    last = weights(run(ppo_config(data=prompts), step_context("test/last", 1, models)))
    average = weights(run(ppo_config(data=prompts, ema_decay=0.999999), step_context("test/average", 1, models)))
    name = "model.embed_tokens.weight"
    assert not torch.allclose(last[name], start[name], atol=1e-4)
    torch.testing.assert_close(average[name], start[name], rtol=0, atol=1e-5)  # eight steps of a millionth each


def test_average_by_iteration_is_published_in_addition_to_the_last_weights(
    ppo_config, step_context, resolve_folder, tiny_llama_folder, prompts
) -> None:
    models = {"policy": resolve_folder(tiny_llama_folder)}
    start = load_file(tiny_llama_folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    # one iteration of four optimizer steps: with updates by iteration, the average includes the last weights once
    one = ppo_config(data=prompts, total_episodes=12, ema_decay=0.75, ema_cadence="iteration", publish_last=True)
    context = step_context("test/average", 1, models)
    average = weights(run(one, context))
    last = load_file(next(context.registry.get("test/average-last").path.glob("*.safetensors")))
    torch.testing.assert_close(average[name], 0.75 * start[name] + 0.25 * last[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(last[name], start[name], atol=1e-4)
    every = weights(run(ppo_config(data=prompts, total_episodes=12, ema_decay=0.75), step_context("test/every", 1, models)))
    assert not torch.allclose(every[name], average[name], atol=1e-5)


def test_returns_by_hand_in_a_complete_rollout(ppo_config, ppo_context, make_rollout) -> None:
    from stages.ppo.roles import load_roles

    config = ppo_config(whiten_advantages=False, gae_lambda=1.0, missing_eos="subtract", missing_eos_penalty=3.0, length_penalty=0.5)
    rollout = make_rollout(load_roles(config, ppo_context), config)
    assert set(rollout.stopped.tolist()) == {True, False}
    torch.testing.assert_close(rollout.raw_scores - rollout.scores, 0.5 * rollout.lengths + torch.where(rollout.stopped, 0.0, 3.0))
    target = targets(rollout, config, kl_coef=0.2)
    for row in range(len(rollout.prompts)):
        length = int(rollout.lengths[row])
        # at gamma = lambda = 1 the return of the first token is the sum of all rewards
        expected = float(rollout.scores[row]) - 0.2 * float(rollout.kl[row].sum())
        assert float(target.returns[row, 0]) == pytest.approx(expected, abs=1e-4)
        assert float(target.rewards[row, length - 1]) == pytest.approx(
            float(rollout.scores[row] - 0.2 * rollout.kl[row, length - 1]), abs=1e-5
        )


def test_a_reward_that_fails_is_named(ppo_config, ppo_context, prompts, tmp_path, monkeypatch) -> None:
    (tmp_path / "bad_rewards.py").write_text(
        "def raises(p, c): raise ZeroDivisionError('no')\ndef short(p, c): return [1.0]\ndef nans(p, c): return [float('nan')] * len(c)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, message in (
        ("raises", "bad_rewards:raises raised ZeroDivisionError: no.*; there was no checkpoint yet, so the next run starts this step over"),
        ("short", r"'short' returned scores of shape \(1,\); expected one number per completion \(12\)"),
        ("nans", "'nans' returned nan for the completion"),
    ):
        with pytest.raises(TrainingError, match=message):
            run(ppo_config(data=prompts, reward=[{"function": f"bad_rewards:{name}"}]), ppo_context)
        episodes = [json.loads(line) for line in (ppo_context.folder / "failed_rollout.jsonl").read_text().splitlines()]
        assert len(episodes) == 12 and set(episodes[0]) == {"prompt", "completion"}


def test_an_update_that_fails_keeps_its_episodes_and_the_last_checkpoint(ppo_config, ppo_context, prompts, tmp_path, monkeypatch) -> None:
    code = "calls = []\ndef huge_in_the_third(p, c):\n    calls.append(1)\n    return [3e38 if len(calls) == 3 else len(t) for t in c]\n"
    (tmp_path / "late_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = ppo_config(data=prompts, reward=[{"function": "late_rewards:huge_in_the_third", "name": "late"}], total_episodes=60)
    with pytest.raises(TrainingError, match=r"iteration 2: .*not finite.*failed_rollout.jsonl; the last checkpoint is kept in"):
        run(config, ppo_context)
    episodes = [json.loads(line) for line in (ppo_context.folder / "failed_rollout.jsonl").read_text().splitlines()]
    assert [episode["score"] for episode in episodes] == [pytest.approx(3e38)] * 12
    assert {"prompt", "completion", "late", "kl", "tokens"} <= set(episodes[0])
    assert any((ppo_context.checkpoint_folder / "ppo").iterdir())


def test_prompts_without_room_for_a_completion_are_left_out(ppo_config, ppo_context, tmp_path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "film " * 200}) + "\n")
    with pytest.raises(DataError, match="none of 1 prompts has at most 118 tokens"):  # 128 positions less 10 new tokens
        run(ppo_config(data=str(path)), ppo_context)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollout_batch_size": 10}, "rollout_batch_size=10 must be a multiple of minibatch_size=6"),
        ({"total_episodes": 6}, "total_episodes=6 is less than rollout_batch_size=12, one iteration; raise it"),
        ({"generation": {"temperature": 0.0}}, "temperature=0 is greedy"),
        ({"policy": {"ref": "p", "quantization": "nf4"}}, "needs lora"),
        ({"reward": [{"function": "a:b"}, {"function": "c:b"}]}, "two sources have the name 'b'"),
        (
            {"training": {"adam_style": "tensorflow", "weight_decay": 0.1}},
            "weight_decay requires adam_style: torch, got tensorflow; remove weight_decay",
        ),
        ({"whitening_scope": "minibatch"}, "minibatch_size >= 8"),
        ({"publish_last": True}, "ema.publish_last requires ema.decay"),
        ({"generation": {"ignore_eos": True}, "missing_eos": "replace"}, "no completion ends"),
        ({"reward": [{"ensemble": [{"function": "a:b"}, {"function": "c:d"}]}]}, "an ensemble needs a name; add name: NAME"),
        ({"reward": [{"function": "a:b", "combine": "min"}]}, "combine: min needs an ensemble, a list of sources"),
    ],
)
def test_contradictions_are_refused(ppo_config, fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        ppo_config(**fields)


def test_message_about_texts_that_are_too_long_names_the_reward_source() -> None:
    assert cut_message("scoring/taste_cut_share", 0.0156) == (
        "1.6% of the texts are too long for taste, so their beginning is cut (scoring/taste_cut_share)"
    )
    assert cut_message("scoring/taste_completion_cut_share", 0.004) == (
        "0.4% of the completions alone are too long for taste, so their beginning is cut (scoring/taste_completion_cut_share)"
    )
