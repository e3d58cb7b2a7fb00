"""Evaluations of votes by real people and of GPT-4's scores. The expected numbers are computed from the raw rows in another way."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.evaluation.config import EvaluationConfig
from stages.evaluation.run import run

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "real_judgements.py"
RESULTS_PAGE = BENCHMARK.parents[2] / "docs" / "results.md"


@pytest.fixture(scope="module")
def writer() -> Any:
    """The script that writes the shared data in the formats of an evaluation."""
    spec = importlib.util.spec_from_file_location("real_judgements", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raw(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def evaluate(folder: Path, prefix: str, names: list[str], context: Any, **fields: Any) -> dict[str, Any]:
    settings = {
        "name": "verdict",
        "data": str(folder / f"{prefix}-prompts.jsonl"),
        "num_prompts": None,
        "candidates": {name: {"completions": str(folder / f"{prefix}-{name}.jsonl")} for name in names},
        **fields,
    }
    config = EvaluationConfig.model_validate(settings)
    config.check_data()
    run(config, context)
    return json.loads((context.folder / "evaluation.json").read_text())


def test_human_votes_on_five_models_give_the_published_win_rates(shared_data, writer, step_context, tmp_path) -> None:
    names = writer.write_pandalm(tmp_path)
    evaluation = evaluate(
        tmp_path,
        "pandalm",
        names,
        step_context(),
        samples_per_prompt=4,
        judges=[{"judgements": str(tmp_path / "pandalm-votes.jsonl"), "name": "people"}],
    )
    rows = raw(shared_data / "pandalm_human" / "validation.jsonl.gz")
    votes = np.array([row["annotators"] for row in rows])

    # Fleiss' kappa and the agreement of pairs of annotators, from the table of counts
    counts = np.stack([(votes == vote).sum(axis=1) for vote in (0, 1, 2)], axis=1)
    observed = ((counts**2).sum(axis=1) - 3) / 6
    expected = ((counts.sum(axis=0) / votes.size) ** 2).sum()
    people = evaluation["agreement"]["annotators"]["people"]
    assert (people["units"], people["votes"]) == (len(rows), 3 * len(rows)) == (702, 2106)
    assert people["agreement"] == pytest.approx(observed.mean())
    assert people["fleiss_kappa"] == pytest.approx((observed.mean() - expected) / (1 - expected))
    assert people["unanimous"] == pytest.approx((votes.max(axis=1) == votes.min(axis=1)).mean())
    # with equal numbers of ratings, alpha is kappa with a correction for the sample size: 1 - (1 - kappa) (N - 1) / N with N ratings
    assert people["alpha"] == pytest.approx(1 - (1 - people["fleiss_kappa"]) * (votes.size - 1) / votes.size, abs=1e-12)

    # win rates: a comparison counts the mean of its votes, a prompt the mean of its comparisons of the pair
    value = {0: 0.5, 1: 1.0, 2: 0.0}
    by_prompt: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        share = np.mean([value[vote] for vote in row["annotators"]])
        prompt = row["instruction"] + "|" + row["input"]
        by_prompt[row["model_1"], row["model_2"]][prompt].append(share)
        by_prompt[row["model_2"], row["model_1"]][prompt].append(1 - share)
    rates = {(row["a"], row["b"]): row for row in evaluation["win_rates"]}
    assert set(rates) == set(by_prompt) and len(rates) == 20
    for pair, prompts in by_prompt.items():
        means = np.array([np.mean(shares) for shares in prompts.values()])
        assert rates[pair]["n"] == len(means)
        assert rates[pair]["win_rate"] == pytest.approx(means.mean())
        draws = np.random.default_rng(0).choice(means, (4000, len(means))).mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        assert (rates[pair]["bootstrap_low"], rates[pair]["bootstrap_high"]) == pytest.approx((low, high), abs=0.02)
        assert (rates[pair]["ci_low"], rates[pair]["ci_high"]) == pytest.approx(
            (low, high), abs=0.025
        )  # another way to compute the same number

    # as in docs/results.md
    page = " ".join(RESULTS_PAGE.read_text().split())
    assert f"{people['fleiss_kappa']:.2f}" in page and f"{100 * people['agreement']:.1f} %" in page
    for a, b in (("llama-7b", "cerebras-gpt-6.7B"), ("llama-7b", "opt-7b")):
        rate = rates[a, b]
        assert f"{rate['win_rate']:.2f} ({rate['ci_low']:.2f} to {rate['ci_high']:.2f})" in page


def test_gpt4_scores_of_eight_models_give_the_published_means(shared_data, writer, step_context, tmp_path) -> None:
    names = writer.write_alpaca(tmp_path)
    evaluation = evaluate(
        tmp_path, "alpaca", names, step_context(), judges=[{"judgements": str(tmp_path / "alpaca-scores.jsonl"), "name": "gpt4"}]
    )
    rows = raw(shared_data / "alpaca_eval_ranking" / "validation.jsonl.gz")
    table = {name: {row["prompt"]: row["scores"][row["models"].index(name)] for row in rows if name in row["models"]} for name in names}
    for name in names:
        assert evaluation["candidates"][name]["scores"]["gpt4"] == pytest.approx(np.mean(list(table[name].values())))
    assert names[-1] == "gpt-3.5-turbo-1106"  # the strongest model according to the card of the data set
    rates = {(row["a"], row["b"]): row for row in evaluation["win_rates"]}
    for a, b in combinations(names, 2):
        both = sorted(table[a].keys() & table[b].keys())
        x, y = np.array([table[a][prompt] for prompt in both]), np.array([table[b][prompt] for prompt in both])
        row = rates[a, b]
        assert (row["n"], row["wins"], row["ties"]) == (len(both), (x > y).sum(), (x == y).sum())
        assert row["win_rate"] == pytest.approx(((x > y) + 0.5 * (x == y)).mean())
        assert row["score_difference"]["mean"] == pytest.approx((x - y).mean())
    missing = Counter(name for row in rows for name in names if name not in row["models"])
    excluded = {item["what"].split()[2]: item["count"] for item in evaluation["exclusions"]}
    assert excluded == dict(missing)
