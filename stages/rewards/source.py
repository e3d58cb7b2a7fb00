"""What a reward source is, and a weighted list of them. N completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.corpora.messages import Prompt
from stages.errors import TrainingError
from stages.rewards.config import RewardInput
from stages.runtime import ResolvedModel


class RewardSource(Protocol):
    """Anything that scores completions."""

    name: str

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Scores [N] fp32 on the CPU, one per completion."""
        ...


@dataclass(frozen=True)
class Scores:
    """The weighted sum [N] and each source's own, unweighted scores [N] by name."""

    total: Tensor
    parts: dict[str, Tensor]


class CombinedReward:
    """Sources with weights: the sum trains, the parts are logged apart."""

    def __init__(self, sources: Sequence[tuple[RewardSource, float]]) -> None:
        self.sources = list(sources)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """Score every completion by every source. Raises TrainingError where a source returns another number of scores, or NaN."""
        parts = {}
        total = torch.zeros(len(completions))
        for source, weight in self.sources:
            scores = checked(source.score(prompts, completions), source.name, completions)
            parts[source.name] = scores
            total += weight * scores
        return Scores(total, parts)


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


def build_source(source: RewardInput, model: ResolvedModel | None, *, device: torch.device, dtype: torch.dtype) -> RewardSource:
    """The source that a recipe names. Raises ModelError where the model cannot play the part."""
    if source.function is not None:
        from stages.rewards.function import FunctionSource

        return FunctionSource(source.shown_name, source.function)
    from stages.rewards.learned import load_source

    assert model is not None
    return load_source(source, model, device=device, dtype=dtype)


def build_reward(
    sources: Sequence[RewardInput], models: Mapping[str, ResolvedModel], place: str, *, device: torch.device, dtype: torch.dtype
) -> CombinedReward:
    """All sources of a recipe's list; ``models`` by field path (``<place>[0].model``)."""
    built = [
        (build_source(source, models.get(f"{place}[{index}].model"), device=device, dtype=dtype), source.weight)
        for index, source in enumerate(sources)
    ]
    return CombinedReward(built)
