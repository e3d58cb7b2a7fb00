"""Generative reward models in the registry: made from a language model, with or without training, and used in every role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.errors import ModelError
from stages.models.adapters.exporting import export_merged
from stages.registry.references import ResolvedModel
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.run import run
from stages.rewards.config import RewardInput
from stages.rewards.learned import load_source
from stages.rewards.source import RewardSource

QUESTION = "{prompt} | {completion} | good?"
CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
PROMPTS, COMPLETIONS = ["the film", "plot"], ["a joy", "dull and weak"]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"prompt": f"film {n}", "chosen": "a joy to see", "rejected": "dull"} for n in range(6)]
    rows += [{"prompt": "film", "chosen": "dull", "rejected": "a joy to see"}] * 2
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def step(pairs: str, **fields: Any) -> RewardModelConfig:
    given = {"name": "asked", "model": "sft", "precision": "fp32", "data": {"train": pairs, "validation": pairs}}
    generative = {"answers": ["y", "n"], "question": QUESTION, **fields.pop("generative", {})}
    return RewardModelConfig.model_validate({**given, "generative": generative, **fields})


def source_of(model: ResolvedModel, **fields: Any) -> RewardSource:
    return load_source(RewardInput.model_validate({"model": model.ref, **fields}), model, **CPU)


def test_untrained_language_model_scores_by_log_odds(pairs, tiny_llama_folder, resolve_folder, step_context, tmp_path, monkeypatch) -> None:
    (tmp_path / "lengths_beside.py").write_text("def longer(p, c): return [len(text) for text in c]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = resolve_folder(tiny_llama_folder)
    context = step_context("test/asked", models={"model": folder})
    config = step(pairs, beside=[{"function": "lengths_beside:longer"}])
    made = run(config, context)
    plain = source_of(folder, answers=["y", "n"], question=QUESTION)
    expected = plain.score(PROMPTS, COMPLETIONS)
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    right = [plain.score([row["prompt"]] * 2, [row["chosen"], row["rejected"]]).diff().item() < 0 for row in rows]
    assert made.metrics["heldout_accuracy"] == sum(right) / 8 and made.metrics["heldout_pairs"] == 8
    assert made.metrics["heldout_beside"]["longer"]["accuracy"] == 0.75
    # the version contains model, question and answers, so a reward does not have to name them
    assert made.model.role == "generative_reward_model"
    asked = json.loads((made.model.path / "reward_question.json").read_text())
    assert asked["answers"] == ["y", "n"] and asked["question"] == QUESTION
    torch.testing.assert_close(source_of(ResolvedModel.of_record(made.model)).score(PROMPTS, COMPLETIONS), expected, rtol=0, atol=0)
    # another question is another model
    other = run(step(pairs, generative={"question": "{completion} ok?"}), step_context("test/other", models={"model": folder}))
    assert other.model.digest != made.model.digest
    # an exported folder works in the same way
    context.registry.export(made.model.ref, tmp_path / "out", merge=export_merged)
    torch.testing.assert_close(source_of(resolve_folder(tmp_path / "out")).score(PROMPTS, COMPLETIONS), expected, rtol=0, atol=0)
    for fields, message in (
        ({"label": 1}, "Remove label"),
        ({"level": "token"}, "Remove level: token"),
        ({"answers": ["a", "b"]}, "already has a question and the answers 'y' and 'n'. Remove answers and question"),
    ):
        with pytest.raises(ModelError, match=message):
            source_of(ResolvedModel.of_record(made.model), **fields)


def test_the_server_answers_with_its_digest(pairs, tiny_llama_folder, resolve_folder, step_context) -> None:
    from starlette.testclient import TestClient

    from stages.serving import Scorer, make_app

    record = run(step(pairs), step_context("test/asked", models={"model": resolve_folder(tiny_llama_folder)})).model
    source = source_of(ResolvedModel.of_record(record))
    client = TestClient(make_app(Scorer(source, ResolvedModel.of_record(record))))  # type: ignore[arg-type]
    answer = client.post("/get_reward", json={"prompts": PROMPTS, "completions": COMPLETIONS}).json()
    assert answer["rewards"] == pytest.approx(source.score(PROMPTS, COMPLETIONS).tolist()) and answer["digest"] == record.digest
    assert client.post("/score", json={"text_1": PROMPTS, "text_2": COMPLETIONS}).json()["data"][1]["score"] == answer["rewards"][1]
    refused = client.post("/pooling", json={"input": ["a text"]})
    assert refused.status_code == 400 and "do not show where the completion begins" in refused.json()["error"]


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_training_moves_the_log_odds_towards_the_preferences(
    pairs, lora, tiny_llama_folder, resolve_folder, step_context, tmp_path
) -> None:
    training = {"batch_size": 8, "microbatch_size": 4, "max_steps": 8, "learning_rate": 1e-2}
    context = step_context("test/asked", models={"model": resolve_folder(tiny_llama_folder)})
    made = run(step(pairs, generative={"train": True}, training=training, lora=lora), context)
    assert made.metrics["heldout_accuracy"] == 0.75 and made.metrics["heldout_loss"] < 0.62  # of log 2 = 0.69; 6 of 8 pairs can be right
    assert made.metrics["comparisons"] == 8 and made.model.is_adapter == (lora is not None)
    context.registry.export(made.model.ref, tmp_path / "out", merge=export_merged)
    reread = source_of(resolve_folder(tmp_path / "out")).score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(source_of(ResolvedModel.of_record(made.model)).score(PROMPTS, COMPLETIONS), reread, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generative": {"answers": ["a", "a"]}}, "expected two texts that differ"),
        ({"generative": {"question": "Good?"}}, "question must contain {completion}"),
        ({"training": {"max_steps": 3}}, "training is for training; set generative.train: true"),
        ({"lora": {"r": 4}}, "lora is for training"),
        ({"num_seeds": 2, "generative": {"train": True}}, "num_seeds is for a scalar head"),
        ({"normalization": {"to": "standardize"}}, "normalization is for a scalar head"),
    ],
)
def test_contradictions_are_refused(pairs, fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        step(pairs, **fields)


def test_training_needs_answers_of_one_token(pairs, tiny_llama_folder, resolve_folder, step_context) -> None:
    config = step(pairs, generative={"train": True, "answers": ["y", " dull"]})
    with pytest.raises(ModelError, match=r"answers of one token each, got 'y' \(1 tokens\), ' dull' \(3 tokens\)"):
        run(config, step_context("test/asked", models={"model": resolve_folder(tiny_llama_folder)}))


def test_accuracy_is_compared_with_that_of_the_scalar_head(tiny_llama_folder, resolve_folder, step_context, tmp_path, monkeypatch) -> None:
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
    source = source_of(folder, answers=[" yes", " no"], question=QUESTION)
    texts = [[source.score([row["prompt"]], [row[side]]).item() for side in ("chosen", "rejected")] for row in rows]
    assert metrics["heldout_beside"]["asked"]["accuracy"] == sum(chosen > rejected for chosen, rejected in texts) / 8
