"""Export and import of tasks and answers in the formats of other tools.

The formats are those of the tools' documentation: records of Argilla 2 (Record.to_dict), Label Studio's tasks with a Ranker or a Pairwise,
AlpacaEval's annotations.json and PandaLM's testset-v1.json. The tests at the end run where the packages of Argilla and Label Studio are
installed (the extra ``exchange``).
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import pytest

from stages.config import DataSource
from stages.corpora.comparisons import comparison
from stages.corpora.files import read_rows
from stages.errors import DataError, StorageError
from stages.labelling.exchange.files import export_labels, import_answers
from stages.labelling.exchange.label_studio import LABEL_STUDIO_CONFIG
from stages.labelling.store import Store, read_labels
from stages.labelling.tasks import file_tasks

UUID_OF_BEN = uuid5(NAMESPACE_URL, "annotator:ben")


@pytest.fixture
def answered(make_folder, answer) -> Path:
    """Two tasks: three completions ranked 2 < 0 < 1 by anna and with a tie by ben; two completions of which anna likes the second."""
    folder = make_folder(texts=[["a", "b", "c"], ["x", "y"]], overlap=1.0)
    store = Store(folder)
    one, two = store.tasks
    store.record("anna", answer(store, "anna", one, [1, 2, 0]))
    store.record("ben", answer(store, "ben", one, [0, 0, 1]))
    store.record("anna", answer(store, "anna", two, [1, 0]))
    store.close()
    return folder


def written(folder: Path, kind: str) -> tuple[Path, str]:
    path = folder.parent / f"{kind}.out"
    return path, export_labels(folder, kind, path)


def rankings(folder: Path) -> dict[tuple[str, str], list[int]]:
    labels = read_labels(folder)
    return {(labels.tasks[task].prompt, name): item.ranks for name, own in labels.answers.items() for task, item in own.items()}


def test_argilla_records_are_exported(answered) -> None:
    path, said = written(answered, "argilla")
    first, second = json.loads(path.read_text())
    assert first["fields"] == {"prompt": "instruction 0", "completion_1": "a", "completion_2": "b", "completion_3": "c"}
    assert first["responses"]["ranking"][0]["value"] == ["completion_3", "completion_1", "completion_2"]
    tied = [{"value": "completion_1", "rank": 1}, {"value": "completion_2", "rank": 1}, {"value": "completion_3", "rank": 3}]
    assert first["responses"]["ranking"][1] == {"value": tied, "user_id": str(UUID_OF_BEN), "status": "submitted"}
    assert second["responses"]["ranking"][0]["value"] == ["completion_2", "completion_1"]
    assert "left out" not in said


def test_label_studio_tasks_are_exported(answered) -> None:
    path, said = written(answered, "label-studio")
    first, second = json.loads(path.read_text())
    assert first["data"]["items"][0] == {"id": "completion_1", "title": "", "body": "a"}
    (result,) = first["annotations"][0]["result"]
    assert result["type"] == "ranker" and result["value"] == {"ranker": {"ranking": ["completion_3", "completion_1", "completion_2"]}}
    (pair,) = second["annotations"][0]["result"]
    assert pair["type"] == "pairwise" and pair["value"] == {"selected": "right"}
    assert "left out: 1 rankings with ties" in said and "<Pairwise" in said and "<Ranker" in said


def test_alpaca_eval_and_pandalm_pairs_are_exported(answered) -> None:
    rows = json.loads(written(answered, "alpaca-eval")[0].read_text())
    assert len(rows) == 3 + 3 + 1
    told = {(row["annotator"], row["output_1"], row["output_2"]): row["preference"] for row in rows}
    assert told["anna", "a", "b"] == 1 and told["anna", "a", "c"] == 2 and told["ben", "a", "b"] == 1.5
    assert rows[0]["generator_1"] == "model-0" and rows[0]["instruction"] == "instruction 0"
    pairs = json.loads(written(answered, "pandalm")[0].read_text())
    assert [(row["response1"], row["response2"], row["annotator1"], row.get("annotator2")) for row in pairs] == [
        ("a", "b", 1, 0),
        ("a", "c", 2, 1),
        ("b", "c", 2, 1),
        ("x", "y", 2, None),
    ]


def test_csv_and_comparisons_are_exported(answered) -> None:
    with written(answered, "csv")[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["annotator"], row["text"], row["rank"]) for row in rows[:3]] == [
        ("anna", "a", "2"),
        ("anna", "b", "3"),
        ("anna", "c", "1"),
    ]
    path = answered.parent / "out.jsonl"
    export_labels(answered, "comparisons", path)
    made = [comparison(row) for row in read_rows([DataSource(path=str(path))])]
    assert [(item.ranks, item.annotator) for item in made] == [([1, 2, 0], "anna"), ([0, 0, 1], "ben"), ([1, 0], "anna")]


@pytest.mark.parametrize("kind", ["argilla", "label-studio", "alpaca-eval", "pandalm", "csv"])
def test_exported_answers_can_be_imported(answered, make_folder, kind) -> None:
    path, _ = written(answered, kind)
    empty = make_folder(texts=[["a", "b", "c"], ["x", "y"]], overlap=1.0, name="empty")
    said = import_answers(empty, kind, path)
    before, after = rankings(answered), rankings(empty)
    if kind == "csv":
        assert after == before
    elif kind == "argilla":  # users are known by UUIDs there
        assert sorted(after.values()) == sorted(before.values())
    elif kind == "label-studio":  # ties are not exported
        assert list(after.values()) == [[1, 2, 0], [1, 0]]
    else:  # these pairs of three completions do not give a ranking
        assert list(after.values()) == [[1, 0]] and "left out: " in said
    assert "already existed" in import_answers(empty, kind, path)
    assert rankings(empty) == after


@pytest.mark.parametrize("kind", ["argilla", "label-studio", "csv"])
def test_answers_imported_into_the_folder_they_come_from_stay_as_they_are(answered, kind) -> None:
    path, _ = written(answered, kind)
    before = (answered / "answers.jsonl").read_text()
    said = import_answers(answered, kind, path)
    count = 2 if kind == "label-studio" else 3  # it has no ties
    assert said.splitlines()[0] == f"imported 0 rankings from {path}; {count} already existed"
    assert (answered / "answers.jsonl").read_text() == before


def test_every_form_of_a_ranking_of_argilla_is_imported(make_folder) -> None:
    folder = make_folder(texts=[["a", "b", "c"]], overlap=1.0)
    task = next(iter(read_labels(folder).tasks))
    values = {
        "one": ["completion_2", "completion_3", "completion_1"],
        "two": [{"value": "completion_1", "rank": 1}, {"value": "completion_2", "rank": 1}, {"value": "completion_3", "rank": 2}],
        "three": {"value": ["completion_1", "completion_2", "completion_3"], "rank": [3, 2, 1]},
    }
    responses = [{"user_id": name, "value": value} for name, value in values.items()]
    responses.append({"user_id": "four", "value": values["one"], "status": "discarded"})
    path = folder.parent / "in.json"
    path.write_text(json.dumps([{"id": task, "responses": {"ranking": responses}}, {"id": "other"}]))
    said = import_answers(folder, "argilla", path)
    assert rankings(folder) == {
        ("instruction 0", "one"): [2, 0, 1],
        ("instruction 0", "two"): [0, 0, 2],
        ("instruction 0", "three"): [2, 1, 0],
    }
    assert "1 discarded responses" in said and "1 records that match no task" in said


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("argilla", '[{"id": "TASK", "responses": {"ranking": [{"value": ["completion_1"]}]}}]', "record 1: ranking is"),
        (
            "label-studio",
            '[{"data": {"task_id": "TASK"}, "annotations": [{"result": [{"type": "ranker", "value": {}}]}]}]',
            "task 1: the result",
        ),
        ("alpaca-eval", '[{"instruction": "i", "output_1": "a", "output_2": "b", "preference": 7}]', "row 1: preference is 7"),
        ("pandalm", '[{"instruction": "i", "response1": "a", "response2": "b", "annotator1": 5}]', "row 1: annotator1 is 5"),
        ("argilla", '[{"id": "TASK", "ranking.responses": 3}]', "ranking.responses is 3; expected a list"),
        ("label-studio", '[{"data": {"task_id": "TASK"}, "annotations": 3}]', "task 1: annotations is 3; expected a list"),
        (
            "pandalm",
            '[{"instruction": "i", "response1": "a", "response2": "b", "annotators": 1}]',
            "row 1: annotators is 1; expected a list",
        ),
        ("csv", "a,b\n1,2\n", "expected task, annotator, completion and rank"),
        ("csv", "task,annotator,completion,rank\nx,y,one,2\n", "expected whole numbers"),
        ("argilla", "{", "cannot be read as argilla"),
        ("argilla", "{}", "expected a JSON list"),
        ("word", "", "'word' is not a known format; expected one of argilla, label-studio"),
    ],
)
def test_broken_file_is_named_and_nothing_is_taken(make_folder, kind, content, message) -> None:
    folder = make_folder(texts=[["a", "b", "c"]])
    path = folder.parent / "in.file"
    path.write_text(content.replace("TASK", next(iter(read_labels(folder).tasks))))
    with pytest.raises(DataError, match=message):
        import_answers(folder, kind, path)
    assert rankings(folder) == {}


def test_files_of_other_tools_become_tasks(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs.json"  # AlpacaEval's model outputs of two models
    outputs.write_text(
        json.dumps([{"instruction": "say hello", "output": text, "generator": name} for name, text in (("m", "hello"), ("n", "hi"))])
    )
    (task,) = file_tasks(outputs)
    assert (task.prompt, task.completions, task.authors) == ("say hello", ["hello", "hi"], [["m"], ["n"]])
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(
        json.dumps({"prompt": "p", "responses": ["good", "fair", "fair"], "models": ["m", "n", "o"]})
        + "\n"
        + json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"})
        + "\n"
    )
    first, second = file_tasks(ranked)
    assert first.completions == ["good", "fair"] and first.authors == [["m"], ["n", "o"]]  # equal texts are shown once
    assert second.completions == ["yes", "no"]
    tool = {"type": "function", "function": {"name": "clock"}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    asked = [{"role": "user", "content": "what time is it?"}]
    ranked.write_text(
        json.dumps({"prompt": asked, "completions": [[call], [{"role": "assistant", "content": "noon"}]], "tools": [tool]}) + "\n"
    )
    (task,) = file_tasks(ranked)
    assert task.texts == ['[tool call] {"name": "clock", "arguments": {}}', "noon"] and task.tools == [tool]
    assert json.loads(task.as_line())["completions"] == [[call], "noon"]
    ranked.write_text(json.dumps({"prompt": "p", "completions": ["same", "same"]}) + "\n")
    with pytest.raises(DataError, match=r"ranked.jsonl:1: 1 different completion\(s\); a task must have 2 to 9"):
        file_tasks(ranked)


# With the packages of the tools

MISSING = "the package is not installed; pip install 'tristage[exchange]' runs this test"


def test_argilla_s_package_reads_our_records_and_we_read_what_it_writes(answered, make_folder) -> None:
    argilla = pytest.importorskip("argilla", reason=MISSING)
    path, _ = written(answered, "argilla")
    records = [argilla.Record.from_dict(record) for record in json.loads(path.read_text())]
    assert [dict(record.fields) for record in records][1] == {"prompt": "instruction 1", "completion_1": "x", "completion_2": "y"}
    responses = list(records[0].responses)
    assert [response.question_name for response in responses] == ["ranking", "ranking"]
    assert {str(response.status.value) for response in responses} == {"submitted"}
    flat = []
    for record in records:  # what records.to_list(flatten=True) adds to a record
        own = list(record.responses)
        names = {"": [one.value for one in own], ".users": [str(one.user_id) for one in own], ".status": [one.status.value for one in own]}
        flat.append({"id": record.id, **{f"ranking.responses{name}": values for name, values in names.items()}})
    for number, content in enumerate(([record.to_dict() for record in records], flat)):
        back = answered.parent / f"argilla-{number}.json"
        back.write_text(json.dumps(content))
        empty = make_folder(texts=[["a", "b", "c"], ["x", "y"]], overlap=1.0, name=f"empty-{number}")
        assert "imported 3 rankings" in import_answers(empty, "argilla", back)
        assert sorted(rankings(empty).values()) == [[0, 0, 2], [1, 0], [1, 2, 0]]


def test_label_studio_s_package_accepts_our_results(answered) -> None:
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason=MISSING)
    ranker, pairwise = (interface.LabelInterface(LABEL_STUDIO_CONFIG[name]) for name in ("ranker", "pairwise"))
    first, second = json.loads(written(answered, "label-studio")[0].read_text())
    for config, task in ((ranker, first), (pairwise, second)):
        config.validate()
        assert all(tag.value_name in task["data"] for tag in config.objects)
    assert ranker.validate_annotation(first["annotations"][0])
    # Its check of annotations does not support Pairwise, so its own output is the reference.
    theirs = pairwise.get_control("ranking").label("right")._dict()
    (ours,) = second["annotations"][0]["result"]
    assert {name: ours[name] for name in ("from_name", "to_name", "type", "value")} == {
        name: theirs[name] for name in ("from_name", "to_name", "type", "value")
    }


@pytest.mark.parametrize(
    ("name", "reason"), [("", "Is a directory"), ("a.txt/b.csv", "File exists|Not a directory"), ("a" * 300, "too long")]
)
def test_an_export_that_cannot_be_written_is_one_message(name: str, reason: str, answered: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(StorageError, match=rf"{name} cannot be written: .*({reason}). Name another file, or fix this"):
        export_labels(answered, "csv", tmp_path / name)
