"""Files of a PPO run: metrics, samples, and the episodes of failed iterations."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from stages.json_types import JsonObject

if TYPE_CHECKING:
    from stages.ppo.records.history import Entry
    from stages.ppo.rollout.rollout import Rollout
    from stages.step import StepContext


def log(context: StepContext, iteration: int, entry: Entry) -> None:
    """Write an iteration's metrics and samples."""
    context.log(iteration, entry["metrics"])
    if context.runtime.is_main:
        with (context.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for sample in entry["samples"]:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def samples_of(rollout: Rollout, iteration: int, count: int) -> list[JsonObject]:
    """The first ``count`` episodes for samples.jsonl."""
    return [
        {
            "iteration": iteration,
            "prompt": rollout.prompts[row],
            "completion": rollout.completions[row],
            "score": float(rollout.scores[row]),
        }
        for row in range(min(count, len(rollout.prompts)))
    ]


def episodes_of(rollout: Rollout) -> list[JsonObject]:
    """All episodes with everything that is known about them."""
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


def keep_episodes(context: StepContext, episodes: list[JsonObject]) -> str:
    """Write the failed iteration's episodes next to the metrics. Returns the end of the message. Each process writes its own episodes."""
    index = context.runtime.process_index
    path = context.folder / ("failed_rollout.jsonl" if index == 0 else f"failed_rollout-{index}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for episode in episodes:
            file.write(json.dumps(episode, ensure_ascii=False) + "\n")
    return f". Its episodes are in {path}; {checkpoint_note(context)}"


def checkpoint_note(context: StepContext) -> str:
    """The part of a message about a failure that says from where the next run continues."""
    folder = context.checkpoint_folder / "ppo"
    if any(folder.glob("checkpoint-*")):
        return f"the last checkpoint is kept in {folder}"
    return "there was no checkpoint yet, so the next run starts this step over"
