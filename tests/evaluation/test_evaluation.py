"""The evaluation: same prompts and streams, few-shot prompts, judges, KL and perplexity, and the files that it writes."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from stages.errors import DataError
from stages.evaluation.few_shot import FewShot, few_shot_text
from stages.evaluation.run import run

PROMPTS = ["the film", "write a happy line about the music", "a fine film", "the plot was"]
LENGTHS = "judges_for_tests:lengths"


def test_an_evaluation_measures_scores_kl_perplexity_and_win_rates(prompts, step_context, models, tmp_path, config) -> None:
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
    assert json.loads((context.folder / "evaluation.json").read_text())["verdict"].startswith("By lengths, aligned")


def test_samples_of_one_prompt_count_as_one_prompt(prompts, step_context, models, tmp_path, config) -> None:
    trained = tmp_path / "trained.jsonl"
    trained.write_text(json.dumps({"prompt": PROMPTS[1]}) + "\n")
    context = step_context(models=models)
    result = run(config(prompts, exclude=str(trained), samples_per_prompt=3), context)
    lines = [json.loads(line) for line in (context.folder / "completions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS if prompt != PROMPTS[1] for _ in range(3)]
    assert len({line["completions"]["base"] for line in lines}) > 3  # every sample has its own random stream
    assert result.metrics["prompts"] == 3 and all(row["n"] == 3 for row in result.evaluation["win_rates"])
    with pytest.raises(DataError, match="all 4 prompts of data occur in exclude"):
        config(prompts, exclude=prompts).check_data()


def test_model_against_itself_ties(prompts, step_context, resolve_folder, tiny_llama_folder, config) -> None:
    same = resolve_folder(tiny_llama_folder)
    result = run(config(prompts), step_context(models={"candidates.base": same, "candidates.aligned": same}))
    assert all(row["win_rate"] == 0.5 and row["ties"] == 4 for row in result.evaluation["win_rates"])


def test_kl_is_the_difference_of_log_probabilities(prompts, step_context, models, config) -> None:
    from transformers import AutoModelForCausalLM

    from stages.evaluation.answers import answer as sampled
    from stages.evaluation.answers import ask
    from stages.evaluation.tokens import measure_kl

    settings = config(prompts, kl_reference="base", generation={"max_new_tokens": 6, "temperature": 0.7})
    context = step_context(models=models)
    asked = ask(settings, context, PROMPTS)
    answers = {name: sampled(settings, context, asked, name) for name in ("base", "aligned")}
    assert measure_kl(settings, context, answers) == []
    networks = {name: AutoModelForCausalLM.from_pretrained(models[f"candidates.{name}"].path) for name in answers}
    answer = answers["aligned"]
    for row in range(4):
        sample = answer.samples[row]
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        sums = {}
        for name, network in networks.items():
            with torch.no_grad():
                logprobs = (network(ids).logits[0] / 0.7).log_softmax(-1)
            start = len(sample.prompt_ids) - 1
            sums[name] = sum(float(logprobs[start + step, token]) for step, token in enumerate(sample.response_ids))
        assert answer.kl[row] == pytest.approx(sums["aligned"] - sums["base"], abs=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_model_has_a_kl_of_exactly_zero_to_itself_in_any_precision(prompts, step_context, models, config, precision: str) -> None:
    from stages.evaluation.answers import answer as sampled
    from stages.evaluation.answers import ask
    from stages.evaluation.tokens import measure_kl

    settings = config(prompts, kl_reference="base", precision=precision, generation={"max_new_tokens": 12, "batch_size": 3})
    twins = {**models, "candidates.aligned": models["candidates.base"]}
    context = step_context(models=twins)
    asked = ask(settings, context, PROMPTS)
    answers = {name: sampled(settings, context, asked, name) for name in ("base", "aligned")}
    measure_kl(settings, context, answers)
    for answer in answers.values():
        assert answer.kl == [0.0] * len(PROMPTS)


def test_few_shot_text_has_instruction_and_examples_of_the_template(tmp_path) -> None:
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{number}", "completion": f"{{c{number}}}"}) + "\n" for number in range(3)))
    settings = FewShot.model_validate(
        {"data": str(path), "num_examples": 2, "instruction": "Answer:\n", "template": "Q: {prompt}\nA: {completion}\n\n"}
    )
    text = few_shot_text(settings, 0)
    assert text.startswith("Answer:\nQ: p") and text.count("Q:") == 2 and text.count("A: {c") == 2
    assert text == few_shot_text(settings, 0) != few_shot_text(settings, 1)
    with pytest.raises(DataError, match="has 3 rows, fewer than num_examples=4; add rows, or lower num_examples"):
        few_shot_text(settings.model_copy(update={"num_examples": 4}), 0)


def test_a_prompted_candidate_sees_the_examples_and_is_cut(prompts, step_context, models, tmp_path, config) -> None:
    from stages.evaluation.answers import ask
    from stages.models.loading import load_tokenizer

    path = tmp_path / "shots.jsonl"
    path.write_text(json.dumps({"prompt": "the music", "completion": "was a joy"}) + "\n")
    shots = {"data": str(path), "num_examples": 1, "template": "{prompt} -> {completion}\n", "stop": "e"}
    settings = config(prompts, candidates={"base": "b", "aligned": {"model": "a", "few_shot": shots}})
    context = step_context(models=models)
    shown = ask(settings, context, PROMPTS).prompt_ids
    tokenizer = load_tokenizer(models["candidates.aligned"])
    assert tokenizer.decode(shown["aligned"][0]) == "the music -> was a joy\nthe film ->"
    assert tokenizer.decode(shown["base"][0]) == "the film"
    run(settings, context)
    lines = [json.loads(line) for line in (context.folder / "completions.jsonl").read_text().splitlines()]
    assert all("e" not in line["completions"]["aligned"] for line in lines)


def test_all_candidates_answer_the_same_prompts(prompts, step_context, models, tmp_path, config) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps({"prompt": "film " * 300}) + "\n" + json.dumps({"prompt": "the film"}) + "\n")
    context = step_context(models=models)
    run(config(str(path)), context)
    assert len((context.folder / "completions.jsonl").read_text().splitlines()) == 1
    with pytest.raises(DataError, match="candidate 'base': no prompt has at most 28 tokens"):
        run(config(str(path), generation={"max_new_tokens": 100}, data={"path": str(path), "limit": 1}), context)


def test_candidate_with_another_vocabulary_has_no_kl(prompts, step_context, models, config) -> None:
    from stages.pretraining.config import TokenizerSettings
    from stages.pretraining.tokenizer import train_tokenizer

    train_tokenizer(["another text entirely, of other words"], TokenizerSettings(vocab_size=280)).save_pretrained(
        models["candidates.aligned"].path
    )
    context = step_context(models=models)
    result = run(config(prompts, kl_reference="base"), context)
    assert "kl" in result.evaluation["candidates"]["base"] and "kl" not in result.evaluation["candidates"]["aligned"]
    (left_out,) = json.loads((context.folder / "evaluation.json").read_text())["exclusions"]
    assert left_out["what"] == "completions of aligned without a KL: its tokenizer is not that of base" and left_out["count"] == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_reference": "sft"}, "kl_reference='sft' is not a candidate; expected one of base, aligned"),
        ({"candidates": {}}, "at least 1"),
        ({"judges": []}, "at least 1"),
        ({"judges": [{"function": LENGTHS}, {"function": LENGTHS}]}, "two have the name 'lengths'"),
        ({"candidates": {"b": {"model": "x", "few_shot": {"data": "d", "template": "{completion}"}}}}, "template must contain"),
    ],
)
def test_contradicting_settings_are_refused(fields, message, config) -> None:
    with pytest.raises(ValidationError, match=message):
        config("unused", **fields)


def test_the_conversations_of_an_evaluation_are_its_prompts(tmp_path) -> None:
    """The plan renders the prompts with the candidates' templates, without the other columns."""
    import json

    from stages.evaluation.config import EvaluationConfig

    turns = [{"role": "user", "content": "hello"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": turns, "topic": "a"}) + "\n")
    settings = {"name": "verdict", "candidates": {"a": "sft"}, "data": str(tmp_path / "prompts.jsonl"), "judges": [{"model": "rm"}]}
    assert [list(prompt) for prompt, _, _ in EvaluationConfig.model_validate(settings).conversations()] == [turns]
