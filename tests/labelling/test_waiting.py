"""Steps that wait for people: exit status 75 and its message, continuing with the same command, --wait, simulated people, judgements."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import stages
from stages.config import DataSource
from stages.corpora.judgements import load_judgements
from stages.corpora.labels import read_answers, read_tasks
from stages.errors import DataError, Waiting
from stages.labelling.publishing import find_folder
from stages.labelling.simulated import ranked
from stages.labelling.store import Store, read_labels
from stages.reward_model.collection import collect_comparisons
from stages.reward_model.collection_config import Collection


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "persons.py").write_text("def shorter(annotator, prompt, completions): return [-len(text) for text in completions]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a line about film {number}"}) + "\n" for number in range(20)))
    return str(path)


def collection(prompts: str, people: dict[str, Any], **fields: Any) -> Collection:
    settings = {
        "policies": ["sft", {"model": "ppo", "weight": 0.5}],
        "prompts": prompts,
        "num_prompts": 6,
        "per_prompt": 4,
        "judge": {"people": people},
        "generation": {"max_new_tokens": 6, "stop": list("abcdefgh")},
    }
    return Collection.model_validate({**settings, **fields})


@pytest.fixture
def models(resolve_folder: Any, tiny_llama_folder: Path) -> dict[str, Any]:
    folder = resolve_folder(tiny_llama_folder)
    return {
        field_path: replace(folder, digest=f"sha256:{field_path}")
        for field_path in ("collect.policies[0].model", "collect.policies[1].model")
    }


def rank_all(folder: Path, answer: Any, name: str = "anna", number: int = 100) -> None:
    store = Store(folder)
    while number > 0 and (task := store.next_task(name)) is not None:
        store.record(name, answer(store, name, task.id, list(range(len(task.completions)))))
        number -= 1
    store.close()


def test_collection_waits_with_a_command_and_continues_at_the_target(prompts, step_context, models, answer) -> None:
    context = step_context(name="recipe/step", models=models)
    asked = collection(prompts, {"target": 4, "overlap": 0.0})
    told = r"recipe/step: 0 of 4 tasks are ranked\. Rank them with: stages label recipe/step --home "
    with pytest.raises(Waiting, match=told) as waiting:
        collect_comparisons(asked, context, precision="fp32")
    assert waiting.value.exit_status == 75 and "--wait" in str(waiting.value)
    assert (context.checkpoint_folder / "waiting.txt").read_text() == "0 of 4 tasks are ranked"
    folder = find_folder("recipe/step", context.registry.root.parent)
    assert folder == find_folder("step", context.registry.root.parent)
    tasks = read_tasks(folder / "tasks.jsonl")
    assert len(tasks) == 6 and {name for task in tasks.values() for names in task.authors for name in names} == {"sft", "ppo"}
    assert {mark for task in tasks.values() for marks in task.digests for mark in marks} == {item.digest for item in models.values()}
    rank_all(folder, answer, number=3)
    with pytest.raises(Waiting, match="3 of 4"):
        collect_comparisons(asked, context, precision="fp32")
    rank_all(folder, answer, number=1)
    made = collect_comparisons(asked, context, precision="fp32")
    assert len(made) == 4 and {item.annotator for item in made} == {"anna"}
    assert all(item.ranks == list(range(len(item.completions))) for item in made)
    assert not (context.checkpoint_folder / "waiting.txt").exists()
    assert json.loads((context.folder / "labels.json").read_text())["ranked_tasks"] == 4


def test_rankings_are_kept_when_other_settings_of_the_step_change(prompts, step_context, models, answer, tmp_path) -> None:
    context = step_context(name="recipe/step", models=models)
    with pytest.raises(Waiting):
        collect_comparisons(collection(prompts, {"target": 2}), context, precision="fp32")
    folder = find_folder("recipe/step", context.registry.root.parent)
    rank_all(folder, answer, number=2)
    other = replace(context, checkpoint_folder=tmp_path / "work" / "other")  # another fingerprint: the target was raised
    (tmp_path / "work" / "other").mkdir(parents=True)
    with pytest.raises(Waiting, match="2 of 5"):
        collect_comparisons(collection(prompts, {"target": 5, "annotators": 3}), other, precision="fp32")
    assert find_folder("recipe/step", context.registry.root.parent) == folder
    assert read_labels(folder).settings.annotators == 3


def test_wait_polls_until_people_are_done(prompts, step_context, models, answer, monkeypatch) -> None:
    monkeypatch.setattr("stages.labelling.waiting.POLL_SECONDS", 0.02)
    context = step_context(name="recipe/step", models=models)
    context.runtime.waits_for_people = True
    asked = collection(prompts, {"target": 3})
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(collect_comparisons(asked, context, precision="fp32")))
    thread.start()
    until = time.monotonic() + 60
    while (folder := find_folder("recipe/step", context.registry.root.parent)) is None and time.monotonic() < until:
        time.sleep(0.02)
    assert thread.is_alive()
    rank_all(folder, answer, number=3)
    thread.join(timeout=60)
    assert len(made[0]) == 3


def test_simulated_people_answer_over_http_and_the_same_way_twice(prompts, step_context, models) -> None:
    people = {"annotators": 2, "overlap": 0.5, "simulate": {"function": "persons:shorter"}}
    context = step_context(name="recipe/step", models=models)
    made = collect_comparisons(collection(prompts, people), context, precision="fp32")
    assert len(made) == 6 + 3  # three of the six tasks went to both people
    for item in made:
        lengths = [len(text) for text in item.completions]
        assert item.ranks == [sum(other < own for other in lengths) for own in lengths]
    folder = find_folder("recipe/step", context.registry.root.parent)
    answers = [(item.task, item.annotator, item.order) for _, item in read_answers(folder / "answers.jsonl")]
    assert {name for _, name, _ in answers} == {"annotator-00", "annotator-01"}
    (folder / "answers.jsonl").unlink()
    (folder / "open.json").unlink()
    (context.checkpoint_folder / "collected.jsonl").unlink()
    collect_comparisons(collection(prompts, people), context, precision="fp32")
    assert answers == [(item.task, item.annotator, item.order) for _, item in read_answers(folder / "answers.jsonl")]


def test_ranks_of_simulated_scores_by_hand() -> None:
    assert ranked([0.1, 0.9, 0.5], 0.0) == [2, 0, 1]
    assert ranked([0.8, 0.9, 0.5], 0.15) == [0, 0, 2]


@pytest.mark.parametrize(
    ("people", "fields", "message"),
    [
        ({"target": 7}, {}, "target=7 is more than num_prompts=6"),
        ({}, {"per_prompt": 10}, "people rank at most 9 at a time"),
        ({}, {"tie_width": 0.1}, "tie_width needs a judge that scores"),
        ({}, {"data": "x"}, r"collect.prompts and collect.data are the same setting"),
        ({"overlap": 2.0}, {}, "less than or equal to 1"),
        ({"questions": 3}, {}, "expected the path of a file"),
    ],
)
def test_wrong_settings_are_refused(prompts, people, fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        collection(prompts, people, **fields)


def test_missing_question_file_is_reported_before_a_model_is_loaded(prompts, tmp_path) -> None:
    asked = collection(prompts, {"questions": str(tmp_path / "none.yaml")})
    with pytest.raises(DataError, match=r"none.yaml: no such file; questions must name a local file"):
        asked.check_data()
    with pytest.raises(DataError, match="target is 30, but the data has 20 prompts"):
        collection(prompts, {"target": 30}, num_prompts=40).check_data()


def test_rankings_are_read_as_votes_between_candidates(make_folder, answer) -> None:
    folder = make_folder(texts=[["a", "b"], ["c", "d"]], overlap=1.0)
    store = Store(folder)
    one, two = store.tasks
    store.record("anna", answer(store, "anna", one, [0, 1]))
    store.record("ben", answer(store, "ben", one, [1, 0]))
    store.record("anna", answer(store, "anna", two, [0, 0]))
    store.close()
    votes = load_judgements([DataSource(path=str(folder / "answers.jsonl"))]).votes
    assert [(vote.a, vote.b, vote.preference, vote.annotator) for vote in votes] == [
        ("model-0", "model-1", 1.0, "anna"),
        ("model-0", "model-1", 0.0, "ben"),
        ("model-0", "model-1", 0.5, "anna"),
    ]


RECIPE = """
name: small
steps:
  - stage: evaluation
    name: verdict
    candidates: {old: {completions: old.jsonl}, new: {completions: new.jsonl}}
    data: prompts.jsonl
    judges:
      - {people: {target: 4, annotators: 1}}
      - {function: "lengths:longer", name: longer}
"""


def test_people_judge_an_evaluation_side_by_side(prompts, tmp_path, monkeypatch, answer) -> None:
    from stages.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "lengths.py").write_text("def longer(prompts, completions): return [len(text) for text in completions]\n")
    for name, text in (("old", "short"), ("new", "a longer one")):
        rows = [{"prompt": f"a line about film {number}", "completion": text if number < 5 else "the same"} for number in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.yaml").write_text(RECIPE)
    home = ["--home", str(tmp_path / "home")]
    first = CliRunner().invoke(app, ["run", "small.yaml", *home])
    assert first.exit_code == 75 and "waiting: small/verdict: 0 of 4 tasks are ranked" in first.output + first.stderr
    planned = CliRunner().invoke(app, ["plan", "small.yaml", *home, "--json"])
    assert json.loads(planned.stdout)["steps"][0]["reason"] == "it waits for annotators: 0 of 4 tasks are ranked"
    with pytest.raises(Waiting, match="0 of 4 tasks are ranked"):
        stages.run("small.yaml", home=tmp_path / "home", quiet=True)
    folder = find_folder("small/verdict", tmp_path / "home")
    assert len(read_tasks(folder / "tasks.jsonl")) == 5  # equal completions are not shown
    store = Store(folder)
    for number in range(4):
        task = store.next_task("anna")
        new = task.authors.index(["new"])
        store.record("anna", answer(store, "anna", task.id, [int(index != new) for index in range(2)] if number else [0, 0]))
    store.close()
    done = CliRunner().invoke(app, ["run", "small.yaml", *home], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    evaluation = json.loads((tmp_path / "home" / "runs" / "small" / "latest" / "verdict" / "evaluation.json").read_text())
    rates = {(row["judge"], row["a"], row["b"]): row for row in evaluation["win_rates"]}
    assert rates["people", "new", "old"]["win_rate"] == pytest.approx((0.5 + 3) / 4)
    assert evaluation["judges"][0]["kind"] == "people"
    assert any("fewer than two different answers" in item["what"] for item in evaluation["exclusions"])
    page = (tmp_path / "home" / "runs" / "small" / "latest" / "report.html").read_text()
    assert "people" in page and "longer" in page
    assert (tmp_path / "home" / "runs" / "small" / "latest" / "verdict" / "labels.json").is_file()
    report = CliRunner().invoke(app, ["label", "small/verdict", "--report", "--json", *home])
    assert json.loads(report.stdout)["ranked_tasks"] == 4
