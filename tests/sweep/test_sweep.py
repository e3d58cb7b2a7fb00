"""Sweeps: grids of the command line, shared steps, continuing a sweep, and the files that it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.errors import RecipeError
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry
from stages.sweep.grid import read_grid
from stages.sweep.metrics import check_patterns, chosen_numbers, default_patterns, numbers_of

RECIPE = """\
name: quick
seed: 7
steps:
  - {stage: train, name: base, data: a.txt}
  - {stage: train, name: sft, model: base, data: a.txt}
  - {stage: train, name: side, data: a.txt}
"""


@pytest.fixture(autouse=True)
def workdir(fake_stages: Path) -> Path:
    Path("quick.yaml").write_text(RECIPE)
    return fake_stages


def sweep(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["sweep", "quick.yaml", *arguments])


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"outputs/sweeps/quick/{name}/results.jsonl").read_text().splitlines()]


def counts() -> dict[str, int]:
    """Versions by name."""
    versions: dict[str, int] = {}
    for record in Registry("outputs/registry").records():
        versions[record.name] = versions.get(record.name, 0) + 1
    return versions


# The grid


def overrides(*arguments: str) -> list[tuple[str, ...]]:
    return [point.overrides for point in read_grid("quick.yaml", arguments).points()]


def test_the_grid_is_every_combination_and_seeds_vary_slowest() -> None:
    assert overrides("base.rate=4.0", "sft.rate=[1.0, 2.0]", "seeds=2") == [
        ("base.rate=4.0", "sft.rate=1.0", "seed=7"),
        ("base.rate=4.0", "sft.rate=2.0", "seed=7"),
        ("base.rate=4.0", "sft.rate=1.0", "seed=8"),
        ("base.rate=4.0", "sft.rate=2.0", "seed=8"),
    ]


def test_fields_that_vary_together_seeds_of_a_step_and_lists_as_values() -> None:
    assert overrides("base.rate+sft.rate=[1.0,2.0]") == [("base.rate=1.0", "sft.rate=1.0"), ("base.rate=2.0", "sft.rate=2.0")]
    assert overrides("sft.seeds=2") == [("sft.seed=7",), ("sft.seed=8",)]
    assert overrides("sft.seeds=[3,9]", "base.seeds=[4,5]") == [("sft.seed=3", "base.seed=4"), ("sft.seed=9", "base.seed=5")]
    assert overrides("seed=3", "seeds=2") == [("seed=3", "seed=3"), ("seed=3", "seed=4")]
    assert overrides("sft.data=[[a.txt],[a.txt, b.txt]]") == [('sft.data=["a.txt"]',), ('sft.data=["a.txt", "b.txt"]',)]
    assert overrides() == [()]


def test_an_item_is_added_to_a_list_in_every_run() -> None:
    assert overrides("sft.data+=[a.txt]", "sft.rate=[1.0,2.0]") == [
        ("sft.data+=[a.txt]", "sft.rate=1.0"),
        ("sft.data+=[a.txt]", "sft.rate=2.0"),
    ]
    with pytest.raises(RecipeError, match="sft.data is given more than once"):
        overrides("sft.data+=a.txt", "sft.data=[[a.txt],[b.txt]]")


def test_sweep_name_contains_the_varied_fields() -> None:
    assert read_grid("quick.yaml", ["base.rate+sft.rate=[1.0]", "side.rate=[2.0]"]).name == "base.rate-sft.rate-side.rate"
    assert read_grid("quick.yaml", ["seeds=2"]).name == "seeds"
    others = [read_grid("quick.yaml", ["base.rate=[1.0]", *fixed]).name for fixed in ([], ["side.rate=2.0"], ["side.rate=3.0"])]
    assert others[0] == "base.rate" and len(set(others)) == 3  # the rows of one sweep are not those of another
    many = [f"{'+'.join(f'step{index}.a_long_field_name' for index in range(9))}=[1]"]
    assert len(read_grid("quick.yaml", many).name) == 89


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft.rate"], r"'sft.rate': expected field=\[value, value\]"),
        (["sft.rate=[]"], "an axis needs at least one value"),
        (["sft.rate=[1.0]", "sft.rate=2.0"], "sft.rate is given more than once"),
        (["seeds=0"], r"'seeds=0': expected a number of seeds \(seeds=3\) or a list"),
        (["seeds=[a]"], "expected a number of seeds"),
        (["nothing.seeds=2"], "nothing.seeds: the recipe has no such step; expected seeds or one of base.seeds, sft.seeds, side.seeds"),
        (["sft.seeds=2", "base.seeds=3"], "so their counts must be equal"),
        (["sft.rate=[1.0, fast]"], """override 'sft.rate="fast"': steps"""),
        (["sft.rate=[1.0", "a]"], "not readable as YAML"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(arguments: list[str], message: str) -> None:
    from stages.sweep.run import load_sweep

    with pytest.raises(RecipeError, match=message):
        load_sweep("quick.yaml", arguments, Path("outputs"))
    result = sweep(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and not Path("outputs").exists()


# Numbers


SUMMARY = {
    "candidates": {"base": {"scores": {"gold": 0.2, "taste": 0.4}}, "sft": {"scores": {"gold": 0.5, "taste": 0.6}, "model": "x"}},
    "win_rates": [{"a": "sft", "b": "base", "judge": "gold", "win_rate": 0.7, "n": 10}],
    "steps": [{"name": "v1.5", "metrics": {"heldout_loss": 1.5, "train_loss": 2.0, "fine": True, "heldout_bins": [1, 2]}}],
    "wall_seconds": 3.0,
}


def test_numbers_of_a_summary_are_chosen_by_path() -> None:
    assert chosen_numbers(SUMMARY, ["win_rates.sft.base.gold.win_rate", "candidates.*.scores.gold"]) == {
        "win_rates.sft.base.gold.win_rate": 0.7,
        "candidates.base.scores.gold": 0.2,
        "candidates.sft.scores.gold": 0.5,
    }
    assert chosen_numbers(SUMMARY, ["steps.v1.5.metrics.heldout_loss"]) == {"steps.v1.5.metrics.heldout_loss": 1.5}
    assert "steps.v1.5.metrics.fine" not in numbers_of(SUMMARY)
    with pytest.raises(RecipeError, match="no number at 'candidates.sft.scores.glod'; did you mean candidates.sft.scores.gold"):
        chosen_numbers(SUMMARY, ["candidates.sft.scores.glod"])


def test_default_metrics_are_scores_or_step_metrics() -> None:
    assert default_patterns(SUMMARY) == ["candidates.base.scores.gold", "candidates.sft.scores.gold"]
    assert default_patterns({**SUMMARY, "candidates": {}}) == ["steps.v1.5.metrics.heldout_loss"]


# Running


def test_equal_steps_are_made_once_and_the_recipes_own_models_stay_the_newest() -> None:
    assert CliRunner().invoke(app, ["run", "quick.yaml"]).exit_code == 0
    own = Registry("outputs/registry").get("quick/sft")
    result = sweep("sft.rate=[1.0,2.0,3.0]")
    assert result.exit_code == 0, result.output
    # the recipe has made base, side and sft at its own rate; each is adopted once
    assert counts() == {
        "quick/base": 1,
        "quick/sft": 1,
        "quick/side": 1,
        "quick.sft.rate/base": 1,
        "quick.sft.rate/sft": 3,
        "quick.sft.rate/side": 1,
    }
    assert Registry("outputs/registry").get("quick/sft") == own
    taken = Registry("outputs/registry").get("quick.sft.rate/sft@1")
    assert taken.digest == own.digest and taken.manifest["adopted_from"] == "quick/sft@1"
    assert [row["models"]["sft"] for row in rows("sft.rate")] == [f"quick.sft.rate/sft@{number}" for number in (1, 2, 3)]
    assert Path("outputs/runs/quick/latest/summary.json").exists()
    assert json.loads(Path("outputs/runs/quick/latest/summary.json").read_text())["overrides"] == []


def test_best_run_of_a_sweep_is_reused_by_a_plain_run() -> None:
    sweep("sft.rate=[2.0]")
    result = CliRunner().invoke(app, ["run", "quick.yaml", "sft.rate=2.0"])
    assert result.stdout.count("reused:") == 3
    own = Registry("outputs/registry").get("quick/sft")
    assert own.digest == Registry("outputs/registry").get("quick.sft.rate/sft").digest
    assert Registry("outputs/registry").verify("quick/sft") == []


def test_a_sweep_writes_rows_means_and_a_plot() -> None:
    result = sweep("sft.rate=[1.0,2.0]", "seeds=3", "--metric", "steps.sft.metrics.heldout_error", "--metric", "steps.base.metrics.loss")
    assert result.exit_code == 0, result.output
    assert [(row["values"], row["seeds"], row["status"]) for row in rows("sft.rate")] == [
        ({"sft.rate": rate}, {"seed": seed}, "done") for seed in (7, 8, 9) for rate in (1.0, 2.0)
    ]
    folder = Path("outputs/sweeps/quick/sft.rate")
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    # errors of 2 + 0.07, 0.08, 0.09: mean 2.08, standard deviation 0.01; half width 4.3027 * 0.01 / sqrt(3)
    mean, low, high = (float(table[1][f"steps.sft.metrics.heldout_error.{part}"]) for part in ("mean", "low", "high"))
    assert table[1]["sft.rate"] == "2" and table[1]["steps.sft.metrics.heldout_error.n"] == "3"
    assert (mean, low, high) == pytest.approx((2.08, 2.08 - 0.024841, 2.08 + 0.024841), abs=1e-5)
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "2.08 (2.055 to 2.105)" in result.stdout
    assert counts()["quick.sft.rate/base"] == 3  # one per seed, for every setting of sft


def test_repeated_command_continues_an_interrupted_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.chain.run as chain

    arguments = ["sft.rate=[1.0,2.0,3.0]", "--metric", "steps.sft.metrics.heldout_error"]
    real, started = chain.run, []

    def run(recipe: Any, home: Path, runtime: Any) -> Any:
        started.append(recipe.source.overrides)
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(recipe, home, runtime)

    monkeypatch.setattr(chain, "run", run)
    assert sweep(*arguments).exit_code != 0
    assert len(rows("sft.rate")) == 1
    assert sweep(*arguments).exit_code == 0
    assert len(started) == 4  # one finished, one interrupted, then the two that were missing
    first = rows("sft.rate")
    result = sweep(*arguments)
    assert len(started) == 4 and result.stdout.count("already done") == 3
    assert rows("sft.rate") == first
    # other metrics of the same runs need no new run
    sweep("sft.rate=[1.0,2.0,3.0]", "--metric", "steps.sft.metrics.loss")
    assert len(started) == 4 and rows("sft.rate")[0]["metrics"] == {"steps.sft.metrics.loss": 0.5}
    Path("a.txt").write_text("changed")
    sweep(*arguments)
    assert len(started) == 7


def test_failed_run_is_a_row_and_the_others_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.chain.run as chain
    from stages.errors import TrainingError

    real = chain.run

    def run(recipe: Any, home: Path, runtime: Any) -> Any:
        if any("9" in text for text in recipe.source.overrides.values()):
            raise TrainingError("the loss is nan")
        return real(recipe, home, runtime)

    monkeypatch.setattr(chain, "run", run)
    result = sweep("sft.rate=[1.0,9.0,2.0]")
    assert result.exit_code == 2
    assert [(row["status"], row["error"]) for row in rows("sft.rate")] == [("done", None), ("failed", "the loss is nan"), ("done", None)]


def test_plan_creates_nothing() -> None:
    result = sweep("sft.rate=[1.0,2.0]", "--plan")
    assert result.exit_code == 0 and "sft.rate=2" in result.stdout and not Path("outputs").exists()
    sweep("sft.rate=[1.0]")
    shown = sweep("sft.rate=[1.0,2.0]", "--plan", "--name", "sft.rate").stdout
    assert "nothing" in shown and "sft" in shown


def test_json_has_the_means_and_a_wrong_metric_or_axis_is_refused() -> None:
    result = sweep("sft.rate=[1.0,2.0]", "--json", "--metric", "steps.sft.metrics.heldout_error")
    content = json.loads(result.stdout)
    assert [row["values"] for row in content["combinations"]] == [{"sft.rate": 1.0}, {"sft.rate": 2.0}]
    assert content["combinations"][0]["metrics"]["steps.sft.metrics.heldout_error"] == {"mean": 1.07, "low": None, "high": None, "n": 1}
    assert "no number at 'steps.sft.metrics.lose'" in sweep("sft.rate=[1.0]", "--metric", "steps.sft.metrics.lose").stderr
    assert "--x 'rate': expected an axis or a metric" in sweep("sft.rate=[1.0]", "--x", "rate").stderr
    assert "--name '../up': expected letters" in sweep("sft.rate=[1.0]", "--name", "../up").stderr


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("steps.stf.metrics.loss", "did you mean steps.sft.metrics?"),
        ("sft.metrics.loss", "did you mean steps.sft.metrics?"),
        ("steps.sft.metric.*", "did you mean steps.sft.metrics?"),
        ("candidates.aligned.kl", "expected a path such as steps.base.*, steps.sft.*"),
        ("policy/kl", "expected a path such as steps.base.*, steps.sft.*"),
    ],
)
def test_a_path_that_no_run_can_have_is_refused_before_the_first_run(metric: str, hint: str) -> None:
    result = sweep("sft.rate=[1.0,2.0]", "--metric", metric, "--until", "sft")
    assert result.exit_code == 2 and f"--metric {metric!r}: the summary of a run will have no such number; {hint}" in result.stderr
    assert not Path("outputs").exists()


def test_paths_that_a_run_may_have_are_accepted() -> None:
    recipe = load_recipe("quickstart")
    paths = [
        "candidates.aligned.scores.gold",
        "candidates.*.perplexity",
        "*.kl",
        "win_rates.aligned.*",
        "steps.*.metrics.heldout*",
        "steps.sft.metrics.anything",
        "steps.sft.wall_seconds",
        "wall_seconds",
        "environment.cpu_count",
    ]
    check_patterns(paths, recipe)
    with pytest.raises(RecipeError, match=r"did you mean candidates.aligned.scores\?"):
        check_patterns(["candidates.alinged.scores.gold"], recipe)


def test_steps_after_the_measured_one_are_skipped() -> None:
    sweep("base.rate=[1.0,2.0]", "--until", "sft")
    assert counts() == {"quick.base.rate/base": 2, "quick.base.rate/sft": 2}
    assert "--until 'stf': the recipe has no such step; did you mean 'sft'?" in sweep("base.rate=[1.0]", "--until", "stf").stderr


def test_headings_drop_the_common_beginning_of_the_paths() -> None:
    from stages.sweep.run import shortened

    assert shortened(["candidates.ppo.scores.gold", "candidates.ppo.kl"]) == ("candidates.ppo", ["scores.gold", "kl"])
    assert shortened(["steps.sft.metrics.loss"]) == ("", ["steps.sft.metrics.loss"])
    assert shortened(["a.b", "a.b.c"]) == ("a", ["b", "b.c"])
    assert shortened([]) == ("", [])


def test_a_plot_has_one_line_per_combination_of_the_other_fields() -> None:
    from stages.sweep.metrics import estimate
    from stages.sweep.plot import sweep_lines
    from stages.sweep.run import SweepResult, SweepRun

    grid = read_grid("quick.yaml", ["sft.data=[a.txt,b.txt]", "sft.rate=[1.0,2.0]"])
    result = SweepResult(grid, Path("out"))
    for number, point in enumerate(grid.points()):
        result.runs.append(SweepRun(point, {"kl": 10.0 * number, "gold": 0.1 * number}, None, {}))
    lines = sweep_lines(result, None)  # the numeric axis runs along x, the other one makes lines
    assert {label: [where for where, _ in points] for label, points in lines.items()} == {
        "sft.data=a.txt": [1.0, 2.0],
        "sft.data=b.txt": [1.0, 2.0],
    }
    assert lines["sft.data=b.txt"][0][1]["gold"] == estimate([0.2])
    assert {label: [where for where, _ in points] for label, points in sweep_lines(result, "kl").items()} == {
        "sft.data=a.txt": [0.0, 10.0],
        "sft.data=b.txt": [20.0, 30.0],
    }
