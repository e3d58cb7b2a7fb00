"""Rewards behind a server score what the policy has finished, while it samples on and its completions are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.corpora.messages import Prompt
from stages.rewards.background import RemoteSource
from stages.rewards.details import Details
from stages.rewards.source import CombinedReward
from stages.sampling.generation import Finished, OnFinished, completion_text


class EarlyScoring:
    """A context: inside, completions that are finished go to the remote ones among some reward sources.

    The sources give their scores, and meet their errors, when they are asked for the scores of all completions. An exception inside, such
    as a request to stop, drops what was begun.
    """

    def __init__(
        self,
        rewards: Sequence[CombinedReward],
        tokenizer: Any,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        details: Details,
    ) -> None:
        self.sources = [leaf for reward in rewards for leaf in reward.leaves() if isinstance(leaf, RemoteSource)]
        self._tokenizer, self._prompts, self._prompt_ids, self._details = tokenizer, prompts, prompt_ids, details

    def __enter__(self) -> EarlyScoring:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            for source in self.sources:
                source.forget()

    @property
    def on_finished(self) -> OnFinished | None:
        """What hears of finished completions; None where no source is remote, so that sampling does not wait for a GPU's tokens."""
        return self._begin if self.sources else None

    def _begin(self, finished: list[Finished]) -> None:
        rows, responses = [one.row for one in finished], [one.response_ids for one in finished]
        completions = [completion_text(self._tokenizer, self._prompt_ids[one.row], one.response_ids) for one in finished]
        details = Details(self._details.rows(rows).columns, responses)
        for source in self.sources:
            source.begin([self._prompts[row] for row in rows], completions, details)

    def seconds(self) -> float:
        """Seconds of remote scoring so far, summed over the sources: so long the run did not wait for them."""
        return sum(source.seconds_under_way() for source in self.sources)
