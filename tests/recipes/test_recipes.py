"""Shipped recipes from their first step to their report, with the models and data sets that they name on the (local) Hub.

These are the fast ones; ``python tests/benchmarks/recipes.py`` runs all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shrunk
from client import Client
from stand_in import Hub

CANDIDATES = {
    "hh-harmless": ["base", "sft", "best-of-8", "dpo", "aligned"],
    "instructgpt": ["base", "prompted", "sft", "aligned", "aligned-ptx"],
    "instructgpt-7b-qlora": ["base", "sft", "aligned"],
}


def test_every_recipe_that_ships_can_be_made_small() -> None:
    from stages.recipe.schema import load_recipe

    recipes = {path.stem: path for path in shrunk.RECIPES.glob("*.yaml")}
    assert set(shrunk.SHRUNK) == set(recipes)
    for name, path in recipes.items():
        small, full = load_recipe(path, shrunk.SHRUNK[name]), load_recipe(path)
        assert [step.name for step in small.steps] == [step.name for step in full.steps]
        for before, after in zip(full.steps, small.steps, strict=True):
            assert {field_path: model.target for field_path, model in after.models.items()} == {
                field_path: model.target for field_path, model in before.models.items()
            }
            assert _sources(after) == _sources(before)


def _sources(step: Any) -> list[tuple[str, Any, ...]]:
    """The fields of Hub data sets without the selection of rows."""
    from stages.recipe.schema import data_inputs

    sources = [(field_path, source) for field_path, inputs in data_inputs(step.config).items() for source in inputs if source.on_hub]
    return [(field_path, source.path, source.name, source.split, source.data_dir, source.columns) for field_path, source in sources]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CANDIDATES)
def test_a_recipe_runs_to_its_report(name: str, hub: Hub, hub_client: Client, tmp_path: Path) -> None:
    recipe = shrunk.RECIPES / f"{name}.yaml"
    answer = hub_client.run("run", str(recipe), *shrunk.SHRUNK[name], "--home", str(tmp_path / "home"), folder=tmp_path)
    assert answer.status == 0, answer.output[-2000:]
    run = tmp_path / "home" / "runs" / name / "latest"
    assert (run / "report.html").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["candidates"]) == CANDIDATES[name]
    commits = {ref for step in summary["steps"] for ref in step["hub"].values()}
    assert commits and all(ref.partition("@")[2] in _commits(hub, ref.partition("@")[0]) for ref in commits)
    if name == "instructgpt":
        _check_instructgpt(summary)


def _commits(hub: Hub, identifier: str) -> set[str]:
    return {commit for (_, known), repository in hub.repositories.items() if known == identifier for commit in repository.commits}


def _check_instructgpt(summary: dict[str, Any]) -> None:
    """The settings are those of Huang et al. 2024, except for overrides that shorten the run. All numbers of the alignment tax exist."""
    configs = {step["name"]: step["config"] for step in summary["steps"]}
    assert configs["sft"]["training"]["learning_rate"] == 3e-6
    assert (configs["aligned"]["kl"]["coef"], configs["aligned"]["ppo_epochs"]) == (0.05, 4)
    for candidate in summary["candidates"].values():
        assert set(candidate["scores"]) == {"held-out", "preference"}
        assert {name: task["n"] for name, task in candidate["tasks"].items()} == {"hellaswag": 8, "sst": 10, "rte": 10}
        assert candidate["perplexity"]
