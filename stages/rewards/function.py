"""A Python function as a reward source: only the one that the recipe names is imported."""

from __future__ import annotations

import importlib
import operator
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from stages.corpora.messages import Prompt
from stages.corpora.prompts import plain_text
from stages.errors import RecipeError, TrainingError


def load_function(address: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    """The function at ``package.module:name``. Raises RecipeError where there is none."""
    module, _, name = address.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(f"function {address!r}: cannot import {module} ({error}); is it installed, or on PYTHONPATH?") from error
    except Exception as error:  # of the module's own
        raise RecipeError(f"function {address!r}: cannot import {module} ({type(error).__name__}: {error})") from error
    if not hasattr(found, name):
        raise RecipeError(f"function {address!r}: {module} has no {name!r}")
    found = getattr(found, name)
    if not callable(found):
        raise RecipeError(f"function {address!r} is {type(found).__name__}; expected a function of (prompts, completions)")
    return found


class FunctionSource:
    """Calls ``function(prompts, completions) -> scores`` with lists of texts."""

    def __init__(self, name: str, address: str, *, timeout: float | None = None) -> None:
        self.name, self.address, self.timeout = name, address, timeout
        self.function = load_function(address)
        self._calls: SimpleQueue[tuple[list[str], list[str]]] = SimpleQueue()
        self._outcomes: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        # A daemon, and left behind where the function hangs: nothing can end a thread from outside.
        self._thread = threading.Thread(target=self._serve, name=f"reward {address}", daemon=True)

    def _serve(self) -> None:
        while True:
            texts = self._calls.get()
            try:
                self._outcomes.put((self.function(*texts), None))
            except BaseException as error:  # also what is meant to end a program: this one says why it ends
                self._outcomes.put((None, error))

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Scores [N]. Raises TrainingError where the function raises, hangs, or returns something that is no list of numbers."""
        scores = self._call(prompts, completions)
        try:
            return torch.as_tensor(scores, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TrainingError(f"reward function {self.address} returned {scores!r:.80}; expected one number per completion") from error

    def _call(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Any:
        if not self._thread.is_alive():
            self._thread.start()
        self._calls.put(([plain_text(prompt) for prompt in prompts], list(completions)))
        try:
            value, error = self._outcomes.get(timeout=self.timeout)
        except Empty:
            raise TrainingError(
                f"reward function {self.address} did not return within {self.timeout:g} s for {len(completions)} completions; mend it, or "
                "raise timeout_seconds of this reward"
            ) from None
        if error is not None:
            raise TrainingError(f"reward function {self.address} raised {type(error).__name__}: {error}") from error
        return value


class SpanFunctionSource(FunctionSource):
    """Calls ``function(prompts, completions) -> lists of (character position, score)``, one list per completion."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """The sums of the spans [N]."""
        return torch.tensor([float(sum(score for _, score in row)) for row in self.score_spans(prompts, completions)])

    def score_spans(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[tuple[int, float]]]:
        """Raises TrainingError where the function returns something else, or a place outside its text."""
        found = self._call(prompts, completions)
        try:
            spans = [[(operator.index(place), float(score)) for place, score in row] for row in found]
        except (TypeError, ValueError) as error:
            expected = "expected one list of (character position, score) per completion"
            raise TrainingError(f"reward function {self.address} returned {found!r:.80}; {expected}") from error
        if len(spans) != len(completions):
            expected = f"expected one per completion ({len(completions)})"
            raise TrainingError(f"reward function {self.address} returned {len(spans)} lists; {expected}")
        for row, text in zip(spans, completions, strict=True):
            outside = [place for place, _ in row if not 0 <= place <= len(text)]
            if outside:
                has = f"{text[:80]!r} has {len(text)} characters"
                raise TrainingError(f"reward function {self.address} scored position {outside[0]}, and {has}")
        return spans
