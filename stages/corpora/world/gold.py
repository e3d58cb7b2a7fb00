"""The gold judge of the embedded world: a deterministic score in [0, 1] of how well a completion does what its instruction asks.

No training step sees it. It reads the completion with the world's own grammar, sentence by sentence; a sentence that the grammar cannot
have written earns nothing and makes the rest worth less, so a pile of right words is no review.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.corpora.world.language import Request, read_request, read_sentence, split_sentences
from stages.errors import DataError

# What a fully coherent, unrepetitive review earns for each part of the request.
WEIGHTS = {"sentiment": 0.35, "aspects": 0.25, "subject": 0.15, "length": 0.25}
# The same for an inquiry, which also asks for a fact.
INQUIRY_WEIGHTS = {"sentiment": 0.25, "aspects": 0.20, "subject": 0.10, "length": 0.20, "facts": 0.25}
LENGTH_CREDIT = {0: 1.0, 1: 0.5, 2: 0.2}


def score(prompt: str, completion: str) -> float:
    """Gold score of one completion, in [0, 1]. Raises DataError where ``prompt`` is no instruction of the world."""
    return parts(prompt, completion)["score"]


def score_batch(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """``score`` for each pair: the judge in the form that recipes name (stages.corpora.world.gold:score_batch)."""
    return [score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def parts(prompt: str, completion: str) -> dict[str, float]:
    """The score and what it is made of, each in [0, 1].

    ``score`` = coherence^2 * freshness * (0.35 sentiment + 0.25 aspects + 0.15 subject + 0.25 length)
    Of an inquiry: coherence^2 * freshness * (0.25 sentiment + 0.2 aspects + 0.1 subject + 0.2 length + 0.25 facts)
    """
    request = read_request(prompt)
    if request is None:
        raise DataError(f"the gold judge knows only instructions of the embedded world (world:prompts), and got {prompt[:80]!r}")
    return judge(request, completion)


def judge(request: Request, completion: str) -> dict[str, float]:
    """``parts`` for a request that was read already."""
    texts = split_sentences(completion)
    readings = [read_sentence(text) for text in texts]
    read = [reading for reading in readings if reading is not None]
    weights = WEIGHTS if request.fact is None else INQUIRY_WEIGHTS
    if not read:
        return dict.fromkeys((*weights, "coherence", "freshness", "score"), 0.0)
    mentioned = {aspect for sentence in read for aspect in sentence.aspects}
    asked = set(request.aspects)
    # An aspect nobody asked about counts as half a miss: a list of all aspects must not pass for an answer.
    missed = len(asked - mentioned) + 0.5 * len(mentioned - asked)
    titles = {sentence.title for sentence in read if sentence.title}
    genres = {sentence.genre for sentence in read if sentence.genre}
    subject = 0.7 * (titles == {request.film.title}) + 0.3 * (genres == {request.film.genre})
    words = [word for text in texts for word in text.lower().strip(".").split() if len(word) > 4]
    opinions = [sentence for sentence in read if sentence.fact is None]
    found = {
        "sentiment": sum(sentence.sentiment == request.sentiment for sentence in opinions) / max(1, len(opinions)),
        "aspects": max(0.0, 1 - missed / len(asked)),
        "subject": subject,
        "length": LENGTH_CREDIT.get(abs(len(texts) - request.sentences), 0.0),
        "coherence": len(read) / len(texts),
        # Sentences said twice, and adjectives used again and again.
        "freshness": len(set(texts)) / len(texts) * min(1.0, 1.25 * len(set(words)) / max(1, len(words))),
    }
    if request.fact is not None:
        stated = {sentence.fact for sentence in read if sentence.fact is not None}
        true = set(request.film.facts.items())
        # What is false about the film costs half of what the right answer earns: a list of guesses must not pass for knowledge.
        found["facts"] = max(0.0, ((request.fact, request.film.facts[request.fact]) in stated) - 0.5 * len(stated - true))
    total = sum(weight * found[name] for name, weight in weights.items())
    return {**found, "score": found["coherence"] ** 2 * found["freshness"] * total}
