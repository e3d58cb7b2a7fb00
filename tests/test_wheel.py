"""A built wheel works outside of the checkout: recipes are found by name, and the embedded world is read from the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the unpacked wheel."""
    work = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(work), str(REPOSITORY)], check=True, timeout=120)
    (wheel,) = work.glob("tristage-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "site"), str(wheel)], check=True, timeout=120)
    return work / "site"


def stages(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "stages", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def test_wheel_contains_recipes_data_and_licence(installed: Path) -> None:
    shipped = installed / "stages" / "shipped_files"
    assert (shipped / "recipes" / "quickstart.yaml").is_file()
    assert (shipped / "data" / "world" / "lexicon.yaml").is_file()
    assert (installed / "stages" / "report" / "page.html.jinja").is_file()
    assert (installed / "stages" / "labelling" / "page" / "label.js").is_file()
    assert (shipped / "data" / "labelling" / "instructgpt.yaml").is_file()
    assert list(installed.glob("tristage-*.dist-info/licenses/LICENSE"))
    assert not (installed / "tests").exists() and not (installed / "data").exists()


RECIPE = """
name: tiny
steps:
  - stage: pretraining
    name: base
    architecture: {type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}
    tokenizer: {vocab_size: 300}
    block_size: 16
    data: {train: {path: "world:raw", limit: 20}, validation: {path: "world:raw/validation", limit: 5}}
    training: {max_steps: 1, batch_size: 2, microbatch_size: 2}
"""


def test_wheel_plans_a_shipped_recipe_and_trains_on_the_world_from_any_folder(installed: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    planned = stages(installed, tmp_path, "plan", "quickstart", "--home", home)
    assert planned.returncode == 0, planned.stderr[-3000:]
    assert "aligned" in planned.stdout
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    done = stages(installed, tmp_path, "run", "tiny.yaml", "--home", home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "home" / "registry" / "models" / "tiny" / "base" / "1" / "model" / "model.safetensors").is_file()


def test_unknown_recipe_lists_the_shipped_recipes(installed: Path, tmp_path: Path) -> None:
    done = stages(installed, tmp_path, "plan", "quickstrat")
    assert done.returncode == 2
    assert "did you mean 'quickstart'" in done.stderr and "Traceback" not in done.stderr
