"""Small multiple-choice tasks of the embedded world, scored by likelihood. They test what a model learned from
``world:library``.

A row has a ``context``, ``choices`` of continuations, and the index of the right one (``answer``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

from stages.corpora.world.language import Film, fact_values, library_films, write_sentence
from stages.corpora.world.lexicon import FACTS, SENTIMENTS, lexicon
from stages.corpora.world.writers import break_words, draw_rated_review, opinions
from stages.json_types import JsonObject

NUM_CHOICES = 4


@cache
def _questions(split: str) -> tuple[tuple[Film, str], ...]:
    """Every pair of a film of ``split`` and a kind of fact, shuffled once."""
    pairs = [(film, kind) for film in library_films(split) for kind in ("genre", *FACTS)]
    Random(f"questions {split}").shuffle(pairs)
    return tuple(pairs)


def fact_row(random: Random, split: str, index: int) -> JsonObject:
    """A cloze question about a film of ``split``: genre, director, place or year. No question occurs twice."""
    film, kind = _questions(split)[index]
    if kind == "genre":
        context, true, values = f"{film.title}\nGenre:", film.genre, tuple(lexicon().genres)
    else:
        form = lexicon().facts[kind][0]
        context = form[: form.index(f"{{{kind}}}")].format(title=film.title).rstrip()
        true, values = film.facts[kind], fact_values(kind)
    others = random.sample([value for value in values if value != true], NUM_CHOICES - 1)
    return _shuffled(random, context, true, others)


def verdict_row(random: Random, split: str) -> JsonObject:
    """A review of mixed sentiment and the question which verdict its majority supports."""
    verdicts = lexicon().verdicts
    review, true = draw_rated_review(random, library_films(split))
    choices = [f"{verdicts[side]}." for side in SENTIMENTS]
    return {"context": f"{review}\n{verdicts['line']}", "choices": choices, "answer": choices.index(f"{true}.")}


def continuation_row(random: Random, split: str) -> JsonObject:
    """A review without its last sentence. Choices: the real one, the opposite sentiment, another film, and broken grammar."""
    words, film = lexicon(), random.choice(library_films(split))
    index = random.randrange(2)
    sentiment, other = SENTIMENTS[index], SENTIMENTS[1 - index]
    *before, last = opinions(random, film, sentiment, random.randint(3, 4), num_other=0)
    elsewhere: Film = random.choice([candidate for candidate in library_films(split) if candidate.title != film.title])
    about = (random.choice(words.aspects),)
    broken = last
    while broken == last:
        broken = break_words(random, last)
    others = [
        write_sentence(random, "aspect", sentiment=other, title=film.title, genre=film.genre, aspects=about, avoid=set()),
        write_sentence(random, "film", sentiment=sentiment, title=elsewhere.title, genre=elsewhere.genre, aspects=(), avoid=set()),
        broken,
    ]
    return _shuffled(random, " ".join(before), last, others)


def _shuffled(random: Random, context: str, true: str, others: Sequence[str]) -> JsonObject:
    choices = [true, *others]
    random.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(true)}
