"""From answers and scores to an evaluation's result: a row per candidate, a win rate per pair and judge, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from stages.numerics.comparing import distinct_ngrams, win_rate

if TYPE_CHECKING:
    from stages.evaluation import Answers
    from stages.runtime import ResolvedModel


@dataclass(frozen=True)
class Outcome:
    """``candidates`` by name, in the recipe's order; ``win_rates`` of every ordered pair by every judge."""

    candidates: dict[str, dict[str, Any]]
    win_rates: list[dict[str, Any]]

    def rate(self, a: str, b: str, judge: str) -> dict[str, Any]:
        """How ``a`` fares against ``b``. Raises LookupError for an unknown pair."""
        for row in self.win_rates:
            if (row["a"], row["b"], row["judge"]) == (a, b, judge):
                return row
        raise LookupError(f"no comparison of {a!r} with {b!r} by {judge!r}")


def compare(
    answers: Mapping[str, Answers], judges: Sequence[str], models: Mapping[str, ResolvedModel], *, samples_per_prompt: int = 1
) -> Outcome:
    """Summaries of all candidates, and every pair in both directions; samples of one prompt lie next to each other."""
    candidates = {name: _summary(answer, judges, models[name]) for name, answer in answers.items()}
    scores = {name: answer.scores for name, answer in answers.items()}
    rates = [
        {"a": a, "b": b, "judge": judge, **asdict(win_rate(scores[a][judge], scores[b][judge], cluster_size=samples_per_prompt))}
        for judge in judges
        for a in answers
        for b in answers
        if a != b
    ]
    return Outcome(candidates, rates)


def _summary(answer: Answers, judges: Sequence[str], model: ResolvedModel) -> dict[str, Any]:
    words = [text.split() for text in answer.completions]
    summary: dict[str, Any] = {
        "model": model.record.ref if model.record is not None else model.ref,
        "digest": model.digest,
        "scores": {judge: _mean(answer.scores[judge]) for judge in judges},
        "length_words": _mean([len(row) for row in words]),
        "length_tokens": _mean([len(row) for row in answer.response_ids]),
        "stopped_share": _mean(answer.stopped),
        "distinct_1": distinct_ngrams(words, 1),
        "distinct_2": distinct_ngrams(words, 2),
        "distinct_2_tokens": distinct_ngrams(answer.response_ids, 2),
        "distinct_completions": len(set(answer.completions)) / len(answer.completions),
    }
    if answer.perplexity is not None:
        summary |= {"perplexity": answer.perplexity, "bits_per_byte": answer.bits_per_byte}
    if answer.tasks:
        summary["tasks"] = answer.tasks
    if answer.kl is not None:
        summary["kl"] = round(_mean(answer.kl), 6) + 0.0  # no -0.0
    return summary


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def verdict(outcome: Outcome, judges: Sequence[str]) -> str:
    """The last candidate against each of the others by the first judge, in one sentence with its uncertainty."""
    *others, last = outcome.candidates
    judge = judges[0]
    if not others:
        return f"{last} scores {outcome.candidates[last]['scores'][judge]:.3g} by {judge}."
    said = []
    for other in others:
        rate = outcome.rate(last, other, judge)
        interval = f"{rate['win_rate']:.0%} of {rate['n']} prompts (95 %: {rate['ci_low']:.0%} to {rate['ci_high']:.0%})"
        if rate["ci_low"] > 0.5:
            said.append(f"beats {other} on {interval}")
        elif rate["ci_high"] < 0.5:
            said.append(f"loses to {other}, winning {interval}")
        else:
            said.append(f"cannot be told from {other}, winning {interval}")
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


def shown_columns(outcome: Outcome) -> dict[str, tuple[str, str]]:
    """The columns that some candidate has."""
    return {key: column for key, column in COLUMNS.items() if any(key in row for row in outcome.candidates.values())}


def candidate_rows(outcome: Outcome, judges: Sequence[str]) -> list[list[str]]:
    """A row of text per candidate: name, mean score by each judge, then ``shown_columns``."""
    columns = shown_columns(outcome)
    return [
        [
            name,
            *(f"{row['scores'][judge]:.3f}" for judge in judges),
            *(form.format(row[key]) if key in row else "-" for key, (_, form) in columns.items()),
        ]
        for name, row in outcome.candidates.items()
    ]


def evaluation_table(outcome: Outcome, judges: Sequence[str]) -> list[Table]:
    """The result for a terminal: candidates, then win rates (row against column) by each judge."""
    headings = [heading for heading, _ in shown_columns(outcome).values()]
    first = Table("candidate", *judges, *headings, title="Candidates: mean score by judge, and their texts", title_justify="left")
    for cells in candidate_rows(outcome, judges):
        first.add_row(*cells)
    tables = [first]
    for judge in judges if len(outcome.candidates) > 1 else ():
        table = Table("", *outcome.candidates, title=f"Win rate of the row against the column, by {judge} (95 % interval)")
        table.title_justify = "left"
        for a in outcome.candidates:
            table.add_row(a, *("" if a == b else rate_text(outcome.rate(a, b, judge)) for b in outcome.candidates))
        tables.append(table)
    return tables


def rate_text(rate: Mapping[str, Any]) -> str:
    """A win rate with its interval."""
    return f"{rate['win_rate']:.2f} ({rate['ci_low']:.2f}-{rate['ci_high']:.2f})"
