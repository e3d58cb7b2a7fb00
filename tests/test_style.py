"""ruff's linter, ruff's formatter and mypy are clean, and the shipped recipes are valid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["linter", "formatter"])
def test_ruff_accepts_the_code(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "stages", "tests", "docs"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_line_disables_the_formatter() -> None:
    marks = ("fmt: " + word for word in ("skip", "off", "on"))
    kept = [mark for mark in marks for path in REPOSITORY.glob("[st]*/**/*.py") if mark in path.read_text()]
    assert not kept


@pytest.mark.timeout(600)
def test_mypy_accepts_the_code() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_recipes_are_found() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "imdb-sentiment", "steer-sentiment", "hh-harmless"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run(path: Path) -> None:
    from stages.recipe.schema import load_recipe

    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert path.read_text().startswith(f"# ./launch.sh recipes/{path.name}")
