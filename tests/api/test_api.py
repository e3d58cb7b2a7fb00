"""The Python interface, on models, data sets and functions in memory. The snippets of docs/python.md are run by tests/test_docs.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stages
from stages.api.functions import address_of
from stages.api.inputs import as_field

PROMPTS = [{"prompt": f"word {number}"} for number in range(8)]
TRAINING = {"max_steps": 1, "batch_size": 4, "microbatch_size": 4}


def shortness(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward of an importable module."""
    return [-float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pair(tiny_llama_folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder), AutoTokenizer.from_pretrained(tiny_llama_folder)


def ppo(policy: Any, reward: Any, **fields: Any) -> stages.PPO:
    sizes = dict.fromkeys(("total_episodes", "rollout_batch_size", "minibatch_size", "microbatch_size"), 4)
    return stages.PPO(name="aligned", policy=policy, reward=reward, data=PROMPTS, generation={"max_new_tokens": 3}, **{**sizes, **fields})


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, stages; print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists_and_is_documented() -> None:
    for name in stages.__all__:
        assert getattr(stages, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'GRPO'"):
        _ = stages.GRPO  # type: ignore[attr-defined]


def test_steps_in_memory_train_and_evaluate(pair: tuple[Any, Any], home: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"word {number}", "completion": "yes"} for number in range(8)])
    lines: list[tuple[str, int, dict[str, float]]] = []
    sft = stages.SFT(model=pair, data={"train": rows, "validation": rows}, training=TRAINING).train(
        home, quiet=True, on_log=lambda name, step, metrics: lines.append((name, step, metrics))
    )
    assert (sft.ref, sft.role) == ("python/sft@1", "language_model")
    assert {"python/sft"} == {name for name, _, _ in lines}
    assert any("heldout/loss" in metrics for _, _, metrics in lines)

    aligned = ppo(sft, shortness).train(home, quiet=True)
    model, tokenizer = aligned.load()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([tokenizer("word").input_ids])).logits).all()

    results = stages.Evaluation(
        candidates={"sft": sft, "aligned": aligned}, data=PROMPTS, judges=shortness, generation={"max_new_tokens": 3}
    ).run(home, quiet=True)
    rate = results.win_rate("aligned", "sft")
    assert rate["judge"] == "shortness" and 0 <= rate["ci_low"] <= rate["win_rate"] <= rate["ci_high"] <= 1
    assert results.report is not None and results.report.is_file()
    assert "aligned preferred" not in results._repr_html_() and "shortness" in results._repr_html_()
    with pytest.raises(KeyError, match="known: .*aligned / sft by shortness"):
        results.win_rate("aligned", "nobody")


def test_an_equal_step_is_reused_and_a_changed_function_runs_again(pair: tuple[Any, Any], home: Path) -> None:
    def reward_of(sign: float) -> Any:
        return lambda prompts, completions: [sign * len(text) for text in completions]

    first = ppo(pair, reward_of(1.0)).train(home, recipe="again", quiet=True)
    assert ppo(pair, reward_of(1.0)).train(home, recipe="again", quiet=True).ref == first.ref
    assert ppo(pair, reward_of(-1.0)).train(home, recipe="again", quiet=True).ref != first.ref


def test_run_takes_a_recipe_file_with_overrides(tmp_path: Path, home: Path, tiny_llama_folder: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join('{"text": "some words to read"}\n' for _ in range(40)))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"name: mine\nsteps:\n  - {{stage: pretraining, name: base, model: {tiny_llama_folder}, block_size: 8, "
        f"data: {{train: {data}}}, training: {{max_steps: 2, batch_size: 2, microbatch_size: 2}}}}\n"
    )
    results = stages.run(recipe, {"base.training.max_steps": 1}, home, quiet=True)
    assert results.metrics["base"]["optimizer_steps"] == 1
    assert stages.Registry(home / "registry").get(results.models["base"].ref).role == "language_model"


def test_bad_input_raises_an_error_with_its_location(pair: tuple[Any, Any], home: Path, tmp_path: Path) -> None:
    with pytest.raises(stages.StagesError, match="kl_coeff"):
        ppo(pair, shortness, kl_coeff=0.1).train(home, quiet=True)
    with pytest.raises(stages.StagesError, match="has no tokenizer"):
        ppo(pair[0], shortness).train(home, quiet=True)
    with pytest.raises(stages.StagesError, match="row 1 of the data in memory cannot be written as JSON"):
        as_field("data", [{"prompt": object()}], tmp_path)


def test_function_address_is_its_importable_module() -> None:
    assert address_of(shortness).endswith(":shortness") and "stages.api" not in address_of(shortness)
    assert address_of(lambda prompts, completions: [0.0]).startswith("stages.api.functions:lambda_")
