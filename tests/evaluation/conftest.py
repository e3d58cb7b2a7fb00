"""A small evaluation: two tiny models, four prompts, a judge that counts letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.evaluation.config import EvaluationConfig

PROMPTS = ["the film", "write a happy line about the music", "a fine film", "the plot was"]
LENGTHS = "judges_for_tests:lengths"


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "judges_for_tests.py").write_text(
        "def lengths(p, c): return [float(len(t)) for t in c]\n"
        "def letters(p, c): return [sum(map(ord, t)) % 97 / 97 for t in c]\n"
        "def nonsense(p, c): return [float('nan')] * len(c)\n"
        "def too_few(p, c): return [0.0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(path)


@pytest.fixture
def config() -> Any:
    """config(prompts, **fields) -> EvaluationConfig."""

    def make(prompts: str, **fields: Any) -> EvaluationConfig:
        settings = {
            "name": "verdict",
            "candidates": {"base": "b", "aligned": "a"},
            "data": prompts,
            "precision": "fp32",
            "generation": {"max_new_tokens": 6},
            "judges": [{"function": LENGTHS}],
        }
        return EvaluationConfig.model_validate({**settings, **fields})

    return make


@pytest.fixture
def other_folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A tiny Llama with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def models(resolve_folder: Any, tiny_llama_folder: Path, other_folder: Path) -> dict[str, Any]:
    return {"candidates.base": resolve_folder(tiny_llama_folder), "candidates.aligned": resolve_folder(other_folder)}


@pytest.fixture
def read_run() -> Any:
    """read_run(context) -> (evaluation.json, lines of completions.jsonl)."""

    def read(context: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        lines = [json.loads(line) for line in (context.folder / "completions.jsonl").read_text().splitlines()]
        return json.loads((context.folder / "evaluation.json").read_text()), lines

    return read


@pytest.fixture
def write_rows(tmp_path: Path) -> Any:
    """write_rows(name, rows) -> path of a JSON-lines file."""

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
