"""The vLLM benchmark without a server: its runs, its kept rows and its tables, with numbers by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.engines import learning, speed
from tests.benchmarks.engines.kept import Kept

REPOSITORY = Path(__file__).resolve().parents[3]
URL = "http://127.0.0.1:9"


def kept(path: Path, rows: list[dict[str, Any]]) -> Kept:
    path.write_text(json.dumps(rows))
    return Kept(path)


def test_arms_of_the_learning_benchmark_differ_only_in_the_sampler(tmp_path: Path) -> None:
    rest = {"seed": 2, "episodes": 128, "learning_rate": 1e-3}
    engines = {"local": "local", "vllm": {"vllm": {"url": URL}}, "vllm, overlap: 1": {"vllm": {"url": URL}}}
    recipes = {arm: learning.recipe_of({"arm": arm, **rest}, engine, tmp_path) for arm, engine in engines.items()}
    configs = {arm: next(step for step in recipe.steps if step.name == "aligned").config for arm, recipe in recipes.items()}
    assert [step.name for step in recipes["vllm"].steps] == ["base", "sft", "taste", "preference", "aligned", "verdict"]
    assert {
        arm: (config.seed, config.lora.r, config.total_episodes, config.overlap, config.training.learning_rate)
        for arm, config in configs.items()
    } == {
        "local": (2, 8, 128, 0, 1e-3),
        "vllm": (2, 8, 128, 0, 1e-3),
        "vllm, overlap: 1": (2, 8, 128, 1, 1e-3),
    }
    assert [config.generation.vllm is None for config in configs.values()] == [True, False, False]
    same = [config.model_dump(exclude={"overlap": True, "generation": {"engine"}}) for config in configs.values()]
    assert same[0] == same[1] == same[2]


def test_a_finished_row_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"seconds": 2.0}

    for _ in range(2):
        rows = Kept(tmp_path / "rows.json")
        rows.once({"engine": "local", "round": 1}, measure)
    rows.once({"engine": "local", "round": 2}, measure)
    assert len(calls) == 2
    assert [(row["round"], row["seconds"]) for row in Kept(tmp_path / "rows.json").rows] == [(1, 2.0), (2, 2.0)]


def test_speed_table_has_tokens_per_second_and_ratios_of_the_rounds(tmp_path: Path) -> None:
    """100 tokens: local in 2 s, then in 1 s; vLLM in 4 s, then in 5 s. Round 3 lacks vLLM: left out."""
    times = {("local", 1): (2.0, 8.0), ("vllm", 1): (4.0, 4.0), ("local", 2): (1.0, 8.0), ("vllm", 2): (5.0, 4.0), ("local", 3): (9.0, 9.0)}
    rows = [
        {"engine": engine, "batch": 16, "length": 64, "round": turn, "tokens": 100, "processor_seconds": processor, "wall_seconds": wall}
        for (engine, turn), (processor, wall) in times.items()
    ]
    table = speed.speed_table(kept(tmp_path / "rows.json", rows))
    # medians: local (50 + 100) / 2 = 75, vLLM (25 + 20) / 2 = 22.5; ratios by round 0.5 and 0.2
    assert table.splitlines()[2] == "| 16 | 64 | 75 | 22 | 0.30 (0.20 to 0.50) |"


def test_learning_table_pairs_the_seeds_with_the_local_sampler(tmp_path: Path) -> None:
    """Differences 0, 0.02 and 0.04: mean 0.02, deviation 0.02, Student's half-width 4.3027 * 0.02 / sqrt(3) = 0.0497."""
    curves = {"gold": [0.5, 0.7], "proxy": [0.0, 0.1], "kl": [0.0, 1.0]}
    rest = {"episodes": 64, "learning_rate": 1e-3, "gold": 0.8, "kl": 2.0, "processor_seconds": 10.0, "curves": curves}
    rates = {"local": (0.60, 0.60, 0.60), "vllm": (0.60, 0.62, 0.64)}
    rows = [{"arm": arm, "seed": seed, "win_rate": rate, **rest} for arm, own in rates.items() for seed, rate in enumerate(own, 1)]
    for row in rows[3:]:
        row["curves"] = {**curves, "gold": [0.4, 0.7]}  # 0.05 below the local sampler's, over all iterations
    older = {**rows[0], "episodes": 32, "win_rate": 0.1}
    table = learning.table(kept(tmp_path / "rows.json", [*rows, older]))
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")]
    assert cells[1:4] == ["vllm, 0.001", "0.620 (0.570 to 0.670)", "0.020 (-0.030 to 0.070)"]
    assert cells[5:8] == ["-0.050 (-0.050 to -0.050)", "2.0", "10"]


@pytest.mark.parametrize(
    ("name", "table"), [("learning", learning.table), ("speed", speed.speed_table), ("iterations", speed.iterations_table)]
)
def test_the_page_has_the_tables_of_the_kept_numbers(name: str, table: Callable[[Kept], str]) -> None:
    results, page = REPOSITORY / "tests" / "benchmarks" / "results", REPOSITORY / "docs" / "vllm-measurements.md"
    made = table(Kept(results / f"vllm-{name}.json"))
    assert (results / f"vllm-{name}.md").read_text() == made
    assert made[made.index("|") :] in page.read_text()
