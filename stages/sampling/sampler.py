"""The seam between those who want completions and what makes them: a ``Sampler`` completes prompts with the weights of one model.

Who samples (rollouts, evaluation, collecting, the terminal) knows this interface alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from stages.config import GenerationSettings
from stages.errors import LaunchError
from stages.sampling.generation import Generated, OnFinished, ending_tokens, generate


class SamplerLost(LaunchError):
    """What sampled is gone. ``completed``: the token ids of the completions that were done by then, by the place of their prompt."""

    def __init__(self, message: str, completed: dict[int, list[int]] | None = None) -> None:
        super().__init__(message)
        self.completed = completed or {}


class Sampler(Protocol):
    """Completes prompts by one model.

    ``is_local``: whether the completions and their log-probabilities come from the model object of this process.
    """

    is_local: bool

    def take_weights(self) -> None:
        """Make sure that it samples with the model's weights as they are now. Call it after the weights changed, on every process."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
        *,
        on_finished: OnFinished | None = None,
    ) -> Generated:
        """One completion for each prompt (token ids); ``seeds`` has one number for each. A row's stream depends on its seed alone.

        ``on_finished`` gets every completion once, soon after it has ended, while others are still sampled. It must return quickly and
        must not use the model.
        """

    def rest(self) -> None:
        """Give back what sampling needs and training can use, until the next ``take_weights``. Call it on every process."""

    def report(self) -> dict[str, Any]:
        """What sampled, for the summary of a run."""


class LocalSampler:
    """Samples from the model object itself, in this process."""

    is_local = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def take_weights(self) -> None:
        """Nothing: it reads the model itself."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
        *,
        on_finished: OnFinished | None = None,
    ) -> Generated:
        """See ``generate``, whose errors it raises."""
        stop, late = ending_tokens(self.model, self.tokenizer, settings)
        return generate(
            self.model,
            prompts,
            settings,
            seeds=seeds,
            stop_ids=stop,
            late_stop_ids=late,
            pad_token_id=self.tokenizer.pad_token_id,
            on_finished=on_finished,
        )

    def rest(self) -> None:
        """Nothing: what it keeps for the next call (see ``workspace``) is a small share of a GPU's memory."""

    def report(self) -> dict[str, Any]:
        """That it was this one."""
        return {"engine": "local"}
