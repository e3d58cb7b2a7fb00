"""The gold judge of the embedded world: a deterministic score in [0, 1] of how well a completion follows its instruction.

No training step sees it. It parses each sentence with the world's grammar. A sentence that the grammar cannot produce scores nothing and
lowers the score of the others, so a list of correct words does not score as a review.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.corpora.world.language import Request, read_request, read_sentence, split_sentences
from stages.errors import DataError

# Weights of the parts of a request, for a fully coherent review without repetition.
WEIGHTS = {"sentiment": 0.35, "aspects": 0.25, "subject": 0.15, "length": 0.25}
# Weights for an inquiry, which also asks for a fact.
INQUIRY_WEIGHTS = {"sentiment": 0.25, "aspects": 0.20, "subject": 0.10, "length": 0.20, "facts": 0.25}
LENGTH_CREDIT = {0: 1.0, 1: 0.5, 2: 0.2}


def score(prompt: str, completion: str) -> float:
    """Gold score of one completion, in [0, 1]. Raises DataError if ``prompt`` is not an instruction of the world."""
    return parts(prompt, completion)["score"]


def score_batch(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """``score`` for each pair, in the form that recipes can name (stages.corpora.world.gold:score_batch)."""
    return [score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def parts(prompt: str, completion: str) -> dict[str, float]:
    """The score and its components, each in [0, 1].

    ``score`` = coherence^2 * freshness * (0.35 sentiment + 0.25 aspects + 0.15 subject + 0.25 length)
    For an inquiry: coherence^2 * freshness * (0.25 sentiment + 0.2 aspects + 0.1 subject + 0.2 length + 0.25 facts)

    Raises DataError if ``prompt`` is not an instruction of the embedded world.
    """
    request = read_request(prompt)
    if request is None:
        raise DataError(f"expected an instruction of the embedded world (world:prompts) for the gold judge, got {prompt[:80]!r}")
    return judge(request, completion)


def judge(request: Request, completion: str) -> dict[str, float]:
    """``parts`` for a parsed request."""
    texts = split_sentences(completion)
    readings = [read_sentence(text) for text in texts]
    read = [reading for reading in readings if reading is not None]
    weights = WEIGHTS if request.fact is None else INQUIRY_WEIGHTS
    if not read:
        return dict.fromkeys((*weights, "coherence", "freshness", "score"), 0.0)
    mentioned = {aspect for sentence in read for aspect in sentence.aspects}
    asked = set(request.aspects)
    # An aspect that was not requested counts as half a miss, so that listing all aspects does not score well.
    missed = len(asked - mentioned) + 0.5 * len(mentioned - asked)
    titles = {sentence.title for sentence in read if sentence.title}
    genres = {sentence.genre for sentence in read if sentence.genre}
    subject = 0.7 * (titles == {request.film.title}) + 0.3 * (genres == {request.film.genre})
    words = [word for text in texts for word in text.lower().strip(".").split() if len(word) > 4]
    opinions = [sentence for sentence in read if sentence.fact is None]
    components = {
        "sentiment": sum(sentence.sentiment == request.sentiment for sentence in opinions) / max(1, len(opinions)),
        "aspects": max(0.0, 1 - missed / len(asked)),
        "subject": subject,
        "length": LENGTH_CREDIT.get(abs(len(texts) - request.sentences), 0.0),
        "coherence": len(read) / len(texts),
        # Penalizes repeated sentences and repeated adjectives.
        "freshness": len(set(texts)) / len(texts) * min(1.0, 1.25 * len(set(words)) / max(1, len(words))),
    }
    if request.fact is not None:
        stated = {sentence.fact for sentence in read if sentence.fact is not None}
        true = set(request.film.facts.items())
        # A false fact costs half of what the right one earns, so that listing guesses does not score well.
        components["facts"] = max(0.0, ((request.fact, request.film.facts[request.fact]) in stated) - 0.5 * len(stated - true))
    total = sum(weight * components[name] for name, weight in weights.items())
    return {**components, "score": components["coherence"] ** 2 * components["freshness"] * total}
