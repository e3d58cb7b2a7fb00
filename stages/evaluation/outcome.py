"""Compute the outcome of an evaluation: a row per candidate, a win rate per pair and judge, best-of-n curves, a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, cast

from stages.evaluation.answers import Answers, Question, Sample
from stages.evaluation.judging import Judged
from stages.json_types import JsonObject
from stages.process.tables import Table
from stages.run_summary import Candidate, Interval, WinRate
from stages.stats.best_of_n import best_of_n_kl, best_of_n_weights
from stages.stats.comparing import distinct_ngrams, length_controlled_win_rate, prompt_means, win_rate
from stages.stats.intervals import bootstrap_interval

if TYPE_CHECKING:
    from stages.registry.references import ResolvedModel
    from stages.run_summary import LengthControlledRate, TextMeasures, TokenMeasures, WinRateNumbers


@dataclass(frozen=True)
class Outcome:
    """``candidates`` by name, in recipe order; ``win_rates`` of every judged pair, in both directions, by every judge."""

    candidates: dict[str, Candidate]
    win_rates: list[WinRate]
    judges: list[str]
    best_of_n: dict[str, list[JsonObject]] = field(default_factory=dict)

    def rate(self, a: str, b: str, judge: str) -> WinRate | None:
        """The win rate of ``a`` against ``b``; None if this judge did not compare them."""
        return next((row for row in self.win_rates if (row["a"], row["b"], row["judge"]) == (a, b, judge)), None)


def compare(
    questions: Sequence[Question], answers: Mapping[str, Answers], judged: Sequence[Judged], models: Mapping[str, ResolvedModel | None]
) -> Outcome:
    """Summarize all candidates, and compare every pair in both directions. ``models``: None for existing completions."""
    prompts = [question.prompt_number for question in questions]
    candidates = {name: _summary(answer, prompts, models[name]) for name, answer in answers.items()}
    pairs = list(permutations(answers, 2))
    rates = [row for judge in judged for a, b in pairs if (row := _rate(judge, a, b, prompts, answers)) is not None]
    curves = {name: _best_of_n_curve(answer, prompts) for name, answer in answers.items() if answer.draws is not None}
    return Outcome(candidates, rates, [judge.name for judge in judged], curves)


# Candidates


def _summary(answer: Answers, prompts: Sequence[int], model: ResolvedModel | None) -> Candidate:
    """The row of one candidate. ``prompts``: the index of each question's prompt."""
    scores, intervals = _mean_scores(answer, prompts)
    summary: Candidate = {
        "model": (model.record.ref if model.record is not None else model.ref) if model is not None else None,
        "digest": model.digest if model is not None else None,
        "scores": scores,
        "score_intervals": intervals,
        **_of_texts([text for text in answer.texts if text is not None]),
        **_of_tokens([sample for sample in answer.samples if sample is not None and sample.response_ids]),
    }
    if answer.perplexity is not None:
        summary |= {"perplexity": answer.perplexity, "bits_per_byte": answer.bits_per_byte}
    if answer.tasks:
        summary["tasks"] = answer.tasks
    if answer.kl is not None:
        means = prompt_means(answer.kl, prompts)
        summary["kl"] = round(_mean(means), 6) + 0.0  # no -0.0
        summary["kl_interval"] = bootstrap_interval(means)
    elif answer.expected_kl is not None:
        summary["kl"] = answer.expected_kl
    if answer.draws is not None:
        summary["best_of"] = len(answer.draws[0])
    return summary


def _mean_scores(answer: Answers, prompts: Sequence[int]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """(mean score, its interval) by judge. Judges without a score are left out."""
    scores, intervals = {}, {}
    for judge, values in answer.scores.items():
        known = [(value, prompt) for value, prompt in zip(values, prompts, strict=True) if value is not None]
        if known:
            means = prompt_means([value for value, _ in known], [prompt for _, prompt in known])
            scores[judge] = _mean(means)
            intervals[judge] = bootstrap_interval(means)
    return scores, intervals


def _of_texts(texts: Sequence[str]) -> TextMeasures:
    """Measures of the completions as texts."""
    words = [text.split() for text in texts]
    return {
        "completions": len(texts),
        "length_words": _mean([len(row) for row in words]),
        "empty_share": _mean([not text.strip() for text in texts]),
        "distinct_1": distinct_ngrams(words, 1),
        "distinct_2": distinct_ngrams(words, 2),
        "distinct_completions": len(set(texts)) / max(1, len(texts)),
    }


def _of_tokens(samples: Sequence[Sample]) -> TokenMeasures:
    """Measures of the completions that a model of this run sampled; empty if there are none."""
    if not samples:
        return {}
    return {
        "length_tokens": _mean([len(sample.response_ids) for sample in samples]),
        "stopped_share": _mean([sample.stopped for sample in samples]),
        "distinct_2_tokens": distinct_ngrams([sample.response_ids for sample in samples], 2),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# Pairs


def _rate(judge: Judged, a: str, b: str, prompts: Sequence[int], answers: Mapping[str, Answers]) -> WinRate | None:
    """``a`` against ``b`` by one judge; None if it did not compare them."""
    straight = (a, b) in judge.preferences
    given = judge.preferences.get((a, b)) or judge.preferences.get((b, a))
    if given is None:
        return None
    rows = [row for row, value in enumerate(given) if value is not None]
    preferred = [value if straight else 1 - value for value in given if value is not None]
    groups = [prompts[row] for row in rows]
    rate = win_rate(preferred, groups)
    texts = answers[a].texts, answers[b].texts
    longer = [float(len(texts[0][row_index] or "") - len(texts[1][row_index] or "")) for row_index in rows]
    controlled = length_controlled_win_rate(preferred, longer, groups)
    numbers = cast("WinRateNumbers", asdict(rate))
    row: WinRate = {
        "a": a,
        "b": b,
        "judge": judge.name,
        **numbers,
        "prompts_needed": None if math.isinf(rate.prompts_needed) else rate.prompts_needed,
        "length_controlled": cast("LengthControlledRate", asdict(controlled)),
    }
    if judge.scores is not None:
        scored = [(judge.scores[a][row_index], judge.scores[b][row_index], prompts[row_index]) for row_index in rows]
        known = [(x - y, prompt) for x, y, prompt in scored if x is not None and y is not None]  # a vote may lack ratings
        if known:
            differences = prompt_means([difference for difference, _ in known], [prompt for _, prompt in known])
            low, high = bootstrap_interval(differences)
            row["score_difference"] = {"mean": _mean(differences), "ci_low": low, "ci_high": high}
    return row


# Best-of-n


def _best_of_n_curve(answer: Answers, prompts: Sequence[int]) -> list[JsonObject]:
    """Mean score of the best of 1, 2, 4, ... n by each judge that scored every draw, with the KL to the sampling policy.

    ``reward``: the score that selects the best. All points are unbiased estimates from one set of samples.
    """
    assert answer.draws is not None and answer.draw_rewards is not None
    largest = len(answer.draws[0])
    sizes = sorted({2**power for power in range(largest.bit_length())} | {largest})
    curve = []
    for n in sizes:
        weights = [best_of_n_weights(rewards, n) for rewards in answer.draw_rewards]
        scores = {judge: _weighted(weights, rows, prompts) for judge, rows in answer.draw_scores.items()}
        curve.append({"n": n, "kl": best_of_n_kl(n), "reward": _weighted(weights, answer.draw_rewards, prompts), "scores": scores})
    return curve


def _weighted(weights: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], prompts: Sequence[int]) -> Interval:
    """Mean over prompts of the weighted scores, with its bootstrap interval."""
    means = prompt_means([sum(w * x for w, x in zip(*pair, strict=True)) for pair in zip(weights, scores, strict=True)], prompts)
    low, high = bootstrap_interval(means)
    return {"mean": _mean(means), "ci_low": low, "ci_high": high}


# Verdict and tables


def verdict(outcome: Outcome) -> str:
    """One sentence that compares the last candidate with each of the others by the first judge, with uncertainty."""
    *others, last = outcome.candidates
    judge = outcome.judges[0]
    if not others:
        score = outcome.candidates[last]["scores"].get(judge)
        return f"{last} was not scored by {judge}." if score is None else f"{last} scores {score:.3g} by {judge}."
    said = []
    for other in others:
        rate = outcome.rate(last, other, judge)
        if rate is None or not rate["n"]:
            said.append(f"was not compared with {other}")
            continue
        interval = f"{rate['win_rate']:.0%} of {rate['n']} prompts (95 %: {rate['ci_low']:.0%} to {rate['ci_high']:.0%})"
        if rate["ci_low"] > 0.5:
            said.append(f"beats {other} on {interval}")
        elif rate["ci_high"] < 0.5:
            said.append(f"loses to {other}, winning {interval}")
        else:
            said.append(f"cannot be distinguished from {other}, winning {interval}")
    return f"By {judge}, {last} {'; '.join(said)}."


COLUMNS = {  # key of a candidate's summary -> (heading, format)
    "length_words": ("words", "{:.1f}"),
    "stopped_share": ("ended", "{:.0%}"),
    "distinct_1": ("distinct-1", "{:.3f}"),
    "distinct_2": ("distinct-2", "{:.3f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "bits_per_byte": ("bits/byte", "{:.3f}"),
    "kl": ("KL (nats)", "{:.2f}"),
}


def candidate_table(candidates: Mapping[str, Candidate], judges: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of text) for the candidates: name, mean score by each scoring judge, and the available columns."""
    scoring = [judge for judge in judges if any(judge in row["scores"] for row in candidates.values())]
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in candidates.values())}
    rows = [
        [
            name,
            *(f"{row['scores'][judge]:.3f}" if judge in row["scores"] else "-" for judge in scoring),
            *(_cell(row, key, form) for key, (_, form) in columns.items()),
        ]
        for name, row in candidates.items()
    ]
    return ["candidate", *scoring, *(heading for heading, _ in columns.values())], rows


def _cell(row: Mapping[str, object], key: str, form: str) -> str:
    return form.format(row[key]) if key in row else "-"


def evaluation_tables(outcome: Outcome) -> list[Table]:
    """Terminal tables: candidates, then win rates (row against column) by each judge."""
    headings, rows = candidate_table(outcome.candidates, outcome.judges)
    first = Table(*headings, title="Candidates: mean score by judge, and their texts", title_justify="left")
    for cells in rows:
        first.add_row(*cells)
    tables = [first]
    for judge in outcome.judges if len(outcome.candidates) > 1 else ():
        table = Table("", *outcome.candidates, title=f"Win rate of the row against the column, by {judge} (95 % interval)")
        table.title_justify = "left"
        for a in outcome.candidates:
            rates = [outcome.rate(a, b, judge) for b in outcome.candidates]
            table.add_row(a, *(rate_text(rate) if rate is not None else "" for rate in rates))
        tables.append(table)
    return tables


def rate_text(rate: WinRate) -> str:
    """A win rate with its interval."""
    return f"{rate['win_rate']:.2f} ({rate['ci_low']:.2f}-{rate['ci_high']:.2f})"
