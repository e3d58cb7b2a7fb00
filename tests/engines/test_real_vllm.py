"""Tests with vLLM itself. They need an environment with vLLM (STAGES_VLLM_PYTHON, or ./launch.sh --with-vllm), and share one server."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch

from stages.config import GenerationSettings, LoraSettings, VllmStart
from stages.engines.opening import Workplace, open_sampler
from stages.engines.vllm_start import StartedServer, find_installed
from stages.errors import LaunchError, TrainingError
from stages.models.loaded import LoadedModel
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.passes.responses import Policy
from stages.process.runtime import Runtime
from stages.sampling.sampler import LocalSampler
from tests.engines.stub_server import RECORDED
from tests.engines.test_shared_server import adapter, evaluated
from tests.engines.test_vllm_sampler import PROMPTS, SEEDS, disturbed, same

try:
    find_installed(VllmStart())
except LaunchError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SETTINGS = GenerationSettings.model_validate({"engine": {"vllm": {"start": {}}}, "max_new_tokens": 24, "temperature": 0})


@pytest.fixture(scope="module")
def served(wide_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(sampler with a started server, policy with a new trainable adapter, tokenizer)."""
    from stages.config import ModelInput
    from stages.registry.references import ResolvedModel

    source = ResolvedModel(str(wide_llama), "folder", str(wide_llama), "sha256:test", ModelInput(ref=str(wide_llama)))
    tokenizer = load_tokenizer(source)
    model = load_language_model(source, dtype=torch.float32, lora=LoraSettings(r=4), tokenizer=tokenizer)
    policy = Policy(model, temperature=1.0, autocast=None)
    folder = tmp_path_factory.mktemp("served")
    workplace = Workplace(Runtime(quiet=True), folder / "vllm.log", folder)
    opened = open_sampler(SETTINGS, LoadedModel(model, tokenizer, source, torch.float32), workplace, trains="adapter", policy=policy)
    with opened as sampler:
        yield sampler, policy, tokenizer


def test_greedy_completions_and_logprobs_equal_the_local_samplers(served) -> None:
    """With a new adapter, then with two random ones. Stop tokens apply from the first token, or from the tenth token on."""
    sampler, policy, tokenizer = served
    local = LocalSampler(policy.model, tokenizer)
    for seed in (0, 1, 2):
        if seed:
            disturbed(policy.model, seed)
        sampler.take_weights()
        expected = local.sample(PROMPTS, SETTINGS, SEEDS)
        same(sampler.sample(PROMPTS, SETTINGS, SEEDS), expected)
        stop = tokenizer.convert_ids_to_tokens(int(expected.response_ids[0, 5]))
        for fields in ({"stop": [stop]}, {"stop": [stop], "stop_after": 9, "ignore_eos": True}):
            chosen = SETTINGS.model_copy(update=fields)
            same(sampler.sample(PROMPTS, chosen, SEEDS), local.sample(PROMPTS, chosen, SEEDS))


def test_seeds_decide_completions_and_logprobs_are_the_policys(served) -> None:
    sampler, policy, tokenizer = served
    sampler.take_weights()
    chosen = SETTINGS.model_copy(update={"temperature": 1.0})
    one, again = sampler.sample(PROMPTS, chosen, SEEDS), sampler.sample(PROMPTS[::-1], chosen, SEEDS[::-1])
    other = sampler.sample(PROMPTS, chosen, [seed + 10 for seed in SEEDS])
    rows = [one.response_ids[row][one.response_mask[row]].tolist() for row in range(5)]
    assert rows == [again.response_ids[row][again.response_mask[row]].tolist() for row in range(4, -1, -1)]
    assert rows != [other.response_ids[row][other.response_mask[row]].tolist() for row in range(5)]
    with torch.no_grad():
        for row, (prompt, response) in enumerate(zip(PROMPTS, rows, strict=True)):
            logits = policy.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
            torch.testing.assert_close(one.logprobs[row][: len(response)], own, atol=1e-4, rtol=0)


def test_stale_adapter_is_detected(served, monkeypatch) -> None:
    """The policy changes, but the server loads the files of the earlier policy."""
    from stages.engines import vllm_sampler

    sampler, policy, _ = served
    before = vllm_sampler.updates_of(policy.model)
    disturbed(policy.model, 7)
    monkeypatch.setattr(vllm_sampler, "updates_of", lambda *_: before)
    with pytest.raises(TrainingError, match="does not have the policy's weights"):
        sampler.take_weights()


def test_answers_have_the_recorded_shapes(served) -> None:
    """The stub server of the other tests gives the same answers as this vLLM version."""
    sampler, _, _ = served
    client, key = sampler.servers.clients[0], sampler.servers.started.key
    with httpx2.Client(base_url=client.url, headers={"Authorization": f"Bearer {key}"}, timeout=600) as http:
        body = {"model": "base", "prompt": [5, 9], "max_tokens": 2, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
        responses = {
            "version": http.get("/version"),
            "models": http.get("/v1/models"),
            "completion": http.post("/v1/completions", json=body),
            "unknown_model": http.post("/v1/completions", json={**body, "model": "gone"}),
            "unknown_adapter": http.post("/v1/unload_lora_adapter", json={"lora_name": "gone"}),
            "no_adapter_folder": http.post("/v1/load_lora_adapter", json={"lora_name": "p2", "lora_path": "/nowhere"}),
            "reset_prefix_cache": http.post("/reset_prefix_cache"),
            "sleep": http.post("/sleep?level=1"),
            "wake_up": http.post("/wake_up"),
        }
    assert httpx2.post(f"{client.url}/v1/completions", json=body).status_code == 401
    for name, response in responses.items():
        assert shape(response.json()) == shape(RECORDED[name]), name


def shape(value: Any) -> Any:
    """The keys of nested objects, and of the first item of a list."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items() if key != "top_logprobs"}
    return [shape(value[0])] if isinstance(value, list) and value else type(value).__name__ if isinstance(value, str) else None


def test_server_killed_during_a_rollout_is_restarted(served) -> None:
    """The rollout continues with the same weights, and keeps the finished completions."""
    sampler, policy, tokenizer = served
    sampler.take_weights()
    chosen = SETTINGS.model_copy(update={"max_new_tokens": 100})
    expected = LocalSampler(policy.model, tokenizer).sample(PROMPTS, chosen, SEEDS)
    keeper = psutil.Process(sampler.servers.started._process.pid)
    (server,) = keeper.children()
    finished: list[Any] = []

    def kill(rows: list[Any]) -> None:
        if not finished:
            os.kill(server.pid, signal.SIGKILL)
        finished.extend(rows)

    same(
        sampler.sample(PROMPTS * 8, chosen, SEEDS * 8, on_finished=kill),
        LocalSampler(policy.model, tokenizer).sample(PROMPTS * 8, chosen, SEEDS * 8),
    )
    assert len(finished) == 40 and expected.lengths.min() > 0
    assert sampler.report()["restarts"] == 1


def test_full_weights_are_reloaded(served, wide_llama, tmp_path) -> None:
    """The same server gets other full weights, as in full fine-tuning, and answers the probe."""
    from stages.engines.vllm_sampler import VllmSampler, Weights

    sampler, _, tokenizer = served
    model = load_language_model(str(wide_llama), dtype=torch.float32, tokenizer=tokenizer)
    policy = Policy(model, temperature=1.0, autocast=None)
    options = {"runtime": Runtime(quiet=True), "dtype": torch.float32, "folder": tmp_path / "full"}
    full = VllmSampler(policy, tokenizer, SETTINGS.vllm, sampler.servers, Weights("full"), **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    full.take_weights()
    same(full.sample(PROMPTS, SETTINGS, SEEDS), LocalSampler(model, tokenizer).sample(PROMPTS, SETTINGS, SEEDS))


def test_the_server_ends_with_its_run(served) -> None:
    """This test must be the last one, because it ends the shared server. The keeper ends with all its children."""
    sampler, _, _ = served
    keeper = psutil.Process(sampler.servers.started._process.pid)
    everyone = [keeper, *keeper.children(recursive=True)]
    assert len(everyone) > 2
    sampler.servers.started.end()
    until = time.monotonic() + 20
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in everyone) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [one for one in everyone if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_candidates_on_one_base_share_a_server(
    wide_llama: Path, tmp_path: Path, resolve_folder: Any, step_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base and two adapters on it give the answers of the local sampler."""
    starts: list[int] = []
    usual = StartedServer.start
    monkeypatch.setattr(StartedServer, "start", lambda server: (starts.append(server.served.lora_rank), usual(server))[1])
    folders = {"base": wide_llama, **{f"rank{rank}": adapter(wide_llama, tmp_path / f"{rank}", rank) for rank in (4, 2)}}
    places = (tmp_path, resolve_folder, step_context)
    expected = evaluated(folders, "local", *places)
    assert evaluated(folders, {"vllm": {"start": {}}}, *places) == expected
    assert starts == [4] and len({tuple(one[name] for one in expected) for name in folders}) > 1
