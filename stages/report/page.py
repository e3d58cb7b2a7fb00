"""One self-contained HTML file: the verdict, the numbers, and every prompt with all completions side by side.

No network and no scripts from elsewhere; everything a model or a data set wrote goes through Jinja's escaping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.corpora.prompts import plain_text
from stages.report.results import Outcome, candidate_rows, rate_text, shown_columns, verdict

if TYPE_CHECKING:
    from stages.corpora.messages import Prompt
    from stages.evaluation import Answers


def write_page(
    path: Path, title: str, prompts: Sequence[Prompt], answers: Mapping[str, Answers], outcome: Outcome, judges: Sequence[str]
) -> None:
    """Write the page of an evaluation to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(title, prompts, answers, outcome, judges), encoding="utf-8")


def render_page(
    title: str, prompts: Sequence[Prompt], answers: Mapping[str, Answers], outcome: Outcome, judges: Sequence[str]
) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stages", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        verdict=verdict(outcome, judges),
        judges=judges,
        candidates=outcome.candidates,
        headings=["candidate", *judges, *(heading for heading, _ in shown_columns(outcome).values())],
        rows=candidate_rows(outcome, judges),
        matrices=[_matrix(outcome, judge) for judge in judges] if len(outcome.candidates) > 1 else [],
        examples=[_example(row, prompt, answers, judges) for row, prompt in enumerate(prompts)],
        num_prompts=len(prompts),
    )


def _matrix(outcome: Outcome, judge: str) -> dict[str, Any]:
    """Win rates of row against column; ``strength`` in [-1, 1] colours the cell."""
    rows = []
    for a in outcome.candidates:
        cells: list[dict[str, Any] | None] = []
        for b in outcome.candidates:
            rate = outcome.rate(a, b, judge) if a != b else None
            sure = rate is not None and (rate["ci_low"] > 0.5 or rate["ci_high"] < 0.5)
            cells.append({"text": rate_text(rate), "strength": round(2 * rate["win_rate"] - 1, 3), "sure": sure} if rate else None)
        rows.append({"name": a, "cells": cells})
    return {"judge": judge, "rows": rows}


def _example(row: int, prompt: Prompt, answers: Mapping[str, Answers], judges: Sequence[str]) -> dict[str, Any]:
    """One prompt and its completions; ``winner`` is the candidate the first judge scores highest ('' where several do)."""
    first = {name: answer.scores[judges[0]][row] for name, answer in answers.items()}
    best = [name for name, score in first.items() if score == max(first.values())]
    return {
        "number": row + 1,
        "prompt": plain_text(prompt),
        "winner": best[0] if len(best) == 1 else "",
        "completions": [
            {
                "name": name,
                "text": answer.completions[row],
                "scores": [f"{judge} {answer.scores[judge][row]:.3f}" for judge in judges],
                "stopped": answer.stopped[row],
            }
            for name, answer in answers.items()
        ],
    }
