"""Judgements made elsewhere, usually by people, of completions that candidates gave.

    prompt + a + b + vote                 a, b: names of candidates; vote: a, b or tie
    prompt + candidate + score            a number; the higher the better
    annotator                             who judged, where several did
    sample                                which of several samples of a prompt (from 0; 0 where it is left out)

A labelling folder (``stages label``) is read as votes: one per annotator and pair of candidates whose completions were ranked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from stages.config import DataSource
from stages.corpora.completions import prompt_key, sample_number
from stages.corpora.files import Row, read_rows, text_of
from stages.corpora.prompts import prompt_in
from stages.errors import DataError

VOTES = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Vote:
    """One annotator on two completions of a prompt: 1 where ``a`` is better, 0 where ``b`` is, 1/2 for a tie."""

    prompt: str  # prompt_key
    sample: int
    a: str
    b: str
    preference: float
    annotator: str


@dataclass(frozen=True)
class Rating:
    """One annotator's score of one completion."""

    prompt: str  # prompt_key
    sample: int
    candidate: str
    score: float
    annotator: str


@dataclass(frozen=True)
class Judgements:
    """All rows of a file: votes, ratings, or both."""

    votes: list[Vote]
    ratings: list[Rating]

    @property
    def candidates(self) -> set[str]:
        """Every name that is judged."""
        return {name for vote in self.votes for name in (vote.a, vote.b)} | {rating.candidate for rating in self.ratings}


def load_judgements(sources: Sequence[DataSource]) -> Judgements:
    """Votes and ratings in the order of the data. Raises DataError with the place of a row that is neither, or repeats another."""
    votes: list[Vote] = []
    ratings: list[Rating] = []
    seen: dict[tuple[object, ...], str] = {}
    for row in read_rows(sources, split="test"):
        prompt, annotator, sample = prompt_key(prompt_in(row)), _annotator(row), sample_number(row)
        if "ranks" in row and "authors" in row:
            votes += _votes_of_ranking(row, prompt, sample, annotator)
            continue
        if "vote" in row:
            a, b = text_of(row, "a"), text_of(row, "b")
            if a == b:
                raise DataError(f"{row.place}: a and b are both {a!r}; expected two candidates")
            if row["vote"] not in VOTES:
                raise DataError(f"{row.place}: vote is {row['vote']!r}; expected a, b or tie")
            votes.append(Vote(prompt, sample, a, b, VOTES[row["vote"]], annotator))
            what: tuple[object, ...] = (prompt, sample, frozenset((a, b)), annotator)
        elif "score" in row:
            score = row["score"]
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise DataError(f"{row.place}: score is {score!r}; expected a finite number")
            candidate = text_of(row, "candidate")
            ratings.append(Rating(prompt, sample, candidate, float(score), annotator))
            what = (prompt, sample, candidate, annotator)
        else:
            expected = "prompt + a + b + vote, or prompt + candidate + score"
            raise DataError(f"{row.place}: columns {', '.join(row)} make no judgement; expected {expected}")
        if what in seen:
            who = annotator or "the annotator"
            raise DataError(f"{row.place}: {who} judged the same thing in {seen[what]}; name annotators, or samples")
        seen[what] = row.place
    return Judgements(votes, ratings)


def _votes_of_ranking(row: Row, prompt: str, sample: int, annotator: str) -> list[Vote]:
    """A vote per pair of candidates. Candidates that wrote the same text tie; one that wrote several of the texts is no side of a vote."""
    written = Counter(name for names in row["authors"] for name in set(names))
    ranked = [(name, rank) for rank, names in zip(row["ranks"], row["authors"], strict=True) for name in names]
    ranks = {name: rank for name, rank in ranked if written[name] == 1}
    pairs = combinations(sorted(ranks), 2)
    return [Vote(prompt, sample, a, b, (ranks[a] < ranks[b]) + 0.5 * (ranks[a] == ranks[b]), annotator) for a, b in pairs]


def _annotator(row: Row) -> str:
    value = row.get("annotator", "")
    if not isinstance(value, str | int):
        raise DataError(f"{row.place}: annotator is {value!r}; expected a name")
    return str(value)
