"""The words and sentence templates of the embedded world, read once from data/world."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.errors import DataError
from stages.shipped import shipped_folder

WORLD_FOLDER = shipped_folder("data") / "world"
SENTIMENTS = ("positive", "negative")
FACTS = ("director", "place", "year")  # facts of a library film, besides its genre


@dataclass(frozen=True)
class Lexicon:
    """Words by kind. Kinds that carry sentiment are keyed by ``positive`` and ``negative``."""

    first: list[str]
    second: list[str]
    genres: list[str]
    aspects: list[str]
    adjectives: dict[str, list[str]]
    verbs: dict[str, list[str]]
    adverbs: list[str]
    numbers: list[str]
    sentiment_words: dict[str, list[str]]
    people: dict[str, list[str]]  # given and family names
    num_directors: int
    places: list[str]
    years: list[int]  # first and last
    library: dict[str, int]  # number of library films per split
    instructions: list[str]
    sentences: dict[str, list[str]]
    listings: dict[str, list[str]]
    requests: dict[str, list[str]]
    inquiries: list[str]
    asks: dict[str, list[str]]
    facts: dict[str, list[str]]
    cards: list[str]
    headings: list[str]
    verdicts: dict[str, str]


@cache
def lexicon() -> Lexicon:
    """The world's lexicon. Raises DataError where data/world is missing (an installation that is not editable has no data folder)."""
    words, phrases = _read("lexicon.yaml"), _read("phrasings.yaml")
    titles = words.pop("titles")
    return Lexicon(**titles, **words, **phrases)


def world_files() -> list[Path]:
    """The files of the world, for fingerprints."""
    return sorted(WORLD_FOLDER.glob("*.yaml"))


def _read(name: str) -> dict[str, Any]:
    path = WORLD_FOLDER / name
    if not path.is_file():
        raise DataError(f"the embedded world needs {path}; run from a checkout of the repository, installed with `pip install -e .`")
    return dict(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
