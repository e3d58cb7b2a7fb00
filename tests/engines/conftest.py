"""Stub servers with vLLM's HTTP interface, on the tiny Llama."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.config import GenerationSettings
from tests.conftest import REPOSITORY, save_llama
from tests.engines.stub_server import StubServer
from tests.ppo.conftest import PROMPTS, _reward_functions, ppo_config, ppo_context  # noqa: F401


@pytest.fixture
def stub(tiny_llama_folder: Path) -> Iterator[Callable[..., StubServer]]:
    """stub(folder=tiny Llama, **options) -> a running stub server."""
    started: list[StubServer] = []

    def make(folder: Path | str = tiny_llama_folder, **options: Any) -> StubServer:
        started.append(StubServer(str(folder), **options).start())
        return started[-1]

    yield make
    for server in started:
        server.die()


@pytest.fixture
def over() -> Callable[..., dict[str, Any]]:
    """over(servers..., **fields) -> generation.engine for these servers, with one retry and no waiting time."""

    def make(*servers: StubServer, **fields: Any) -> dict[str, Any]:
        return {"vllm": {"url": [server.url for server in servers], "backoff_seconds": 0.0, "retries": 1, "concurrency": 8, **fields}}

    return make


@pytest.fixture
def settings(over: Any) -> Callable[..., GenerationSettings]:
    """settings(servers..., **fields) -> generation settings with these servers."""

    def make(*servers: StubServer, **fields: Any) -> GenerationSettings:
        return GenerationSettings.model_validate({"engine": over(*servers), "max_new_tokens": 8, **fields})

    return make


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return str(path)


@pytest.fixture
def config(ppo_config: Any, over: Any, prompts: str) -> Any:  # noqa: F811
    """config(servers..., **fields) -> a PPO config with two iterations of four episodes; without servers it samples locally."""

    def make(*servers: Any, **fields: Any) -> Any:
        small = {"total_episodes": 8, "rollout_batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1, "num_samples": 0}
        generation = {"engine": over(*servers) if servers else "local", "max_new_tokens": 6}
        return ppo_config(**{"data": prompts, **small, "generation": generation, **fields})

    return make


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """A folder with prompts and a reward function for runs in other processes."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    shutil.copy(REPOSITORY / "tests" / "ppo" / "letters_reward.py", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random Llama with heads of 32 dimensions, the smallest that vLLM's attention on CPUs supports."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    return save_llama(tmp_path_factory.mktemp("wide-llama"), tiny_tokenizer, **shape)
