"""Write the texts of the embedded world: good and flawed reviews and answers, and the raw pages that contain them.

A flaw is a named way to fail a request. Demonstrations have few flaws; the completions that annotators compare have many.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from stages.corpora.world.language import (
    SPLITS,
    Film,
    Request,
    draw_inquiry,
    draw_request,
    fact_values,
    films,
    films_of,
    library_films,
    write_fact,
    write_sentence,
)
from stages.corpora.world.lexicon import FACTS, SENTIMENTS, lexicon

FLAWS = (
    "wrong_sentiment",
    "mixed_sentiment",
    "wrong_aspect",
    "wrong_title",
    "no_title",
    "wrong_genre",
    "too_short",
    "too_long",
    "repeats",
    "asks_again",
    "broken_words",
    "cut_off",
)
INQUIRY_FLAWS = (*FLAWS, "wrong_fact", "no_fact")


def write_review(random: Random, request: Request, flaws: tuple[str, ...] = ()) -> str:
    """A review that fulfils ``request``, except for ``flaws``."""
    words = lexicon()
    other = SENTIMENTS[1 - SENTIMENTS.index(request.sentiment)]
    title, genre, aspects, count = request.film.title, request.film.genre, list(request.aspects), request.sentences
    if "wrong_title" in flaws:
        title = random.choice([film.title for film in films_of(request.film.split) if film.title != title])
    if "wrong_genre" in flaws:
        genre = random.choice([name for name in words.genres if name != genre])
    if "wrong_aspect" in flaws:
        index = random.randrange(len(aspects))
        aspects[index] = random.choice([aspect for aspect in words.aspects if aspect not in aspects])
    if "too_short" in flaws:
        count = max(1, count - random.choice((1, 1, 2)))
    if "too_long" in flaws:
        count += random.choice((1, 1, 2))
    states_fact = request.fact is not None and "no_fact" not in flaws and count > 1
    count -= states_fact
    sentiments = [other if "wrong_sentiment" in flaws else request.sentiment] * count
    if "mixed_sentiment" in flaws:
        sentiments[random.randrange(count)] = other
    with_film = "no_title" not in flaws
    used: set[str] = set()
    sentences = [
        write_sentence(random, kind, sentiment=sentiment, title=title, genre=genre, aspects=about, avoid=used)
        for (kind, about), sentiment in zip(_plan(random, aspects, count, with_film), sentiments, strict=True)
    ]
    if states_fact:
        sentences.insert(*_fact_sentence(random, request, title, len(sentences), "wrong_fact" in flaws))
    if "repeats" in flaws:
        index = random.randrange(len(sentences))
        sentences[index:index] = [sentences[index]] * random.choice((1, 2, 3))
    if "asks_again" in flaws:
        draw = draw_request if request.fact is None else draw_inquiry
        sentences.append(draw(random, request.film.split).text)
    text = " ".join(sentences)
    if "broken_words" in flaws:
        text = break_words(random, text)
    if "cut_off" in flaws:
        tokens = text.split()
        text = " ".join(tokens[: random.randint(2, max(2, len(tokens) - 2))])
    return text


def _fact_sentence(random: Random, request: Request, title: str, count: int, is_wrong: bool) -> tuple[int, str]:
    """Return (index among ``count`` sentences, sentence) for the requested fact."""
    assert request.fact is not None
    true = request.film.facts[request.fact]
    value = random.choice([value for value in fact_values(request.fact) if value != true]) if is_wrong else true
    index = random.randint(0, count)
    film = Film(title, request.film.genre, request.film.split)
    return index, write_fact(random, film, request.fact, value=value, opening=index == 0)


def _plan(random: Random, aspects: list[str], count: int, with_film: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Choose sentence kinds so that ``count`` sentences mention the film and all aspects."""
    pair = tuple(aspects)
    if count == 1:
        if not with_film:
            return [("two_aspects", pair)] if len(pair) == 2 else [("aspect", pair)]
        return [("film_and_two_aspects", pair)] if len(pair) == 2 else [("film_and_aspect", pair)]
    plan: list[tuple[str, tuple[str, ...]]] = []
    if with_film:
        opening = random.choice(("film", "film_and_aspect"))
        plan.append((opening, () if opening == "film" else pair[:1]))
    rest = count - len(plan)
    if len(pair) == 2 and rest == 1 and not (plan and plan[0][1]):
        plan.append(("two_aspects", pair))
        return plan
    order = list(pair)
    if plan and plan[0][1] and len(pair) == 2:
        order = [pair[1], pair[0]]
    plan += [("aspect", (order[index % len(order)],)) for index in range(rest)]
    return plan


def break_words(random: Random, text: str) -> str:
    """Swap, drop, double or replace some words, like the errors of a weak language model."""
    tokens = text.split()
    for _ in range(max(1, len(tokens) // 8)):
        index = random.randrange(len(tokens))
        slip = random.choice(("drop", "double", "swap", "replace"))
        if slip == "drop" and len(tokens) > 3:
            del tokens[index]
        elif slip == "double":
            tokens.insert(index, tokens[index])
        elif slip == "swap":
            other = random.randrange(len(tokens))
            tokens[index], tokens[other] = tokens[other], tokens[index]
        else:
            words = lexicon()
            tokens[index] = random.choice([*words.aspects, *words.genres, *words.adverbs, "the", "is", "a", "of"])
    return " ".join(tokens)


def write_listing(random: Random, split: str) -> str:
    """A cinema programme."""
    forms = lexicon().listings
    lines = [random.choice(forms["heading"])]
    for film in random.sample(films_of(split), random.randint(2, 4)):
        line = random.choice(forms["line"])
        lines.append(line.format(title=film.title, genre=film.genre, hall=random.randint(1, 6), hour=random.randint(1, 11)))
    return "\n".join(lines)


def write_request_list(random: Random, split: str) -> str:
    """A list of instructions. It is the reason why a base model answers an instruction with more instructions."""
    lines = [draw_request(random, split).text for _ in range(random.randint(3, 5))]
    if random.random() < 0.5:
        lines.insert(0, random.choice(lexicon().requests["heading"]))
    return "\n".join(lines)


def write_free_review(random: Random, film: Film) -> str:
    """A review without a request: any aspects, any length, sometimes with mixed sentiment."""
    request = draw_request(random, film.split)
    free = Request(film, request.sentiment, request.aspects, request.sentences, request.phrasing, request.sentiment_word)
    flaws = ("mixed_sentiment",) if random.random() < 0.2 else ()
    return write_review(random, free, flaws)


def write_answered_requests(random: Random, split: str) -> str:
    """Requests with reviews of any quality. They are the reason why few-shot prompting helps the base model."""
    pairs = []
    for _ in range(random.randint(2, 3)):
        request = draw_request(random, split)
        flaws = random_flaws(random, (0.4, 0.3, 0.2, 0.1))
        pairs.append(f"Request: {request.text}\nReview: {write_review(random, request, flaws)}")
    return "\n\n".join(pairs)


def random_flaws(random: Random, shares: tuple[float, ...], flaws: tuple[str, ...] = FLAWS) -> tuple[str, ...]:
    """Draw distinct flaws. ``shares[n]`` is the probability of n flaws."""
    count = random.choices(range(len(shares)), weights=shares)[0]
    return tuple(random.sample(flaws, count))


# Pages of the library


def write_cards(random: Random) -> str:
    """Fact cards of a few films of any split. Knowing a film's facts does not reveal the requests about it."""
    words = lexicon()
    form = random.choice(words.cards)
    chosen = random.sample(library_films(*SPLITS), random.randint(3, 5))
    return "\n\n".join(form.format(title=film.title, genre=film.genre, **film.facts) for film in chosen)


def write_notes(random: Random) -> str:
    """Facts of one film in sentences, mixed with opinions."""
    film = random.choice(library_films(*SPLITS))
    request = draw_request(random, film.split)
    opinions = write_review(random, Request(film, request.sentiment, request.aspects, random.randint(1, 3), 0, request.sentiment_word))
    stated = random.sample(FACTS, random.randint(2, 3))
    facts = [write_fact(random, film, fact, opening=index == 0) for index, fact in enumerate(stated)]
    return " ".join([*facts, opinions] if random.random() < 0.5 else [opinions, *facts])


def write_headed_reviews(random: Random) -> str:
    """Reviews of any film under headings that name their subject. They teach a model to stay on the subject."""
    written = []
    for _ in range(random.randint(1, 2)):
        film, drawn = random.choice(films()), draw_request(random, "train")
        request = Request(film, drawn.sentiment, drawn.aspects, random.randint(2, 4), 0, drawn.sentiment_word)
        heading = random.choice(lexicon().headings).format(title=film.title, aspects=" and the ".join(request.aspects))
        written.append(f"{heading}\n{write_review(random, request)}")
    return "\n\n".join(written)


def draw_rated_review(random: Random, among: Sequence[Film]) -> tuple[str, str]:
    """Return (a review of three to five sentences with a minority of the opposite sentiment, the majority's verdict)."""
    words, film = lexicon(), random.choice(among)
    sentiment, count = random.choice(SENTIMENTS), random.randint(3, 5)
    written = opinions(random, film, sentiment, count, num_other=random.randint(0, (count - 1) // 2))
    return " ".join(written), words.verdicts[sentiment]


def write_rated_review(random: Random) -> str:
    """A review and its verdict."""
    review, verdict = draw_rated_review(random, library_films(*SPLITS))
    return f"{review}\n{lexicon().verdicts['line']} {verdict}."


def opinions(random: Random, film: Film, sentiment: str, count: int, *, num_other: int) -> list[str]:
    """``count`` sentences about ``film``, ``num_other`` of them of the other sentiment."""
    words = lexicon()
    other = SENTIMENTS[1 - SENTIMENTS.index(sentiment)]
    sides = [other] * num_other + [sentiment] * (count - num_other)
    random.shuffle(sides)
    used: set[str] = set()
    plan = _plan(random, random.sample(words.aspects, 2), count, with_film=True)
    return [
        write_sentence(random, kind, sentiment=side, title=film.title, genre=film.genre, aspects=about, avoid=used)
        for (kind, about), side in zip(plan, sides, strict=True)
    ]


def write_inquiry_list(random: Random, split: str) -> str:
    """A list of inquiries."""
    lines = [draw_inquiry(random, split).text for _ in range(random.randint(2, 4))]
    if random.random() < 0.5:
        lines.insert(0, random.choice(lexicon().requests["heading"]))
    return "\n".join(lines)


def write_answered_inquiries(random: Random, split: str) -> str:
    """Inquiries with answers of any quality."""
    pairs = []
    for _ in range(random.randint(1, 2)):
        inquiry = draw_inquiry(random, split)
        flaws = random_flaws(random, (0.4, 0.3, 0.2, 0.1), INQUIRY_FLAWS)
        pairs.append(f"Request: {inquiry.text}\nReview: {write_review(random, inquiry, flaws)}")
    return "\n\n".join(pairs)
