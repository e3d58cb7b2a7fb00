"""The evaluation: same prompts and streams, few-shot prompts, judges, KL and perplexity, and the files it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.errors import DataError, ModelError
from stages.evaluation import EvaluationConfig, FewShot, few_shot_examples, run

PROMPTS = ["the film", "write a happy line about the music", "a fine film", "the plot was"]
LENGTHS = "judges_for_tests:lengths"


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "judges_for_tests.py").write_text("def lengths(p, c): return [float(len(t)) for t in c]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(path)


def config(prompts: str, **fields: Any) -> EvaluationConfig:
    settings = {
        "name": "verdict", "candidates": {"base": "b", "aligned": "a"}, "data": prompts, "precision": "fp32",
        "generation": {"max_new_tokens": 6}, "judges": [{"function": LENGTHS}],
    }  # fmt: skip
    return EvaluationConfig.model_validate({**settings, **fields})


@pytest.fixture
def other_folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """The tiny Llama with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def models(resolve_folder: Any, tiny_llama_folder: Path, other_folder: Path) -> dict[str, Any]:
    return {"candidates.base": resolve_folder(tiny_llama_folder), "candidates.aligned": resolve_folder(other_folder)}


def test_a_whole_evaluation(prompts, step_context, models, tmp_path) -> None:
    texts = tmp_path / "heldout.txt"
    texts.write_text("the acting was warm and the film was a joy\n")
    context = step_context(models=models)
    result = run(config(prompts, kl_reference="base", perplexity=str(texts)), context)
    base, aligned = result.evaluation["candidates"]["base"], result.evaluation["candidates"]["aligned"]
    assert base["kl"] == pytest.approx(0, abs=1e-4) and aligned["kl"] > 0.1
    assert base["perplexity"] > 1 and base["bits_per_byte"] > 0
    lines = [json.loads(line) for line in (context.folder / "completions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    for line in lines:
        assert line["scores"]["lengths"] == {name: len(text) for name, text in line["completions"].items()}
    assert base["scores"]["lengths"] == pytest.approx(sum(len(line["completions"]["base"]) for line in lines) / 4)
    wins = sum(
        (x > y) + 0.5 * (x == y) for x, y in ((line["scores"]["lengths"]["aligned"], line["scores"]["lengths"]["base"]) for line in lines)
    )
    (rate,) = [row for row in result.evaluation["win_rates"] if (row["a"], row["b"]) == ("aligned", "base")]
    assert (rate["win_rate"], rate["n"], rate["judge"]) == (wins / 4, 4, "lengths")
    assert {(row["a"], row["b"]) for row in result.evaluation["win_rates"]} == {("aligned", "base"), ("base", "aligned")}
    assert "By lengths, aligned" in (context.folder / "report.html").read_text()


def test_several_samples_and_prompts_kept_apart(prompts, step_context, models, tmp_path) -> None:
    trained = tmp_path / "trained.jsonl"
    trained.write_text(json.dumps({"prompt": PROMPTS[1]}) + "\n")
    context = step_context(models=models)
    result = run(config(prompts, exclude=str(trained), samples_per_prompt=3), context)
    lines = [json.loads(line) for line in (context.folder / "completions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS if prompt != PROMPTS[1] for _ in range(3)]
    assert len({line["completions"]["base"] for line in lines}) > 3  # every sample has a stream of its own
    assert result.metrics["prompts"] == 3 and all(row["n"] == 3 for row in result.evaluation["win_rates"])
    with pytest.raises(DataError, match="all 4 prompts of data occur in exclude"):
        config(prompts, exclude=prompts).check_data()


def test_one_model_twice_is_a_tie(prompts, step_context, resolve_folder, tiny_llama_folder) -> None:
    same = resolve_folder(tiny_llama_folder)
    result = run(config(prompts), step_context(models={"candidates.base": same, "candidates.aligned": same}))
    assert all(row["win_rate"] == 0.5 and row["ties"] == 4 for row in result.evaluation["win_rates"])


def test_kl_is_the_difference_of_log_probabilities(prompts, step_context, models) -> None:
    from transformers import AutoModelForCausalLM

    from stages.evaluation import _answer, _measure_kl, _rendered

    settings = config(prompts, kl_reference="base", generation={"max_new_tokens": 6, "temperature": 0.7})
    context = step_context(models=models)
    _, shown = _rendered(settings, context, PROMPTS)
    answers = {name: _answer(settings, context, name, shown[name]) for name in ("base", "aligned")}
    _measure_kl(settings, context, answers)
    networks = {name: AutoModelForCausalLM.from_pretrained(models[f"candidates.{name}"].path) for name in answers}
    answer = answers["aligned"]
    for row in range(4):
        ids = torch.tensor([answer.prompt_ids[row] + answer.response_ids[row]])
        sums = {}
        for name, network in networks.items():
            with torch.no_grad():
                logprobs = (network(ids).logits[0] / 0.7).log_softmax(-1)
            start = len(answer.prompt_ids[row]) - 1
            sums[name] = sum(float(logprobs[start + step, token]) for step, token in enumerate(answer.response_ids[row]))
        assert answer.kl[row] == pytest.approx(sums["aligned"] - sums["base"], abs=1e-3)


def test_few_shot_text(tmp_path) -> None:
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{number}", "completion": f"{{c{number}}}"}) + "\n" for number in range(3)))
    settings = FewShot.model_validate(
        {"data": str(path), "num_examples": 2, "instruction": "Answer:\n", "template": "Q: {prompt}\nA: {completion}\n\n"}
    )
    text = few_shot_examples(settings, 0)
    assert text.startswith("Answer:\nQ: p") and text.count("Q:") == 2 and text.count("A: {c") == 2
    assert text == few_shot_examples(settings, 0) != few_shot_examples(settings, 1)
    with pytest.raises(DataError, match="has 3 rows, fewer than num_examples=4"):
        few_shot_examples(settings.model_copy(update={"num_examples": 4}), 0)


def test_a_prompted_candidate_sees_the_examples_and_is_cut(prompts, step_context, models, tmp_path) -> None:
    from stages.evaluation import _rendered
    from stages.models.loading import load_tokenizer

    path = tmp_path / "shots.jsonl"
    path.write_text(json.dumps({"prompt": "the music", "completion": "was a joy"}) + "\n")
    shots = {"data": str(path), "num_examples": 1, "template": "{prompt} -> {completion}\n", "stop": "e"}
    settings = config(prompts, candidates={"base": "b", "aligned": {"model": "a", "few_shot": shots}})
    context = step_context(models=models)
    _, shown = _rendered(settings, context, PROMPTS)
    tokenizer = load_tokenizer(models["candidates.aligned"])
    assert tokenizer.decode(shown["aligned"][0]) == "the music -> was a joy\nthe film ->"
    assert tokenizer.decode(shown["base"][0]) == "the film"
    run(settings, context)
    lines = [json.loads(line) for line in (context.folder / "completions.jsonl").read_text().splitlines()]
    assert all("e" not in line["completions"]["aligned"] for line in lines)


def test_all_answer_the_same_prompts(prompts, step_context, models, tmp_path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps({"prompt": "film " * 300}) + "\n" + json.dumps({"prompt": "the film"}) + "\n")
    context = step_context(models=models)
    run(config(str(path)), context)
    assert len((context.folder / "completions.jsonl").read_text().splitlines()) == 1
    with pytest.raises(DataError, match="candidate 'base': no prompt has at most 28 tokens"):
        run(config(str(path), generation={"max_new_tokens": 100}, data={"path": str(path), "limit": 1}), context)


def test_another_vocabulary_has_no_kl(prompts, step_context, models) -> None:
    from stages.pretraining import TokenizerSettings, train_tokenizer

    train_tokenizer(["another text entirely, of other words"], TokenizerSettings(vocab_size=280)).save_pretrained(
        models["candidates.aligned"].path
    )
    with pytest.raises(ModelError, match="candidate 'aligned' and kl_reference 'base' have different tokenizers"):
        run(config(prompts, kl_reference="base"), step_context(models=models))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_reference": "sft"}, "kl_reference='sft' is no candidate; expected one of base, aligned"),
        ({"candidates": {}}, "at least 1"),
        ({"judges": []}, "at least 1"),
        ({"judges": [{"function": LENGTHS}, {"function": LENGTHS}]}, "two sources are called 'lengths'"),
        ({"candidates": {"b": {"model": "x", "few_shot": {"data": "d", "template": "{completion}"}}}}, "template must hold"),
    ],
)
def test_contradictions(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        config("unused", **fields)
