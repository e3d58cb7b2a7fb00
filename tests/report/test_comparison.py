"""Several runs on one page: names, what differs, scores side by side; and the drawing of a chain."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stages.report.comparison import differing_settings, render_comparison, run_names, write_comparison
from stages.report.curves import frontier, over_optimisation, series_of
from stages.report.diagram import HEIGHT, WIDTH, draw_chain
from stages.report.figures import as_svg, root_scale, smoothed
from stages.report.run_folder import read_run
from stages.report.training import data_efficiency


def test_differing_settings_are_listed(new_run, tmp_path) -> None:
    first = read_run(new_run(tmp_path / "toy" / "one"))
    second = read_run(new_run(tmp_path / "toy" / "two", kl_coef=0.2, seed=8))
    assert run_names([first, second]) == ["one", "two"]
    rows = differing_settings([first, second])
    assert ["aligned", "kl_coef", "0.05", "0.2"] in rows
    assert {row[1] for row in rows} == {"kl_coef", "seed of the run"}
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", render_comparison([first, second]).html))
    assert "2 runs of toy, side by side." in words and "kl_coef" in words
    assert "aligned, by gold 0.600 0.550 to 0.650 0.600 0.550 to 0.650" in words
    assert "aligned against sft 0.70 0.60 to 0.80 0.70 0.60 to 0.80" in words
    # seed, time, processes, memory, precision and device of each run, and the versions that all runs had
    for name, seed in (("one", 7), ("two", 8)):
        assert f"{name} {seed} 3 min 20 s 1 1.00 GiB of the process bf16 2 CPU cores (Some CPU)" in words
    assert "all runs torch 2.13" in words


def test_runs_of_two_recipes_are_compared_without_a_missing_step(new_run, tmp_path) -> None:
    first, second = new_run(tmp_path / "toy" / "one"), new_run(tmp_path / "other" / "one")
    summary = json.loads((second / "summary.json").read_text())
    summary["recipe"] = "other"
    summary["steps"] = [step for step in summary["steps"] if step["name"] != "aligned"]
    (second / "summary.json").write_text(json.dumps(summary))
    runs = [read_run(first), read_run(second)]
    assert run_names(runs) == ["toy one", "other one"]
    assert ["aligned", "the step itself", "present", "absent"] in differing_settings(runs)
    assert write_comparison(runs, tmp_path / "page.html").path.read_text().count('class="plot"') == 4


def test_equal_runs_are_reported_as_equal(new_run, tmp_path) -> None:
    runs = [read_run(new_run(tmp_path / "toy" / name)) for name in ("one", "two")]
    assert "Their settings are equal" in render_comparison(runs).html


def test_data_efficiency_needs_three_sizes(new_run, tmp_path) -> None:
    runs = []
    for name, number in (("a", 100), ("b", 1000), ("c", 10000)):
        folder = new_run(tmp_path / "toy" / name)
        summary = json.loads((folder / "summary.json").read_text())
        summary["steps"][1]["metrics"] |= {"demonstrations": number, "heldout_loss_after": 2.0 - number / 10000}
        summary["steps"][1]["config"]["model"] = {"ref": "base"}
        (folder / "summary.json").write_text(json.dumps(summary))
        runs.append(read_run(folder))
    assert data_efficiency(runs[:2]) is None
    figure = data_efficiency(runs)
    assert figure is not None and figure.legend == [("from base", 1)]
    assert figure.rows == [["sft", "from base", "100", "1.99"], ["sft", "from base", "1,000", "1.9"], ["sft", "from base", "10,000", "1"]]


def test_over_optimisation_shows_best_of_n_and_ppo(run_folder: Path) -> None:
    run = read_run(run_folder)
    step = run.step("aligned")
    assert step is not None
    figure = over_optimisation(step, run.evaluations[0].evaluation)
    assert figure is not None
    assert [panel.title for panel in figure.panels] == ["preference, trained on", "gold, monitor"]
    assert [name for name, _ in figure.legend] == ["aligned, by iteration", "best-of-n on held-out prompts"]
    assert over_optimisation(run.steps[0]) is None


def test_reward_against_kl_shows_ppo_iterations_on_a_square_root_axis(run_folder: Path) -> None:
    run = read_run(run_folder)
    evaluation, step = run.evaluations[0].evaluation, run.step("aligned")
    assert evaluation is not None and step is not None
    colors = series_of(list(evaluation["candidates"]))
    plain, with_way = frontier(evaluation, colors), frontier(evaluation, colors, trained={"aligned": step})
    assert plain is not None and with_way is not None
    assert "Thin lines" in with_way.caption and "Thin lines" not in plain.caption
    watched = [panel.svg.count("<path") for panel in with_way.panels], [panel.svg.count("<path") for panel in plain.panels]
    assert sum(watched[0]) > sum(watched[1])


def test_reward_against_kl_of_a_single_prompt_has_no_intervals(run_folder: Path) -> None:
    evaluation = read_run(run_folder).evaluations[0].evaluation
    assert evaluation is not None
    for point in evaluation["best_of_n"]["best"]:
        for score in point["scores"].values():
            score["ci_low"] = score["ci_high"] = None
    figure = frontier(evaluation, series_of(list(evaluation["candidates"])))
    assert figure is not None
    assert [text for _, name, _, text in figure.rows if name.startswith("best of") and "to" in text] == []


def test_square_root_axis_has_ticks_that_do_not_overlap() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([0, 144], [0, 1])
    axes.set_xlim(-0.1, 144)
    root_scale(axes)
    # the axis ends at the root 12; marks 1, 2, 5, ... are kept if their roots are at least 0.09 * 12 = 1.08 apart
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "2", "10", "20", "50", "100"]
    assert axes.transData.transform((36, 0))[0] == pytest.approx(axes.transData.transform([(0, 0), (144, 0)])[:, 0].mean())


def test_candidates_get_distinct_colours() -> None:
    assert series_of(["a", "b", "c", "d"]) == {"a": 0, "b": 2, "c": 3, "d": 1}
    assert series_of(["only"]) == {"only": 1}
    assert series_of([]) == {}


def test_curves_are_smoothed_by_a_moving_mean() -> None:
    assert smoothed([1.0, 2.0, 6.0], share=0.7) == [1.0, 3.0, 6.0]
    assert smoothed([5.0] * 40) == [5.0] * 40


def test_numbers_in_the_text_of_a_drawing_are_not_shortened() -> None:
    from matplotlib.figure import Figure

    drawing = Figure()
    drawing.text(0.123456, 0.5, "0.98765")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
        svg = as_svg(drawing, 'a "label" <b>')
    assert "0.98765" in svg and not re.search(r'="[^"]*\d\.\d{3}', svg)
    assert 'aria-label="a &quot;label&quot; &lt;b>"' in svg


def test_a_chain_is_drawn_from_left_to_right() -> None:
    reads = {"sft": ["base"], "preference": ["sft"], "aligned": ["sft", "preference", "hub/model"], "verdict": ["base", "sft", "aligned"]}
    drawn = draw_chain({name: ("stage", "") for name in ("base", "sft", "preference", "aligned", "verdict")}, reads)
    x = {box.name: box.x for box in drawn.boxes}
    assert x["base"] == x["hub/model"] < x["sft"] < x["preference"] < x["aligned"] < x["verdict"]
    assert [box.name for box in drawn.boxes if box.is_foreign] == ["hub/model"]
    # aligned reads sft through preference, and verdict reads everything through aligned: five arrows are enough
    assert len(drawn.arrows) == 5
    places = {(box.x, box.y) for box in drawn.boxes}
    assert len(places) == len(drawn.boxes)
    assert all(0 <= box.x <= drawn.width - WIDTH and 0 <= box.y <= drawn.height - HEIGHT for box in drawn.boxes)
