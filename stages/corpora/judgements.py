"""Judgements from outside, usually by people, of the candidates' completions.

    prompt + a + b + vote                 a, b: names of candidates; vote: a, b or tie
    prompt + candidate + score            a number; higher is better
    annotator                             who judged, if there are several annotators
    sample                                which of several samples of a prompt (from 0; default 0)

A labelling folder (``stages label``) is read as votes: one per annotator and pair of ranked candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from stages.config import DataSource
from stages.corpora.completions import prompt_key, sample_index
from stages.corpora.files import read_rows
from stages.corpora.prompts import prompt_in
from stages.corpora.rows import Row, renaming, text_of
from stages.errors import DataError
from stages.json_types import is_finite_number

VOTES = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Vote:
    """One annotator's preference between two completions of a prompt: 1 for ``a``, 0 for ``b``, 1/2 for a tie."""

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
    """All rows of the sources: votes, ratings, or both."""

    votes: list[Vote]
    ratings: list[Rating]

    @property
    def candidates(self) -> set[str]:
        """The names of all judged candidates."""
        return {name for vote in self.votes for name in (vote.a, vote.b)} | {rating.candidate for rating in self.ratings}


def load_judgements(sources: Sequence[DataSource]) -> Judgements:
    """Load votes and ratings in data order. Raises DataError with the location of a malformed or duplicate row."""
    votes: list[Vote] = []
    ratings: list[Rating] = []
    seen: dict[tuple[object, ...], str] = {}
    for row in read_rows(sources, split="test"):
        prompt, annotator, sample = prompt_key(prompt_in(row)), _annotator(row), sample_index(row)
        if "ranks" in row and "authors" in row:
            votes += _votes_of_ranking(row, prompt, sample, annotator)
            continue
        if "vote" in row:
            a, b = text_of(row, "a"), text_of(row, "b")
            if a == b:
                raise DataError(f"{row.location}: a and b are both {a!r}; expected two candidates")
            if row["vote"] not in VOTES:
                raise DataError(f"{row.location}: vote is {row['vote']!r}; expected a, b or tie")
            votes.append(Vote(prompt, sample, a, b, VOTES[row["vote"]], annotator))
            what: tuple[object, ...] = (prompt, sample, frozenset((a, b)), annotator)
        elif "score" in row:
            score = row["score"]
            if not is_finite_number(score):
                raise DataError(f"{row.location}: score is {score!r}; expected a finite number")
            candidate = text_of(row, "candidate")
            ratings.append(Rating(prompt, sample, candidate, float(score), annotator))
            what = (prompt, sample, candidate, annotator)
        else:
            expected = "prompt + a + b + vote, or prompt + candidate + score"
            raise DataError(
                f"{row.location}: columns {', '.join(row)} are not a judgement; expected {expected}"
                + renaming(row, "prompt a b vote", "prompt candidate score")
            )
        if what in seen:
            who = annotator or "the annotator"
            raise DataError(f"{row.location}: {who} already judged this in {seen[what]}; add a column annotator or sample")
        seen[what] = row.location
    return Judgements(votes, ratings)


def _votes_of_ranking(row: Row, prompt: str, sample: int, annotator: str) -> list[Vote]:
    """One vote per pair of candidates. Candidates with the same text tie; a candidate that wrote several of the texts is left out."""
    written = Counter(name for names in row["authors"] for name in set(names))
    ranked = [(name, rank) for rank, names in zip(row["ranks"], row["authors"], strict=True) for name in names]
    ranks = {name: rank for name, rank in ranked if written[name] == 1}
    pairs = combinations(sorted(ranks), 2)
    return [Vote(prompt, sample, a, b, (ranks[a] < ranks[b]) + 0.5 * (ranks[a] == ranks[b]), annotator) for a, b in pairs]


def _annotator(row: Row) -> str:
    value = row.get("annotator", "")
    if not isinstance(value, str | int):
        raise DataError(f"{row.location}: annotator is {value!r}; expected a name")
    return str(value)
