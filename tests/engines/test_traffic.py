"""The sizes in docs/nodes.md: the formulas are compared with files that are written, and with an answer of a server."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import LoraSettings
from stages.engines.vllm_sampler import write_full_weights
from stages.models.adapters.served import updates_of, write_adapter
from stages.models.loading import load_language_model, load_tokenizer
from tests.engines.stub_server import RECORDED

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def traffic() -> Any:
    sys.path.insert(0, str(REPOSITORY / "docs"))  # as when the script runs
    spec = importlib.util.spec_from_file_location("traffic", REPOSITORY / "docs" / "traffic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["traffic"] = module  # for its dataclass
    spec.loader.exec_module(module)
    sys.path.remove(str(REPOSITORY / "docs"))
    return module


def test_the_tables_in_the_docs_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/traffic.py", "--check"], cwd=REPOSITORY, check=False)
    assert done.returncode == 0, "run: python docs/traffic.py"


def test_models_have_their_published_sizes(traffic: Any) -> None:
    """The model cards say 1.24, 8.03 and 70.6 billion weights."""
    assert [round(shape.parameters() / 1e9, 2) for shape in traffic.SHAPES] == [1.24, 8.03, 70.55]


def test_files_have_the_computed_sizes(traffic: Any, tiny_llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama_folder))
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32, tokenizer=tokenizer)
    given = model.config
    shape = traffic.Shape(
        "tiny",
        given.hidden_size,
        given.intermediate_size,
        given.num_hidden_layers,
        given.num_attention_heads,
        given.num_key_value_heads,
        given.head_dim,
        given.vocab_size,
        given.tie_word_embeddings,
    )
    write_full_weights(model, tmp_path / "full", torch.bfloat16, None)
    assert size_of(tmp_path / "full" / "model.safetensors") == traffic.weight_bytes(shape)
    adapted = load_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=LoraSettings(r=3), tokenizer=tokenizer)
    write_adapter(updates_of(adapted), tmp_path / "adapter", "base")
    assert size_of(tmp_path / "adapter" / "adapter_model.safetensors") == traffic.adapter_bytes(shape, 3)


def size_of(path: Path) -> int:
    """The size of a safetensors file without its header (its length is in the first 8 bytes)."""
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_an_answer_has_about_the_computed_size(traffic: Any) -> None:
    """A recorded answer of vLLM; only lists with one entry per sampled token count.

    In real vocabularies, the texts of tokens are longer.
    """
    (choice,) = RECORDED["completion"]["choices"]
    lists = [choice["token_ids"], *choice["logprobs"].values()]
    each = sum(len(json.dumps(values)) for values in lists) / len(choice["token_ids"])
    assert 0.7 * traffic.ANSWER_BYTES < each < 1.1 * traffic.ANSWER_BYTES
