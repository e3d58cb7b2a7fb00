"""The embedded world: disjoint splits, equal draws, a judge that knows good from bad, annotators who mostly agree with it."""

from __future__ import annotations

from random import Random

import pytest

from stages.corpora.world import gold
from stages.corpora.world.annotators import annotators
from stages.corpora.world.language import draw_request, read_request, read_sentence, split_sentences
from stages.corpora.world.parts import PARTS, world_rows
from stages.corpora.world.writers import FLAWS, write_review
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


def test_every_request_and_sentence_reads_back() -> None:
    random = Random(1)
    for _ in range(300):
        request = draw_request(random, "train")
        found = read_request(request.text)
        assert (found.film, found.sentiment, found.aspects, found.sentences) == (
            request.film, request.sentiment, request.aspects, request.sentences,
        )  # fmt: skip
        review = write_review(random, request)
        sentences = split_sentences(review)
        assert len(sentences) == request.sentences
        assert all(read_sentence(sentence) is not None for sentence in sentences), review


def test_gold_by_hand() -> None:
    assert gold.score(PROMPT, "The romance Bitter Morning is weak with dull acting.") <= 1
    perfect = write_review(Random(0), read_request(PROMPT))
    assert gold.parts(PROMPT, perfect)["score"] == pytest.approx(1.0), perfect
    assert gold.score(PROMPT, "") == 0 and gold.score(PROMPT, "acting negative Bitter Morning romance") == 0
    # said twice: one sentence too many (length 0.5 of 0.25), half of the sentences new
    twice = gold.parts(PROMPT, f"{perfect} {perfect}")
    assert twice["length"] == 0.5 and twice["freshness"] <= 0.5
    assert twice["score"] <= 0.5 * (1 - 0.125)
    with pytest.raises(DataError, match="knows only instructions of the embedded world"):
        gold.score("Tell me a joke.", "Ha.")


@pytest.mark.parametrize("flaw", FLAWS)
def test_every_flaw_costs(flaw) -> None:
    random = Random(flaw)
    good = bad = 0.0
    for _ in range(60):
        request = draw_request(random, "train")
        good += gold.judge(request, write_review(random, request))["score"] / 60
        bad += gold.judge(request, write_review(random, request, (flaw,)))["score"] / 60
    assert good > 0.97 and bad < good - 0.04, (good, bad)


def test_annotators_agree_with_the_judge_mostly_and_not_always() -> None:
    rows = world_rows("world:comparisons/heldout")
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
    assert 0.75 < agree / total < 0.97  # useful, and imperfect
    assert len({person.name for person in annotators()}) == 12
