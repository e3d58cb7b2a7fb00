"""What a reward source is, and a weighted list of them. N completions.

A source gives one score per completion. One with ``level: token`` also says where in the text its score arises: spans, per completion a
list of (character position, score) whose sum is the score. Positions and not tokens: a source has a tokenizer of its own, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from stages.corpora.messages import Prompt
from stages.errors import ModelError, TrainingError
from stages.numerics.combining import Combine, combine_scores
from stages.process.runtime import ResolvedModel
from stages.rewards.config import RewardInput

if TYPE_CHECKING:
    from stages.rewards.learned import RewardModelLoader


class RewardSource(Protocol):
    """Anything that scores completions."""

    name: str

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Scores [N] fp32 on the CPU, one per completion."""
        ...


Spans = list[list[tuple[int, float]]]


@runtime_checkable
class SpanSource(Protocol):
    """A source that says where its scores arise."""

    name: str

    def score_spans(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Spans:
        """(character position, score) pairs of each completion; the end of the text is a position, too."""
        ...


@dataclass(frozen=True)
class Scores:
    """The weighted sum [N] and each source's own, unweighted scores [N] by name; of an ensemble the members' and their variance, too.

    ``spans``: the share of the sum that has a place in the text, weighted; None without a source of tokens' scores.
    """

    total: Tensor
    parts: dict[str, Tensor]
    spans: Spans | None = None


class Ensemble:
    """Sources that judge the same thing, made one score: what they disagree about is where a policy finds their faults."""

    def __init__(self, name: str, members: Sequence[tuple[RewardSource, float]], *, combine: Combine, uncertainty_coef: float) -> None:
        self.name, self.members = name, list(members)
        self.combine, self.uncertainty_coef = combine, uncertainty_coef

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """The members' scores as one [N]."""
        return self.score_members(prompts, completions)[0]

    def score_members(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """One score [N]; and each member's own [N] and their variance [N], by name. A member's weight is a factor of its scores."""
        members = {
            f"{self.name}.{member.name}": weight * checked(member.score(prompts, completions), member.name, completions)
            for member, weight in self.members
        }
        table = torch.stack(list(members.values()))
        scores = combine_scores(table, how=self.combine, uncertainty_coef=self.uncertainty_coef)
        return scores, {**members, f"{self.name}.variance": table.var(dim=0, correction=0)}


class CombinedReward:
    """Sources with weights: the sum trains, the parts are logged apart."""

    def __init__(self, sources: Sequence[tuple[RewardSource, float]]) -> None:
        self.sources = list(sources)

    def modules(self) -> list[torch.nn.Module]:
        """The models behind the sources, each once."""
        members: list[RewardSource] = []
        for source, _ in self.sources:
            members += [member for member, _ in source.members] if isinstance(source, Ensemble) else [source]
        found = [model for member in members if isinstance(model := getattr(member, "model", None), torch.nn.Module)]
        return [model for index, model in enumerate(found) if all(model is not other for other in found[:index])]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """Score every completion by every source. Raises TrainingError where a source returns another number of scores, or NaN."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros(len(completions))
        spans: Spans | None = None
        for source, weight in self.sources:
            if isinstance(source, SpanSource):
                found = source.score_spans(prompts, completions)
                scores = checked(torch.tensor([sum(score for _, score in row) for row in found]), source.name, completions)
                spans = spans or [[] for _ in completions]
                for row, new in zip(spans, found, strict=True):
                    row += [(place, weight * score) for place, score in new]
            elif isinstance(source, Ensemble):
                scores, members = source.score_members(prompts, completions)
                parts |= members
            else:
                scores = checked(source.score(prompts, completions), source.name, completions)
            parts[source.name] = scores
            total += weight * scores
        return Scores(total, parts, spans)


def checked(scores: Tensor, name: str, completions: Sequence[str]) -> Tensor:
    """``scores`` as [N] fp32, or TrainingError naming the source and the first completion it failed on."""
    scores = torch.as_tensor(scores, dtype=torch.float32).cpu()
    if scores.shape != (len(completions),):
        expected = f"expected one number per completion ({len(completions)})"
        raise TrainingError(f"reward {name!r} returned scores of shape {tuple(scores.shape)}; {expected}")
    bad = torch.nonzero(~torch.isfinite(scores)).flatten()
    if len(bad):
        place = int(bad[0])
        value, text = float(scores[place]), completions[place][:80]
        raise TrainingError(f"reward {name!r} returned {value} for the completion {text!r}; expected a finite number")
    return scores


def build_source(
    source: RewardInput,
    model: ResolvedModel | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load: RewardModelLoader | None = None,
) -> RewardSource:
    """The source that a recipe names; ``load``: where reward models come from (None: each is loaded with weights of its own).

    Raises ModelError where the model cannot play the part.
    """
    if source.ensemble is not None:
        raise ModelError(f"{source.shown_name!r} is an ensemble, which is a reward of PPO; as judges, name its members")
    if source.function is not None:
        from stages.rewards.function import FunctionSource, SpanFunctionSource

        kind = SpanFunctionSource if source.level == "token" else FunctionSource
        return kind(source.shown_name, source.function, timeout=source.timeout_seconds)
    from stages.rewards.learned import load_source

    assert model is not None
    return load_source(source, model, device=device, dtype=dtype, load=load)


def build_reward(
    sources: Sequence[RewardInput],
    models: Mapping[str, ResolvedModel],
    place: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load: RewardModelLoader | None = None,
) -> CombinedReward:
    """All sources of a recipe's list; ``models`` by field path (``<place>[0].model``, ``<place>[1].ensemble[0].model``)."""

    def build(source: RewardInput, here: str) -> RewardSource:
        if source.ensemble is None:
            return build_source(source, models.get(f"{here}.model"), device=device, dtype=dtype, load=load)
        members = [(build(member, f"{here}.ensemble[{index}]"), member.weight) for index, member in enumerate(source.ensemble)]
        return Ensemble(source.shown_name, members, combine=source.combine, uncertainty_coef=source.uncertainty_coef)

    return CombinedReward([(build(source, f"{place}[{index}]"), source.weight) for index, source in enumerate(sources)])
