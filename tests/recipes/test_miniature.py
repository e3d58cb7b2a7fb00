"""The miniature: its recipes have the required sizes and candidates, the studies run on a few rows, and figure 1 reads a summary."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from stages.chain import run as chain
from stages.process.runtime import Runtime
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = ("base", "prompted", "sft", "ppo", "ptx")


@pytest.fixture(scope="module")
def figure1() -> Any:
    path = REPOSITORY / "tests" / "benchmarks" / "figure1.py"
    spec = importlib.util.spec_from_file_location("figure1", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(architecture: dict[str, Any]) -> int:
    """Weights of a Llama without the embedding: four attention matrices, three of the MLP, two norms per layer and one at the end."""
    hidden, inner = architecture["hidden_size"], architecture["intermediate_size"]
    return architecture["num_hidden_layers"] * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden


def test_recipe_has_every_kind_of_model_in_three_sizes_that_differ_by_a_factor_of_100() -> None:
    recipe = load_recipe(REPOSITORY / "recipes" / "instructgpt-miniature.yaml")
    steps = {step.name: step.config for step in recipe.steps}
    sizes = [parameters(steps[f"base-{size}"].architecture) for size in "sml"]
    assert sizes[2] >= 100 * sizes[0] and sizes[0] < sizes[1] < sizes[2]
    assert [round(size / 1e6, 2) for size in sizes] == [0.06, 0.5, 5.58]
    assert set(steps["verdict"].candidates) == {f"{kind}-{size}" for kind in KINDS for size in "sml"}
    for size in "sml":  # one reward model for all sizes; the chains differ only in size and learning rates
        assert recipe.steps[[step.name for step in recipe.steps].index(f"ppo-{size}")].models["reward[0].model"].target == "preference"
        assert steps[f"ppo-{size}"].pretraining_mix is None and steps[f"ptx-{size}"].pretraining_mix is not None
        assert steps[f"ppo-{size}"].total_episodes == steps[f"ptx-{size}"].total_episodes == steps["ppo-s"].total_episodes
    seen = {name: {source.skip for source in steps[name].data.train} for name in ("preference", "judge")}
    assert seen["preference"] == {0} and min(seen["judge"]) >= steps["preference"].data.train[0].limit  # other comparisons


def test_parameter_counts_match_the_models(figure1: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path / "models" / "mini" / "base" / "1" / "model"
    LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **shape)).save_pretrained(folder)
    assert figure1.non_embedding_parameters(tmp_path, "mini/base@1") == parameters(shape)


def test_figure_1_reports_which_claims_the_run_shows(figure1: Any) -> None:
    strength = {f"{kind}-{size}": index + 0.1 * step for step, size in enumerate("sml") for index, kind in enumerate(KINDS)}
    strength["ppo-m"] = strength["sft-m"]  # one claim that this run does not show

    def rate(a: str, b: str) -> dict[str, Any]:
        middle = 0.5 + 0.2 * ((strength[a] > strength[b]) - (strength[a] < strength[b]))
        return {"a": a, "b": b, "judge": "gold", "win_rate": middle, "ci_low": middle - 0.05, "ci_high": middle + 0.05}

    summary = {"candidates": dict.fromkeys(strength), "win_rates": [rate(a, b) for a in strength for b in strength if a != b]}
    said = figure1.claims(summary, "gold")
    assert len(said) == 13
    assert [claim for claim, is_true, _ in said if not is_true] == ["ppo-m > sft-m"]
    assert figure1.rates(summary, "gold")["sft-l"]["win_rate"] == 0.5


@pytest.mark.timeout(600)  # seven steps, each short, on a machine that may be busy
def test_the_studies_run_on_a_few_rows(tmp_path: Path) -> None:
    tiny = "{type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    overrides = [f"{step}.{field}" for step in ("base", "blank") for field in (f"architecture={tiny}", "data.train[0].limit=60")]
    small = {"sft": "answers", "preference": "rankings"}
    for step, part in small.items():
        rows = {"train": f"{{path: world:{part}, limit: 16}}", "validation": f"{{path: world:{part}, skip: 16, limit: 4}}"}
        overrides += [f"{step}.data.{split}={source}" for split, source in rows.items()]
    overrides += [f"{step}.data.validation={{path: world:library/validation, limit: 4}}" for step in ("base", "blank")]
    overrides += [f"{step}.training.max_steps=2" for step in ("base", *small)]
    overrides += [f"{step}.data={{path: world:inquiries, limit: 16}}" for step in ("ppo", "ptx")]
    overrides += ["sft.pretraining_mix.data.limit=60", "ptx.pretraining_mix.data.limit=60"]
    overrides += [f"{step}.{field}" for step in ("ppo", "ptx") for field in ("total_episodes=16", "rollout_batch_size=8")]
    overrides += [f"{step}.generation.max_new_tokens=4" for step in ("ppo", "ptx", "verdict")]
    overrides += ["verdict.num_prompts=4", "verdict.perplexity={path: world:library/heldout, limit: 4}"]
    overrides += ["verdict.tasks={facts: {path: world:tasks/facts/heldout, limit: 3}}"]
    recipe = load_recipe(REPOSITORY / "recipes" / "instructgpt-studies.yaml", overrides, Registry(tmp_path / "registry"))
    summary = chain.run(recipe, tmp_path, Runtime(quiet=True))
    assert [step["name"] for step in summary["steps"]] == ["base", "blank", "sft", "preference", "ppo", "ptx", "verdict"]
    assert summary["candidates"]["ptx"]["tasks"]["facts"]["n"] == 3
