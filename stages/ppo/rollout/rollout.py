"""One iteration's data: the sampled completions, and everything that the update needs.

B episodes, R response tokens (right padded). Tensors are on the CPU, and every process has those of all episodes. They are small compared
with the models, and so whitening, the KL controller, minibatches and metrics use all episodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Generic, TypeVar, get_origin, get_type_hints

import torch
from torch import Tensor

from stages.corpora.conversations.messages import Prompt
from stages.rl.losses import importance_weights
from stages.sampling.padding import right_pad

T = TypeVar("T")
N = TypeVar("N", int, float)
EpisodeValue = Any  # of a field with an entry for each episode: a tensor, tensors by name, or a list


@dataclass(frozen=True)
class Joined(Generic[T]):
    """A field with one value for the iteration. ``join``: the value of the iteration from those of the processes' shares."""

    join: Callable[[list[T]], T]


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _largest_by_name(values: list[dict[str, N]]) -> dict[str, N]:
    return {name: max(value[name] for value in values) for name in values[0]}


def _same(values: list[T]) -> T:
    return values[0]


@dataclass(frozen=True)
class Rollout:
    """Episodes of one iteration, in order.

    A field without ``Joined`` has an entry for each episode: a list, a tensor, or tensors by name. Division into episodes, joining of the
    processes' shares, and checkpoints follow from the fields; none of them lists the fields again.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    completions: list[str]
    response_ids: Tensor  # [B, R]
    response_mask: Tensor  # [B, R] bool, True up to and including the stop token
    stopped: Tensor  # [B] bool: ended with a stop token
    rollout_logprobs: Tensor  # [B, R] by the policy at the start of the update, at the sampling temperature
    sampler_logprobs: Tensor  # [B, R] as returned by the sampler, which may be another engine, or have the policy of an earlier update
    reference_logprobs: Tensor  # [B, R]
    values: Tensor  # [B, R] value before each token, by the value network of the rollout
    bootstrap_values: Tensor  # [B] value after the last token, where bootstrap_mask is True
    bootstrap_mask: Tensor  # [B] bool: the score is added one state after the last token (score_placement: after, if there is room)
    scores: Tensor  # [B] weighted sum of the reward sources, after the penalties for the length and for a missing stop token
    raw_scores: Tensor  # [B] before these penalties
    token_scores: Tensor  # [B, R] the parts of scores with a position in the text; the rest of a score is added at the end
    parts: dict[str, Tensor]  # [B] by source, NaN if it does not apply; and additional measurements (stages.rewards.source.Scores)
    monitors: dict[str, Tensor]  # [B] by judge, in the same way
    seconds: Annotated[dict[str, float], Joined(_largest_by_name)]  # by phase, on this process
    # The largest difference between sampled and recomputed log-probabilities; 0 if they are not recomputed.
    sampling_gap: Annotated[float, Joined(max)]
    # Seconds of remote scoring in parallel with sampling and measuring; None without a remote source.
    hidden_seconds: Annotated[float | None, Joined(_largest)] = None
    # Whether another engine sampled, whose log-probabilities differ slightly from the policy's.
    sampled_elsewhere: Annotated[bool, Joined(_same)] = False
    # The number of updates between the policy that sampled and the policy that trains on these episodes.
    lag: Annotated[int, Joined(_same)] = 0
    # Seconds of sampling while the update before ran; None without such sampling.
    hidden_sampling_seconds: Annotated[float | None, Joined(_largest)] = None
    # Peak bytes of GPU memory by phase, maximum over processes.
    gpu_memory: Annotated[dict[str, int], Joined(_largest_by_name)] = field(default_factory=dict)
    # The number of times that memory ran out while measuring, on all processes.
    retreats: Annotated[int, Joined(sum)] = 0

    @property
    def kl(self) -> Tensor:
        """k1 estimate per token [B, R] for the policy that sampled, 0 outside the mask.

        With a lag, this is the policy before an earlier update. The estimate is unbiased only for the policy that sampled.
        """
        logprobs = self.sampler_logprobs if self.lag else self.rollout_logprobs
        return torch.where(self.response_mask, logprobs - self.reference_logprobs, 0.0)

    @property
    def lengths(self) -> Tensor:
        """Number of response tokens [B]."""
        return self.response_mask.sum(dim=1)

    def importance(self, cap: float) -> Tensor | None:
        """Weights of the tokens' losses [B, R], 1 outside the mask; None if the local engine sampled."""
        if not self.sampled_elsewhere:
            return None
        return importance_weights(self.rollout_logprobs, self.sampler_logprobs, cap=cap)

    def response(self, row: int) -> list[int]:
        """Token ids of response ``row``."""
        return self.response_ids[row][self.response_mask[row]].tolist()

    def rows(self, chosen: Tensor) -> Rollout:
        """The episodes ``chosen`` [M]."""
        return replace(self, **{name: _chosen(getattr(self, name), chosen) for name in EPISODE_FIELDS})


_JOINS = {
    name: kind.__metadata__[0].join for name, kind in get_type_hints(Rollout, include_extras=True).items() if get_origin(kind) is Annotated
}
EPISODE_FIELDS = tuple(item.name for item in fields(Rollout) if item.name not in _JOINS)
TENSORS = tuple(name for name, kind in get_type_hints(Rollout).items() if kind is Tensor)
TENSOR_GROUPS = tuple(name for name, kind in get_type_hints(Rollout).items() if kind == dict[str, Tensor])


def _chosen(value: EpisodeValue, rows: Tensor) -> EpisodeValue:
    """The entries ``rows`` [M] of a field: of a list, of a tensor, or of each tensor by name."""
    if isinstance(value, dict):
        return {name: part[rows] for name, part in value.items()}
    return [value[row] for row in rows.tolist()] if isinstance(value, list) else value[rows]


def joined(shares: list[Rollout]) -> Rollout:
    """Join the shares of all processes to the complete rollout, in the order of the episodes."""
    num_episodes, width = sum(len(share.prompts) for share in shares), max(share.response_ids.shape[1] for share in shares)
    # Each process has every n-th episode. The concatenated shares are sorted into the order of the episodes.
    order = torch.cat([torch.arange(index, num_episodes, len(shares)) for index in range(len(shares))]).argsort()

    def padded(part: Tensor) -> Tensor:
        return right_pad(list(part), 0, width) if part.dim() == 2 else part

    def concatenated(values: list[EpisodeValue]) -> EpisodeValue:
        if isinstance(values[0], dict):
            return {name: torch.cat([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], list):
            return [entry for value in values for entry in value]
        return torch.cat([padded(value) for value in values])

    of_episodes = {name: _chosen(concatenated([getattr(share, name) for share in shares]), order) for name in EPISODE_FIELDS}
    of_iteration = {name: join([getattr(share, name) for share in shares]) for name, join in _JOINS.items()}
    return Rollout(**of_episodes, **of_iteration)
