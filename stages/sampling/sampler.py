"""The interface ``Sampler``, which completes prompts with the weights of one model, and its local implementation.

Rollouts, evaluation, data collection and the terminal use this interface only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stages.config import GenerationSettings
from stages.errors import LaunchError
from stages.json_types import JsonObject
from stages.sampling.generation import Finished, Generated, OnFinished, ending_tokens, generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel


class SamplerLost(LaunchError):
    """The sampling engine was lost. ``completed``: the completions that were finished, by the index of their prompt."""

    def __init__(self, message: str, completed: dict[int, Finished] | None = None) -> None:
        super().__init__(message)
        self.completed = completed or {}


class Sampler(Protocol):
    """Completes prompts with one model.

    ``is_local``: whether the completions and their log-probabilities come from the model object in this process.
    """

    is_local: bool

    def take_weights(self) -> None:
        """Make the sampler use the model's current weights. Call it on every process after the weights have changed."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
        *,
        on_finished: OnFinished | None = None,
    ) -> Generated:
        """Sample one completion for each prompt (token ids).

        ``seeds`` has one random seed per prompt. The random stream of a completion depends on its seed only. ``on_finished`` gets every
        completion once, soon after it has ended, while others are still running. It must return quickly and must not use the model.
        """

    def sleep(self) -> None:
        """Release the memory that training can use, until the next ``take_weights``. Call it on every process."""

    def report(self) -> JsonObject:
        """A description of the sampling engine for the summary of a run."""


class ServedSampler(Sampler, Protocol):
    """A sampler outside this process. It keeps the weights of its last ``take_weights`` while those of the model change."""

    def save_weights(self, folder: Path) -> None:
        """Copy the weights that it samples with into ``folder``. Call it on the first process only."""

    def restore_weights(self, folder: Path) -> None:
        """Sample with the weights that ``save_weights`` copied into ``folder``. Call it on every process."""

    def revive(self) -> bool:
        """Bring the engine back after ``SamplerLost``, with the same weights. Call it on every process.

        Returns whether sampling can go on; all processes get the same answer.
        """


class LocalSampler:
    """Samples from the model object itself, in this process."""

    is_local = True

    def __init__(self, model: TransformersModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def take_weights(self) -> None:
        """Do nothing: this sampler uses the model object directly."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
        *,
        on_finished: OnFinished | None = None,
    ) -> Generated:
        """Call ``generate`` with the model's stop tokens; raises the same errors."""
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

    def sleep(self) -> None:
        """Do nothing: the workspace that is kept for the next call (see ``workspace``) is a small share of a GPU's memory."""

    def report(self) -> JsonObject:
        """The engine name ``local``."""
        return {"engine": "local"}
