"""The verdict of an evaluation for its page: a headline with its interval, win rates against every candidate, tables for every judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.report import curves
from stages.report.run_folder import Row, StepFolder
from stages.run_summary import Candidate, EvaluationFile, WinRate


def verdict(step: StepFolder) -> Row:
    """The headline, the other comparisons of the last candidate, and the tables for every judge."""
    evaluation = step.evaluation
    assert evaluation is not None
    names = list(evaluation["candidates"])
    *others, last = names
    colors = curves.series_of(names)
    judge = evaluation["judges"][0]["name"]
    rates = {(row["a"], row["b"], row["judge"]): row for row in evaluation["win_rates"]}
    main = evaluation.get("kl_reference") if evaluation.get("kl_reference") in others else (others[0] if others else None)
    judges = [entry["name"] for entry in evaluation["judges"]]
    plots = []
    for name in judges:
        rows = [(other, rates[last, other, name]) for other in others if (last, other, name) in rates]
        if rows:
            plots.append({"judge": name, "rows": [_interval_row(other, rate, colors[other]) for other, rate in rows]})
    return {
        "step": step.name,
        "headline": _headline(last, main, judge, rates.get((last, main, judge)) if main else None, evaluation),
        "others": _others(last, [other for other in others if other != main], judge, rates),
        "last": last,
        "prompts": evaluation["prompts"],
        "samples": evaluation["samples_per_prompt"],
        "plots": plots,
        "candidates": [
            {"name": name, "color": colors[name], "model": row.get("model"), "best_of": row.get("best_of")}
            for name, row in evaluation["candidates"].items()
        ],
        "columns": _columns(evaluation, judges),
        "matrices": [_matrix(name, names, rates) for name in judges] if others else [],
        "agreement": {"pairs": [], "annotators": {}, **evaluation.get("agreement", {})},
        "judges": evaluation["judges"],
        "few_shot": evaluation.get("few_shot", {}),
    }


def _headline(last: str, other: str | None, judge: str, rate: WinRate | None, evaluation: EvaluationFile) -> str:
    if rate is None or other is None or not rate["n"]:
        return str(evaluation["verdict"])
    interval = f"95 % interval {percent(rate['ci_low'])} to {percent(rate['ci_high'])}"
    share = f"{percent(rate['win_rate'])} of {rate['n']} prompts against {other}, by {judge} ({interval})"
    if rate["ci_low"] > 0.5:
        return f"{last} wins {share}."
    if rate["ci_high"] < 0.5:
        return f"{last} loses: it wins {share}."
    return f"No difference was shown: {last} wins {share}."


def _others(last: str, others: Sequence[str], judge: str, rates: Mapping[tuple[str, str, str], WinRate]) -> str:
    """One sentence about the remaining comparisons by the first judge. Empty if there are none."""
    groups: dict[str, list[str]] = {"beats": [], "loses to": [], "cannot be distinguished from": [], "was not compared with": []}
    for other in others:
        rate = rates.get((last, other, judge))
        if rate is None or not rate["n"]:
            groups["was not compared with"].append(other)
        elif rate["ci_low"] > 0.5:
            groups["beats"].append(other)
        else:
            groups["loses to" if rate["ci_high"] < 0.5 else "cannot be distinguished from"].append(other)
    said = [f"{verb} {listed(names)}" for verb, names in groups.items() if names]
    return f"By the same judge {last} also {', '.join(said[:-1]) + ' and ' + said[-1] if len(said) > 1 else said[0]}." if said else ""


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _interval_row(name: str, rate: WinRate, color: int) -> Row:
    sure = rate["ci_low"] > 0.5 or rate["ci_high"] < 0.5
    controlled = rate.get("length_controlled") or {}
    return {
        "name": name,
        "color": color,
        "mid": rate["win_rate"],
        "low": rate["ci_low"],
        "high": rate["ci_high"],
        "n": rate["n"],
        "sure": sure,
        "controlled": controlled.get("win_rate"),
    }


def _columns(evaluation: EvaluationFile, judges: Sequence[str]) -> Row:
    """Headings and cells of the table of candidates."""
    shown = {
        "length_words": ("words", "{:.1f}"),
        "stopped_share": ("has an end token", "{:.0%}"),
        "distinct_2": ("distinct bigrams", "{:.3f}"),
        "perplexity": ("perplexity", "{:.4g}"),
        "bits_per_byte": ("bits per byte", "{:.3f}"),
        "kl": ("KL (nats)", "{:.2f}"),
    }
    rows = evaluation["candidates"]
    scoring = [judge for judge in judges if any(judge in row["scores"] for row in rows.values())]
    keys = [key for key in shown if any(row.get(key) is not None for row in rows.values())]
    cells = {}
    for name, row in rows.items():
        scores = [_score_cell(row, judge) for judge in scoring]
        values: Mapping[str, object] = row
        others = [{"text": shown[key][1].format(values[key]) if values.get(key) is not None else "", "interval": ""} for key in keys]
        cells[name] = scores + others
    return {"headings": [*scoring, *(shown[key][0] for key in keys)], "cells": cells}


def _score_cell(row: Candidate, judge: str) -> Row:
    """A candidate's mean score by a judge, with its interval if there is one."""
    if row["scores"].get(judge) is None:
        return {"text": "", "interval": ""}
    low, high = row.get("score_intervals", {}).get(judge) or (None, None)
    interval = f"{low:.2f} to {high:.2f}" if low is not None and high is not None else ""
    return {"text": f"{row['scores'][judge]:.3f}", "interval": interval}


def _matrix(judge: str, names: Sequence[str], rates: Mapping[tuple[str, str, str], WinRate]) -> Row:
    """Win rates of the row against the column. ``strength`` in [-1, 1] sets the colour of the cell."""
    rows = []
    for a in names:
        cells: list[Row | None] = []
        for b in names:
            rate = rates.get((a, b, judge))
            if rate is None or not rate["n"]:
                cells.append(None)
                continue
            sure = rate["ci_low"] > 0.5 or rate["ci_high"] < 0.5
            controlled = (rate.get("length_controlled") or {}).get("win_rate")
            cells.append(
                {
                    "rate": f"{rate['win_rate']:.2f}",
                    "interval": f"{rate['ci_low']:.2f} to {rate['ci_high']:.2f}",
                    "controlled": f"{controlled:.2f}" if controlled is not None else "",
                    "strength": round(2 * rate["win_rate"] - 1, 3),
                    "sure": sure,
                }
            )
        rows.append({"name": a, "cells": cells})
    return {"judge": judge, "names": list(names), "rows": rows}
