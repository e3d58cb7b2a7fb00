"""Each metric is spelled in one module, has a meaning, and the documentation names only metrics that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages import metric_names
from stages.metric_names import MEANINGS
from tests.conftest import check_declared

REPOSITORY = Path(__file__).resolve().parents[1]
ROOMS = [
    "policy",
    "value",
    "rewards",
    "monitors",
    "responses",
    "scoring",
    "time",
    "passes",
    "memory",
    "health",
    "heldout",
    "selection",
    "masked",
]
METRIC = re.compile(rf"({'|'.join(ROOMS)}|train(_seed_\d+)?)/[\w<>{{}}]*")
SUMMARY = {value for name, value in vars(metric_names).items() if name.startswith("HELDOUT") and "/" not in str(value)}


def texts(tree: ast.Module) -> Iterator[str]:
    """The string literals of a module, without docstrings. The literal parts of f-strings count."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def spelled(source: str) -> list[str]:
    """The metrics that a module spells itself."""
    return [text for text in texts(ast.parse(source)) if METRIC.fullmatch(text) or text in SUMMARY or text == "heldout_"]


def test_metrics_are_spelled_only_in_metric_names() -> None:
    paths = [path for path in (REPOSITORY / "stages").rglob("*.py") if path.name != "metric_names.py"]
    again = {str(path.relative_to(REPOSITORY)): names for path in paths if (names := spelled(path.read_text(encoding="utf-8")))}
    assert again == {}, "import these names from stages/metric_names.py"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('metrics["policy/kl"]', ["policy/kl"]),
        ('f"time/{phase}_s"', ["time/"]),
        ('metrics.get("heldout_accuracy")', ["heldout_accuracy"]),
        ('{f"heldout_{name}": 1}', ["heldout_"]),
        ('"""policy/kl"""\nx = "rewards/learned.py:Source"', []),
    ],
)
def test_second_spellings_are_found(source: str, expected: list[str]) -> None:
    assert spelled(source) == expected


def test_every_name_of_a_log_has_a_meaning() -> None:
    names = [value for name, value in vars(metric_names).items() if name.isupper() and isinstance(value, str) and "/" in value]
    assert len(names) > 50 and set(names) <= set(MEANINGS)
    assert set(MEANINGS) >= metric_names.SUMMED_UP
    with pytest.raises(AssertionError, match="policy/made_up"):
        check_declared(["policy/kl", "policy/made_up"])


def test_pages_name_only_metrics_that_exist() -> None:
    pages = [*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "README.md"]
    named = {name for page in pages for name in re.findall(r"[`\"]([\w/<>]+)[`\"]", page.read_text(encoding="utf-8"))}
    named = {name for name in named if METRIC.fullmatch(name) and not name.endswith("/")}
    assert {"policy/sampling_gap_mean", "train/loss"} <= named
    check_declared(named)


def test_the_table_in_the_docs_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/metrics.py", "--check"], cwd=REPOSITORY, check=False)
    assert done.returncode == 0, "run: python docs/metrics.py"


def test_statistics_of_the_scores_are_not_reward_sources() -> None:
    logged = ["rewards/helpful", "rewards/score_mean", "rewards/score_std", "rewards/total_mean", "rewards/prompt_std", "policy/kl"]
    assert [name for name in logged if metric_names.is_reward(name)] == ["rewards/helpful"]
    assert metric_names.seed_of_loss("train_seed_7/loss") == "7" and metric_names.seed_of_loss("train/loss") is None
