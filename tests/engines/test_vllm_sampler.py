"""Sampling over HTTP from a stub that uses plain peft: completions and log-probabilities equal the local ones; faults are found."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import LoraSettings, ModelInput, Vllm
from stages.engines.opening import Workplace, check_reachable, open_sampler
from stages.engines.vllm_servers import Servers
from stages.errors import LaunchError, ModelError, RecipeError, TrainingError
from stages.models.loaded import LoadedModel
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.saving import save_model
from stages.process.runtime import Runtime
from stages.registry.references import ResolvedModel
from stages.sampling.sampler import LocalSampler, SamplerLost

PROMPTS = [[5, 9, 11], [7], [20, 21], [5, 9, 11], [30, 31, 32, 33]]
SEEDS = [1, 2, 3, 4, 5]


@pytest.fixture
def opened(tiny_llama_folder: Path, resolve_folder: Any, tmp_path: Path) -> Any:
    """opened(settings, source=tiny Llama, **options) -> (context manager of the sampler, local sampler of the same model)."""

    def make(settings: Any, source: Any = None, **fields: Any) -> Any:
        source = source or resolve_folder(tiny_llama_folder)
        tokenizer = load_tokenizer(source)
        model = load_language_model(source, dtype=torch.float32, trainable=False, tokenizer=tokenizer)
        workplace = Workplace(Runtime(quiet=True), tmp_path / "vllm.log", tmp_path / "served")
        sampler = open_sampler(settings, LoadedModel(model, tokenizer, source, torch.float32), workplace, **fields)
        return sampler, LocalSampler(model, tokenizer)

    return make


def same(actual: Any, expected: Any) -> None:
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "stopped"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.logprobs, expected.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": ["ONE"]},
        {"stop": ["ONE"], "stop_after": 3},
        {"stop": ["ONE"], "stop_after": 8},
        {"stop": ["ONE"], "ignore_eos": True, "stop_after": 1},
    ],
)
def test_greedy_completions_equal_the_local_samplers(stub, settings, opened, fields) -> None:
    """Stop tokens apply from different positions on. The stop token is the third token of the first prompt's greedy completion."""
    server = stub()
    opening, local = opened(settings(server))
    greedy = local.sample(PROMPTS, settings(server, temperature=0), SEEDS)
    third = local.tokenizer.convert_ids_to_tokens(int(greedy.response_ids[0, 2]))
    chosen = settings(server, temperature=0, **{**fields, **({"stop": [third]} if fields else {})})
    heard: list[Any] = []
    with opening as sampler:
        sampled = sampler.sample(PROMPTS, chosen, SEEDS, on_finished=heard.extend)
    expected = local.sample(PROMPTS, chosen, SEEDS)
    same(sampled, expected)
    assert bool(expected.stopped[0]) == (bool(fields) and fields.get("stop_after", 0) <= 2)
    assert {one.row: one.response_ids for one in heard} == {
        row: sampled.response_ids[row][sampled.response_mask[row]].tolist() for row in range(len(PROMPTS))
    }


def test_a_request_has_every_sampling_setting_and_a_seed_per_prompt(stub, settings, opened) -> None:
    """A request contains every sampling parameter, so the model's generation config has no effect; each prompt has its own seed."""
    first, second = stub(), stub()
    chosen = settings(first, second, top_k=3, top_p=0.5)
    with opened(chosen)[0] as sampler:
        for server in (first, second):
            server.requests.clear()
        sampler.sample(PROMPTS, chosen, SEEDS)
    asked = [body for server in (first, second) for path, body in server.requests if path == "/v1/completions"]
    assert {tuple(body["prompt"]): body["seed"] for body in asked if body["seed"] != 4} == {
        tuple(prompt): seed for prompt, seed in zip(PROMPTS, SEEDS, strict=True) if seed != 4
    }
    assert [len([1 for path, _ in server.requests if path == "/v1/completions"]) for server in (first, second)] == [3, 2]
    assert {(body["top_k"], body["top_p"], body["temperature"], body["min_p"], body["repetition_penalty"]) for body in asked} == {
        (3, 0.5, 1.0, 0.0, 1.0)
    }
    assert all(body["ignore_eos"] and 0 in body["stop_token_ids"] and body["max_tokens"] == 8 for body in asked)


def disturbed(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def stack(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that is an adapter (rank 3) on an adapter (rank 2) on the tiny Llama."""
    path, tokenizer = tiny_llama_folder, load_tokenizer(str(tiny_llama_folder))
    for rank in (2, 3):
        model = load_language_model(str(path), dtype=torch.float32, lora=LoraSettings(r=rank, alpha=5.0), tokenizer=tokenizer)
        below, path = path, tmp_path_factory.mktemp(f"rank-{rank}")
        save_model(disturbed(model, rank), tokenizer, path)
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(below)}))
    return ResolvedModel(str(path), "folder", str(path), "sha256:test", ModelInput(ref=str(path)))


def test_a_stack_is_served_as_one_adapter(stub, settings, opened, stack) -> None:
    """The local model has both adapters merged; the server has its base and one adapter of rank 5."""
    server = stub()
    chosen = settings(server, temperature=0)
    opening, local = opened(chosen, stack)
    with opening as sampler:
        same(sampler.sample(PROMPTS, chosen, SEEDS), local.sample(PROMPTS, chosen, SEEDS))
        (adapted,) = server.adapted.values()
        assert adapted.peft_config["default"].r == 5
        assert sampler.report()["weights"] == "adapter"
    assert server.adapted == {}  # this run leaves no adapter on a server that continues to run


def test_stale_adapter_is_detected(stub, settings, opened, stack) -> None:
    server = stub()
    server.ignores_adapters = True
    with pytest.raises(TrainingError, match=r"the sampler does not have the policy's weights.*nats per token \(bound 0.001\)"):
        opened(settings(server), stack)[0].__enter__()


def test_server_with_other_weights_is_detected(stub, settings, opened, tiny_llama_folder, tmp_path) -> None:
    other = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match="does not have the policy's weights"):
        opened(settings(stub(tmp_path / "other")))[0].__enter__()


def test_temperature_needs_the_servers_processed_logprobs(stub, settings, opened, tiny_llama_folder) -> None:
    """A policy at temperature 0.5: a server with raw log-probabilities is refused, one with processed ones is accepted."""
    from stages.models.passes.responses import Policy

    policy = Policy(load_language_model(str(tiny_llama_folder), dtype=torch.float32), temperature=0.5, autocast=None)
    with pytest.raises(TrainingError, match="--logprobs-mode processed_logprobs"):
        opened(settings(stub()), policy=policy)[0].__enter__()
    with opened(settings(stub(processed=True)), policy=policy)[0]:
        pass


def test_a_server_that_dies_is_left_out(stub, settings, opened) -> None:
    """The second server dies at its first completion after the probe; its prompts go to the first one, with their own seeds."""
    first, second = stub(), stub()
    chosen = settings(first, second)
    with opened(chosen)[0] as sampler:
        expected = {tuple(row): seed for row, seed in zip(PROMPTS, SEEDS, strict=True)}
        first.requests.clear()
        second.before = lambda path, body: (threading.Thread(target=second.die).start(), time.sleep(0.3))
        sampled = sampler.sample(PROMPTS, chosen, SEEDS)
        assert sampled.lengths.min() > 0
        assert {tuple(body["prompt"]) for path, body in first.requests if path == "/v1/completions"} == set(expected)
        assert [one["server"] for one in sampler.report()["left_out"]] == [second.url]
        first.before = lambda path, body: (threading.Thread(target=first.die).start(), time.sleep(0.3)) if body.get("seed") == 5 else None
        with pytest.raises(SamplerLost, match="no vLLM server is left") as lost:
            sampler.sample(PROMPTS[:1] + PROMPTS[-1:], chosen.model_copy(update={"max_new_tokens": 1}), [1, 5])
        assert set(lost.value.completed) <= {0}


def test_all_processes_leave_out_a_server_that_one_lost_and_use_a_restarted_one() -> None:
    """There are three servers and two processes. Each process loses a different server; then both have only the third one.

    A restarted server has another address.
    """
    urls = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]
    said: list[list[str]] = [[], []]
    vllm = Vllm(url=urls)
    both = [Servers(urls, vllm, None, say=said[number].append) for number in (0, 1)]
    for number, servers in enumerate(both):
        servers.leave_out(servers.clients[number], f"as process {number} saw")

    def share() -> None:
        news = [servers.left_out[servers._shared :] for servers in both]
        for servers in both:
            servers.share_losses(lambda own: news)

    for _ in range(2):  # the second time there is no news
        share()
        for servers in both:
            assert [client.url for client in servers.clients] == urls[2:]
            assert sorted(lost["server"] for lost in servers.left_out) == urls[:2]
            assert {lost["reason"] for lost in servers.left_out} == {"as process 0 saw", "as process 1 saw"}
    assert len(said[0]) == len(said[1]) == 2
    kept = both[1].clients[0]
    both[1].use([urls[2], "http://127.0.0.1:4"])
    assert both[1].clients[0] is kept and both[1].clients[1].url == "http://127.0.0.1:4"


def test_base_models_of_different_names_and_a_server_that_dies_between_two_samplings(stub, settings, opened, monkeypatch) -> None:
    first, second = stub(), stub()
    answer = second.answer

    def renamed(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "other"}]}
        if path != "/v1/completions":
            return answer(path, body)
        assert body["model"] == "other"
        status, content = answer(path, {**body, "model": "base"})
        return status, {**content, "model": "other"}

    monkeypatch.setattr(second, "answer", renamed)
    chosen = settings(first, second, temperature=0)
    opening, local = opened(chosen)
    expected = local.sample(PROMPTS, chosen, SEEDS)
    with opening as sampler:
        same(sampler.sample(PROMPTS, chosen, SEEDS), expected)
        first.die()
        same(sampler.sample(PROMPTS, chosen, SEEDS), expected)
        assert [one["server"] for one in sampler.report()["left_out"]] == [first.url]


def test_unreachable_server_is_left_out_if_another_answers(stub, settings, opened) -> None:
    living, dead = stub(), stub()
    dead.die()
    with opened(settings(living, dead))[0] as sampler:
        assert [one["server"] for one in sampler.report()["left_out"]] == [dead.url]
    with pytest.raises(LaunchError, match="no server answers"):
        check_reachable(settings(dead))


def test_key_is_only_sent_in_the_header(stub, over, settings, opened, monkeypatch) -> None:
    server = stub(key="sesame-sesame")
    chosen = settings(server, engine=over(server, api_key_variable="VLLM_TEST_KEY"))
    with pytest.raises(RecipeError, match="VLLM_TEST_KEY is not set"):
        opened(chosen)[0].__enter__()
    monkeypatch.setenv("VLLM_TEST_KEY", "wrong-wrong")
    with pytest.raises(ModelError, match=r"status 401.*api_key_variable") as refused:
        opened(chosen)[0].__enter__()
    assert "wrong-wrong" not in str(refused.value)
    monkeypatch.setenv("VLLM_TEST_KEY", "sesame-sesame")
    with opened(chosen)[0] as sampler:
        assert sampler.sample(PROMPTS, chosen, SEEDS).lengths.min() > 0
    assert "sesame-sesame" not in str(server.requests)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("/version", {"version": "0.19.1"}, "version 0.19.1; this release is tested with 0.32"),
        (
            "/v1/completions",
            {"choices": [{"token_ids": [1], "finish_reason": "abort"}], "model": "base"},
            "without a valid completion: token ids",
        ),
        ("/v1/models", {"data": []}, "lists no base model"),
    ],
)
def test_invalid_answers_are_refused(stub, settings, opened, monkeypatch, path, content, message) -> None:
    server = stub()
    answer = server.answer
    monkeypatch.setattr(server, "answer", lambda asked, body: (200, content) if asked == path else answer(asked, body))
    with pytest.raises((ModelError, SamplerLost), match=message):
        opened(settings(server))[0].__enter__()


def test_a_server_that_allows_fewer_tokens_is_named(stub, settings, opened, monkeypatch) -> None:
    server = stub()
    with opened(settings(server))[0] as sampler:
        monkeypatch.setattr(server, "_sample", lambda model, body: ([3], [-1.0], "length"))
        with pytest.raises(ModelError, match="ended a completion after 1 of 8 tokens without a stop token"):
            sampler.sample(PROMPTS, settings(server), SEEDS)


def test_started_server_that_dies_is_restarted(stub, settings, opened, stack, monkeypatch) -> None:
    """It dies during a rollout, and between two rollouts.

    Each time it gets the weights and the probe again, and the completions are the same as without a restart.
    """
    first = stub()
    chosen = settings(first, temperature=0)
    opening, local = opened(chosen, stack)
    expected = local.sample(PROMPTS, chosen, SEEDS)

    class Started:
        """Replaces a StartedServer."""

        shares_gpu = outlives_sampler = sleeps = False
        url = first.url
        running = True

        def start(self) -> None:
            self.url, self.running = stub().url, True

        def end(self) -> None:
            self.running = False

        def is_running(self) -> bool:
            return self.running

    with opening as sampler:
        sampler.servers.started = started = Started()
        first.before = lambda path, body: (threading.Thread(target=first.die).start(), time.sleep(0.3)) if body["seed"] == 3 else None
        same(sampler.sample(PROMPTS, chosen, SEEDS), expected)
        assert sampler.report()["restarts"] == 1
        started.running = False
        sampler.take_weights()
        same(sampler.sample(PROMPTS, chosen, SEEDS), expected)
        assert sampler.report()["restarts"] == 2
