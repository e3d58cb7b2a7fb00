"""Language models as rewards: grades by a rubric over HTTP, and the log-odds of two answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.errors import ModelError, RecipeError, TrainingError
from stages.judges.config import EndpointJudge
from stages.process.remote import AnswerCache
from stages.rewards.config import RewardInput, check_rubrics, rubric_inputs
from stages.rewards.prompted import GenerativeSource, RubricSource, read_grade
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
def test_grades(reply: str, grade: float | None) -> None:
    assert read_grade(reply, (1.0, 10.0)) == grade


def chat(text: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 50, "completion_tokens": 2}}


def grader(server: Server, folder: Path, *, cache: AnswerCache | None = None, **fields: Any) -> RubricSource:
    (folder / "rubric.md").write_text("Be kind. {braces} stay.")
    judge = {"endpoint": server.url.rpartition("/")[0], "model": "judge-1", "rubric": str(folder / "rubric.md"), "scale": [1, 10], **fields}
    given = RewardInput.model_validate({"judge": judge, "name": "kind"})
    return RubricSource(given, key="k-secret-9", cache=cache, sleep=lambda seconds: None)


def test_a_rubric_grades(server, tmp_path) -> None:
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


def test_replies_without_a_grade(server, tmp_path) -> None:
    cache = AnswerCache(tmp_path / "rewards.sqlite3")
    server.reply = lambda body, number: (200, chat("I will not." if "bad" in body["messages"][1]["content"] else "5"))
    with pytest.raises(TrainingError, match=r"gave no grade for 1 of 3 completions \(max_refused_share=0.1\), the first 'bad'"):
        grader(server, tmp_path, cache=cache).score(["p"] * 3, ["a", "bad", "c"])
    assert len(server.bodies) == 4  # the one without a grade twice
    found = grader(server, tmp_path, cache=cache, max_refused_share=0.5).score(["p"] * 3, ["a", "bad", "c"])
    assert found.tolist()[::2] == [5.0, 5.0] and math.isnan(found[1])
    assert len(server.bodies) == 6  # grades are kept, and a reply without one is not
    server.reply = lambda body, number: (500, {})
    with pytest.raises(TrainingError, match="gave no grade: status 500. Grades that came are kept"):
        grader(server, tmp_path, retries=1).score(["p"], ["new"])
    server.reply = lambda body, number: (404, {"error": "k-secret-9"})
    with pytest.raises(TrainingError, match="status 404.*check endpoint, model='judge-1'") as caught:
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
        ({"judge": {"endpoint": "http://u:p@h", "model": "m", "rubric": "r.md"}}, "holds a password"),
        ({"model": "m", "answers": ["Yes", "Yes"]}, "expected two texts that differ"),
        ({"model": "m", "answers": ["Yes", "No"], "question": "Good?"}, "question must hold {completion}"),
        ({"model": "m", "answers": ["Yes", "No"], "label": 1}, "answers belongs to model"),
        ({"model": "m", "question": "{completion}"}, "question belongs to answers"),
    ],
)
def test_contradictions_are_refused(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardInput.model_validate(fields)


def test_a_judge_that_compares_is_told_from_one_that_scores() -> None:
    from stages.evaluation.config import EvaluationConfig

    judges = [{"endpoint": "http://h/v1", "model": "m"}, {"endpoint": "http://h/r", "protocol": "openrlhf", "name": "far"}]
    made = EvaluationConfig.model_validate({"name": "e", "candidates": {"a": "a"}, "data": "d.jsonl", "judges": judges}).judges
    assert isinstance(made[0], EndpointJudge) and isinstance(made[1], RewardInput)


QUESTION = "{prompt} | {completion} | good?"


def generative(folder: Path, resolve: Any, **fields: Any) -> GenerativeSource:
    given = {"model": str(folder), "answers": [" yes", " no"], "question": QUESTION, **fields}
    return GenerativeSource(RewardInput.model_validate(given), resolve(folder), device=torch.device("cpu"), dtype=torch.float32)


def test_log_odds_equal_those_of_a_plain_forward_pass(tiny_llama_folder, tiny_tokenizer, resolve_folder) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, attn_implementation="eager").eval()
    prompts, completions = ["the film", TURNS, "p"], ["a joy", "dull and weak and dull", "x"]
    shown = ["the film | a joy | good?", "system: be kind\n\nuser: hello | dull and weak and dull | good?", "p | x | good?"]

    def logprob(text: str, answer: str) -> float:
        ids = tiny_tokenizer(text)["input_ids"]
        answer_ids = tiny_tokenizer(answer)["input_ids"]
        with torch.no_grad():
            steps = model(torch.tensor([ids + answer_ids])).logits[0].log_softmax(dim=-1)
        return sum(float(steps[len(ids) - 1 + place, token]) for place, token in enumerate(answer_ids))

    expected = [logprob(text, " yes") - logprob(text, " no") for text in shown]
    judged = generative(tiny_llama_folder, resolve_folder).judge(prompts, completions)
    torch.testing.assert_close(judged.scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert not judged.cut.any()
    with pytest.raises(ModelError, match="writes the answers .* with the same tokens"):
        source = generative(tiny_llama_folder, resolve_folder)
        source._answer_ids = lambda answer: [1]  # type: ignore[method-assign]
        source.check_answers("x")


def test_a_question_that_is_too_long_keeps_its_completion(tiny_llama_folder, resolve_folder) -> None:
    source = generative(tiny_llama_folder, resolve_folder)  # 128 positions
    judged = source.judge(["the film " * 100, "the film " * 100, "p"], ["a joy", "dull", "weak " * 200])
    assert judged.cut.tolist() == [True, True, True] and judged.completion_cut.tolist() == [False, False, True]
    assert len(set(judged.scores.tolist())) == 3
    rows, _, _ = source._encode("the film " * 100, "a joy")
    assert all(120 < len(ids) <= 128 for ids, _ in rows)
    assert source.tokenizer.decode(rows[0][0]).endswith("the film  | a joy | good? yes")


def test_accuracy_beside_the_scalar_head(tiny_llama_folder, resolve_folder, step_context, tmp_path, monkeypatch) -> None:
    from stages.reward_model.config import RewardModelConfig
    from stages.reward_model.run import run

    (tmp_path / "lengths_beside.py").write_text("def longer(p, c): return [len(text) for text in c]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prompt": f"film {n}", "chosen": "a joy to see", "rejected": "dull"} for n in range(6)]
    rows += [{"prompt": "film", "chosen": "dull", "rejected": "a joy to see"}] * 2
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = resolve_folder(tiny_llama_folder)
    config = RewardModelConfig.model_validate(
        {
            "name": "rm",
            "model": "sft",
            "precision": "fp32",
            "data": {"train": str(path), "validation": str(path)},
            "training": {"batch_size": 4, "microbatch_size": 4, "max_steps": 1},
            "beside": [
                {"function": "lengths_beside:longer"},
                {"model": "sft", "answers": [" yes", " no"], "question": QUESTION, "name": "asked"},
            ],
        }
    )
    assert list(config.model_inputs()) == ["model", "beside[1].model"]
    metrics = run(config, step_context(models={"model": folder, "beside[1].model": folder})).metrics
    assert metrics["heldout_beside"]["longer"]["accuracy"] == 0.75 and metrics["heldout_beside"]["longer"]["pairs"] == 8
    source = generative(tiny_llama_folder, resolve_folder)
    texts = [[source.score([row["prompt"]], [row[side]]).item() for side in ("chosen", "rejected")] for row in rows]
    assert metrics["heldout_beside"]["asked"]["accuracy"] == sum(chosen > rejected for chosen, rejected in texts) / 8
