"""The completions of an evaluation for its page, and the numbers for searching and filtering them.

The page's script reads them as JSON and shows a few at a time, so that a page with thousands of completions opens quickly. If not all of
them fit, long texts are cut first; then prompts are left out, evenly spread. The page says how many texts are cut and how many prompts are
left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from stages.corpora.conversations.messages import transcript
from stages.json_types import finite
from stages.report import curves
from stages.report.run_folder import Row, StepFolder, thinned

LONGEST_TEXT = 4000
"""Maximum number of characters of a text if not everything fits."""
WITHOUT_SCRIPT, LONGEST_WITHOUT_SCRIPT = 12, 1000
"""Number of prompts that the page shows if scripts are off, and the maximum number of characters of their texts."""


@dataclass(frozen=True)
class Reader:
    """The completions of one evaluation. ``rows`` has a JSON object for each prompt on the page."""

    step: str
    names: list[str]
    judges: list[str]
    colors: list[int]
    coloured: list[str]
    rows: list[str]
    total: int  # number of prompts in the evaluation
    completions: int
    total_completions: int
    cut: int = 0  # number of texts in ``rows`` that were cut

    @cached_property
    def size(self) -> int:
        """Bytes of the rows in the page."""
        return sum(_size(row) for row in self.rows)

    @property
    def first(self) -> list[Row]:
        """The rows that the page shows if scripts are off."""
        return [_shortened(json.loads(row), LONGEST_WITHOUT_SCRIPT)[0] for row in self.rows[:WITHOUT_SCRIPT]]

    @property
    def json(self) -> str:
        """The JSON that the page's script reads."""
        head = {"names": self.names, "judges": self.judges, "colors": self.colors, "coloured": self.coloured}
        return f'{{"head":{as_json(head)},"rows":[{",".join(self.rows)}]}}'

    @property
    def note(self) -> str:
        """A sentence about what is missing. Empty if nothing is missing."""
        said = []
        if len(self.rows) < self.total:
            completions = f"{self.completions:,} of {self.total_completions:,} completions"
            said.append(f"{len(self.rows):,} of {self.total:,} prompts ({completions}), evenly spread")
        if self.cut:
            said.append(f"{self.cut:,} texts cut at {LONGEST_TEXT:,} characters")
        return f"{self.step}: {'; '.join(said)}. Everything is in {self.step}/completions.jsonl of the run folder." if said else ""


def read_completions(step: StepFolder) -> Reader:
    """Read every completion of an evaluation."""
    evaluation = step.evaluation
    assert evaluation is not None
    names = list(evaluation["candidates"])
    judges = [entry["name"] for entry in evaluation["judges"]]
    colors = curves.series_of(names)
    tokens: dict[int, dict[str, Row]] = {}
    for row in step.tokens:
        tokens.setdefault(row["row"], {})[row["candidate"]] = row
    rows = [_row(number, line, names, judges, tokens.get(number, {})) for number, line in enumerate(step.completions)]
    completions = sum(_completions(row) for row in rows)
    return Reader(
        step=step.name,
        names=names,
        judges=judges,
        colors=[colors[name] for name in names],
        coloured=sorted({key for row in step.tokens for key in ("kl", "value") if key in row}),
        rows=[as_json(row) for row in rows],
        total=len(rows),
        completions=completions,
        total_completions=completions,
    )


def fitted(readers: Sequence[Reader], room: int) -> list[Reader]:
    """Reduce the readers of a page so that they take at most ``room`` bytes together.

    Small readers stay complete. The bytes that they do not need go to the others.
    """
    by_index: dict[int, Reader] = {}
    for left, (index, reader) in enumerate(sorted(enumerate(readers), key=lambda item: item[1].size)):
        by_index[index] = _fitted(reader, room // (len(readers) - left))
        room -= by_index[index].size
    return [by_index[index] for index in range(len(readers))]


def _fitted(reader: Reader, room: int) -> Reader:
    """Reduce a reader to at most ``room`` bytes: cut long texts, and leave out prompts if that is not enough."""
    if reader.size <= room:
        return reader
    shortened = [_shortened(json.loads(row), LONGEST_TEXT) for row in reader.rows]
    texts = [(as_json(row), _completions(row), cut) for row, cut in shortened]
    sizes = [_size(text) for text, _, _ in texts]
    number = len(texts)
    while (size := sum(thinned(sizes, number))) > room:
        number = max(0, min(number - 1, math.floor(number * room / size)))
    kept = thinned(texts, number)
    completions, cut = sum(count for _, count, _ in kept), sum(cut for _, _, cut in kept)
    return replace(reader, rows=[text for text, _, _ in kept], completions=completions, cut=cut)


def as_json(value: object) -> str:
    """JSON for a script element: without ``<``, so that no text can end the element. Numbers that are not finite become null.

    Unpaired surrogates, which UTF-8 cannot encode, are escaped.
    """
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _size(row: str) -> int:
    """Bytes of a row and of the comma after it."""
    return len(row.encode()) + 1


# Keys of a row: n number of the prompt, p prompt, c completions by candidate, o candidates whose completion has no end token,
# s scores by judge and candidate, f preferences [judge, candidate, candidate, share], t token details by candidate,
# m missing characters by candidate (-1: of the prompt)


def _row(number: int, line: Row, names: Sequence[str], judges: Sequence[str], tokens: Mapping[str, Row]) -> Row:
    sample = f", sample {line['sample'] + 1}" if line.get("sample") else ""
    scores, stopped = line.get("scores", {}), line.get("stopped", {})
    row: Row = {
        "n": f"{line.get('prompt_number', number) + 1}{sample}",
        "p": transcript(line["prompt"]),
        "c": [line["completions"].get(name) for name in names],
        "s": [[_short(scores.get(judge, {}).get(name)) for name in names] for judge in judges],
    }
    if going_on := [column for column, name in enumerate(names) if not stopped.get(name, True)]:
        row["o"] = going_on
    preferences = [
        [index, names.index(given["a"]), names.index(given["b"]), _short(given["preference"])]
        for index, judge in enumerate(judges)
        for given in line.get("preferences", {}).get(judge, [])
    ]
    if preferences:
        row["f"] = preferences
    if tokens:
        kept = ("tokens", "kl", "value")
        row["t"] = {names.index(name): {key: detail[key] for key in kept if key in detail} for name, detail in tokens.items()}
    return row


def _completions(row: Row) -> int:
    return sum(text is not None for text in row["c"])


def _shortened(row: Row, longest: int) -> tuple[Row, int]:
    """Cut the texts of a row to ``longest`` characters. Returns the row and the number of cut texts.

    ``m`` counts the missing characters. The token details of a cut text are removed, because they would not match it.
    """
    texts = dict(enumerate([row["p"], *row["c"]], start=-1))
    cut = [index for index, text in texts.items() if text is not None and len(text) > longest]
    if not cut:
        return row, 0
    missing = dict(row.get("m", {}))
    for index in cut:
        missing[str(index)] = missing.get(str(index), 0) + len(texts[index]) - longest
        texts[index] = texts[index][:longest]
    prompt, *completions = texts.values()
    tokens = {index: detail for index, detail in row.get("t", {}).items() if int(index) not in cut}
    return {**row, "p": prompt, "c": completions, "m": missing, **({"t": tokens} if "t" in row else {})}, len(cut)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
