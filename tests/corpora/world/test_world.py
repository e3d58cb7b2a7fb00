"""The embedded world: disjoint splits, reproducible rows, a gold judge that detects errors, annotators who mostly agree with it."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from stages.corpora.world import gold
from stages.corpora.world.annotators import annotators
from stages.corpora.world.language import (
    SPLITS,
    draw_inquiry,
    draw_request,
    films,
    library_films,
    read_request,
    read_sentence,
    split_sentences,
)
from stages.corpora.world.lexicon import FACTS
from stages.corpora.world.parts import HASTE, PARTS, parse_part, world_rows
from stages.corpora.world.writers import FLAWS, INQUIRY_FLAWS, write_review
from stages.errors import DataError

PROMPT = "Compose one sentence on the romance Bitter Morning. Talk about the acting and stay negative."


def test_splits_share_no_film_and_no_instruction() -> None:
    films, prompts = {}, {}
    for split in ("train", "validation", "heldout"):
        rows = world_rows("world:prompts" if split == "train" else f"world:prompts/{split}")
        prompts[split] = {row["prompt"] for row in rows}
        films[split] = {read_request(prompt).film.title for prompt in prompts[split]}
    for one, other in (("train", "validation"), ("train", "heldout"), ("validation", "heldout")):
        assert not films[one] & films[other] and not prompts[one] & prompts[other]
    assert len(prompts["train"]) > 5000


def test_the_world_is_the_same_every_time() -> None:
    for part in PARTS:
        path = f"world:{part}/heldout"
        assert world_rows(path, 5) == world_rows(path)[:5]
    assert world_rows("world:prompts/heldout", 1)[0]["prompt"] == PROMPT


def test_every_request_and_sentence_can_be_parsed_back() -> None:
    random = Random(1)
    for _ in range(300):
        request = draw_request(random, "train")
        parsed = read_request(request.text)
        assert (parsed.film, parsed.sentiment, parsed.aspects, parsed.sentences) == (
            request.film,
            request.sentiment,
            request.aspects,
            request.sentences,
        )
        review = write_review(random, request)
        sentences = split_sentences(review)
        assert len(sentences) == request.sentences
        assert all(read_sentence(sentence) is not None for sentence in sentences), review


def test_gold_by_hand() -> None:
    assert gold.score(PROMPT, "The romance Bitter Morning is weak with dull acting.") <= 1
    perfect = write_review(Random(0), read_request(PROMPT))
    assert gold.parts(PROMPT, perfect)["score"] == pytest.approx(1.0), perfect
    assert gold.score(PROMPT, "") == 0 and gold.score(PROMPT, "acting negative Bitter Morning romance") == 0
    # a repeated sentence: one sentence too many (length 0.5 of 0.25), half of the sentences are new
    twice = gold.parts(PROMPT, f"{perfect} {perfect}")
    assert twice["length"] == 0.5 and twice["freshness"] <= 0.5
    assert twice["score"] <= 0.5 * (1 - 0.125)
    with pytest.raises(DataError, match="expected an instruction of the embedded world"):
        gold.score("Tell me a joke.", "Ha.")


@pytest.mark.parametrize("flaw", FLAWS)
def test_every_flaw_lowers_the_gold_score(flaw) -> None:
    random = Random(flaw)
    good = bad = 0.0
    for _ in range(60):
        request = draw_request(random, "train")
        good += gold.judge(request, write_review(random, request))["score"] / 60
        bad += gold.judge(request, write_review(random, request, (flaw,)))["score"] / 60
    assert good > 0.97 and bad < good - 0.04, (good, bad)


@pytest.mark.parametrize(("part", "low", "high"), [("comparisons", 0.75, 0.97), ("rankings", 0.72, 0.88)])
def test_annotators_agree_with_the_judge_mostly_and_not_always(part, low, high) -> None:
    rows = world_rows(f"world:{part}/heldout")
    assert {len(row["completions"]) for row in rows} == set(range(4, 10))
    agree = total = ties = 0
    for row in rows:
        scores = [gold.score(row["prompt"], text) for text in row["completions"]]
        for a in range(len(scores)):
            for b in range(a):
                if row["ranks"][a] == row["ranks"][b]:
                    ties += 1
                elif scores[a] != scores[b]:
                    total += 1
                    agree += (row["ranks"][a] < row["ranks"][b]) == (scores[a] > scores[b])
    assert ties > 20
    assert low < agree / total < high  # better than chance, but not perfect
    assert len({person.name for person in annotators()}) == 12


def test_two_annotators_in_a_hurry_agree_as_often_as_the_papers_labelers() -> None:
    """72.6 +- 1.5 % of pairs (Ouyang et al. 2022, section 3.4)."""
    agree = total = 0
    for number, row in enumerate(world_rows("world:rankings/heldout", 60)):
        request, texts = read_request(row["prompt"]), row["completions"]
        ranks = [person.rank(Random(f"{number} {person.name}"), request, texts, haste=HASTE) for person in annotators()]
        for one, other in itertools.combinations(ranks, 2):
            for a, b in itertools.combinations(range(len(texts)), 2):
                if one[a] != one[b] and other[a] != other[b]:
                    total += 1
                    agree += (one[a] < one[b]) == (other[a] < other[b])
    assert 0.70 < agree / total < 0.75


# The library: inquiries that also ask for a fact


INQUIRY = "Write a warm review of Silver Harbor in three sentences about the plot. Say who directed it."
DIRECTOR = "Boris Rossi"


def test_inquiry_and_answer_can_be_parsed_back() -> None:
    random = Random(2)
    for _ in range(300):
        inquiry = draw_inquiry(random, "train")
        assert read_request(inquiry.text) == inquiry
        sentences = split_sentences(write_review(random, inquiry))
        read = [read_sentence(sentence) for sentence in sentences]
        assert len(sentences) == inquiry.sentences and None not in read
        assert [sentence.fact for sentence in read if sentence.fact is not None] == [(inquiry.fact, inquiry.film.facts[inquiry.fact])]


def test_facts_are_drawn_by_the_title_and_spread_evenly() -> None:
    assert read_request(INQUIRY).film.facts == {"director": DIRECTOR, "place": "Oslo", "year": "1983"}
    for fact in FACTS:
        counts: dict[str, int] = {}
        for film in films():
            counts[film.facts[fact]] = counts.get(film.facts[fact], 0) + 1
        assert max(counts.values()) < 100, fact  # of 900: guessing the most common answer is not a good strategy


def test_gold_of_an_inquiry_by_hand() -> None:
    request = read_request(INQUIRY)
    film = request.film
    opinions = f"The {film.genre} Silver Harbor is vivid and tender. I praised the honest plot."
    right, other = f"It was directed by {DIRECTOR}.", "It was directed by Nobody Known."
    wrong = next(f"It was directed by {film.facts['director']}." for film in films() if film.facts["director"] != DIRECTOR)
    perfect = gold.parts(INQUIRY, f"{opinions} {right}")
    assert perfect["facts"] == 1 and perfect["score"] == pytest.approx(1.0)
    assert gold.parts(INQUIRY, f"{right} {opinions}") == perfect  # a fact may be at any position
    # a false fact gets none of the 0.25 for the fact
    assert gold.score(INQUIRY, f"{opinions} {wrong}") == pytest.approx(0.75)
    # a guess in addition to the right answer: half of the 0.25, and one sentence too many (0.5 of 0.2)
    both = gold.parts(INQUIRY, f"{opinions} {right} {wrong}")
    assert both["facts"] == 0.5 and both["length"] == 0.5 and both["sentiment"] == 1
    # a sentence with an unknown name does not belong to the world
    assert gold.parts(INQUIRY, f"{opinions} {other}")["coherence"] == pytest.approx(2 / 3)
    # facts alone are not an opinion
    assert gold.parts(INQUIRY, right)["sentiment"] == 0


@pytest.mark.parametrize("flaw", INQUIRY_FLAWS)
def test_every_flaw_of_an_answer_lowers_its_gold_score(flaw) -> None:
    random = Random(flaw)
    good = bad = 0.0
    for _ in range(60):
        inquiry = draw_inquiry(random, "train")
        good += gold.judge(inquiry, write_review(random, inquiry))["score"] / 60
        bad += gold.judge(inquiry, write_review(random, inquiry, (flaw,)))["score"] / 60
    assert good > 0.97 and bad < good - 0.025, (good, bad)  # the genre alone gives 0.03


def test_the_library_knows_its_films_of_all_splits_and_asks_only_about_those_of_one() -> None:
    asked, known = set(), set()
    for row in world_rows("world:library", 4000):
        for line in row["text"].split("\n"):
            text = line.removeprefix("Request: ")
            if (request := read_request(text)) is not None:
                asked.add(request.film.title)
            known |= {film.title for film in films() if line.startswith(f"{film.title} (")}
    assert asked <= {film.title for film in library_films("train")} and len(asked) > 0.95 * len(library_films("train"))
    everything = {film.title for film in library_films(*SPLITS)}
    assert known <= everything and len(known) > 0.95 * len(everything)
    for split in ("validation", "heldout"):
        assert {read_request(row["prompt"]).film.split for row in world_rows(f"world:inquiries/{split}")} == {split}


@pytest.mark.parametrize("task", ["facts", "verdicts", "continuations"])
def test_tasks_have_one_right_answer_without_shortcuts(task) -> None:
    rows = world_rows(f"world:tasks/{task}/heldout")
    assert all(len(set(row["choices"])) == len(row["choices"]) and 0 <= row["answer"] < len(row["choices"]) for row in rows)
    share = sum(row["answer"] == 0 for row in rows) / len(rows)
    assert abs(share - 1 / len(rows[0]["choices"])) < 0.06
    if task == "facts":
        assert len({row["context"] for row in rows}) == len(rows)
        true = {value for film in library_films("heldout") for value in (film.genre, *film.facts.values())}
        assert all(row["choices"][row["answer"]] in true for row in rows)
    if task == "verdicts":  # the majority, counted here
        for row in rows:
            review, _, _ = row["context"].rpartition("\n")
            sides = [read_sentence(sentence).sentiment for sentence in split_sentences(review)]
            majority = "recommended." if sides.count("positive") > len(sides) / 2 else "not recommended."
            assert row["choices"][row["answer"]] == majority


def test_names_of_parts_are_parsed_and_misspelt_ones_refused() -> None:
    assert parse_part("world:tasks/facts/heldout") == ("tasks/facts", "heldout")
    assert parse_part("world:tasks/facts") == ("tasks/facts", "train")
    with pytest.raises(DataError, match="did you mean world:tasks/facts?"):
        parse_part("world:tasks/fact/heldout")
    with pytest.raises(DataError, match="has no split 'test'; expected world:prompts/ and one of train, validation, heldout"):
        parse_part("world:prompts/test")
