"""A Python function as a reward source. N completions.

Only the function that the recipe names is imported. Its signature determines its arguments (stages/rewards/signature.py). A score of None
means that the function does not apply to that completion.
"""

from __future__ import annotations

import logging
import math
import operator
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from stages.corpora.conversations.messages import Prompt, transcript
from stages.errors import TrainingError
from stages.json_types import JsonObject
from stages.rewards.details import NOTHING, Details, Judgement, checked
from stages.rewards.signature import GIVEN, Signature, load_function, signature_of
from stages.rewards.source import RewardSource
from stages.rewards.texts import conversation

logger = logging.getLogger(__name__)
LONGEST_WAIT = 60.0  # seconds between two attempts


class Hung(Exception):
    """A function call did not return in time."""


Calls = SimpleQueue[tuple[list[object], JsonObject] | None]
Outcomes = SimpleQueue[tuple[object, BaseException | None]]


class _Worker:
    """A thread that calls a function. It is a daemon thread: Python cannot end a hanging thread, so the process must not wait for it.

    The thread ends when nothing refers to this object any more. It would otherwise keep the function, and the models that it uses.
    """

    def __init__(self, function: Callable[..., object], name: str) -> None:
        self._calls: Calls = SimpleQueue()
        self._outcomes: Outcomes = SimpleQueue()
        threading.Thread(target=_serve, args=(function, self._calls, self._outcomes), name=name, daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def call(self, arguments: list[object], named: JsonObject, timeout: float | None) -> tuple[object, BaseException | None]:
        """Call the function; returns (its result, the exception that it raised or None). Raises Hung after ``timeout`` seconds."""
        self._calls.put((arguments, named))
        try:
            return self._outcomes.get(timeout=timeout)
        except Empty:
            raise Hung from None


def _serve(function: Callable[..., object], calls: Calls, outcomes: Outcomes) -> None:
    """Call ``function`` with the arguments in ``calls`` until there is a None."""
    while (call := calls.get()) is not None:
        arguments, named = call
        try:
            outcomes.put((function(*arguments, **named), None))
        except BaseException as error:  # also SystemExit and the like: the caller reports them
            outcomes.put((None, error))
        del call, arguments, named


class FunctionSource(RewardSource):
    """Calls a function with the arguments that its signature names.

    ``timeout``: in seconds; None: no limit. ``retries``: further attempts after an exception or a time-out, with a growing wait between
    them. An invalid return value is an error of the function and causes no retry.
    """

    may_abstain = True

    def __init__(
        self,
        name: str,
        address: str,
        *,
        timeout: float | None = None,
        retries: int = 0,
        backoff_seconds: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name, self.address, self.timeout = name, address, timeout
        self.retries, self.backoff_seconds, self._sleep = retries, backoff_seconds, sleep
        self.function = load_function(address)
        self.signature: Signature = signature_of(self.function, address)
        self._worker: _Worker | None = None

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """One score per completion [N]; NaN where the function returned None.

        Raises TrainingError if the function raises, hangs, or returns anything other than N finite numbers or None values.
        """
        returned = self._call(prompts, completions, details)
        if not isinstance(returned, list | tuple):
            return Judgement(self._numbers(returned, completions))
        scores = self._numbers([0.0 if score is None else score for score in returned], completions)
        scores[[row for row, score in enumerate(returned) if score is None]] = math.nan
        return Judgement(scores)

    def _numbers(self, returned: Any, completions: Sequence[str]) -> Tensor:
        try:
            scores = torch.as_tensor(returned, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TrainingError(
                f"reward function {self.address} returned {returned!r:.80}; expected one number, or None, per completion"
            ) from error
        return checked(scores, self.name, completions)

    def _call(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details) -> Any:
        arguments, named = self._arguments(prompts, completions, details)
        for attempt in range(self.retries + 1):
            if attempt:
                self._sleep(min(LONGEST_WAIT, self.backoff_seconds * 2 ** (attempt - 1)))
            if self._worker is None:
                self._worker = _Worker(self.function, f"reward {self.address}")
            try:
                # ``call`` returns the function's exception. An exception raised here, such as a request to stop, must propagate.
                value, cause = self._worker.call(arguments, named, self.timeout)
            except Hung:
                self._worker, cause = None, None
                reason = f"did not return within {self.timeout:g} s for {len(completions)} completions"
                advice = "; make it faster, or raise timeout_seconds of this reward"
            else:
                if cause is None:
                    return value
                reason, advice = f"raised {type(cause).__name__}{f': {cause}' if str(cause) else ''}{_line_of(cause)}", ""
                if not isinstance(cause, Exception):
                    break
            if attempt < self.retries:
                logger.warning("reward function %s %s; attempt %d of %d follows", self.address, reason, attempt + 2, self.retries + 1)
        tried = f" (attempt {attempt + 1} of {self.retries + 1})" if self.retries else ""
        raise TrainingError(f"reward function {self.address} {reason}{tried}{advice}") from cause

    def _arguments(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details) -> tuple[list[object], JsonObject]:
        given = {
            "prompts": [transcript(prompt) for prompt in prompts],
            "completions": list(completions),
            "messages": [conversation(prompt) for prompt in prompts],
            "completion_ids": None if details.completion_ids is None else [list(ids) for ids in details.completion_ids],
        }
        try:
            return self.signature.arguments(given, {name: list(values) for name, values in details.columns.items()})
        except LookupError as error:
            name = error.args[0]
            why = (
                "no model of this run wrote these completions, so they have no token ids"
                if name in GIVEN
                else "this data has no such column"
            )
            raise TrainingError(f"reward function {self.address} needs {name!r}, but {why}") from None


def _line_of(error: BaseException) -> str:
    """`` (file.py, line 3)``: where the reward function, or what it called, raised ``error``."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is ``_serve``
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


class SpanFunctionSource(FunctionSource):
    """Calls a function that returns, per completion, a list of (character position, score)."""

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """The sum of the spans of each completion, and the spans. Where the function returned None: the score NaN and no spans."""
        spans = self._spans(prompts, completions, details)
        scores = torch.tensor([math.nan if row is None else float(sum(score for _, score in row)) for row in spans])
        return Judgement(scores, spans=[row or [] for row in spans])

    def _spans(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details) -> list[list[tuple[int, float]] | None]:
        """The spans of every completion, or None.

        Raises TrainingError if the result has another form, a position is outside its text, or a score is not finite.
        """
        returned = self._call(prompts, completions, details)
        try:
            spans = [None if row is None else [(operator.index(position), float(score)) for position, score in row] for row in returned]
        except (TypeError, ValueError, OverflowError) as error:
            expected = "expected one list of (character position, score) per completion"
            raise TrainingError(f"reward function {self.address} returned {returned!r:.80}; {expected}") from error
        if len(spans) != len(completions):
            expected = f"expected one per completion ({len(completions)})"
            raise TrainingError(f"reward function {self.address} returned {len(spans)} lists; {expected}")
        for row, text in zip(spans, completions, strict=True):
            for position, score in row or []:
                if not 0 <= position <= len(text):
                    has = f"{text[:80]!r} has {len(text)} characters"
                    raise TrainingError(f"reward function {self.address} scored position {position}, and {has}; expected 0 to {len(text)}")
                if not math.isfinite(score):
                    raise TrainingError(
                        f"reward function {self.address} returned {score} for the completion {text[:80]!r}; expected a finite number"
                    )
        return spans
