"""Films, requests and sentences of the embedded world, and the grammar that parses sentences."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from random import Random

from stages.corpora.world.lexicon import FACTS, SENTIMENTS, lexicon

SPLITS = ("train", "validation", "heldout")
# Films are assigned to splits by title: a film of one split never occurs in the requests of another.
SPLIT_SHARES = {"train": 0.80, "validation": 0.08, "heldout": 0.12}


@dataclass(frozen=True)
class Film:
    """A film. Its title determines its genre, its facts and its split."""

    title: str
    genre: str
    split: str

    @property
    def facts(self) -> dict[str, str]:
        """The film's facts by kind (FACTS). They are a hash of the title, so a model must memorize them."""
        words = lexicon()
        first, last = words.years
        return {
            "director": _drawn(directors(), f"director {self.title}"),
            "place": _drawn(words.places, f"place {self.title}"),
            "year": str(first + int(_share(f"year {self.title}") * (last - first + 1))),
        }


@dataclass(frozen=True)
class Request:
    """The content of an instruction. An inquiry (``fact`` is set) also asks for a fact, and does not state the genre."""

    film: Film
    sentiment: str
    aspects: tuple[str, ...]
    sentences: int
    phrasing: int
    sentiment_word: str
    fact: str | None = None  # one of FACTS
    ask: int = 0  # index of the phrasing of the question

    @property
    def text(self) -> str:
        """The instruction text."""
        words = lexicon()
        count = f"{words.numbers[self.sentences - 1]} sentence{'s' if self.sentences > 1 else ''}"
        slots = {"sentiment": self.sentiment_word, "title": self.film.title, "count": count, "aspects": " and the ".join(self.aspects)}
        if self.fact is None:
            return words.instructions[self.phrasing].format(genre=self.film.genre, **slots)
        return words.inquiries[self.phrasing].format(ask=words.asks[self.fact][self.ask], **slots)


@dataclass(frozen=True)
class Sentence:
    """The meaning of one sentence of a review."""

    sentiment: str  # positive, negative, mixed, or "none" for a stated fact
    aspects: tuple[str, ...]
    title: str | None
    genre: str | None
    fact: tuple[str, str] | None = None  # kind and value


def _share(text: str) -> float:
    """A fixed number in [0, 1) computed from a text; equal on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _drawn(choices: Sequence[str], text: str) -> str:
    """A fixed choice computed from a text."""
    return choices[int(_share(text) * len(choices))]


@cache
def directors() -> tuple[str, ...]:
    """The people who direct films."""
    names = lexicon().people
    everybody = [f"{given} {family}" for given in names["given"] for family in names["family"]]
    return tuple(sorted(everybody, key=lambda name: _share(f"person {name}"))[: lexicon().num_directors])


def fact_values(fact: str) -> tuple[str, ...]:
    """All possible values of a fact."""
    words = lexicon()
    first, last = words.years
    values = {"director": directors(), "place": words.places, "year": [str(year) for year in range(first, last + 1)]}
    return tuple(values[fact])


@cache
def films() -> tuple[Film, ...]:
    """Every film of the world."""
    words, made = lexicon(), []
    for first in words.first:
        for second in words.second:
            title = f"{first} {second}"
            share, split = _share(f"split {title}"), SPLITS[-1]
            for name in SPLITS:
                if share < SPLIT_SHARES[name]:
                    split = name
                    break
                share -= SPLIT_SHARES[name]
            made.append(Film(title, words.genres[int(_share(f"genre {title}") * len(words.genres))], split))
    return tuple(made)


@cache
def films_of(split: str) -> tuple[Film, ...]:
    return tuple(film for film in films() if film.split == split)


@cache
def library_films(*splits: str) -> tuple[Film, ...]:
    """The films of ``splits`` in the library: few enough to memorize."""
    chosen: list[Film] = []
    for split in splits:
        chosen += sorted(films_of(split), key=lambda film: _share(f"library {film.title}"))[: lexicon().library[split]]
    return tuple(chosen)


def draw_request(random: Random, split: str) -> Request:
    """A random request about a film of ``split``: one or two aspects, one to four sentences."""
    words = lexicon()
    sentiment = random.choice(SENTIMENTS)
    aspects = tuple(random.sample(words.aspects, random.choice((1, 1, 2))))
    return Request(
        film=random.choice(films_of(split)),
        sentiment=sentiment,
        aspects=aspects,
        sentences=random.choice((1, 2, 2, 3, 3, 4)),
        phrasing=random.randrange(len(words.instructions)),
        sentiment_word=random.choice(words.sentiment_words[sentiment]),
    )


def draw_inquiry(random: Random, split: str) -> Request:
    """A random inquiry about a library film of ``split``: two to four sentences, one of them for a fact."""
    words = lexicon()
    sentiment, fact = random.choice(SENTIMENTS), random.choice(FACTS)
    return Request(
        film=random.choice(library_films(split)),
        sentiment=sentiment,
        aspects=tuple(random.sample(words.aspects, random.choice((1, 1, 2)))),
        sentences=random.choice((2, 3, 3, 4)),
        phrasing=random.randrange(len(words.inquiries)),
        sentiment_word=random.choice(words.sentiment_words[sentiment]),
        fact=fact,
        ask=random.randrange(len(words.asks[fact])),
    )


@cache
def _request_patterns() -> tuple[re.Pattern[str], ...]:
    """Patterns of all instructions, then of all inquiries."""
    words = lexicon()
    slots = {
        "sentiment": _either([word for side in SENTIMENTS for word in words.sentiment_words[side]]),
        "genre": _either(words.genres),
        "title": f"{_either(words.first)} {_either(words.second)}",
        "count": f"{_either(words.numbers)} sentences?",
        "aspects": f"{_either(words.aspects)}(?: and the {_either(words.aspects)})?",
        "ask": _either([re.escape(ask) for asks in words.asks.values() for ask in asks]),
    }
    return tuple(_pattern(form, slots) for form in [*words.instructions, *words.inquiries])


@lru_cache(maxsize=65536)
def read_request(text: str) -> Request | None:
    """Parse an instruction; None for a text that is not an instruction of this world."""
    words, by_title = lexicon(), {film.title: film for film in films()}
    for phrasing, pattern in enumerate(_request_patterns()):
        if match := pattern.fullmatch(text.strip()):
            word = match["sentiment"]
            asked = match.groupdict().get("ask")
            fact, ask = next(((fact, forms.index(asked)) for fact, forms in words.asks.items() if asked in forms), (None, 0))
            return Request(
                film=by_title[match["title"]],
                sentiment=next(side for side in SENTIMENTS if word in words.sentiment_words[side]),
                aspects=tuple(match["aspects"].split(" and the ")),
                sentences=words.numbers.index(match["count"].split()[0]) + 1,
                phrasing=phrasing if fact is None else phrasing - len(words.instructions),
                sentiment_word=word,
                fact=fact,
                ask=ask,
            )
    return None


def write_sentence(random: Random, kind: str, *, sentiment: str, title: str, genre: str, aspects: tuple[str, ...], avoid: set[str]) -> str:
    """A sentence of kind ``kind``. Adjectives in ``avoid`` are not used if others remain; the used ones are added to ``avoid``."""
    words = lexicon()
    fresh = [word for word in words.adjectives[sentiment] if word not in avoid] or words.adjectives[sentiment]
    adjectives = random.sample(fresh, 2) if len(fresh) > 1 else fresh * 2
    form = random.choice(words.sentences[kind])
    text = form.format(
        title=title,
        genre=genre,
        aspect=aspects[0] if aspects else "",
        aspect2=aspects[1] if len(aspects) > 1 else "",
        adjective=adjectives[0],
        adjective2=adjectives[1],
        verb=random.choice(words.verbs[sentiment]),
        adverb=random.choice(words.adverbs),
    )
    avoid.update(word for word, slot in zip(adjectives, ("{adjective}", "{adjective2}"), strict=True) if slot in form)
    return text


def write_fact(random: Random, film: Film, fact: str, *, value: str | None = None, opening: bool = False) -> str:
    """A sentence that states a fact of ``film`` (or ``value`` instead). With ``opening`` it names the film."""
    forms = lexicon().facts[fact]
    form = forms[0] if opening else random.choice(forms)
    return form.format(title=film.title, **{fact: value or film.facts[fact]})


@cache
def _sentence_patterns() -> tuple[re.Pattern[str], ...]:
    words = lexicon()
    adjectives = _either([word for side in SENTIMENTS for word in words.adjectives[side]])
    slots = {
        "title": f"{_either(words.first)} {_either(words.second)}",
        "genre": _either(words.genres),
        "aspect": _either(words.aspects),
        "aspect2": _either(words.aspects),
        "adjective": adjectives,
        "adjective2": adjectives,
        "verb": _either([word for side in SENTIMENTS for word in words.verbs[side]]),
        "adverb": _either(words.adverbs),
        **{fact: _either(fact_values(fact)) for fact in FACTS},
    }
    return tuple(_pattern(form, slots) for forms in [*words.sentences.values(), *words.facts.values()] for form in forms)


@cache
def _word_sentiment() -> dict[str, str]:
    words = lexicon()
    return {word: side for side in SENTIMENTS for word in [*words.adjectives[side], *words.verbs[side]]}


@lru_cache(maxsize=65536)
def read_sentence(text: str) -> Sentence | None:
    """Parse a sentence; None if the world's grammar cannot produce it."""
    for pattern in _sentence_patterns():
        if match := pattern.fullmatch(text):
            slots = match.groupdict()
            stated = next(((fact, slots[fact]) for fact in FACTS if slots.get(fact)), None)
            if stated is not None:
                return Sentence("none", (), slots.get("title"), None, stated)
            sides = {_word_sentiment()[slots[name]] for name in ("adjective", "adjective2", "verb") if slots.get(name)}
            return Sentence(
                sentiment=sides.pop() if len(sides) == 1 else "mixed",
                aspects=tuple(slots[name] for name in ("aspect", "aspect2") if slots.get(name)),
                title=slots.get("title"),
                genre=slots.get("genre"),
            )
    return None


def split_sentences(text: str) -> list[str]:
    """Split a text after each full stop, question mark and line break, and strip the sentences."""
    return [part.strip() for part in re.split(r"(?<=[.?!])\s+|\n+", text.strip()) if part.strip()]


def _either(words: Sequence[str]) -> str:
    return "(?:" + "|".join(sorted(words)) + ")"


def _pattern(form: str, slots: dict[str, str]) -> re.Pattern[str]:
    """Convert a sentence template to a regular expression with one named group per slot."""
    parts = re.split(r"\{(\w+)\}", form)
    built = [re.escape(part) if index % 2 == 0 else f"(?P<{part}>{slots[part]})" for index, part in enumerate(parts)]
    return re.compile("".join(built))
