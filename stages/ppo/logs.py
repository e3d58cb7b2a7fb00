"""What a PPO run writes beside its models: metrics and samples as it goes, and the episodes that something went wrong with."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.ppo.rollout import Rollout
    from stages.step import StepContext


def log(context: StepContext, iteration: int, entry: dict[str, Any]) -> None:
    """Write an iteration's metrics and samples."""
    context.log(iteration, entry["metrics"])
    if context.runtime.is_main:
        with (context.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for sample in entry["samples"]:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def samples_of(rollout: Rollout, iteration: int, number: int) -> list[dict[str, Any]]:
    """The first ``number`` episodes, to be read."""
    return [
        {
            "iteration": iteration,
            "prompt": rollout.prompts[row],
            "completion": rollout.completions[row],
            "score": float(rollout.scores[row]),
        }
        for row in range(min(number, len(rollout.prompts)))
    ]


def episodes_of(rollout: Rollout) -> list[dict[str, Any]]:
    """Every episode with all that is known of it."""
    return [
        {
            "prompt": rollout.prompts[row],
            "completion": rollout.completions[row],
            "score": float(rollout.scores[row]),
            **{name: None if math.isnan(part[row]) else float(part[row]) for name, part in rollout.parts.items()},
            "kl": float(rollout.kl[row].sum()),
            "tokens": rollout.response(row),
        }
        for row in range(len(rollout.prompts))
    ]


def keep_episodes(context: StepContext, episodes: list[dict[str, Any]]) -> str:
    """Write the offending episodes beside the metrics; returns the end of the message. Each process writes what it met."""
    index = context.runtime.process_index
    path = context.folder / ("failed_rollout.jsonl" if index == 0 else f"failed_rollout-{index}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for episode in episodes:
            file.write(json.dumps(episode, ensure_ascii=False) + "\n")
    return f". Its episodes are in {path}; the last checkpoint is kept in {context.checkpoint_folder / 'ppo'}"
