"""The digest of a callable in memory: it changes with what the callable computes, and with nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from stages.api.functions import address_of, shown_name, unchanged_by_the_run
from stages.api.identity import digest_of

Reward = Callable[..., Any]


def defined(source: str, **names: object) -> Reward:
    """The function ``score`` that a notebook cell defines. ``names``: the other names of the notebook."""
    space: dict[str, Any] = {"__name__": "__main__", **names}
    exec(source, space)
    score: Reward = space["score"]
    return score


def scaled(prompts: list[str], completions: list[str], scale: float = 1.0) -> list[float]:
    return [scale * len(text) for text in completions]


class Scaled:
    """A reward with a state."""

    def __init__(self, scale: Any) -> None:
        self.scale, self.calls, self.lock = scale, 0, threading.Lock()

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        self.calls += 1
        return [float(self.scale) for _ in completions]

    def score(self, prompts: list[str], completions: list[str]) -> list[float]:
        return self(prompts, completions)


def capturing(value: object) -> Reward:
    return lambda prompts, completions: [value for _ in completions]


USES = "def score(prompts, completions):\n    return [{} for text in completions]\n"
DIFFERENT: dict[str, tuple[Callable[[], Reward], Callable[[], Reward]]] = {
    "arguments of a partial": (lambda: partial(scaled, scale=2.0), lambda: partial(scaled, scale=3.0)),
    "state of an object": (lambda: Scaled(1.0), lambda: Scaled(2.0)),
    "object of a bound method": (lambda: Scaled(1.0).score, lambda: Scaled(2.0).score),
    "two lambdas in one line": (lambda: [lambda p, c: [1], lambda p, c: [2]][0], lambda: [lambda p, c: [1], lambda p, c: [2]][1]),
    "captured array, whose repr is shortened": (
        lambda: capturing(np.arange(5000)),
        lambda: capturing(np.where(np.arange(5000) == 2500, 0, np.arange(5000))),
    ),
    "captured tensor": (lambda: capturing(torch.zeros(3000)), lambda: capturing(torch.zeros(3000).index_fill(0, torch.tensor([1500]), 1))),
    "weights of a captured module": (lambda: capturing(_layer(0)), lambda: capturing(_layer(1))),
    "default value": (
        lambda: defined("K = 1\n" + USES.format("k").replace("s)", "s, k=K)")),
        lambda: defined("K = 2\n" + USES.format("k").replace("s)", "s, k=K)")),
    ),
    "global constant": (lambda: defined(USES.format("WEIGHT"), WEIGHT=1.0), lambda: defined(USES.format("WEIGHT"), WEIGHT=2.0)),
    "global list": (
        lambda: defined(USES.format("text in GOOD"), GOOD=["a"]),
        lambda: defined(USES.format("text in GOOD"), GOOD=["a", "b"]),
    ),
    "global used inside a nested function": (
        lambda: defined(USES.format("(lambda: WEIGHT)()"), WEIGHT=1.0),
        lambda: defined(USES.format("(lambda: WEIGHT)()"), WEIGHT=2.0),
    ),
    "helper function": (
        lambda: defined("def helper(text):\n    return 1.0\n" + USES.format("helper(text)")),
        lambda: defined("def helper(text):\n    return 2.0\n" + USES.format("helper(text)")),
    ),
    "helper class": (
        lambda: defined("class H:\n    def f(self):\n        return 1.0\n" + USES.format("H().f()")),
        lambda: defined("class H:\n    def f(self):\n        return 2.0\n" + USES.format("H().f()")),
    ),
    "captured set": (lambda: capturing({"a", "b"}), lambda: capturing({"a", "c"})),
}


def _layer(fill: float) -> torch.nn.Module:
    layer = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(layer.weight, fill)
    torch.nn.init.zeros_(layer.bias)
    return layer


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_callable_that_computes_something_else_has_another_address(case: str) -> None:
    first, second = DIFFERENT[case]
    assert address_of(first()) == address_of(first())
    assert address_of(first()) != address_of(second())


def test_comments_and_lines_do_not_count() -> None:
    plain = USES.format("len(text)")
    moved = "# a comment\n\n\n" + plain.replace("return", "# count\n    return")
    assert digest_of(defined(plain)) == digest_of(defined(moved))


def test_globals_that_the_function_assigns_do_not_count() -> None:
    counting = "def score(prompts, completions):\n    global calls\n    calls += 1\n    return [0.0 for _ in completions]\n"
    assert digest_of(defined(counting, calls=0)) == digest_of(defined(counting, calls=7))


def test_objects_with_cycles_or_without_a_pickle_have_a_digest() -> None:
    holder: list[object] = [threading.Lock(), (step for step in range(2))]
    holder.append(holder)
    assert digest_of(capturing(holder)) == digest_of(capturing(holder))


def test_a_callable_that_its_own_calls_change_keeps_its_address() -> None:
    reward = Scaled(1.0)
    with unchanged_by_the_run():
        before = address_of(reward)
        reward([], ["a"])  # the run calls it
    assert address_of(reward) == before
    reward.scale = 2.0  # the user changes it
    assert address_of(reward) != before


def test_a_partial_has_the_name_of_its_function() -> None:
    assert shown_name(partial(scaled, scale=2.0)) == "scaled"
    assert ":scaled_" in address_of(partial(scaled, scale=2.0))
