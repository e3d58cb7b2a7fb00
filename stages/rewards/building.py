"""Builds the reward sources that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stages.errors import ModelError
from stages.process.environment import secret
from stages.registry.references import ResolvedModel
from stages.rewards.config import RewardInput
from stages.rewards.endpoint import EndpointSource, open_cache
from stages.rewards.function import FunctionSource, SpanFunctionSource
from stages.rewards.learned import RewardModelLoader, load_source
from stages.rewards.rubric import RubricSource
from stages.rewards.source import CombinedReward, Ensemble, RewardSource


def build_source(
    source: RewardInput,
    model: ResolvedModel | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load: RewardModelLoader | None = None,
    cache_folder: Path | None = None,
) -> RewardSource:
    """Build the reward source that a recipe names.

    ``load``: a function that loads reward models, for example to share weights. None: each reward model is loaded with its own weights.
    ``cache_folder``: the folder that stores answers of servers; None: answers are not stored.

    Raises ModelError if the model cannot be used as this kind of reward source.
    """
    if source.ensemble is not None:
        raise ModelError(f"{source.shown_name!r} is an ensemble; only PPO can use one. Name its members as separate judges")
    if source.function is not None:
        kind = SpanFunctionSource if source.level == "token" else FunctionSource
        return kind(
            source.shown_name,
            source.function,
            timeout=source.timeout_seconds,
            retries=source.retries or 0,
            backoff_seconds=source.backoff_seconds,
        )
    if source.endpoint is not None:
        key = secret(source.api_key_variable) if source.api_key_variable is not None else None
        return EndpointSource(source, key=key, cache=open_cache(cache_folder, source))
    if source.judge is not None:
        variable = source.judge.api_key_variable
        return RubricSource(source, key=secret(variable) if variable is not None else None, cache=open_cache(cache_folder, source))
    assert model is not None
    return load_source(source, model, device=device, dtype=dtype, load=load)


def build_reward(
    sources: Sequence[RewardInput],
    models: Mapping[str, ResolvedModel],
    field_path: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load: RewardModelLoader | None = None,
    cache_folder: Path | None = None,
) -> CombinedReward:
    """Build all reward sources of a recipe's list.

    ``models``: the resolved models by field path (``<field_path>[0].model``, ``<field_path>[1].ensemble[0].model``). Raises ModelError like
    ``build_source``.
    """

    def build(source: RewardInput, here: str) -> RewardSource:
        if source.ensemble is None:
            model = models.get(f"{here}.model")
            return build_source(source, model, device=device, dtype=dtype, load=load, cache_folder=cache_folder)
        members = [(build(member, f"{here}.ensemble[{index}]"), member.weight) for index, member in enumerate(source.ensemble)]
        return Ensemble(source.shown_name, members, combine=source.combine, uncertainty_coef=source.uncertainty_coef)

    return CombinedReward([(build(source, f"{field_path}[{index}]"), source.weight) for index, source in enumerate(sources)])
