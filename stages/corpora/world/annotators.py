"""Simulated annotators. Each one weighs the parts of a good review differently, has irrelevant biases, and makes errors.

Their shared preferences are close to the gold judge. Their biases are what a reward model trained on their rankings can exploit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from stages.corpora.world.gold import INQUIRY_WEIGHTS, WEIGHTS, judge
from stages.corpora.world.language import Request, read_request
from stages.corpora.world.lexicon import lexicon
from stages.errors import DataError

NUM_ANNOTATORS = 12


@dataclass(frozen=True)
class Annotator:
    """One simulated annotator. Utilities are about in [0, 1]; noise and tie_width have the same unit."""

    name: str
    weights: dict[str, float]
    likes_length: float  # utility per word, up to 40 words
    likes_emphasis: float  # utility per emphatic adverb, up to 4
    noise: float  # standard deviation of the error per completion
    tie_width: float  # completions closer than this share a rank
    inquiry_weights: dict[str, float]  # like weights, for requests that ask for a fact

    def utility(self, request: Request, completion: str) -> float:
        """How much this annotator likes a completion, without noise."""
        components = judge(request, completion)
        words = completion.lower().strip(".").split()
        emphasis = sum(word in lexicon().adverbs for word in words)
        weights = self.weights if request.fact is None else self.inquiry_weights
        total = sum(weight * components[name] for name, weight in weights.items())
        biases = self.likes_length * min(len(words), 40) + self.likes_emphasis * min(emphasis, 4)
        return components["coherence"] * (0.5 + 0.5 * components["freshness"]) * total + biases

    def rank(self, random: Random, request: Request, completions: list[str], *, haste: float = 1.0) -> list[int]:
        """Ranks of ``completions`` (0 is best). Neighbours within the tie width share a rank. ``haste`` multiplies the noise."""
        felt = [self.utility(request, completion) + random.gauss(0, haste * self.noise) for completion in completions]
        order = sorted(range(len(felt)), key=lambda index: -felt[index])
        ranks, rank = [0] * len(felt), 0
        for position, index in enumerate(order):
            if position and felt[order[position - 1]] - felt[index] > self.tie_width:
                rank = position
            ranks[index] = rank
        return ranks


@cache
def annotators() -> tuple[Annotator, ...]:
    """The annotators, identical in every run."""
    made = []
    for index in range(NUM_ANNOTATORS):
        random = Random(f"annotator {index}")
        raw = {name: weight * random.uniform(0.6, 1.4) for name, weight in WEIGHTS.items()}
        total = sum(raw.values())
        tastes = {
            "likes_length": random.uniform(0.0, 0.002),
            "likes_emphasis": random.uniform(0.0, 0.03),
            "noise": random.uniform(0.03, 0.12),
            "tie_width": random.uniform(0.005, 0.03),
        }
        # The same preferences for requests that ask for a fact; the weight of a wrong fact is drawn separately.
        leaning = {name: raw[name] / weight for name, weight in WEIGHTS.items()} | {"facts": random.uniform(0.6, 1.4)}
        inquiry = {name: weight * leaning[name] for name, weight in INQUIRY_WEIGHTS.items()}
        made.append(
            Annotator(
                name=f"annotator-{index:02d}",
                weights={name: weight / total for name, weight in raw.items()},
                inquiry_weights={name: weight / sum(inquiry.values()) for name, weight in inquiry.items()},
                **tastes,
            )
        )
    return tuple(made)


def label_batch(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Noisy utility of each completion for the annotator of its prompt: labels for ``collect.judge``.

    One annotator labels all completions of a prompt and always gives the same label to the same text. Raises DataError for a prompt that is
    not an instruction of the world.
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        request = read_request(prompt)
        if request is None:
            raise DataError(f"expected an instruction of the embedded world (world:prompts) for the annotators, got {prompt[:80]!r}")
        annotator = Random(f"labels {prompt}").choice(annotators())
        error = Random(f"labels {annotator.name} {prompt} {completion}").gauss(0, annotator.noise)
        scores.append(annotator.utility(request, completion) + error)
    return scores


def opinion(annotator: str, prompt: object, completions: Sequence[str]) -> list[float]:
    """Noisy utility of each completion for the annotator ``annotator``: for ``people.simulate``.

    An unknown name is mapped to one of the twelve annotators. Raises DataError for a prompt that is not an instruction of the world.
    """
    request = read_request(prompt) if isinstance(prompt, str) else None
    if request is None:
        raise DataError(f"expected an instruction of the embedded world (world:prompts) for the annotators, got {str(prompt)[:80]!r}")
    known = {person.name: person for person in annotators()}
    person = known.get(annotator) or Random(f"who is {annotator}").choice(annotators())
    errors = (Random(f"opinion {annotator} {prompt} {completion}").gauss(0, person.noise) for completion in completions)
    return [person.utility(request, completion) + error for completion, error in zip(completions, errors, strict=True)]
