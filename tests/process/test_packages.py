"""The packages for a recipe's attention are checked before any step runs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.chain.planning import check_attention, check_quantization
from stages.config import ModelInput
from stages.errors import RecipeError
from stages.process import packages


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa", "flex_attention"])
def test_attention_of_pytorch_needs_no_package(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda module: False)
    assert packages.missing_attention_package(attention) == ""


def test_flash_attention_needs_its_package_or_hub_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, missing in (("flash_attn", False), ("kernels", False), ("other", True)):
        monkeypatch.setattr(packages, "is_installed", lambda module, installed=installed: module == installed)
        assert bool(packages.missing_attention_package("flash_attention_2")) == missing


def test_is_installed_knows_packages_and_their_parts() -> None:
    assert packages.is_installed("json.decoder")
    assert not packages.is_installed("no_such_package") and not packages.is_installed("no_such_package.part")


def test_a_step_whose_attention_needs_a_missing_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda module: False)
    inputs = {"policy": ModelInput(ref="some/model", attention="flash_attention_2")}
    step = SimpleNamespace(name="ppo", config=SimpleNamespace(model_inputs=lambda: inputs))
    with pytest.raises(RecipeError, match="step ppo: policy.attention=flash_attention_2 cannot be used: neither flash_attn nor kernels"):
        check_attention(step)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quantization", "optimizer", "message"),
    [
        ("nf4", "adamw", r"step ppo: policy: quantization: nf4 needs the package bitsandbytes.*pip install 'tristage\[quantize\]'"),
        (
            "none",
            "adamw_8bit",
            r"step ppo: training: optimizer: adamw_8bit needs .*pip install 'tristage\[quantize\]'",
        ),
    ],
)
def test_a_missing_extra_is_named_before_a_step_runs(quantization, optimizer, message, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"policy": ModelInput(ref="some/model", quantization=quantization)}
    config = SimpleNamespace(model_inputs=lambda: inputs, training=SimpleNamespace(optimizer=optimizer))
    step = SimpleNamespace(name="ppo", config=config)
    check_quantization(step)  # type: ignore[arg-type]
    monkeypatch.setattr(packages, "is_installed", lambda module: False)
    with pytest.raises(RecipeError, match=message):
        check_quantization(step)  # type: ignore[arg-type]
    inputs["policy"], config.training.optimizer = ModelInput(ref="some/model"), "adamw"
    check_quantization(step)  # type: ignore[arg-type]


def test_the_extra_has_the_package_and_launch_installs_it() -> None:
    repository = Path(__file__).resolve().parents[2]
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert any(item.startswith("bitsandbytes") for item in extras["quantize"])
    assert not any(item.startswith("bitsandbytes") for item in project["dependencies"])
    assert (repository / "launch.sh").read_text(encoding="utf-8").count("[quantize,test]") == 2
