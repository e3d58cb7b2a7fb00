"""Tasks: scores of choices against a plain computation, accuracy by hand, and tasks in an evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.corpora.choices import Question
from stages.evaluation.config import TaskInput
from stages.evaluation.tasks import encode_choice, measure_task, score_choices, task_result, task_table
from stages.process.runtime import Runtime

QUESTIONS = [
    Question("the acting was", ["warm", "dull and weak", "a"], 0),
    Question("", ["the film", "a story with a bright ending"], 1),
    Question("the plot was dull and", ["the ending was weak", "the music"], 0),
]


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


def test_scores_are_sums_of_log_probabilities(model, tiny_tokenizer) -> None:
    scores = score_choices(model, tiny_tokenizer, QUESTIONS, "none", batch_size=4)
    for question, row in zip(QUESTIONS, scores, strict=True):
        for choice, score in zip(question.choices, row, strict=True):
            context = tiny_tokenizer(question.context)["input_ids"] or [tiny_tokenizer.eos_token_id]
            ids = context + tiny_tokenizer((" " if question.context else "") + choice)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logprobs[position - 1, ids[position]]) for position in range(len(context), len(ids)))
            assert score == pytest.approx(expected, abs=1e-4)


def test_scores_are_divided_by_tokens_or_bytes(model, tiny_tokenizer) -> None:
    ways = ("none", "tokens", "bytes")
    plain, by_token, by_byte = (score_choices(model, tiny_tokenizer, QUESTIONS[:1], way, batch_size=8)[0] for way in ways)
    tokens = [len(tiny_tokenizer(" " + choice)["input_ids"]) for choice in QUESTIONS[0].choices]
    assert by_token == pytest.approx([score / number for score, number in zip(plain, tokens, strict=True)])
    assert by_byte == pytest.approx([plain[0] / 4, plain[1] / 13, plain[2] / 1])


def test_scores_do_not_depend_on_the_batch_size(model, tiny_tokenizer) -> None:
    together, alone = (score_choices(model, tiny_tokenizer, QUESTIONS, "none", batch_size=size) for size in (64, 1))
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_leading_space_belongs_to_the_choice_and_long_contexts_are_cut_at_the_beginning(tiny_tokenizer) -> None:
    def text(ids: list[int]) -> str:
        return tiny_tokenizer.decode(ids)

    context, choice = encode_choice(tiny_tokenizer, "the film ", "was warm")
    assert (text(context), text(choice)) == ("the film", " was warm")
    context, choice = encode_choice(tiny_tokenizer, "the film\n", "was warm")
    assert (text(context), text(choice)) == ("the film\n", "was warm")
    context, choice = encode_choice(tiny_tokenizer, "the acting was", "warm", longest=len(choice) + 2)
    assert len(context) + len(choice) <= len(encode_choice(tiny_tokenizer, "", "was warm")[1]) + 2 and text(context).endswith(" was")


def test_accuracy_by_hand() -> None:
    # right; wrong; a tie of two among three, half a point
    result = task_result([[-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0, -5.0]], [0, 0, 1])
    assert result.accuracy == pytest.approx(0.5) and result.n == 3
    assert result.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    odds = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2)), 1 / (2 + math.exp(-3))]
    assert result.probability == pytest.approx(sum(odds) / 3)
    # Wilson: n = 3, share 1/2, z = 1.95996: 1/2 -+ 1.95996 / (1 + 1.2805) * sqrt(1/12 + 3.8415 / 36)
    assert (result.ci_low, result.ci_high) == pytest.approx((0.12535, 0.87465), abs=1e-4)


def test_model_trained_on_the_answers_scores_one(model, tiny_tokenizer) -> None:
    import copy

    pupil = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(pupil.parameters(), lr=3e-3)
    texts = [tiny_tokenizer(text, return_tensors="pt")["input_ids"] for text in ("the music was a joy", "the story was a fine film")]
    for _ in range(30):
        optimizer.zero_grad()
        sum(pupil(ids, labels=ids).loss for ids in texts).backward()
        optimizer.step()
    questions = [Question("the music was", ["a fine film", "a joy"], 1), Question("the story was", ["a fine film", "a joy"], 0)]
    task, runtime = TaskInput(data="unused", normalize="tokens"), Runtime(quiet=True)
    result = measure_task(pupil.eval(), tiny_tokenizer, questions, task, batch_size=4, runtime=runtime)
    assert result.accuracy == 1 and result.probability > 0.55


def test_an_evaluation_measures_the_accuracy_of_its_tasks(tmp_path, monkeypatch, step_context, resolve_folder, tiny_llama_folder) -> None:
    from stages.evaluation.config import EvaluationConfig
    from stages.evaluation.run import run

    (tmp_path / "judges_for_tasks.py").write_text("def lengths(p, c): return [float(len(t)) for t in c]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n')
    rows = [{"context": question.context, "choices": question.choices, "answer": question.answer} for question in QUESTIONS]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"prompt": "the music", "completion": "was a joy"}) + "\n")
    config = EvaluationConfig.model_validate(
        {
            "name": "verdict",
            "data": str(tmp_path / "prompts.jsonl"),
            "precision": "fp32",
            "generation": {"max_new_tokens": 4},
            "candidates": {"base": "b", "prompted": {"model": "b", "few_shot": {"data": str(shots), "num_examples": 1}}},
            "judges": [{"function": "judges_for_tasks:lengths"}],
            "tasks": {"plain": str(tmp_path / "task.jsonl"), "scaled": {"data": str(tmp_path / "task.jsonl"), "normalize": "bytes"}},
        }
    )
    assert set(config.data_inputs()) >= {"tasks.plain.data", "tasks.scaled.data"}
    config.check_data()
    folder = resolve_folder(tiny_llama_folder)
    result = run(config, step_context(models={"candidates.base": folder, "candidates.prompted": folder}))
    base, prompted = (result.evaluation["candidates"][name]["tasks"] for name in ("base", "prompted"))
    assert base == prompted and set(base) == {"plain", "scaled"}
    assert base["plain"]["n"] == 3 and 0 <= base["plain"]["ci_low"] <= base["plain"]["accuracy"] <= base["plain"]["ci_high"] <= 1
    table = task_table(result.evaluation["candidates"])
    assert table is not None and [column.header for column in table.columns] == ["candidate", "plain (chance 0.44)", "scaled (chance 0.44)"]
    assert task_table({"base": {"scores": {}}}) is None


def test_task_can_be_written_as_block_or_as_data() -> None:
    from stages.evaluation.config import EvaluationConfig

    base = {"name": "v", "candidates": {"a": "b"}, "data": "p", "judges": [{"function": "m:f"}]}
    tasks = {"one": "x.jsonl", "two": [{"path": "x.jsonl", "limit": 3}], "three": {"path": "y"}}
    config = EvaluationConfig.model_validate({**base, "tasks": tasks})
    assert [config.tasks[name].data[0].path for name in ("one", "two", "three")] == ["x.jsonl", "x.jsonl", "y"]
    with pytest.raises(ValidationError, match="normalise"):
        EvaluationConfig.model_validate({**base, "tasks": {"one": {"data": "x.jsonl", "normalise": "bytes"}}})
