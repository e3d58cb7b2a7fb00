"""Simulated annotators: each weighs the parts of a good review differently, is drawn to something that does not matter, and errs.

What they share is close to the gold judge; what they like beyond it is what a reward model trained on their rankings can be led astray by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from stages.corpora.world.gold import INQUIRY_WEIGHTS, WEIGHTS, judge
from stages.corpora.world.language import Request, read_request
from stages.corpora.world.lexicon import lexicon
from stages.errors import DataError

NUM_ANNOTATORS = 12


@dataclass(frozen=True)
class Annotator:
    """One simulated person. Utilities lie around [0, 1]; noise and tie_width are in the same unit."""

    name: str
    weights: dict[str, float]
    likes_length: float  # utility per word, up to forty
    likes_emphasis: float  # utility per emphatic adverb, up to four
    noise: float  # standard deviation of an error drawn per completion
    tie_width: float  # completions closer than this rank the same
    inquiry_weights: dict[str, float]  # as weights, where a fact is asked for

    def utility(self, request: Request, completion: str) -> float:
        """How much this annotator likes a completion, before the error of the day."""
        found = judge(request, completion)
        words = completion.lower().strip(".").split()
        emphasis = sum(word in lexicon().adverbs for word in words)
        weights = self.weights if request.fact is None else self.inquiry_weights
        total = sum(weight * found[name] for name, weight in weights.items())
        biases = self.likes_length * min(len(words), 40) + self.likes_emphasis * min(emphasis, 4)
        return found["coherence"] * (0.5 + 0.5 * found["freshness"]) * total + biases

    def rank(self, random: Random, request: Request, completions: list[str], *, haste: float = 1.0) -> list[int]:
        """Ranks of ``completions``, 0 best; neighbours within the tie width share a rank. ``haste`` multiplies the noise."""
        felt = [self.utility(request, completion) + random.gauss(0, haste * self.noise) for completion in completions]
        order = sorted(range(len(felt)), key=lambda index: -felt[index])
        ranks, rank = [0] * len(felt), 0
        for place, index in enumerate(order):
            if place and felt[order[place - 1]] - felt[index] > self.tie_width:
                rank = place
            ranks[index] = rank
        return ranks


@cache
def annotators() -> tuple[Annotator, ...]:
    """The same people every time."""
    made = []
    for number in range(NUM_ANNOTATORS):
        random = Random(f"annotator {number}")
        raw = {name: weight * random.uniform(0.6, 1.4) for name, weight in WEIGHTS.items()}
        total = sum(raw.values())
        tastes = {
            "likes_length": random.uniform(0.0, 0.002),
            "likes_emphasis": random.uniform(0.0, 0.03),
            "noise": random.uniform(0.03, 0.12),
            "tie_width": random.uniform(0.005, 0.03),
        }
        # The same leanings where a fact is asked for; how much somebody minds a false one is a matter of its own.
        leaning = {name: raw[name] / weight for name, weight in WEIGHTS.items()} | {"facts": random.uniform(0.6, 1.4)}
        inquiry = {name: weight * leaning[name] for name, weight in INQUIRY_WEIGHTS.items()}
        made.append(
            Annotator(
                name=f"annotator-{number:02d}",
                weights={name: weight / total for name, weight in raw.items()},
                inquiry_weights={name: weight / sum(inquiry.values()) for name, weight in inquiry.items()},
                **tastes,
            )
        )
    return tuple(made)


def label_batch(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """How much each completion pleases the annotator who got its prompt, errors included: labels for ``collect.judge``.

    One annotator labels all completions of a prompt, and says the same of the same text every time. Raises DataError for a prompt that is
    no instruction of the world.
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        request = read_request(prompt)
        if request is None:
            raise DataError(f"the annotators know only instructions of the embedded world (world:prompts), and got {prompt[:80]!r}")
        annotator = Random(f"labels {prompt}").choice(annotators())
        error = Random(f"labels {annotator.name} {prompt} {completion}").gauss(0, annotator.noise)
        scores.append(annotator.utility(request, completion) + error)
    return scores


def opinion(annotator: str, prompt: Any, completions: Sequence[str]) -> list[float]:
    """How much each completion pleases the annotator of this name, errors included: for ``people.simulate``.

    A name that is none of the twelve gets one of them. Raises DataError for a prompt that is no instruction of the world.
    """
    request = read_request(prompt) if isinstance(prompt, str) else None
    if request is None:
        raise DataError(f"the annotators know only instructions of the embedded world (world:prompts), and got {str(prompt)[:80]!r}")
    known = {person.name: person for person in annotators()}
    person = known.get(annotator) or Random(f"who is {annotator}").choice(annotators())
    errors = (Random(f"opinion {annotator} {prompt} {completion}").gauss(0, person.noise) for completion in completions)
    return [person.utility(request, completion) + error for completion, error in zip(completions, errors, strict=True)]
