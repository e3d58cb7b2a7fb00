"""A small version of recipes/people.yaml from its first step to its report. The rankings are in the run folder and are reused."""

from __future__ import annotations

import json
from pathlib import Path

import shrunk
from typer.testing import CliRunner

from stages.corpora.labels import read_answers


def test_two_rounds_with_simulated_people_run_and_are_reused(tmp_path: Path) -> None:
    from stages.cli import app

    command = ["run", str(shrunk.RECIPES / "people.yaml"), *shrunk.SHRUNK["people"], "--home", str(tmp_path)]
    first = CliRunner().invoke(app, command, catch_exceptions=False)
    assert first.exit_code == 0, first.output[-2000:]
    run = tmp_path / "runs" / "people" / "latest"
    assert (run / "report.html").is_file()
    summary = json.loads((run / "summary.json").read_text())
    rates = {(row["judge"], row["a"], row["b"]) for row in summary["win_rates"]}
    assert {judge for judge, _, _ in rates} == {"people", "preference", "gold"}
    second = json.loads((run / "preference-2" / "labels.json").read_text())
    assert second["ranked_tasks"] == 4 and second["reward_model"]["model"] == "preference-1"
    answers = [item for _, item in read_answers(tmp_path / "labelling" / "people" / "preference-2" / "latest" / "answers.jsonl")]
    digests = {step["name"]: step["model"]["digest"] for step in summary["steps"] if step["model"]}
    behind = {mark for item in answers for marks in item.digests for mark in marks}
    assert behind <= {digests["sft"], digests["aligned-1"]} and len({item.annotator for item in answers}) > 1
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert again.exit_code == 0
    assert all(step["reused"] for step in json.loads((run.parent / "latest" / "summary.json").read_text())["steps"])
