"""PPO's settings in groups: flat names of earlier versions are accepted everywhere, with the same fingerprint, and named in messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.chain.fingerprints import settings_of
from stages.errors import RecipeError
from stages.ppo.config import PPOStepConfig
from stages.ppo.health import HealthSettings
from stages.recipe.schema import Recipe, load_recipe
from stages.sft.config import SFTStepConfig
from stages.sweep.grid import read_grid

STEP = {"name": "aligned", "policy": "some/policy", "reward": [{"model": "some/reward"}], "data": "world:prompts/train"}
FLAT: dict[str, Any] = {
    "kl_coef": 0.1,
    "kl_target": 3.0,
    "kl_horizon": 99,
    "kl_estimator": "k3",
    "target_update_kl": 0.5,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "value_gae_lambda": 0.7,
    "clip_range": 0.3,
    "dual_clip": 3.0,
    "value_clip_range": None,
    "whiten_advantages": False,
    "whiten_rewards": True,
    "whitening_scope": "process",
    "ema_decay": 0.99,
    "ema_cadence": "iteration",
    "publish_last": True,
    "checkpoint_seconds": 3.0,
    "keep_last": 4,
    "keep_best": 1,
}
GROUPED: dict[str, Any] = {
    "kl": {"coef": 0.1, "target": 3.0, "horizon": 99, "estimator": "k3", "update_limit": 0.5},
    "gae": {"gamma": 0.9, "gae_lambda": 0.8, "value_gae_lambda": 0.7},
    "clip": {"ratio": 0.3, "dual": 3.0, "value": None},
    "whiten": {"advantages": False, "rewards": True, "scope": "process"},
    "ema": {"decay": 0.99, "cadence": "iteration", "publish_last": True},
    "checkpoints": {"seconds": 3.0, "keep_last": 4, "keep_best": 1},
}


def recipe(tmp_path: Path, fields: str, *overrides: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    head = "name: toy\nsteps:\n  - stage: ppo\n    name: aligned\n    policy: hub:some/policy\n    reward: [{model: hub:some/reward}]\n"
    file.write_text(f"{head}    data: world:prompts/train\n{fields}")
    return load_recipe(file, overrides)


def test_flat_and_grouped_settings_are_the_same_step_with_the_same_fingerprint() -> None:
    flat, grouped = PPOStepConfig.model_validate({**STEP, **FLAT}), PPOStepConfig.model_validate({**STEP, **GROUPED})
    assert flat == grouped and set(FLAT) == set(PPOStepConfig.former_names)
    settings = settings_of(flat)
    assert settings == settings_of(grouped)
    # settings as in versions without groups: every flat name and no group
    assert {name: settings[name] for name in FLAT} == FLAT and not set(GROUPED) & set(settings)


def test_checkpoints_are_a_group_of_every_stage_that_trains() -> None:
    step = {"name": "sft", "model": "some/model", "data": {"train": "world:demonstrations/train"}}
    config = SFTStepConfig.model_validate({**step, "keep_best": 2})
    assert config.checkpoints.keep_best == 2 and settings_of(config)["keep_best"] == 2


@pytest.mark.parametrize(
    ("fields", "override"),
    [
        ("    kl_coef: 0.3\n", "aligned.kl_coef=0.1"),
        ("    kl_coef: 0.3\n", "aligned.kl.coef=0.1"),
        ("    kl: {coef: 0.3, target: 2.0}\n", "aligned.kl_coef=0.1"),
        ("    kl: {coef: 0.3}\n", "steps[0].kl_coef=0.1"),
        ("", "aligned.kl_coef=0.1"),
    ],
)
def test_an_override_wins_under_either_name(tmp_path: Path, fields: str, override: str) -> None:
    loaded = recipe(tmp_path, fields, override)
    assert loaded.steps[0].config.kl.coef == 0.1
    assert loaded.steps[0].config.kl.target == (2.0 if "target" in fields else None)


def test_notice_names_the_current_field(tmp_path: Path) -> None:
    notices = recipe(tmp_path, "    clip_range: 0.3\n", "aligned.kl_coef=0.1").notices()
    assert notices == [
        f"{tmp_path}/recipe.yaml:8: steps[0].clip.ratio is the name of clip_range today; the former name still works",
        "override 'aligned.kl_coef=0.1': steps[0].kl.coef is the name of kl_coef today; the former name still works",
    ]
    assert recipe(tmp_path, "    clip: {ratio: 0.3}\n", "aligned.kl.coef=0.1").notices() == []


@pytest.mark.parametrize(
    ("fields", "overrides", "message"),
    [
        ("    kl_coef: -1\n", (), r"recipe.yaml:8: steps\[0\].kl.coef \(written as kl_coef\): got -1, expected a number of at least 0"),
        ("", ("aligned.kl_coef=-1",), r"override 'aligned.kl_coef=-1': steps\[0\].kl.coef: got -1, expected a number of at least 0"),
        (
            "    kl_coef: 0.1\n    kl: {coef: 0.2}\n",
            (),
            "recipe.yaml:8: steps.0..kl_coef: kl_coef is the former name of kl.coef, and kl is set",
        ),
        ("    whitening_scope: minibatch\n    minibatch_size: 4\n", (), "whiten.scope=minibatch needs minibatch_size >= 8"),
        ("    kl: {coeff: 0.1}\n", (), r"steps\[0\].kl.coeff: unknown field 'coeff'; did you mean 'coef'"),
        ("    health: {length_factor: 3.0}\n", (), r"length_factor is not a setting but a constant \(2.5\).*health.off: \[length_drift\]"),
    ],
)
def test_error_names_the_current_field(tmp_path: Path, fields: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, fields, *overrides)


def test_a_config_that_is_built_in_python_refuses_both_names() -> None:
    with pytest.raises(ValidationError, match="kl_coef is the former name of kl.coef, and kl is set, too; remove kl_coef"):
        PPOStepConfig.model_validate({**STEP, "kl_coef": 0.1, "kl": {"coef": 0.1}})


def test_sweep_can_vary_a_former_name(tmp_path: Path) -> None:
    recipe(tmp_path, "    kl: {coef: 0.3}\n")
    grid = read_grid(str(tmp_path / "recipe.yaml"), ["aligned.kl_coef=[0.1,0.2]"])
    coefs = [load_recipe(tmp_path / "recipe.yaml", point.overrides).steps[0].config.kl.coef for point in grid.points()]
    assert coefs == [0.1, 0.2]


def test_former_limits_that_are_now_constants_keep_the_fingerprint() -> None:
    former = HealthSettings.model_validate({"length_factor": None, "entropy_share": 0.1})
    assert former == HealthSettings(off=["length_drift"])
    settings = settings_of(former)
    assert (settings["length_factor"], settings["entropy_share"], settings["kl_limit"]) == (None, 0.1, 50.0) and "off" not in settings


def test_layers_that_are_not_compiled_do_not_change_the_fingerprint_of_earlier_versions() -> None:
    """Versions before ``torch_compile`` had no such setting."""
    for compiles in (False, True):
        training = {"learning_rate": 1e-3, "torch_compile": compiles}
        ppo = PPOStepConfig.model_validate({**STEP, "data": "d", "training": training})
        sft = SFTStepConfig.model_validate({"name": "a", "model": "p", "data": {"train": "d"}, "training": training})
        for config in (ppo, sft):
            written = settings_of(config)["training"]
            assert isinstance(written, dict) and written.get("torch_compile", False) == compiles
            assert ("torch_compile" in written) == compiles
