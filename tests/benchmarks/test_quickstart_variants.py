"""The benchmarks that repeat the PPO step of a recipe build valid recipes. So a change of the recipe cannot break them unnoticed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent))
    yield
    for name in ("assistant", "critic_free", "learning_curves", "paper_choices", "planted_exploit"):
        sys.modules.pop(name, None)


def test_the_only_monitor_is_the_gold_judge_and_the_models_are_those_of_the_quickstart(tmp_path: Path) -> None:
    from learning_curves import load_steps

    (step,) = (loaded.config for loaded in load_steps("curves", {"seed-3": {"seed": 3}}, tmp_path).steps)
    assert (step.name, step.policy.ref, step.seed) == ("seed-3", "quickstart/sft", 3)
    assert [source.model.ref for source in step.reward] == ["quickstart/preference"]
    assert [source.name for source in step.monitors] == ["gold"]


def test_each_variant_of_the_papers_choices_changes_only_its_own_fields(tmp_path: Path) -> None:
    from learning_curves import load_steps
    from paper_choices import variants

    recipe = load_steps("choices", {name: fields for name, (_, fields) in variants().items()}, tmp_path)
    steps = {step.name: step.config.model_dump() for step in recipe.steps}
    default = steps.pop("default")
    changed = {name: sorted(differences(default, step)) for name, step in steps.items()}
    assert changed == {
        "tf-adam": ["training.adam_style"],
        "no-clipping": ["training.max_grad_norm"],
        "warmup": ["training.schedule", "training.warmup_iterations"],
        "value-warmup": ["value_warmup_iterations"],
        "one-epoch": ["minibatch_size", "ppo_epochs"],
        "whiten-rewards": ["whiten.rewards"],
        "by-minibatch": ["whiten.scope"],
        "score-behind": ["score_placement"],
        "value-policy": ["value"],
        "value-shared": ["value"],
        "adaptive-kl": ["kl.target"],
    }


def test_the_planted_exploit_replaces_the_reward(tmp_path: Path) -> None:
    from learning_curves import load_steps
    from planted_exploit import fields

    (step,) = (loaded.config for loaded in load_steps("planted-exploit", {"exploited": fields()}, tmp_path).steps)
    assert [source.name for source in step.reward] == ["emphasis"]
    assert step.kl.coef == 0.02


@pytest.mark.parametrize("task", ["quickstart", "miniature", "assistant"])
def test_the_estimators_differ_in_their_advantages_only(task: str, tmp_path: Path) -> None:
    import critic_free

    described = critic_free.TASKS[task]
    steps = {}
    for method in critic_free.METHODS:
        recipe = critic_free.load(described, critic_free.overrides_of(described, method, 3, 256), tmp_path)
        (steps[method],) = (step.config.model_dump() for step in recipe.steps if step.name == described.ppo)
    assert {steps[method]["advantages"] for method in ("rloo", "grpo", "reinforce")} == {"rloo", "grpo", "reinforce"}
    assert {name: (step["samples_per_prompt"], step["total_episodes"], step["seed"]) for name, step in steps.items()} == {
        "gae": (1, 256, 3),
        **dict.fromkeys(("rloo", "grpo", "dr-grpo", "reinforce"), (4, 256, 3)),
    }
    assert differences(steps["grpo"], steps["rloo"]) == ["advantages"]
    assert differences(steps["grpo"], steps["dr-grpo"]) == ["divide_by_deviation"]
    assert described.judge in [source["name"] for source in steps["gae"]["monitors"]]


def test_local_data_of_the_assistant_adds_no_task_to_the_comparison(tmp_path: Path) -> None:
    import critic_free

    task = critic_free.TASKS["assistant"]
    local = critic_free.local_data(tmp_path / "shared", tmp_path / "rankings")
    for name in re.findall(rf"{tmp_path}[\w/.-]+", " ".join(local)):  # a recipe may only name files that exist
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    verdict = critic_free.load(task, [*local, *critic_free.overrides_of(task, "rloo", 0, 256)], tmp_path).steps[-1].config
    assert verdict.tasks == {} and verdict.perplexity is None
    assert list(verdict.candidates) == ["sft", "aligned"]


def differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two settings differ, without the step's name."""
    changed: list[str] = []
    for field in left:
        if prefix + field == "name" or left[field] == right[field]:
            continue
        nested = isinstance(left[field], dict) and isinstance(right[field], dict) and "ref" not in left[field]
        changed += differences(left[field], right[field], f"{prefix}{field}.") if nested else [prefix + field]
    return changed
