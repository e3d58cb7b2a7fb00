"""Candidates of an evaluation on one base share one vLLM server. The servers here are stubs that use plain peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import LoraSettings, VllmStart
from stages.engines import opening
from stages.engines.shared_server import SharedServer, expected_ranks
from stages.engines.vllm_start import Served, StartedServer
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.run import run
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.saving import save_model
from tests.engines.stub_server import StubServer

PROMPTS = ["the film", "write a happy line about the music"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The stubs that were started, each with the ``Served`` that it was started for and whether it was ended."""
    made: list[Any] = []
    running: dict[int, StubServer] = {}

    def start(server: StartedServer) -> None:
        stub = StubServer(server.served.model, key=server.key).start()
        stub.served, stub.ended = server.served, False  # type: ignore[attr-defined]
        made.append(stub)
        running[id(server)], server.url = stub, stub.url

    def end(server: StartedServer) -> None:
        if (stub := running.pop(id(server), None)) is not None:
            stub.ended = True  # type: ignore[attr-defined]
            stub.die()

    monkeypatch.setattr(StartedServer, "start", start)
    monkeypatch.setattr(StartedServer, "end", end)
    monkeypatch.setattr(StartedServer, "is_running", lambda server: id(server) in running)
    monkeypatch.setattr(opening, "CPU_HEAD_SIZES", (8,))  # those of the tiny Llama
    return made


def adapter(base: Path, folder: Path, rank: int) -> Path:
    tokenizer = load_tokenizer(str(base))
    model = load_language_model(str(base), dtype=torch.float32, lora=LoraSettings(r=rank), tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(rank)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    save_model(model, tokenizer, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


def evaluated(folders: dict[str, Path], engine: Any, folder: Path, resolve_folder: Any, step_context: Any) -> list[Any]:
    """The completions of an evaluation of the models in ``folders``, without a temperature."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    fields = {"candidates": {name: name for name in folders}, "data": str(folder / "prompts.jsonl"), "precision": "fp32"}
    generation = {"max_new_tokens": 5, "temperature": 0, "engine": engine}
    judges = [{"function": "letters_reward:letters"}]
    config = EvaluationConfig.model_validate({"name": "verdict", **fields, "generation": generation, "judges": judges})
    context = step_context("test/verdict", 0, {f"candidates.{name}": resolve_folder(path) for name, path in folders.items()})
    run(config, context)
    return [json.loads(line)["completions"] for line in (context.folder / "completions.jsonl").read_text().splitlines()]


def test_candidates_on_one_base_are_served_by_one_server(
    started: list[Any], tiny_llama_folder: Path, tmp_path: Path, resolve_folder: Any, step_context: Any
) -> None:
    """The answers equal those of the local sampler. A full model is another base."""
    other = tmp_path / "other"
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    save_model(model, load_tokenizer(str(tiny_llama_folder)), other)
    folders = {"base": tiny_llama_folder, **{f"rank{rank}": adapter(tiny_llama_folder, tmp_path / f"{rank}", rank) for rank in (9, 2)}}
    folders |= {"other": other}
    places = (tmp_path, resolve_folder, step_context)
    expected = evaluated(folders, "local", *places)
    assert evaluated(folders, {"vllm": {"start": {"python": "/nowhere"}, "backoff_seconds": 0.0}}, *places) == expected
    assert len({tuple(one[name] for one in expected) for name in folders}) > 1  # the candidates differ
    first, second = started
    assert (first.served.model, first.served.lora_rank) == (str(tiny_llama_folder), 9)  # known before the first candidate
    assert (second.served.model, second.served.lora_rank) == (str(other), 0)
    loaded = [body["lora_name"] for path, body in first.requests if path == "/v1/load_lora_adapter"]
    assert len(loaded) == 2 and first.adapted == {}  # each candidate unloads its adapter
    assert first.ended and second.ended


def test_a_server_starts_again_only_for_a_model_that_it_cannot_serve(started: list[Any], tiny_llama_folder: Path, tmp_path: Path) -> None:
    base, settings = str(tiny_llama_folder), VllmStart()
    shared = SharedServer({base: 3})

    def take(**fields: Any) -> StartedServer:
        server = shared.take(settings, Served(base, **{"dtype": "float32", **fields}), tmp_path / "vllm.log")
        if not server.is_running():
            server.start()
        return server

    first = take()
    assert take(lora_rank=3) is first and take(lora_rank=8) is first  # --max-lora-rank is 8 for a rank of 3
    assert take(lora_rank=9) is not first and [stub.ended for stub in started] == [True, False]
    assert take(dtype="bfloat16").served.lora_rank == 3
    started[-1].die()
    shared.end()
    assert [stub.ended for stub in started] == [True] * 3


def test_expected_ranks_are_those_of_combined_adapters(tiny_llama_folder: Path, tmp_path: Path, resolve_folder: Any) -> None:
    low = adapter(tiny_llama_folder, tmp_path / "low", 2)
    config = json.loads((low / "adapter_config.json").read_text())
    high = tmp_path / "high"  # an adapter on the adapter
    high.mkdir()
    pattern = {"r": 4, "rank_pattern": {"q_proj": 6}, "base_model_name_or_path": str(low)}
    (high / "adapter_config.json").write_text(json.dumps({**config, **pattern}))
    models = [resolve_folder(folder) for folder in (tiny_llama_folder, low, high)]
    assert expected_ranks(models) == {str(tiny_llama_folder): 8}
    assert expected_ranks(models[:1]) == {}
