"""A language model behind an endpoint grades by a rubric."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.errors import RecipeError, TrainingError
from stages.judges.config import EndpointJudge
from stages.process.remote import AnswerCache
from stages.rewards.config import RewardInput, check_rubrics, rubric_inputs
from stages.rewards.rubric import RubricSource, read_grade
from stages.rewards.source import CombinedReward
from tests.rewards.conftest import TURNS, Server


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("7", 7.0),
        (" 7.5\n", 7.5),
        ("7/10", 7.0),
        ("Score: 8", 8.0),
        ("8 out of 10", 8.0),
        ('{"score": 3}', 3.0),
        ('```json\n{"score": 3}\n```', 3.0),
        ('{"reason": "too short", "score": 2}', 2.0),
        ("The response is kind.\n\n9", 9.0),
        ("<think>9 or 10?</think>\n4", 4.0),
        ("**6**", 6.0),
        ("", None),
        ("no", None),
        ("11", None),
        ("0", None),
        ("between 3 and 5", None),
        ('{"a": 1, "b": 2}', None),
        ("true", None),
        ("NaN", None),
        ("[5, 6]", None),
        ("7,5", 7.5),
    ],
)
def test_a_grade_is_read_from_a_reply(reply: str, grade: float | None) -> None:
    assert read_grade(reply, (1.0, 10.0)) == grade


def chat(text: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 50, "completion_tokens": 2}}


def grader(server: Server, folder: Path, *, cache: AnswerCache | None = None, **fields: Any) -> RubricSource:
    (folder / "rubric.md").write_text("Be kind. {braces} stay.")
    judge = {"endpoint": server.url.rpartition("/")[0], "model": "judge-1", "rubric": str(folder / "rubric.md"), "scale": [1, 10], **fields}
    given = RewardInput.model_validate({"judge": judge, "name": "kind"})
    return RubricSource(given, key="k-secret-9", cache=cache, sleep=lambda seconds: None)


def test_rubric_source_returns_grades(server, tmp_path) -> None:
    server.reply = lambda body, number: (200, chat(str(len(body["messages"][1]["content"].partition("<response>\n")[2].split("\n")[0]))))
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 100.0}
    scores = CombinedReward([(grader(server, tmp_path, concurrency=1, **prices), 0.5)]).score([TURNS, "p"], ["ab", "abc"])
    assert scores.total.tolist() == [1.0, 1.5]
    assert scores.parts["scoring/kind_input_tokens"].tolist() == [50.0, 50.0]
    assert scores.parts["scoring/kind_cost"].tolist() == pytest.approx([250e-6, 250e-6])
    body = server.bodies[0]
    assert body["model"] == "judge-1" and body["temperature"] == 0
    assert "from 1 to 10" in body["messages"][0]["content"] and "Be kind. {braces} stay." in body["messages"][0]["content"]
    assert "system: be kind\n\nuser: hello" in body["messages"][1]["content"]
    assert server.headers[0]["authorization"] == "Bearer k-secret-9"


def test_replies_without_a_grade_are_requested_again_and_limited(server, tmp_path) -> None:
    cache = AnswerCache(tmp_path / "rewards.sqlite3")
    server.reply = lambda body, number: (200, chat("I will not." if "bad" in body["messages"][1]["content"] else "5"))
    with pytest.raises(TrainingError, match=r"gave no grade for 1 of 3 completions \(max_refused_share=0.1\), the first 'bad'"):
        grader(server, tmp_path, cache=cache).score(["p"] * 3, ["a", "bad", "c"])
    assert len(server.bodies) == 4  # the reply without a grade is requested twice
    grades = grader(server, tmp_path, cache=cache, max_refused_share=0.5).score(["p"] * 3, ["a", "bad", "c"])
    assert grades.tolist()[::2] == [5.0, 5.0] and math.isnan(grades[1])
    assert len(server.bodies) == 6  # grades are cached, but a reply without a grade is not
    server.reply = lambda body, number: (500, {})
    with pytest.raises(TrainingError, match="gave no grade: status 500. The grades received so far are stored"):
        grader(server, tmp_path, retries=1).score(["p"], ["new"])
    server.reply = lambda body, number: (404, {"error": "k-secret-9"})
    with pytest.raises(TrainingError, match="status 404.*Check endpoint, model='judge-1'") as caught:
        grader(server, tmp_path).score(["p"], ["new"])
    assert "k-secret-9" not in str(caught.value)


def test_a_rubric_is_an_input_of_the_step(tmp_path) -> None:
    judge = {"endpoint": "http://h/v1", "model": "m", "rubric": str(tmp_path / "none.md")}
    source = RewardInput.model_validate({"judge": judge})
    assert source.shown_name == "m" and list(rubric_inputs([source], "reward")) == ["reward[0].judge.rubric"]
    with pytest.raises(RecipeError, match="rubric .*none.md: cannot be read"):
        check_rubrics([source])
    (tmp_path / "none.md").write_text(" \n")
    with pytest.raises(RecipeError, match="the file is empty"):
        check_rubrics([source])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"judge": {"endpoint": "http://h", "model": "m", "rubric": "r.md", "scale": [5, 5]}}, r"scale is \[5, 5\]"),
        ({"judge": {"endpoint": "http://u:p@h", "model": "m", "rubric": "r.md"}}, "contains a password"),
        ({"model": "m", "answers": ["Yes", "Yes"]}, "expected two texts that differ"),
        ({"model": "m", "answers": ["Yes", "No"], "question": "Good?"}, "question must contain {completion}"),
        ({"model": "m", "answers": ["Yes", "No"], "label": 1}, "answers needs model"),
        ({"model": "m", "question": "{completion}"}, "question needs answers, for example answers"),
    ],
)
def test_contradictions_are_refused(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardInput.model_validate(fields)


def test_pairwise_judge_is_distinguished_from_a_rubric_judge() -> None:
    from stages.evaluation.config import EvaluationConfig

    judges = [{"endpoint": "http://h/v1", "model": "m"}, {"endpoint": "http://h/r", "protocol": "openrlhf", "name": "far"}]
    made = EvaluationConfig.model_validate({"name": "e", "candidates": {"a": "a"}, "data": "d.jsonl", "judges": judges}).judges
    assert isinstance(made[0], EndpointJudge) and isinstance(made[1], RewardInput)
