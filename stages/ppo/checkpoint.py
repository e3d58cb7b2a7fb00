"""Checkpoints of a PPO run: all weights that train, optimizers, the moving average, and a small JSON of everything else.

Random streams need no saving: every one of them is drawn from the seed and the iteration. A checkpoint is written aside and renamed,
so a cut-off run leaves whole ones only; the two newest are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.ppo.optimizers import WeightAverage, load_optimizer_tensors, optimizer_tensors, trainable

KEPT = 2


def save_checkpoint(
    folder: Path,
    iteration: int,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    average: WeightAverage | None,
    state: dict[str, Any],
) -> None:
    """Write ``folder/iteration-<n>`` after ``iteration`` iterations."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".partial-{iteration}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for name, network in networks.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in trainable(network)}, staging / f"{name}.safetensors")
    for name, optimizer in optimizers.items():
        save_file(optimizer_tensors(optimizer), staging / f"{name}-optimizer.safetensors")
    if average is not None:
        save_file({key: value.cpu().contiguous() for key, value in average.weights.items()}, staging / "average.safetensors")
    (staging / "state.json").write_text(json.dumps({**state, "iteration": iteration}), encoding="utf-8")
    target = folder / f"iteration-{iteration:06d}"
    shutil.rmtree(target, ignore_errors=True)
    os.rename(staging, target)
    for old in _checkpoints(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], average: WeightAverage | None
) -> dict[str, Any] | None:
    """Put the newest readable checkpoint into the networks and optimizers; returns its state, or None where there is none."""
    for place in _checkpoints(folder):
        try:
            state = json.loads((place / "state.json").read_text(encoding="utf-8"))
            weights = {name: load_file(place / f"{name}.safetensors") for name in networks}
            moments = {name: load_file(place / f"{name}-optimizer.safetensors") for name in optimizers}
            averages = load_file(place / "average.safetensors") if average is not None else None
        except (OSError, ValueError, SafetensorError):
            continue  # a damaged one; the one before it is older and whole
        with torch.no_grad():
            for name, network in networks.items():
                for key, parameter in trainable(network):
                    parameter.copy_(weights[name][key])
        for name, optimizer in optimizers.items():
            load_optimizer_tensors(optimizer, moments[name])
        if average is not None and averages is not None:
            average.weights = {key: _like(value, average.weights[key]) for key, value in averages.items()}
        return state
    return None


def _like(value: Tensor, old: Tensor) -> Tensor:
    return value.to(old.device)


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest first."""
    return sorted((path for path in folder.glob("iteration-*") if (path / "state.json").exists()), reverse=True)
