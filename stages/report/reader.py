"""The completions of an evaluation for its page, as many as there is room for, and the numbers by which they are searched and filtered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stages.corpora.messages import transcript
from stages.report import curves
from stages.report.run_folder import StepFolder

Row = dict[str, Any]


def reader(step: StepFolder, room: int) -> Row:
    """The completions of an evaluation, as many as ``room`` bytes hold, and what the page's script needs to search and filter them."""
    evaluation = step.evaluation
    assert evaluation is not None
    names = list(evaluation["candidates"])
    judges = [entry["name"] for entry in evaluation["judges"]]
    colors = curves.series_of(names)
    tokens: dict[int, dict[str, Row]] = {}
    for row in step.tokens:
        tokens.setdefault(row["row"], {})[row["candidate"]] = row
    examples: list[Row] = []
    data: list[Row] = []
    used = 0
    for number, line in enumerate(step.completions):
        example, numbers = _example(number, line, names, judges), _example_data(line, names, judges, tokens.get(number, {}))
        used += _bytes_of(example, numbers)
        if used > room and examples:
            break
        examples.append(example)
        data.append(numbers)
    coloured = sorted({key for row in step.tokens for key in ("kl", "value") if key in row})
    return {
        "step": step.name,
        "names": names,
        "colors": [colors[name] for name in names],
        "judges": judges,
        "examples": examples,
        "total": len(step.completions),
        "coloured": coloured,
        "data": {"names": names, "judges": judges, "rows": data},
    }


def _example(number: int, line: Row, names: Sequence[str], judges: Sequence[str]) -> Row:
    sample = f", sample {line['sample'] + 1}" if line.get("sample") else ""
    scores = line.get("scores", {})
    return {
        "number": f"{line.get('prompt_number', number) + 1}{sample}",
        "prompt": _prompt_text(line["prompt"]),
        "completions": [
            {
                "place": place,
                "text": line["completions"].get(name),
                "stopped": line.get("stopped", {}).get(name, True),
                "scores": [f"{judge} {scores[judge][name]:.3f}" for judge in judges if name in scores.get(judge, {})],
            }
            for place, name in enumerate(names)
        ],
    }


def _bytes_of(example: Row, numbers: Row) -> int:
    """About what a question takes in the page: its texts as escaped, the elements around them, its numbers."""
    from markupsafe import escape

    texts = [example["prompt"], *(completion["text"] or "" for completion in example["completions"])]
    written = sum(len(escape(text).encode()) for text in texts)
    scores = sum(len(score) + 3 for completion in example["completions"] for score in completion["scores"])
    return written + scores + 220 * len(texts) + len(json.dumps(numbers))


def _prompt_text(prompt: Any) -> str:
    """A prompt as it is read; a conversation with who said what."""
    return transcript(prompt)


def _example_data(line: Row, names: Sequence[str], judges: Sequence[str], tokens: Mapping[str, Row]) -> Row:
    """Scores by judge and candidate, preferences of judges that compare, and token details, as numbers."""
    scores = [[_short(line.get("scores", {}).get(judge, {}).get(name)) for name in names] for judge in judges]
    preferences = [
        [index, names.index(row["a"]), names.index(row["b"]), _short(row["preference"])]
        for index, judge in enumerate(judges)
        for row in line.get("preferences", {}).get(judge, [])
    ]
    row: Row = {"s": scores}
    if preferences:
        row["p"] = preferences
    if tokens:
        kept = ("tokens", "kl", "value")
        row["t"] = {names.index(name): {key: detail[key] for key in kept if key in detail} for name, detail in tokens.items()}
    return row


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
