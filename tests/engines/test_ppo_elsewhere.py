"""PPO with a sampling server: weights are sent after every update, the sampling gap is corrected, and an interrupted run resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import TrainingError
from stages.ppo.loop import PPORun, run
from stages.ppo.rollout.rollout import Rollout
from tests.ppo.conftest import PROMPTS

LORA = {"lora": {"r": 2}, "value": "policy"}


def metrics_of(context: Any) -> list[dict[str, float]]:
    return [json.loads(line) for line in (context.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fields", [LORA, {}], ids=["adapter", "full"])
def test_server_gets_the_policy_of_every_iteration(stub, config, ppo_context, fields) -> None:
    """With an old policy, the probe would end the run: its bound in fp32 is 0.001 nats, and a learning rate of 0.01 changes more."""
    server = stub()
    result = run(config(server, training={"learning_rate": 1e-2}, **fields), ppo_context)
    paths = [path for path, _ in server.requests]
    if fields:
        loaded = [body["lora_name"] for path, body in server.requests if path == "/v1/load_lora_adapter"]
        unloaded = [body["lora_name"] for path, body in server.requests if path == "/v1/unload_lora_adapter"]
        assert len(set(loaded)) == 2 and unloaded == loaded
        folders = [body["lora_path"] for path, body in server.requests if path == "/v1/load_lora_adapter"]
        assert not any(Path(folder).exists() for folder in folders)
    else:
        assert paths.count("/collective_rpc") == paths.count("/reset_prefix_cache") == 2
    for entry in metrics_of(ppo_context):
        assert entry["policy/sampling_gap"] < 1e-4 and entry["policy/importance_mean"] == pytest.approx(1, abs=1e-4)
        assert entry["policy/ratio_first_deviation"] < 1e-4 and entry["time/transfer_s"] > 0
    (sampling,) = result.metrics["sampling"]
    assert sampling["engine"] == "vllm" and sampling["version"] == "0.32.0" and sampling["transfers"] == 2
    assert "the same seeds" in sampling["not_promised"]


def test_a_stale_adapter_ends_the_run(stub, config, ppo_context) -> None:
    """The new adapter changes nothing, so the first iteration is correct. The second one would be sampled from the old policy."""
    server = stub()
    server.ignores_adapters = True
    with pytest.raises(TrainingError, match="the sampler does not have the policy's weights"):
        run(config(server, training={"learning_rate": 1e-2}, **LORA), ppo_context)
    assert len(metrics_of(ppo_context)) == 1


def test_run_whose_server_dies_continues_from_its_checkpoint(stub, config, ppo_context) -> None:
    """The server dies in the second rollout. The same command with a new server ends with the metrics of an uninterrupted run."""

    def metrics_of_a_run(server: Any) -> dict[str, Any]:
        ppo_context.runtime.begin_step(0)  # the seed for the new adapter
        (ppo_context.folder / "metrics.jsonl").unlink(missing_ok=True)
        return run(config(server, **LORA), ppo_context).metrics

    uninterrupted = metrics_of_a_run(stub())
    shutil.rmtree(ppo_context.checkpoint_folder)  # as the chain does after a step
    dying = stub()
    seen: list[str] = []

    def die(path: str, body: dict[str, Any]) -> None:
        seen.append(path)
        if seen.count("/v1/completions") > 1 + 4 + 1 + 2:  # probe and rollout, probe and half a rollout
            dying.die()
            raise ConnectionError

    dying.before = die
    with pytest.raises(
        TrainingError, match=r"iteration 1: no vLLM server is left.*episodes are in .*failed_rollout.jsonl.*continues from there"
    ):
        metrics_of_a_run(dying)
    kept = [json.loads(line) for line in (ppo_context.folder / "failed_rollout.jsonl").read_text().splitlines()]
    assert len(kept) <= 2 and all(set(one) == {"prompt", "completion"} for one in kept)
    again = metrics_of_a_run(stub())
    for name in ("score_mean_last", "kl_last", "entropy_last"):
        assert again[name] == uninterrupted[name], name


def test_importance_weights_of_tokens_from_another_policy(config, ppo_context) -> None:
    """The loss of a token is multiplied by min(p / q, cap): with q = p / 4 and a cap of 2 the gradient doubles, with q = 2 p it halves."""
    from stages.ppo.roles import load_roles
    from stages.ppo.rollout.rollout import TENSORS
    from stages.ppo.update.targets import targets
    from stages.ppo.update.updater import Updater

    settings = config(**LORA, entropy_coef=0.0)
    roles = load_roles(settings, ppo_context)
    with torch.no_grad():
        for name, parameter in roles.networks()["policy"].named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    ids = [roles.tokenizer(text)["input_ids"] for text in PROMPTS[:4]]
    generated = roles.sampler.sample(ids, settings.generation, [1, 2, 3, 4])
    mask = generated.response_mask
    zeros = torch.zeros(mask.shape)
    fields = {name: zeros for name in TENSORS} | {
        "response_ids": generated.response_ids,
        "response_mask": mask,
        "rollout_logprobs": generated.logprobs,
        "bootstrap_values": torch.zeros(4),
        "bootstrap_mask": torch.zeros(4, dtype=torch.bool),
        "stopped": generated.stopped,
        "scores": torch.arange(4.0),
        "raw_scores": torch.arange(4.0),
    }
    names = {"prompts": PROMPTS[:4], "prompt_ids": ids, "completions": [""] * 4, "seconds": {}, "sampling_gap": 0.0}

    def gradient(shift: float, elsewhere: bool) -> torch.Tensor:
        made: dict[str, Any] = {**names, **fields, "sampler_logprobs": generated.logprobs - shift, "parts": {}, "monitors": {}}
        rollout = Rollout(**made, sampled_elsewhere=elsewhere)
        for parameter in roles.networks()["policy"].parameters():
            parameter.grad = None
        Updater(roles, {}, settings).accumulate(rollout, targets(rollout, settings, kl_coef=0.0))
        return torch.cat([parameter.grad.flatten() for parameter in roles.networks()["policy"].parameters()])

    plain = gradient(0.0, False)
    assert plain.abs().max() > 0
    four, two = float(torch.tensor(4.0).log()), float(torch.tensor(2.0).log())
    torch.testing.assert_close(gradient(0.0, True), plain)
    torch.testing.assert_close(gradient(four, True), 2 * plain, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient(-two, True), plain / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient(four, False), plain)  # the local sampler's tokens have no weights


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollout_logprobs": "sampled"}, "rollout_logprobs=sampled requires generation.engine: local"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "makes an adapter that vLLM cannot load"),
        ({"generation": {"temperature": 0.7, "top_p": 0.9}}, "temperature=0.7 with top_k or top_p is not supported with engine: vllm"),
        ({"generation": {"cuda_graphs": False}}, "cuda_graphs=false does nothing for vLLM servers under url"),
        ({"generation": {"engine": {"vllm": {}}}}, "needs either url"),
        ({"generation": {"engine": {"vllm": {"url": "localhost"}}}}, "not a valid URL; expected http://HOST:PORT"),
        ({"generation": {"engine": "local"}, "importance_cap": 3.0}, "importance_cap requires generation.engine: vllm"),
    ],
)
def test_unusable_engine_settings_are_refused_at_the_plan(ppo_config, fields, message) -> None:
    generation = {"engine": {"vllm": {"url": "http://here:1"}}, **fields.get("generation", {})}
    with pytest.raises(ValueError, match=message):
        ppo_config(**{**fields, "generation": generation})


def test_fingerprint_of_local_sampling_is_unchanged(ppo_config) -> None:
    """A recipe without ``engine`` has the settings from before engines existed. The address of a server is not in the fingerprint."""
    from stages.chain.fingerprints import settings_of

    local = settings_of(ppo_config())
    assert "engine" not in local["generation"] and "importance_cap" not in local and "sampler_gap" not in local["health"]
    here, there = (settings_of(ppo_config(generation={"engine": {"vllm": {"url": f"http://{host}:1"}}})) for host in "ab")
    assert here == there != local
    assert here["importance_cap"] == 2.0 and here["generation"]["engine"] == {"vllm": {}}


def test_interrupted_rollout_is_stored_with_the_samplers_logprobs(stub, config, ppo_context) -> None:
    """After an interruption in an update, the rollout is not sampled again, and its importance weights are the same as before."""
    from stages.ppo.records.checkpoint import load_rollout, save_rollout

    ppo = PPORun(config(stub(), **LORA), ppo_context)
    with ppo.sampling():
        rollout = ppo._collect(ppo.prompts[:4])
    folder = ppo_context.folder
    save_rollout(rollout, folder)
    again = load_rollout(folder)
    assert again.sampled_elsewhere
    assert torch.equal(again.importance(2.0), rollout.importance(2.0)) and torch.equal(again.sampler_logprobs, rollout.sampler_logprobs)
