"""Candidates of every kind: completions made elsewhere, few-shot prompts chosen by a reward, the best of several samples, tokens."""

from __future__ import annotations

import io
import json
import re
import weakref
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from stages.config import DataSource
from stages.corpora.completions import load_completions, prompt_key
from stages.corpora.conversations.messages import prompt_of
from stages.corpora.files import read_rows
from stages.errors import DataError, ModelError
from stages.evaluation import answers
from stages.evaluation.answers import ask
from stages.evaluation.record import write_completions
from stages.evaluation.run import run
from stages.evaluation.tokens import _pieces
from stages.models.loaded import LoadedModel
from stages.process import console
from stages.stats.best_of_n import best_of_n_kl
from stages.tokens.continuation import plain_ids

PROMPTS = ["the film", "write a happy line about the music", "a fine film", "the plot was"]


def test_candidate_from_a_completions_file(prompts, step_context, models, config, write_rows, read_run) -> None:
    rows = [{"instruction": "the film", "output": "a long enough answer"}, {"prompt": PROMPTS[2], "completion": ""}]
    rows += [{"prompt": PROMPTS[2], "completion": "a second sample"}, {"prompt": "unknown", "completion": "x"}]
    elsewhere = write_rows("elsewhere", rows)
    context = step_context(models=models)
    result = run(config(prompts, candidates={"base": "b", "elsewhere": {"completions": elsewhere}}), context)
    evaluation, lines = read_run(context)
    assert [line["completions"].get("elsewhere") for line in lines] == ["a long enough answer", None, "", None]
    # two of four prompts are left out of its comparisons, and this is reported
    assert evaluation["exclusions"] == [
        {"what": "prompts that elsewhere has no completion for (left out of its comparisons)", "count": 2, "of": 4, "expected": False}
    ]
    (rate,) = [row for row in result.evaluation["win_rates"] if row["a"] == "elsewhere"]
    lengths = [len(lines[row]["completions"]["base"]) for row in (0, 2)]
    assert rate["n"] == 2
    assert rate["win_rate"] == sum((x > y) + 0.5 * (x == y) for x, y in zip([20, 0], lengths, strict=True)) / 2
    candidate = result.evaluation["candidates"]["elsewhere"]
    assert candidate["scores"]["lengths"] == 10 and candidate["model"] is None and candidate["empty_share"] == 0.5
    assert "stopped_share" not in candidate and "kl" not in candidate
    assert result.metrics["left_out"] == 2


def test_long_sampling_shows_how_far_it_is(prompts, step_context, models, config, monkeypatch) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    written = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={})
    with console.showing(written):
        run(config(prompts, candidates={"base": "b"}), step_context(models=models))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.file.getvalue())
    assert re.search(r": sampling .* 4/4 ", shown)


def test_recorded_prompts_are_those_of_the_data(write_rows, tmp_path) -> None:
    """With their tools and template arguments: prompts that differ in them are different prompts."""
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    rows = [{"prompt": "hi"}, {"prompt": "hi", "chat_template_kwargs": {"enable_thinking": False}}, {"prompt": "hi", "tools": [weather]}]
    asked = [prompt_of(row) for row in read_rows([DataSource(path=write_rows("asked", rows))], split="test")]
    questions = [answers.Question(prompt, number, 0, {}) for number, prompt in enumerate(asked)]
    write_completions(tmp_path, questions, {"a": answers.Answers([answers.Sample("one")] * 3)}, [])
    recorded = DataSource(path=str(tmp_path / "completions.jsonl"), columns={"completion": "completions.a"})
    assert load_completions([recorded]) == {prompt_key(prompt): {0: "one"} for prompt in asked}
    assert len({prompt_key(prompt) for prompt in asked}) == 3


def test_completions_file_with_other_prompts_is_refused(prompts, config, write_rows) -> None:
    elsewhere = write_rows("elsewhere", [{"prompt": "unknown", "completion": "x"}])
    settings = config(prompts, candidates={"base": "b", "elsewhere": {"completions": elsewhere}})
    with pytest.raises(
        DataError, match="candidate 'elsewhere': its completions answer none of the 4 prompts of data.* Use the prompts of this file"
    ):
        settings.check_data()
    with pytest.raises(DataError, match="have no completion; expected prompt . completion"):
        config(prompts, candidates={"x": {"completions": write_rows("bad", [{"prompt": "the film"}])}}).check_data()


def test_completions_file_with_several_samples(prompts, step_context, models, config, write_rows, read_run) -> None:
    rows = [{"prompt": prompt, "completion": f"{prompt} {number}"} for prompt in PROMPTS for number in range(2)]
    rows.pop()  # the last prompt has one sample only
    settings = config(prompts, candidates={"base": "b", "elsewhere": {"completions": write_rows("e", rows)}}, samples_per_prompt=2)
    context = step_context(models=models)
    run(settings, context)
    evaluation, lines = read_run(context)
    assert [line["completions"].get("elsewhere") for line in lines] == [row["completion"] for row in rows] + [None]
    assert evaluation["exclusions"][0]["count"] == 1
    (rate,) = [row for row in evaluation["win_rates"] if row["a"] == "elsewhere"]
    assert (rate["n"], rate["samples"]) == (4, 7)


def test_samples_may_be_numbered(prompts, step_context, models, config, write_rows, read_run) -> None:
    rows = [{"prompt": PROMPTS[0], "completion": "second", "sample": 1}, {"prompt": PROMPTS[1], "completion": "first"}]
    settings = config(prompts, candidates={"base": "b", "elsewhere": {"completions": write_rows("e", rows)}}, samples_per_prompt=2)
    context = step_context(models=models)
    run(settings, context)
    assert [line["completions"].get("elsewhere") for line in read_run(context)[1]][:4] == [None, "second", "first", None]
    for wrong, message in (([*rows, rows[0]], "sample 1 of this prompt occurs twice"), ([{**rows[0], "sample": -1}], "sample is -1")):
        with pytest.raises(DataError, match=message):
            config(prompts, candidates={"e": {"completions": write_rows("wrong", wrong)}}).check_data()


def test_duplicates_are_counted(prompts, step_context, models, config, write_rows, read_run) -> None:
    again = write_rows("again", [{"prompt": prompt} for prompt in [*PROMPTS, PROMPTS[0], PROMPTS[0]]])
    context = step_context(models=models)
    run(config(again), context)
    evaluation, lines = read_run(context)
    assert len(lines) == 4
    assert evaluation["exclusions"] == [{"what": "prompts that occur more than once, counted once", "count": 2, "of": 6, "expected": True}]
    with pytest.raises(DataError, match="prompt is empty"):
        config(write_rows("empty", [{"prompt": "  "}])).check_data()


# Few-shot


def test_few_shot_prompt_with_the_highest_reward_is_chosen(prompts, step_context, models, config, write_rows, read_run) -> None:
    shots = write_rows("shots", [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(6)])
    validation = write_rows("validation", [{"prompt": prompt} for prompt in ["the ending", "the cast", "the film"]])
    choose = {"reward": {"function": "judges_for_tests:letters"}, "data": validation, "tries": 3}
    few_shot = {"data": shots, "num_examples": 1, "template": "{prompt}: {completion}\n", "choose": choose, "instruction": ["", "Go on.\n"]}
    settings = config(prompts, candidates={"base": "b", "aligned": {"model": "a", "few_shot": few_shot}})
    assert "candidates.aligned.few_shot.choose.data" in settings.data_inputs()
    context = step_context(models=models)
    run(settings, context)
    tries = read_run(context)[0]["few_shot"]["aligned"]
    assert len(tries) == 6 and len({row["text"] for row in tries}) > 3  # two instructions, three draws each
    assert [row["score"] for row in tries] == sorted((row["score"] for row in tries), reverse=True)
    assert tries[0]["score"] > tries[-1]["score"]
    from stages.models.loading import load_tokenizer

    tokenizer = load_tokenizer(models["candidates.aligned"])
    shown = ask(settings, step_context(models=models), PROMPTS).prompt_ids["aligned"]
    assert tokenizer.decode(shown[0]) == tries[0]["text"] + "the film:"


def test_few_shot_validation_prompts_are_not_evaluated(prompts, config, write_rows) -> None:
    shots = write_rows("shots", [{"prompt": "p", "completion": "c"}])
    choose = {"reward": {"function": "judges_for_tests:lengths"}, "data": prompts}
    few_shot = {"data": shots, "num_examples": 1, "choose": choose}
    with pytest.raises(DataError, match="are evaluation prompts"):
        config(prompts, candidates={"base": "b", "aligned": {"model": "a", "few_shot": few_shot}}).check_data()


# Best of n


def test_best_of_n_is_the_best_of_its_own_samples(prompts, step_context, models, config, read_run) -> None:
    best = {"model": "b", "best_of": {"n": 5, "reward": {"function": "judges_for_tests:lengths"}}}
    settings = config(prompts, candidates={"base": "b", "best": best, "aligned": "a"}, kl_reference="base")
    given = {**models, "candidates.best": models["candidates.base"]}
    context = step_context(models=given)
    result = run(settings, context)
    evaluation, lines = read_run(context)
    # its first sample is the plain answer, so the best one cannot be shorter
    assert all(len(line["completions"]["best"]) >= len(line["completions"]["base"]) for line in lines)
    (rate,) = [row for row in evaluation["win_rates"] if (row["a"], row["b"]) == ("best", "base")]
    assert rate["win_rate"] > 0.5
    curve = evaluation["best_of_n"]["best"]
    assert [point["n"] for point in curve] == [1, 2, 4, 5]
    assert [point["kl"] for point in curve] == pytest.approx([best_of_n_kl(n) for n in (1, 2, 4, 5)])
    means = [point["reward"]["mean"] for point in curve]
    assert means == sorted(means) and means == pytest.approx([point["scores"]["lengths"]["mean"] for point in curve])
    # the best of all five is the candidate's answer, so the means are equal
    assert means[-1] == pytest.approx(evaluation["candidates"]["best"]["scores"]["lengths"])
    assert result.evaluation["candidates"]["best"]["kl"] == pytest.approx(best_of_n_kl(5))
    assert result.evaluation["candidates"]["best"]["best_of"] == 5


def test_best_of_n_has_no_kl_to_another_model(prompts, step_context, models, config) -> None:
    best = {"model": "a", "best_of": {"n": 2, "reward": {"function": "judges_for_tests:lengths"}}}
    settings = config(prompts, candidates={"base": "b", "best": best}, kl_reference="base")
    given = {"candidates.base": models["candidates.base"], "candidates.best": models["candidates.aligned"]}
    given["candidates.base"] = type(given["candidates.base"])(**{**vars(given["candidates.base"]), "digest": "sha256:other"})
    assert "kl" not in run(settings, step_context(models=given)).evaluation["candidates"]["best"]


def test_only_one_candidate_is_in_memory(prompts, step_context, models, config, monkeypatch) -> None:
    """Also while the reward of a best-of candidate scores, and while log-probabilities for the KL are measured."""
    loaded: list[weakref.ref[Any]] = []
    alive: dict[str, list[int]] = {"load": [], "score": []}
    load, score = LoadedModel.frozen, answers.every_score

    def counted(name: str) -> None:
        alive[name].append(sum(model() is not None for model in loaded))

    def frozen(*arguments: Any) -> LoadedModel:
        counted("load")
        made = load(*arguments)
        loaded.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr(LoadedModel, "frozen", frozen)
    monkeypatch.setattr(answers, "every_score", lambda *given: counted("score") or score(*given))
    best = {"model": "b", "best_of": {"n": 2, "reward": {"function": "judges_for_tests:lengths"}}}
    settings = config(prompts, candidates={"base": "b", "best": best, "aligned": "a"}, kl_reference="base")
    run(settings, step_context(models={**models, "candidates.best": models["candidates.base"]}))
    assert len(alive["load"]) == 6 and len(alive["score"]) == 1
    assert not any(sum(alive.values(), []))


# Tokens


def test_token_details_have_kl_and_values_of_the_first_prompts(
    prompts, step_context, models, config, read_run, tiny_llama_folder, tmp_path, resolve_folder
) -> None:
    from stages.models.heads import ValueModel

    value = ValueModel.from_policy(tiny_llama_folder, dtype=torch.float32)
    with torch.no_grad():
        value.score_head.bias.fill_(0.25)  # a head of zeros and this bias: every value is 1/4
    value.save(tmp_path / "value")
    given = {**models, "token_details.value": resolve_folder(tmp_path / "value")}
    context = step_context(models=given)
    settings = config(prompts, kl_reference="base", token_details={"num_prompts": 3, "value": "v"}, samples_per_prompt=2)
    run(settings, context)
    details = [json.loads(line) for line in (context.folder / "tokens.jsonl").read_text().splitlines()]
    assert [(row["row"], row["candidate"]) for row in details] == [(row, name) for name in ("base", "aligned") for row in (0, 2, 4)]
    _, lines = read_run(context)
    for row in details:
        line = lines[row["row"]]
        assert len(row["tokens"]) == len(row["kl"]) == len(row["value"]) == line["tokens"][row["candidate"]]
        assert "".join(row["tokens"]).strip() == line["completions"][row["candidate"]]
        assert sum(row["kl"]) == pytest.approx(line["kl"][row["candidate"]], abs=1e-2)
        assert row["value"] == pytest.approx([0.25] * len(row["value"]))


# Formats


def test_completions_are_written_in_the_format_of_alpaca_eval(prompts, step_context, models, config, read_run) -> None:
    context = step_context(models=models)
    run(config(prompts, samples_per_prompt=2), context)
    _, lines = read_run(context)
    rows = json.loads((context.folder / "alpaca_eval" / "aligned.json").read_text())
    assert [(row["instruction"], row["output"]) for row in rows] == [
        (line["prompt"], line["completions"]["aligned"]) for line in lines if line["sample"] == 0
    ]
    assert {row["generator"] for row in rows} == {"aligned"}


def test_completions_written_by_an_evaluation_can_be_read(prompts, step_context, models, config, read_run) -> None:
    context = step_context(models=models)
    run(config(prompts), context)
    _, lines = read_run(context)
    again = step_context(name="test/again", models=models)
    candidates = {"base": "b", "aligned": {"completions": str(context.folder / "alpaca_eval" / "aligned.json")}}
    run(config(prompts, candidates=candidates), again)
    assert [line["completions"] for line in read_run(again)[1]] == [line["completions"] for line in lines]


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({}, "exactly one of model and completions"),
        ({"model": "a", "completions": "b.jsonl"}, "exactly one of model and completions"),
        ({"completions": "b.jsonl", "best_of": {"reward": {"function": "a:b"}}}, "need a model"),
        (
            {"model": "a", "few_shot": {"data": "d", "instruction": ["x", "y"]}},
            "instruction is a list: give it at least one text, and set choose",
        ),
    ],
)
def test_contradicting_settings_are_refused(config, candidate: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config("unused", candidates={"base": "b", "x": candidate})


def test_kl_reference_must_be_a_model_without_few_shot_or_best_of(config) -> None:
    best = {"model": "a", "best_of": {"reward": {"function": "a:b"}}}
    with pytest.raises(ValidationError, match="must be a model without few_shot"):
        config("unused", candidates={"base": "b", "best": best}, kl_reference="best")
    with pytest.raises(ValidationError, match="token_details needs kl_reference"):
        config("unused", token_details={})


def test_value_network_of_a_ppo_step_is_recorded(step_context, tiny_llama_folder, tmp_path) -> None:
    import shutil

    from stages.evaluation.tokens import value_network
    from stages.models.heads import ValueModel
    from stages.registry.references import ResolvedModel

    context = step_context()
    value = ValueModel.from_policy(tiny_llama_folder, dtype=torch.float32)
    records = {}
    for version, parts in enumerate(({"seed": 1}, {"seed": 2}), 1):
        policy = context.registry.publish(
            "r/aligned",
            lambda folder: shutil.copytree(tiny_llama_folder, folder, dirs_exist_ok=True),
            role="language_model",
            fingerprint=str(version),
            fingerprint_parts=parts,
        )
        records[version] = policy
        if version == 1:
            context.registry.publish("r/aligned-value", lambda folder: value.save(folder), role="value_model", fingerprint_parts=parts)

    context.models["token_details.value"] = ResolvedModel.of_record(records[1])
    assert value_network(context).ref == "r/aligned-value@1"
    context.models["token_details.value"] = value_network(context)
    assert value_network(context).ref == "r/aligned-value@1"  # named itself
    context.models["token_details.value"] = ResolvedModel.of_record(records[2])
    with pytest.raises(ModelError, match="r/aligned@2 published no value network; set publish_value: true"):
        value_network(context)


def test_a_character_of_several_tokens_is_shown_at_its_last_token(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")  # é has two bytes and the bird four
    prompt, ids = (plain_ids(tokenizer, text) for text in ("hello there", " a é🦜 b"))
    assert _pieces(tokenizer, prompt, [*ids, tokenizer.eos_token_id]) == [" a", " ", "", "é", "", "", "", "🦜", " b", ""]
