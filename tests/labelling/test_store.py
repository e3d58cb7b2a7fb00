"""Answers are stored once, permanently and in order. Tasks go to the right people. Screening accepts who agrees with the gold answers."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from stages.config import DataInput, DataSource
from stages.corpora.comparisons import load_comparisons
from stages.corpora.files import fingerprint, read_rows
from stages.corpora.labels import read_answers
from stages.errors import DataError, StorageError
from stages.labelling.assignment import Assignment, overlap_tasks, shown_order
from stages.labelling.config import load_questions
from stages.labelling.questions import AnswerError
from stages.labelling.store import Log, Store
from stages.shipped import shipped_folder


def test_answer_is_one_line_with_all_that_reports_need(make_folder, answer) -> None:
    folder = make_folder()
    store = Store(folder)
    task = store.next_task("anna")
    store.record("anna", answer(store, "anna", task.id, [2, 1, 1], flagged=None))
    (line,) = (folder / "answers.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["annotator"] == "anna" and kept["task"] == task.id and kept["seconds"] == 2.0
    assert kept["ranks"] == [2, 0, 0]  # number of better completions for each: two, none, none
    assert kept["order"] == store.order(task, "anna")
    assert kept["digests"] == [["sha256:0"], ["sha256:1"], ["sha256:2"]]
    assert kept["time"].endswith("+00:00") and len(kept["id"]) == 32
    store.close()


def test_same_answer_sent_twice_is_kept_once(make_folder, answer) -> None:
    store = Store(make_folder())
    sent = answer(store, "anna", store.next_task("anna").id, [0, 1, 2])
    assert store.record("anna", sent).id == store.record("anna", sent).id
    assert len(read_answers(store.folder / "answers.jsonl")) == 1
    with pytest.raises(AnswerError, match="belongs to another answer"):
        store.record("ben", sent)
    store.close()


def test_correction_is_appended_and_the_last_one_counts(make_folder, answer) -> None:
    folder = make_folder()
    store = Store(folder)
    task = store.next_task("anna").id
    first = store.record("anna", answer(store, "anna", task, [0, 1, 2]))
    second = store.record("anna", answer(store, "anna", task, [2, 1, 0]))
    assert second.replaces == first.id
    store.close()
    assert len(read_answers(folder / "answers.jsonl")) == 2
    again = Store(folder)
    assert again.answer_of("anna", task).ranks == [2, 1, 0]
    again.close()
    (row,) = read_rows([DataSource(path=str(folder))])
    assert row["ranks"] == [2, 1, 0] and row["annotator"] == "anna" and row.location.endswith("answers.jsonl:2")


def test_line_cut_off_by_a_crash_is_removed_and_the_rest_stays(make_folder, answer) -> None:
    folder = make_folder()
    store = Store(folder)
    store.record("anna", answer(store, "anna", store.next_task("anna").id, [0, 1, 2]))
    store.close()
    with (folder / "answers.jsonl").open("ab") as file:
        file.write(b'{"id": "half an ans')
    again = Store(folder)
    assert again.cut_off == 19
    again.record("anna", answer(again, "anna", again.next_task("anna").id, [1, 0, 2]))
    again.close()
    assert len(read_answers(folder / "answers.jsonl")) == 2


def test_answer_is_flushed_to_the_device_before_it_is_acknowledged(make_folder, answer, monkeypatch) -> None:
    folder = make_folder()
    store, flushed = Store(folder), []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append((folder / "answers.jsonl").read_bytes().count(b"\n")))
    for number in (1, 2):
        store.record("anna", answer(store, "anna", store.next_task("anna").id, [0, 1, 2]))
        assert flushed[-1] == number
    store.close()


def test_concurrent_lines_are_not_mixed_and_share_flushes(tmp_path: Path, monkeypatch) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.open()
    flushes, fsync = [], os.fsync

    def slow(file: int) -> None:
        time.sleep(0.002)
        flushes.append(os.fstat(file).st_size)
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)

    def write(name: str) -> None:
        for number in range(20):
            log.append(f"{name} {number} " + name * 2000)
            assert flushes[-1] > 0

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {number} " + name * 2000 for name in "abcdefgh" for number in range(20))
    assert len(flushes) < 160  # eight writers wait for one flush together


def test_full_disk_refuses_the_answer_and_leaves_only_complete_lines(make_folder, answer, monkeypatch) -> None:
    folder = make_folder()
    store = Store(folder)
    first, write = store.next_task("anna").id, os.write
    store.record("anna", answer(store, "anna", first, [0, 1, 2]))
    sent = answer(store, "anna", store.next_task("anna").id, [0, 1, 2])

    def full(file: int, data: bytes) -> int:
        if len(data) > 20:
            return write(file, data[:20])  # the disk stores a part, then it is full
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "write", lambda file, data: full(file, bytes(data)) if len(data) > 20 else full(file, b""))
    with pytest.raises(StorageError, match="no space is left"):
        store.record("anna", sent)
    monkeypatch.undo()
    assert len((folder / "answers.jsonl").read_bytes().splitlines()) == 1
    store.record("anna", sent)  # the page sends it again
    store.close()
    assert [item.task for _, item in read_answers(folder / "answers.jsonl")] == [first, sent["task"]]


def test_second_server_on_a_folder_is_refused(make_folder) -> None:
    folder = make_folder()
    store = Store(folder)
    with pytest.raises(DataError, match="another `stages label` serves these tasks"):
        Store(folder)
    store.close()
    Store(folder).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [0, 1]}, "expected 3 ranks"),
        ({"ranks": [0, 1, None]}, "expected 3 ranks"),
        ({"ranks": [0, True, 2]}, "expected 3 ranks"),
        ({"order": [0, 0, 1]}, "order is"),
        ({"seconds": -1}, "seconds is"),
        ({"seconds": float("nan")}, "seconds is"),
        ({"task": "nobody"}, "there is no task"),
        ({"id": "x"}, "id is"),
        ({"skipped": "  "}, "needs a reason"),
        ({"flagged": 3}, "expected a text"),
        ({"ratings": {"quality": [1, 2, 9]}}, "numbers from 1 to 7"),
        ({"ratings": {"quality": [1, 2, None]}}, "has no rating yet"),
        ({"ratings": {"other": [1, 2, 3]}}, "unknown rating"),
        ({"checks": {"false": [0, 1, 0]}}, "true or false"),
    ],
)
def test_wrong_answer_is_refused_and_nothing_is_written(make_folder, answer, change, message) -> None:
    questions = "ratings: [{name: quality, text: Quality}]\nchecks: [{name: 'false', text: False}]\n"
    store = Store(make_folder(questions=questions.replace("text: False", "text: Untrue")))
    sent = answer(store, "anna", next(iter(store.tasks)), [0, 1, 2], ratings={"quality": [1, 2, 3]})
    with pytest.raises(AnswerError, match=message):
        store.record("anna", {**sent, **change})
    assert (store.folder / "answers.jsonl").read_bytes() == b""
    store.close()


def test_ties_are_refused_if_the_questions_forbid_them(make_folder, answer) -> None:
    store = Store(make_folder(questions="ties: false\n"))
    with pytest.raises(AnswerError, match="share a rank"):
        store.record("anna", answer(store, "anna", next(iter(store.tasks)), [0, 0, 1]))
    store.close()


# Assignment


def test_single_tasks_go_to_one_person_and_overlap_tasks_to_several(make_folder, answer) -> None:
    store = Store(make_folder(number=10, overlap=0.3, annotators=2))
    overlap = overlap_tasks(list(store.tasks), 0.3, 0)
    assert len(overlap) == 3
    people = ["anna", "ben", "carol"]
    while any([task := store.next_task(name) for name in people]):
        for name in people:
            if (task := store.next_task(name)) is not None:
                store.record(name, answer(store, name, task.id, [0, 1, 2]))
    given = [item.task for _, item in read_answers(store.folder / "answers.jsonl")]
    assert all(given.count(task) == (2 if task in overlap else 1) for task in store.tasks)
    store.close()


def test_open_task_is_leased_and_comes_back_to_the_same_person(make_folder, answer) -> None:
    store = Store(make_folder(number=3, overlap=0.0))
    mine, theirs = store.next_task("anna"), store.next_task("ben")
    assert mine.id != theirs.id
    assert store.next_task("anna").id == mine.id  # the browser was closed and opened again
    store.close()
    again = Store(store.folder)  # a new server knows the open tasks
    assert again.next_task("carol").id not in (mine.id, theirs.id)
    assert again.next_task("ben").id == theirs.id and again.next_task("anna").id == mine.id
    again.close()
    (store.folder / "open.json").write_text("{")
    third = Store(store.folder)  # the file of open tasks is lost: the page says which task it has open
    assert third.next_task("ben", wish=theirs.id).id == theirs.id
    third.close()


def test_lease_runs_out() -> None:
    now = [0.0]
    assignment = Assignment(["one"], {"one": 1}, lease_seconds=60, clock=lambda: now[0])
    assert assignment.next("anna", set()) == "one"
    assert assignment.next("ben", set()) is None
    now[0] = 61.0
    assert assignment.next("ben", set()) == "one"


def test_skipped_and_flagged_tasks_go_to_others_and_do_not_count(make_folder, answer) -> None:
    store = Store(make_folder(number=2, overlap=0.0))
    first = store.next_task("anna")
    store.record("anna", answer(store, "anna", first.id, None, skipped="too hard"))
    second = store.next_task("anna")
    assert second.id != first.id
    store.record("anna", answer(store, "anna", second.id, [0, 1, 2], flagged="a name and an address"))
    assert store.next_task("anna") is None and store.num_ranked() == 0
    assert {store.next_task("ben").id} <= {first.id, second.id}
    store.close()
    with pytest.raises(DataError, match="no rows"):
        read_rows([DataSource(path=str(store.folder))])


def test_order_differs_between_annotators_and_is_constant_for_each() -> None:
    orders = {name: [shown_order(f"task {task}", name, 4, 0) for task in range(50)] for name in ("anna", "ben")}
    assert orders["anna"] != orders["ben"]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders["anna"])
    assert orders["anna"] == [shown_order(f"task {task}", "anna", 4, 0) for task in range(50)]
    firsts = [order[0] for order in orders["anna"]]
    assert all(firsts.count(index) > 3 for index in range(4))  # 12.5 expected; 3 or fewer has a chance below one in a thousand


def test_fingerprint_follows_answers_and_not_the_secret(make_folder, answer) -> None:
    store = Store(make_folder())
    source = [DataSource(path=str(store.folder))]
    before = fingerprint(source)
    (store.folder / "access.json").write_text("{}")
    assert fingerprint(source) == before
    store.record("anna", answer(store, "anna", store.next_task("anna").id, [0, 1, 2]))
    assert fingerprint(source) != before
    store.close()


# Screening

GOLD = [
    {"prompt": "gold one", "completions": ["good", "fair", "bad"], "ranks": [0, 1, 2]},
    {"prompt": "gold two", "completions": ["bad", "good"], "ranks": [1, 0]},
]


@pytest.mark.parametrize(
    ("rankings", "agreement", "passed"),
    [
        # four gold pairs: three of the first task, one of the second
        ({"gold one": [0, 1, 2], "gold two": [1, 0]}, 1.0, True),
        ({"gold one": [0, 2, 1], "gold two": [1, 0]}, 0.75, True),  # fair and bad swapped
        ({"gold one": [0, 1, 1], "gold two": [0, 1]}, 0.5, False),  # a tie counts as disagreement, and the second task is wrong
    ],
)
def test_gold_tasks_come_first_and_decide_the_screening(make_folder, answer, rankings, agreement, passed) -> None:
    store = Store(make_folder(gold=GOLD))
    for _ in range(2):
        task = store.next_task("anna")
        assert task.id.startswith("gold-")
        store.record("anna", answer(store, "anna", task.id, rankings[task.prompt]))
    screening = store.screening("anna")
    assert screening.ranking_agreement == pytest.approx(agreement) and screening.passed is passed
    assert (store.next_task("anna") is not None) is passed
    assert store.num_ranked() == 0 and store.history("anna") == []
    with pytest.raises(AnswerError, match="answered only once"):
        store.record("anna", answer(store, "anna", task.id, [0, 1, 2][: len(task.completions)]))
    store.close()


def test_check_boxes_of_gold_tasks_are_screened_separately_from_ranks(make_folder, answer) -> None:
    gold = [{**GOLD[1], "checks": {"untrue": [True, False]}}]
    store = Store(make_folder(gold=gold, questions="checks: [{name: untrue, text: Untrue}]\n"))
    store.record("anna", answer(store, "anna", store.next_task("anna").id, [1, 0], checks={"untrue": [False, False]}))
    screening = store.screening("anna")
    assert screening.ranking_agreement == 1.0 and screening.check_agreement == 0.5 and screening.passed is False
    store.close()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 0]}, "all completions of this gold task tie"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], "checks": {"no": [True, True]}}, "which the questions do not have"),
        ({"prompt": "p", "completions": ["a"] * 10, "ranks": list(range(10))}, "a task must have 2 to 9"),
    ],
)
def test_wrong_gold_row_is_named(make_folder, row, message) -> None:
    with pytest.raises(DataError, match=message) as error:
        make_folder(gold=[row])
    assert "gold.jsonl:1" in str(error.value)


def test_bad_questions_name_file_and_field(make_folder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions.yaml: ratings.0.highest: .*got 'many'"):
        make_folder(questions="ratings: [{name: q, text: Q, highest: many}]\n")
    with pytest.raises(DataError, match="two questions have the name 'q'"):
        make_folder(name="other", questions="ratings: [{name: q, text: Q}]\nchecks: [{name: q, text: Q}]\n")
    with pytest.raises(DataError, match="target is 9, but there are only 4 tasks"):
        make_folder(name="third", target=9)


@pytest.mark.detail("E2")
def test_questions_of_instructgpt_are_those_of_table_3() -> None:
    questions = load_questions(DataSource(path=str(shipped_folder("data") / "labelling" / "instructgpt.yaml")))
    (rating,) = questions.ratings
    assert (rating.lowest, rating.highest, rating.required) == (1, 7, True)
    assert len(questions.checks) == 11 and questions.ties
    assert load_questions(DataSource(path=str(shipped_folder("data") / "labelling" / "ranks.yaml"))) == load_questions(None)


def test_annotators_of_a_folder_can_be_held_out(make_folder, answer) -> None:
    store = Store(make_folder(number=6, overlap=0.0))
    for name in ("anna", "ben", "carol"):
        for _ in range(2):
            store.record(name, answer(store, name, store.next_task(name).id, [0, 1, 2]))
    store.close()
    data = DataInput(train=[DataSource(path=str(store.folder))], split_by="annotator", folds=3)
    loaded = load_comparisons(data)
    assert {item.annotator for item in loaded.validation} & {item.annotator for item in loaded.train} == set()
    assert len(loaded.validation) == 2 and len(loaded.train) == 4
