"""What a reward source is, and a weighted list of them. N completions.

A source gives one score per completion. One with ``level: token`` also says where in the text its score arises: spans, per completion a
list of (character position, score) whose sum is the score. Positions and not tokens: a source has a tokenizer of its own, or none.

A source may not apply to a completion (a function that returned None): its score there is NaN, and it has no part in the sum. An error,
an infinity, or a NaN that a source computed, is never a score: it raises TrainingError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from stages.corpora.messages import Prompt
from stages.errors import TrainingError
from stages.rewards.checking import checked
from stages.rewards.details import NOTHING, Details, Judgement, Spans, applies
from stages.rl.combining import Combine, combine_scores

if TYPE_CHECKING:
    pass


class RewardSource(Protocol):
    """Anything that scores completions."""

    name: str

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Scores [N] fp32 on the CPU, one per completion."""
        ...


@runtime_checkable
class JudgingSource(Protocol):
    """A source that reads more than the texts, or says more than a score."""

    name: str

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """Scores [N], where they arise, and what could not be read."""
        ...


def judge(source: RewardSource, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
    """What ``source`` says, checked: NaN stands only where a source that may abstain did. Raises TrainingError for anything else."""
    if isinstance(source, JudgingSource):
        found = source.judge(prompts, completions, details)
    else:
        found = Judgement(source.score(prompts, completions))
    scores = torch.as_tensor(found.scores, dtype=torch.float32).cpu()
    present = applies(scores) if getattr(source, "may_abstain", False) else torch.ones_like(scores, dtype=torch.bool)
    checked(torch.where(present, scores, 0.0), source.name, completions)
    return Judgement(scores, found.spans, found.cut, found.completion_cut, found.measured)


@dataclass(frozen=True)
class Scores:
    """The weighted sum [N] over the sources that apply, and what was measured [N] by name.

    ``parts``: each source's own, unweighted scores, NaN where it does not apply; of an ensemble the members' and their variance, too.
    Beside them what is no score: ``scoring/<source>_cut_share`` is 1 where a source could not read a text whole. ``spans``: share of the
    sum that has a place in the text, weighted; None without a source of tokens' scores.
    """

    total: Tensor
    parts: dict[str, Tensor]
    spans: Spans | None = None


class Ensemble:
    """Sources that judge the same thing, made one score: what they disagree about is where a policy finds their faults."""

    may_abstain = True

    def __init__(self, name: str, members: Sequence[tuple[RewardSource, float]], *, combine: Combine, uncertainty_coef: float) -> None:
        self.name, self.members = name, list(members)
        self.combine, self.uncertainty_coef = combine, uncertainty_coef

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """The members' scores as one [N]."""
        return self.score_members(prompts, completions)[0]

    def score_members(
        self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One score [N]; and each member's own [N], their variance [N] and their notes, by name. A member's weight is a factor of its
        scores.

        Members that do not apply to a completion are left out there; where none applies, the ensemble does not either.
        """
        members: dict[str, Tensor] = {}
        notes: dict[str, Tensor] = {}
        for member, weight in self.members:
            found = judge(member, prompts, completions, details)
            members[f"{self.name}.{member.name}"] = weight * found.scores
            notes |= found.notes(f"{self.name}.{member.name}")
        table = torch.stack(list(members.values()))
        scores = combine_scores(table, how=self.combine, uncertainty_coef=self.uncertainty_coef)
        variance = table.var(dim=0, correction=0)
        for place in torch.nonzero(~applies(table).all(dim=0)).flatten().tolist():
            present = table[applies(table[:, place]), place][:, None]
            if len(present):
                scores[place] = combine_scores(present, how=self.combine, uncertainty_coef=self.uncertainty_coef)[0]
                variance[place] = present.var(correction=0)
        return scores, {**members, f"{self.name}.variance": variance, **notes}


class CombinedReward:
    """Sources with weights: the sum trains, the parts are logged apart."""

    def __init__(self, sources: Sequence[tuple[RewardSource, float]]) -> None:
        self.sources = list(sources)

    def leaves(self) -> list[RewardSource]:
        """The sources, of an ensemble its members."""
        found: list[RewardSource] = []
        for source, _ in self.sources:
            found += [member for member, _ in source.members] if isinstance(source, Ensemble) else [source]
        return found

    def modules(self) -> list[torch.nn.Module]:
        """The models behind the sources, each once."""
        found = [model for leaf in self.leaves() if isinstance(model := getattr(leaf, "model", None), torch.nn.Module)]
        return [model for index, model in enumerate(found) if all(model is not other for other in found[:index])]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING, *, may_abstain: bool = False
    ) -> Scores:
        """Score every completion by every source.

        Raises TrainingError where a source returns another number of scores, or none that is finite; and, unless all together
        ``may_abstain``, where no source applies to a completion.
        """
        parts: dict[str, Tensor] = {}
        total = torch.zeros(len(completions))
        applied = torch.zeros(len(completions), dtype=torch.bool)
        spans: Spans | None = None
        for source, weight in self.sources:
            notes: dict[str, Tensor] = {}
            if isinstance(source, Ensemble):
                scores, notes = source.score_members(prompts, completions, details)
            else:
                found = judge(source, prompts, completions, details)
                scores, notes = found.scores, found.notes(source.name)
                if found.spans is not None:
                    spans = spans or [[] for _ in completions]
                    for row, new in zip(spans, found.spans, strict=True):
                        row += [(place, weight * score) for place, score in new]
            parts[source.name] = scores
            parts |= notes
            total += weight * torch.where(applies(scores), scores, 0.0)
            applied |= applies(scores)
        if self.sources and not may_abstain and not applied.all():
            text = completions[int(torch.nonzero(~applied)[0])]
            raise TrainingError(
                f"no reward applies to the completion {text[:80]!r}: {', '.join(source.name for source, _ in self.sources)} returned None; "
                "add a reward that scores every completion, or return a number"
            )
        return Scores(total, parts, spans)
