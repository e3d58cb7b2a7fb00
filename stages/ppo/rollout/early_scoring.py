"""Scoring by remote rewards in parallel: they score finished completions while the policy still samples or is measured."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from stages.ppo.rollout.episodes import Episodes
from stages.rewards.background import RemoteSource
from stages.rewards.details import Details
from stages.rewards.source import CombinedReward
from stages.sampling.generation import Finished, OnFinished, completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EarlyScoring:
    """A context manager. Inside it, finished completions are sent to the remote reward sources.

    A source returns its scores, and raises its errors, when it is asked for the scores of all completions. An exception inside the context,
    such as a request to stop, discards the scores that were requested early.
    """

    def __init__(self, rewards: Sequence[CombinedReward], tokenizer: PreTrainedTokenizerBase, episodes: Episodes) -> None:
        self.sources = [leaf for reward in rewards for leaf in reward.leaves() if isinstance(leaf, RemoteSource)]
        self._tokenizer, self._episodes = tokenizer, episodes

    def __enter__(self) -> EarlyScoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.forget()

    def forget(self) -> None:
        """Discard the scores that were requested."""
        for source in self.sources:
            source.forget()

    @property
    def on_finished(self) -> OnFinished | None:
        """The callback for finished completions. None if no source is remote: then sampling need not copy tokens from the GPU early."""
        return self._begin if self.sources else None

    def _begin(self, finished: list[Finished]) -> None:
        rows, responses = [one.row for one in finished], [one.response_ids for one in finished]
        completions = [completion_text(self._tokenizer, self._episodes.prompt_ids[one.row], one.response_ids) for one in finished]
        details = Details(self._episodes.details.rows(rows).columns, responses)
        for source in self.sources:
            source.begin([self._episodes.prompts[row] for row in rows], completions, details)

    def seconds(self) -> float:
        """Seconds of remote scoring so far, summed over the sources. The run did not wait during this time."""
        return sum(source.seconds_under_way() for source in self.sources)
