"""The interface of reward sources, ensembles of them, and their weighted sum. N completions.

A source gives one score per completion. With ``level: token`` it also gives spans: for each completion a list of (character position,
score) whose scores sum to the completion's score. Spans use character positions, because a source has its own tokenizer, or none.

A source may not apply to a completion, for example if a function returned None. Then its score is NaN, and the sum leaves it out. An error,
an infinite score, or a NaN that a source computed raises TrainingError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.corpora.conversations.messages import Prompt
from stages.errors import TrainingError
from stages.rewards.details import NOTHING, Details, Judgement, Spans, applies, checked
from stages.rl.combining import Combine, combine_scores


class RewardSource(ABC):
    """Anything that scores completions. ``may_abstain``: whether it may have no score (NaN) for a completion."""

    name: str
    may_abstain = False

    @abstractmethod
    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """Scores [N] fp32, their spans, and which texts were cut (see ``Judgement``)."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Tensor:
        """The scores [N] of ``judge``."""
        return self.judge(prompts, completions, details).scores


def judge(source: RewardSource, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
    """Score completions [N] with ``source`` and check the result.

    NaN is allowed only for a source with ``may_abstain``. Raises TrainingError for any other score that is not finite, and if the number
    of scores differs from the number of completions.
    """
    judgement = source.judge(prompts, completions, details)
    scores = torch.as_tensor(judgement.scores, dtype=torch.float32).cpu()
    present = applies(scores) if source.may_abstain else torch.ones_like(scores, dtype=torch.bool)
    checked(torch.where(present, scores, 0.0), source.name, completions)
    return replace(judgement, scores=scores)


@dataclass(frozen=True)
class Scores:
    """The scores of N completions.

    ``total`` [N]: the weighted sum over the sources that apply. ``parts``: tensors [N] by name. They hold the unweighted scores of each
    source, NaN where it does not apply; for an ensemble also the scores of its members and their variance. They also hold measurements that
    are not scores: ``scoring/<source>_cut_share`` is 1 where a text was too long for a source and was cut. ``spans``: the weighted spans of
    the sources with spans; None if there are no such sources.
    """

    total: Tensor
    parts: dict[str, Tensor]
    spans: Spans | None = None


class Ensemble(RewardSource):
    """Combines sources that judge the same thing into one score. A policy tends to exploit texts on which the members disagree."""

    may_abstain = True

    def __init__(self, name: str, members: Sequence[tuple[RewardSource, float]], *, combine: Combine, uncertainty_coef: float) -> None:
        self.name, self.members = name, list(members)
        self.combine, self.uncertainty_coef = combine, uncertainty_coef

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """The combined score [N]; as its parts the scores of each member, their variance, and their measurements.

        A member's scores are multiplied by its weight. A member that does not apply to a completion is left out there. Where no member
        applies, the combined score is NaN.
        """
        members: dict[str, Tensor] = {}
        notes: dict[str, Tensor] = {}
        for member, weight in self.members:
            judgement = judge(member, prompts, completions, details)
            members[f"{self.name}.{member.name}"] = weight * judgement.scores
            notes |= judgement.notes(f"{self.name}.{member.name}")
        table = torch.stack(list(members.values()))
        scores = combine_scores(table, how=self.combine, uncertainty_coef=self.uncertainty_coef)
        variance = table.var(dim=0, correction=0)
        for column in torch.nonzero(~applies(table).all(dim=0)).flatten().tolist():
            present = table[applies(table[:, column]), column][:, None]
            if len(present):
                scores[column] = combine_scores(present, how=self.combine, uncertainty_coef=self.uncertainty_coef)[0]
                variance[column] = present.var(correction=0)
        return Judgement(scores, parts={**members, f"{self.name}.variance": variance, **notes})


class CombinedReward:
    """Weighted reward sources. Training uses the weighted sum; the scores of each source are logged separately."""

    def __init__(self, sources: Sequence[tuple[RewardSource, float]]) -> None:
        self.sources = list(sources)

    def leaves(self) -> list[RewardSource]:
        """All sources. An ensemble is replaced by its members."""
        leaves: list[RewardSource] = []
        for source, _ in self.sources:
            leaves += [member for member, _ in source.members] if isinstance(source, Ensemble) else [source]
        return leaves

    def modules(self) -> list[torch.nn.Module]:
        """The models of the sources, without duplicates."""
        models = [model for leaf in self.leaves() if isinstance(model := getattr(leaf, "model", None), torch.nn.Module)]
        return [model for index, model in enumerate(models) if all(model is not other for other in models[:index])]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING, *, may_abstain: bool = False
    ) -> Scores:
        """Score every completion with every source.

        Raises TrainingError if the number of scores differs from the number of completions, or if a score is not finite. Unless
        ``may_abstain`` is set, it also raises TrainingError if no source applies to a completion.
        """
        parts: dict[str, Tensor] = {}
        total = torch.zeros(len(completions))
        applied = torch.zeros(len(completions), dtype=torch.bool)
        spans: Spans | None = None
        for source, weight in self.sources:
            judgement = judge(source, prompts, completions, details)
            scores = judgement.scores
            if judgement.spans is not None:
                spans = spans or [[] for _ in completions]
                for row, new in zip(spans, judgement.spans, strict=True):
                    row += [(position, weight * score) for position, score in new]
            parts |= {source.name: scores, **judgement.parts, **judgement.notes(source.name)}
            total += weight * torch.where(applies(scores), scores, 0.0)
            applied |= applies(scores)
        if self.sources and not may_abstain and not applied.all():
            text = completions[int(torch.nonzero(~applied)[0])]
            raise TrainingError(
                f"no reward applies to the completion {text[:80]!r}: {', '.join(source.name for source, _ in self.sources)} returned None; "
                "add a reward that scores every completion, or return a number"
            )
        return Scores(total, parts, spans)
