"""All kinds of judges in an evaluation: preferences of pairs, agreement between judges, and judges that fail."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from stages.errors import DataError, ModelError, TrainingError
from stages.evaluation import scoring
from stages.evaluation.agreement import agreement
from stages.evaluation.answers import Question
from stages.evaluation.judging import Judged
from stages.evaluation.run import run
from stages.rewards.details import Judgement
from tests.evaluation.conftest import LENGTHS

PROMPTS = ["the film", "write a happy line about the music", "a fine film", "the plot was"]


def vote(prompt: str, choice: str, annotator: str = "ann", a: str = "base", b: str = "aligned") -> dict[str, Any]:
    return {"prompt": prompt, "a": a, "b": b, "vote": choice, "annotator": annotator}


def test_human_votes_count_as_preferences(prompts, step_context, models, config, write_rows, read_run) -> None:
    rows = [
        vote(PROMPTS[0], "a", "ann"),
        vote(PROMPTS[0], "a", "bob"),
        vote(PROMPTS[0], "b", "cid"),
        vote(PROMPTS[1], "tie", "ann"),
        vote(PROMPTS[1], "b", "bob"),
        vote(PROMPTS[1], "a", "cid", a="aligned", b="base"),
        vote(PROMPTS[2], "b", "ann"),
        vote("elsewhere", "a"),
    ]
    judges = [{"judgements": write_rows("votes", rows)}, {"function": "judges_for_tests:lengths"}]
    context = step_context(models=models)
    run(config(prompts, judges=judges), context)
    evaluation, lines = read_run(context)
    (rate,) = [row for row in evaluation["win_rates"] if (row["a"], row["b"], row["judge"]) == ("aligned", "base", "people")]
    # by prompt: 1/3; (1/2 + 1 + 1) / 3; 1
    assert rate["win_rate"] == pytest.approx((1 / 3 + 5 / 6 + 1) / 3) and rate["n"] == 3
    (left_out,) = evaluation["exclusions"]
    assert (left_out["what"], left_out["count"], left_out["of"]) == ("judgements of people about other prompts or candidates", 1, 8)
    annotators = evaluation["agreement"]["annotators"]["people"]
    # two prompts with three votes each: base base aligned | tie aligned aligned; 2 of 6 pairs agree
    assert (annotators["units"], annotators["votes"]) == (2, 6)
    assert annotators["agreement"] == pytest.approx(2 / 6)
    assert [judge["kind"] for judge in evaluation["judges"]] == ["people", "reward"]
    assert lines[3]["preferences"]["people"] == [] and lines[2]["preferences"]["people"][0]["preference"] == 0.0
    assert evaluation["verdict"].startswith("By people, aligned")
    assert "people" not in evaluation["candidates"]["base"]["scores"]


def test_texts_that_a_judge_or_a_selecting_reward_cut_are_counted(prompts, step_context, models, config, read_run, monkeypatch) -> None:
    def cut_first(source: Any, asked: Any, completions: list[str], details: Any) -> Judgement:
        return Judgement(torch.zeros(len(completions)), cut=torch.arange(len(completions)) < 3)

    monkeypatch.setattr(scoring, "judge", cut_first)
    best_of = {"n": 2, "reward": {"function": LENGTHS, "name": "chooser"}}
    context = step_context(models=models)
    result = run(config(prompts, candidates={"base": "b", "aligned": {"model": "a", "best_of": best_of}}), context)
    # The reward that selects reads 4 prompts x 2 samples in one call; the judge reads 2 candidates x 4 completions, then all 8 samples.
    expected = [{"reader": "chooser", "count": 3, "of": 8}, {"reader": "lengths", "count": 6, "of": 16}]
    assert result.metrics["cut_texts"] == read_run(context)[0]["cut_texts"] == expected


def test_human_ratings_count_as_scores(prompts, step_context, models, config, write_rows, read_run) -> None:
    rows = [
        {"prompt": PROMPTS[row], "candidate": name, "score": score, "annotator": who}
        for row, name, who, score in [
            (0, "base", "ann", 1),
            (0, "aligned", "ann", 3),
            (0, "base", "bob", 2),
            (0, "aligned", "bob", 2),
            (1, "base", "ann", 5),
            (1, "aligned", "ann", 1),
            (2, "base", "ann", 4),
        ]
    ]
    rows.append(vote(PROMPTS[3], "a", "cid"))  # a vote in addition to the ratings
    context = step_context(models=models)
    run(config(prompts, judges=[{"judgements": write_rows("ratings", rows), "name": "stars"}]), context)
    evaluation, _ = read_run(context)
    (rate,) = [row for row in evaluation["win_rates"] if (row["a"], row["b"]) == ("aligned", "base")]
    # prompt 0: ann prefers aligned, bob ties; prompt 1: base; prompt 2 has no rating of aligned; prompt 3: a vote for base
    assert rate["n"] == 3 and rate["win_rate"] == pytest.approx((0.75 + 0 + 0) / 3)
    # scores differ by 2.5 - 1.5 and 1 - 5 where both were rated
    assert rate["score_difference"]["mean"] == pytest.approx((1 - 4) / 2)
    assert evaluation["candidates"]["aligned"]["scores"]["stars"] == pytest.approx((2.5 + 1) / 2)
    assert evaluation["agreement"]["annotators"]["stars"]["agreement"] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "the film", "a": "base", "b": "base", "vote": "a"}], "a and b are both 'base'"),
        ([{"prompt": "the film", "a": "base", "b": "aligned", "vote": "c"}], "vote is 'c'; expected a, b or tie"),
        ([{"prompt": "the film", "candidate": "base", "score": "good"}], "score is 'good'; expected a finite number"),
        ([{"prompt": "the film", "candidate": "base", "score": 10**400}], "score is 1000.*; expected a finite number"),
        ([{"prompt": "the film", "candidate": "base"}], "are not a judgement; expected prompt . a . b . vote"),
        ([vote("the film", "a"), vote("the film", "b")], "ann already judged this in .*jsonl:1"),
        ([vote("the film", "a"), vote("the film", "b", a="aligned", b="base")], "ann already judged this"),
        ([vote("the film", "a", a="x", b="y")], "its judgements contain no candidate; it judges x, y; candidates are base, aligned"),
        ([{**vote("the film", "a"), "sample": -1}], "sample is -1; expected an integer >= 0"),
    ],
)
def test_invalid_judgement_rows_are_refused(prompts, config, write_rows, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        config(prompts, judges=[{"judgements": write_rows("judged", rows)}]).check_data()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nonsense", "reward 'nonsense' returned nan for the completion"),
        ("too_few", r"reward 'too_few' returned scores of shape \(1,\); expected one number per completion \(8\)"),
    ],
)
def test_judge_that_returns_invalid_scores_is_refused(prompts, step_context, models, config, function: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        run(config(prompts, judges=[{"function": f"judges_for_tests:{function}"}]), step_context(models=models))


class Endpoint:
    """Replaces the client: prefers the longer text, and gives no verdict on one prompt."""

    asked: list[Any] = []

    def __init__(self, judge: Any, *, key: str | None, cache: Any) -> None:
        self.tally = self
        self.silent = judge.criteria == "silent"
        Endpoint.asked = []

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def compare(self, comparisons: list[Any], advance: Any) -> list[float | None]:
        Endpoint.asked = comparisons
        if self.silent:
            raise ModelError("judge 'llm' gave no verdict")
        first, second = [len(item.first) for item in comparisons], [len(item.second) for item in comparisons]
        verdicts = [(x > y) + 0.5 * (x == y) for x, y in zip(first, second, strict=True)]
        return [None if item.prompt == PROMPTS[0] else float(value) for item, value in zip(comparisons, verdicts, strict=True)]

    def as_json(self, judge: Any) -> dict[str, Any]:
        return {"comparisons": len(Endpoint.asked), "cost": None}


def test_endpoint_judges_pairs(prompts, step_context, models, config, read_run, monkeypatch) -> None:
    monkeypatch.setattr("stages.evaluation.judging.EndpointClient", Endpoint)
    given = {**models, "candidates.third": models["candidates.base"]}
    endpoint = {"endpoint": "http://localhost:1/v1", "model": "m", "num_prompts": 3}
    candidates = {"third": "b", "base": "b", "aligned": "a"}
    settings = config(prompts, candidates=candidates, judges=[{"function": "judges_for_tests:lengths"}, endpoint])
    context = step_context(models=given)
    run(settings, context)
    evaluation, _ = read_run(context)
    assert len(Endpoint.asked) == 6  # three prompts, the last candidate against each of the others
    assert {(row["a"], row["b"]) for row in evaluation["win_rates"] if row["judge"] == "llm"} == set(
        itertools.permutations(("third", "aligned"), 2)
    ) | set(itertools.permutations(("base", "aligned"), 2))
    assert evaluation["exclusions"] == [{"what": "comparisons that llm gave no verdict on", "count": 2, "of": 6, "expected": False}]
    (pair,) = evaluation["agreement"]["pairs"]
    assert (pair["a"], pair["b"], pair["n"], pair["agreement"]) == ("lengths", "llm", 4, 1.0)
    everything = config(prompts, candidates=candidates, judges=[{**endpoint, "against": "all", "num_prompts": None}])
    run(everything, step_context(name="test/all", models=given))
    assert len(Endpoint.asked) == 12
    with pytest.raises(ModelError, match="gave no verdict"):
        run(config(prompts, judges=[{**endpoint, "criteria": "silent"}]), step_context(name="test/silent", models=models))
    assert (context.cache_folder / "judgements.sqlite3").exists()


def test_agreement_by_hand() -> None:
    questions = [Question(f"p{row}", row, 0) for row in range(5)]
    pair = ("a", "b")
    gold = Judged("gold", "reward", {pair: [1.0, 1.0, 0.0, 0.5, 1.0]})
    other = Judged("other", "llm", {pair: [1.0, 0.25, 0.0, 1.0, None]})
    evaluation = agreement([gold, other], questions)
    (row,) = evaluation["pairs"]
    # first, first, second, tie and first, second, second, first: 2 of 4 agree; three have no tie, and 2 of these agree
    assert (row["n"], row["agreement"], row["decided"]) == (4, 0.5, 3)
    assert row["agreement_decided"] == pytest.approx(2 / 3)
    # chance: gold has 2/4 first, 1/4 second, 1/4 tie; other 2/4 first, 2/4 second: 1/4 + 1/8 = 3/8; (1/2 - 3/8) / (5/8)
    assert row["kappa"] == pytest.approx(0.2)
    # alpha: 8 ratings, 4 first, 3 second, 1 tie; observed disagreement 4 ordered pairs, expected (64 - 26) / 7
    assert evaluation["alpha"] == pytest.approx(1 - 4 / (38 / 7))
    assert agreement([gold], questions)["pairs"] == []
