"""Remarks on an evaluation: each is one complete sentence with the numbers of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.report.remarks import remarks
from stages.report.run_folder import RunFolder, StepFolder


def _evaluation() -> dict[str, Any]:
    """Four candidates, so six comparisons, of which the last one is not decided; and a judge behind an endpoint."""
    names = ["base", "sft", "dpo", "aligned"]
    rows = [
        {"a": a, "b": b, "judge": "llm", "n": 100, "win_rate": 0.9, "ci_low": 0.8, "ci_high": 0.95, "prompts_needed": 10.0}
        for a in names
        for b in names
        if a != b
    ]
    for row in rows:
        if {row["a"], row["b"]} == {"dpo", "aligned"}:
            row |= {"win_rate": 0.52, "ci_low": 0.45, "ci_high": 0.59, "prompts_needed": 4900.0}
    judge = {"name": "llm", "kind": "llm", "requests": 1200, "from_cache": 3, "retries": 2, "refused": 1, "failed": 0}
    return {
        "prompts": 100,
        "candidates": dict.fromkeys(names, {}),
        "judges": [judge | {"cost": 0.5, "order_consistency": 0.75}],
        "win_rates": rows,
        "exclusions": [{"count": 11, "of": 100, "what": "prompts are duplicates"}, {"count": 10, "of": 100, "what": "prompts are empty"}],
        "cut_texts": [{"reader": "llm", "count": 1, "of": 100}],
        "agreement": {"pairs": [{"a": "llm", "b": "gold", "decided": 20, "agreement_decided": 0.55}]},
    }


def test_remarks_of_an_evaluation_are_complete_sentences(tmp_path: Path) -> None:
    step = StepFolder({"name": "verdict", "stage": "evaluation", "metrics": {}}, tmp_path)  # type: ignore[typeddict-item]
    vars(step)["evaluation"] = _evaluation()
    vars(step)["completions"] = []
    run = RunFolder(tmp_path, {"finished": True, "steps": []}, [step])  # type: ignore[typeddict-item]
    assert [(row["kind"], row["text"]) for row in remarks(run)] == [
        ("alarm", "11 of 100 prompts are duplicates."),  # more than a tenth
        ("note", "10 of 100 prompts are empty."),
        ("note", "llm read 1 of 100 texts without their beginning: they were too long."),
        (
            "note",
            "100 prompts do not distinguish aligned from dpo (52 %; about 4,900 prompts would be needed). The numbers assume a power of "
            "80 % at the 5 % level, by llm.",
        ),
        ("note", "llm and gold agree on 55 % of the 20 comparisons without a tie: they judge different things."),
        (
            "note",
            "llm was asked 1,200 times (3 replies from the cache, 2 retries, 1 refusals, 0 failures), for 0.50; for 75 % its verdict was "
            "the same in both orders.",
        ),
        (
            "note",
            "Each interval covers one comparison. There are 6 comparisons, and about one interval in twenty misses its true value by "
            "chance.",
        ),
    ]
