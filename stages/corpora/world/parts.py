"""The tables of the embedded world, named by recipes as ``world:PART`` (training), ``world:PART/validation`` and ``world:PART/heldout``.

Films are split by title, so a film of one split never occurs in the requests of another. A table depends only on its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from stages.corpora.world.annotators import annotators
from stages.corpora.world.language import SPLITS, draw_inquiry, draw_request, films_of
from stages.corpora.world.lexicon import SENTIMENTS
from stages.corpora.world.tasks import continuation_row, fact_row, verdict_row
from stages.corpora.world.writers import (
    INQUIRY_FLAWS,
    random_flaws,
    write_answered_inquiries,
    write_answered_requests,
    write_cards,
    write_free_review,
    write_headed_reviews,
    write_inquiry_list,
    write_listing,
    write_notes,
    write_rated_review,
    write_request_list,
    write_review,
)
from stages.errors import DataError
from stages.json_types import JsonObject

PREFIX = "world:"
HASTE = 4.0  # noise of rankings relative to comparisons: two annotators agree on 72 % of pairs (73 % in Ouyang et al.)
Row = JsonObject


def _raw(random: Random, split: str) -> Row:
    """A page for pretraining: requests, listings or reviews, rarely mixed."""
    kind = random.choices(("requests", "listing", "review", "answered"), weights=(0.35, 0.15, 0.35, 0.15))[0]
    if kind == "requests":
        return {"text": write_request_list(random, split)}
    if kind == "listing":
        return {"text": write_listing(random, split)}
    if kind == "answered":
        return {"text": write_answered_requests(random, split)}
    film = random.choice(films_of(split))
    return {"text": " ".join(write_free_review(random, film) for _ in range(random.choice((1, 1, 2))))}


def _demonstrations(random: Random, split: str) -> Row:
    """A request and a review of varying quality: about half have no flaw."""
    request = draw_request(random, split)
    return {"prompt": request.text, "completion": write_review(random, request, random_flaws(random, (0.45, 0.35, 0.2)))}


def _comparisons(random: Random, split: str) -> Row:
    """A request with four to nine reviews, ranked by one annotator (0 is best, equal ranks tie)."""
    request = draw_request(random, split)
    annotator = random.choice(annotators())
    completions: list[str] = []
    while len(completions) < random.randint(4, 9):
        kind = random.random()
        if kind < 0.04:
            text = write_request_list(random, split)
        elif kind < 0.08:
            text = write_review(random, draw_request(random, split))  # a good answer to another request
        else:
            text = write_review(random, request, random_flaws(random, (0.25, 0.35, 0.25, 0.15)))
        if text not in completions:
            completions.append(text)
    return {
        "prompt": request.text,
        "completions": completions,
        "ranks": annotator.rank(random, request, completions),
        "annotator": annotator.name,
    }


def _prompts(random: Random, split: str) -> Row:
    """A request with its sentiment."""
    request = draw_request(random, split)
    return {"prompt": request.text, "sentiment": request.sentiment}


def _reviews(random: Random, split: str) -> Row:
    """A review with its label (0 negative, 1 positive). One in ten contains a sentence of the opposite sentiment."""
    request = draw_request(random, split)
    flaws = ("mixed_sentiment",) if request.sentences > 2 and random.random() < 0.2 else ()
    return {"text": write_review(random, request, flaws), "label": 1 - SENTIMENTS.index(request.sentiment)}


# The library: a second set of tables with facts to learn. Its pages cover all films; its inquiries cover the films of their split.


def _library(random: Random, split: str) -> Row:
    """A library page for pretraining: cards and notes with facts, reviews with a heading or verdict, inquiries with or without answers."""
    writers = {
        "cards": lambda: write_cards(random),
        "notes": lambda: write_notes(random),
        "headed": lambda: write_headed_reviews(random),
        "rated": lambda: write_rated_review(random),
        "inquiries": lambda: write_inquiry_list(random, split),
        "answered": lambda: write_answered_inquiries(random, split),
    }
    kind = random.choices(list(writers), weights=(0.23, 0.22, 0.19, 0.14, 0.06, 0.16))[0]
    return {"text": writers[kind]()}


def _inquiries(random: Random, split: str) -> Row:
    """An inquiry without an answer."""
    inquiry = draw_inquiry(random, split)
    return {"prompt": inquiry.text, "sentiment": inquiry.sentiment, "fact": inquiry.fact}


def _answers(random: Random, split: str) -> Row:
    """An inquiry and its answer of varying quality: about half have no flaw."""
    inquiry = draw_inquiry(random, split)
    return {"prompt": inquiry.text, "completion": write_review(random, inquiry, random_flaws(random, (0.45, 0.35, 0.2), INQUIRY_FLAWS))}


def _rankings(random: Random, split: str) -> Row:
    """An inquiry with four to nine answers, ranked by one annotator with increased noise."""
    inquiry = draw_inquiry(random, split)
    annotator = random.choice(annotators())
    completions: list[str] = []
    while len(completions) < random.randint(4, 9):
        kind = random.random()
        if kind < 0.04:
            text = write_inquiry_list(random, split)
        elif kind < 0.08:
            text = write_review(random, draw_inquiry(random, split))  # a good answer to another inquiry
        else:
            text = write_review(random, inquiry, random_flaws(random, (0.25, 0.35, 0.25, 0.15), INQUIRY_FLAWS))
        if text not in completions:
            completions.append(text)
    return {
        "prompt": inquiry.text,
        "completions": completions,
        "ranks": annotator.rank(random, inquiry, completions, haste=HASTE),
        "annotator": annotator.name,
    }


@dataclass(frozen=True)
class Part:
    """A table: the function that generates a row, and the number of rows per split."""

    row: Callable[..., Row]  # called with (random, split), and with the row index if ``takes_index``
    sizes: dict[str, int]
    takes_index: bool = False


PARTS = {
    "raw": Part(_raw, {"train": 16000, "validation": 400, "heldout": 400}),
    "demonstrations": Part(_demonstrations, {"train": 8000, "validation": 200, "heldout": 200}),
    "comparisons": Part(_comparisons, {"train": 2000, "validation": 200, "heldout": 200}),
    "prompts": Part(_prompts, {"train": 6000, "validation": 256, "heldout": 512}),
    "reviews": Part(_reviews, {"train": 3000, "validation": 400, "heldout": 400}),
    "library": Part(_library, {"train": 40000, "validation": 400, "heldout": 400}),
    "answers": Part(_answers, {"train": 16000, "validation": 200, "heldout": 200}),
    "rankings": Part(_rankings, {"train": 8000, "validation": 200, "heldout": 200}),
    "inquiries": Part(_inquiries, {"train": 12000, "validation": 256, "heldout": 512}),
    "tasks/facts": Part(fact_row, {"train": 500, "validation": 160, "heldout": 320}, takes_index=True),
    "tasks/verdicts": Part(verdict_row, {"train": 500, "validation": 500, "heldout": 500}),
    "tasks/continuations": Part(continuation_row, {"train": 500, "validation": 500, "heldout": 500}),
}


def parse_part(path: str) -> tuple[str, str]:
    """Parse ``world:PART[/SPLIT]`` as (part, split). Raises DataError that suggests the nearest valid part."""
    name, split = path.removeprefix(PREFIX), "train"
    if name not in PARTS:  # a part name may contain a slash
        head, _, tail = name.rpartition("/")
        name, split = (head, tail) if head in PARTS or tail in SPLITS else (name, split)
    if name not in PARTS:
        near = difflib.get_close_matches(name, PARTS, n=1)
        hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        raise DataError(f"{path!r} is not a part of the embedded world; expected {PREFIX} and one of {', '.join(PARTS)}{hint}")
    if split not in SPLITS:
        raise DataError(f"{path!r} has no split {split!r}; expected {PREFIX}{name}/ and one of {', '.join(SPLITS)}")
    return name, split


_MADE: dict[tuple[str, str], list[Row]] = {}
"""Cache of generated rows by part and split: several steps and checks request the same rows."""


def _table(name: str, split: str, rows: int) -> list[Row]:
    """The first ``rows`` rows. Each row depends only on its index."""
    part, made = PARTS[name], _MADE.setdefault((name, split), [])
    for index in range(len(made), rows):
        made.append(part.row(Random(f"world {name} {split} {index}"), split, *((index,) if part.takes_index else ())))
    return made[:rows]


def world_rows(path: str, limit: int | None = None) -> list[Row]:
    """The rows of ``world:PART[/SPLIT]``, at most ``limit``; identical on every machine and in every process."""
    name, split = parse_part(path)
    size = PARTS[name].sizes[split]
    return [dict(row) for row in _table(name, split, min(size, limit or size))]
