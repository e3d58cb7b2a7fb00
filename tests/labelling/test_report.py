"""Each number of the report against a value computed by hand."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from stages.corpora.labels import LabelAnswer
from stages.labelling.publishing import publish_scores
from stages.labelling.report import agreement, position_bias, quality
from stages.labelling.store import Store, read_labels


def given(task: str, annotator: str, ranks: list[int], order: list[int] | None = None, **fields) -> LabelAnswer:
    order = order or list(range(len(ranks)))
    return LabelAnswer(f"{task}-{annotator}", task, annotator, "2026-11-26T12:00:00+00:00", 30.0, order, [], ranks, **fields)


def test_pairwise_agreement_by_hand() -> None:
    # one: pairs 01 02 12; anna says first, first, first; ben second, first, first: two of three
    # two: anna 0 < 1; ben ties: not decided, and with ties they disagree
    answers = [given("one", "anna", [0, 1, 2]), given("one", "ben", [1, 0, 2]), given("two", "anna", [0, 1]), given("two", "ben", [0, 0])]
    report = agreement([*answers, given("three", "anna", [0, 1])])
    assert report["overlap_tasks"] == 2
    assert report["pairwise"]["share"] == pytest.approx(2 / 3) and report["pairwise"]["pairs"] == 3
    assert report["with_ties"]["share"] == pytest.approx(2 / 4)
    assert report["pairwise"]["ci_low"] < 2 / 3 < report["pairwise"]["ci_high"]


def test_alpha_on_ranks_by_hand() -> None:
    # Two tasks of two completions; mid-ranks anna (0, 1), (0, 1); ben (0, 1), (1, 0). Units: (0,0) (1,1) (0,1) (1,0): ratings 0: 4, 1: 4.
    # With two values every metric is the nominal one: observed disagreement 2 units x 2 ordered pairs / 1 = 4; expected 2*4*4 / 7 = 32/7.
    answers = [given("one", "anna", [0, 1]), given("one", "ben", [0, 1]), given("two", "anna", [0, 1]), given("two", "ben", [1, 0])]
    assert agreement(answers)["alpha"] == pytest.approx(1 - 4 / (32 / 7))
    # Tied completions have the mean of their ranks: anna 0, 1.5, 1.5; ben 0, 1, 2. Counts 0: 2, 1: 1, 1.5: 2, 2: 1; middles 1, 2.5, 4, 5.5.
    # Observed: 2 * 2.25 in the second unit and in the third. Expected, over ordered pairs:
    # 2 * (2*1*2.25 + 2*2*9 + 2*1*20.25 + 1*2*2.25 + 1*1*9 + 2*1*2.25) / 5 = 39.6
    tied = [given("one", "anna", [0, 1, 1]), given("one", "ben", [0, 1, 2])]
    assert agreement(tied)["alpha"] == pytest.approx(1 - 9 / 39.6)
    perfect = [given("one", name, [0, 1, 1]) for name in ("anna", "ben")]  # mid-ranks 0, 1.5, 1.5
    assert agreement(perfect)["alpha"] == 1


def test_position_bias_by_hand() -> None:
    # anna saw 2, 0, 1 and ranked 2 best: the first shown wins its two pairs; of the other two the earlier (0) loses
    # ben saw 0, 1 and ties them: no decided pair, and both positions share the win
    report = position_bias([given("one", "anna", [2, 1, 0], [2, 0, 1]), given("two", "ben", [0, 0])])
    assert report["earlier_wins"]["share"] == pytest.approx(2 / 3) and report["earlier_wins"]["pairs"] == 3
    first = report["best"][0]
    assert first["best"] == pytest.approx((1 + 0.5) / 2) and first["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert report["best"][2] == {"position": 3, "best": 0.0, "chance": pytest.approx(1 / 3), "n": 1}


QUESTIONS = "ratings: [{name: quality, text: Quality}]\nchecks: [{name: untrue, text: Untrue}]\n"


def test_kappa_per_check_box_by_hand(make_folder, answer) -> None:
    # Eight completions, ticked by both 2, by anna alone 1, by ben alone 1, by nobody 4: observed 6/8;
    # anna ticks 3, ben 3: expected (3*3 + 5*5) / 64 = 34/64; kappa (48 - 34) / (64 - 34) = 14/30
    ticks = {"anna": [[1, 1, 1, 0], [0, 0, 0, 0]], "ben": [[1, 1, 0, 1], [0, 0, 0, 0]]}
    folder = make_folder(number=2, k=4, overlap=1.0, questions=QUESTIONS)
    store = Store(folder)
    for name, rows in ticks.items():
        for task, row in zip(store.tasks, rows, strict=True):
            checks = {"untrue": [bool(value) for value in row]}
            store.record(name, answer(store, name, task, [0, 1, 2, 3], checks=checks, ratings={"quality": [7, 5, 3, 1]}))
    store.close()
    report = quality(read_labels(folder))
    assert report["checks"]["untrue"]["kappa"] == pytest.approx(14 / 30)
    assert report["checks"]["untrue"]["share"] == pytest.approx(6 / 16) and report["checks"]["untrue"]["compared"] == 8
    assert report["checks"]["untrue"]["agreement"] == pytest.approx(6 / 8)
    assert report["ratings"]["quality"]["mean"] == 4 and report["ratings"]["quality"]["alpha"] == 1


def test_report_of_a_folder(make_folder, answer) -> None:
    folder = make_folder(number=3, k=3, overlap=1.0, annotators=3, target=2)
    store = Store(folder)
    one, two, three = store.tasks
    for name, ranks in (("anna", [0, 1, 2]), ("ben", [0, 1, 2]), ("carol", [2, 1, 0])):
        store.record(name, answer(store, name, one, ranks, seconds=10.0 if name == "anna" else 20.0))
    store.record("anna", answer(store, "anna", two, None, skipped="too hard"))
    store.record("ben", answer(store, "ben", two, [0, 1, 2], flagged="an address"))
    store.record("anna", answer(store, "anna", three, [0, 0, 1], seconds=40.0))
    store.close()
    publish_scores(folder, "preference-1", "sha256:x", {one: [3.0, 2.0, 1.0], three: [0.0, 1.0, 0.5]})
    report = quality(read_labels(folder), now=datetime.now(UTC))
    assert (report["answers"], report["ranked_tasks"], report["target"]) == (6, 2, 2)
    assert report["skipped"] == {"count": 1, "reasons": {"too hard": 1}} and report["flagged"]["reasons"] == {"an address": 1}
    assert report["rate"]["last_hour"] == 6
    # 10 + 20 + 20 + 2 (skipped) + 2 (flagged) + 40 seconds of work
    assert report["rate"]["per_hour_of_work"] == pytest.approx(6 / (94 / 3600))
    assert report["seconds"]["median"] == 20
    assert report["agreement"]["pairwise"]["share"] == pytest.approx(3 / 9)  # anna with ben 3 of 3, each with carol 0 of 3
    rows = {row["name"]: row for row in report["annotators"]}
    assert rows["carol"]["against_the_rest"]["share"] == 0 and rows["anna"]["against_the_rest"]["share"] == pytest.approx(3 / 6)
    assert rows["anna"]["ties"] == pytest.approx(1 / 6)
    # task one: anna 3 of 3, ben 3 of 3, carol 0 of 3; task three: anna decides 02 and 12, the model says 2 over 0 (wrong), 1 over 2 (right)
    assert report["reward_model"]["share"] == pytest.approx((3 + 3 + 0 + 1) / 11)
    json.dumps(report, allow_nan=False)


def test_empty_report_has_no_nan(make_folder) -> None:
    report = quality(read_labels(make_folder(questions=QUESTIONS)))
    assert report["agreement"]["pairwise"]["share"] is None and report["seconds"]["median"] is None
    json.dumps(report, allow_nan=False)
    from rich.console import Console

    from stages.labelling.tables import report_tables

    Console(quiet=True).print(report_tables(report))
