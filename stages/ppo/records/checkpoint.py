"""Checkpoints of a PPO run, between iterations or inside one with its rollout.

Episodes, minibatches and pretraining rows are drawn from the seed and their index in the run. Global random generator states are also
saved, because a reward function may use them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from stages.ppo.records.history import Entry, RunHistory
from stages.ppo.rollout.rollout import TENSOR_GROUPS, TENSORS, Rollout
from stages.ppo.rollout.sampling import SAMPLER, SampledSoFar
from stages.ppo.update.optimizers import WeightAverage
from stages.ppo.update.updater import UpdateProgress
from stages.process.runtime import Runtime
from stages.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    load_generators,
    load_optimizer,
    load_tensors,
    save_generators,
    save_optimizer,
    save_tensors,
    trainable,
)


@dataclass
class RunState:
    """The state of a run.

    ``rollout`` is None between iterations and during collection. ``sampled``: episodes that an engine outside this process has sampled for
    an iteration without a rollout so far. ``pass_tokens``: the token budget of update passes that was measured on a GPU.
    ``loss_scale``: the ``state`` of the loss scale.
    """

    iteration: int = 0  # completed iterations
    kl_coef: float = 0.0  # of the current iteration
    optimizer_steps: int = 0
    pretraining_draws: int = 0
    pass_tokens: int | None = None
    loss_scale: Sequence[float] | None = None
    history: RunHistory = field(default_factory=lambda: RunHistory())  # completed iterations
    rollout: Rollout | None = None
    sampled: SampledSoFar | None = None
    progress: UpdateProgress = field(default_factory=UpdateProgress)


class RunKeeper:
    """Writes and reads the checkpoints of a run: networks, optimizers, the weight average, and the run's state."""

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        networks: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        average: WeightAverage | None,
        **rule: Any,
    ) -> None:
        self.checkpoints = Checkpoints(folder, runtime, **rule)
        self.runtime, self.optimizers, self.average = runtime, optimizers, average
        # Listed once: a stop signal can interrupt a change of adapters, and then not all of them require a gradient.
        self.parameters = {name: trainable(network) for name, network in networks.items()}
        self.log = HistoryLog(folder / "history.jsonl", is_main=runtime.is_main)

    def save(self, state: RunState, *, score: float | None = None, save_sampler: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint. Call on every process.

        ``save_sampler``: writes the weights with which ``state.sampled`` must be continued into a folder.
        """
        is_main = self.runtime.is_main

        def fill(folder: Path) -> None:
            for name, parameters in self.parameters.items():
                save_tensors(parameters, folder / f"{name}.safetensors", write=is_main)
            for name, optimizer in self.optimizers.items():
                save_optimizer(optimizer, self.parameters[name], folder / f"{name}-optimizer.safetensors", write=is_main)
            if self.average is not None:
                save_tensors(self.average.weights, folder / "average.safetensors", write=is_main)
            save_generators(folder, self.runtime)
            if is_main:
                content = {
                    "iteration": state.iteration,
                    "kl_coef": state.kl_coef,
                    "optimizer_steps": state.optimizer_steps,
                    "pretraining_draws": state.pretraining_draws,
                    "pass_tokens": state.pass_tokens,
                    "loss_scale": state.loss_scale,
                    "history": self.log.append(state.history.take_new()),
                    "progress": vars(state.progress),
                }
                (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")
                if state.rollout is not None:
                    save_rollout(state.rollout, folder)
                if state.sampled is not None:
                    state.sampled.save(folder)
                if save_sampler is not None:
                    (folder / SAMPLER).mkdir()
                    save_sampler(folder / SAMPLER)

        self.checkpoints.write(fill, score=score)

    def load(self) -> RunState | None:
        """Load the newest intact checkpoint into networks, optimizers and average. Returns None if there is none."""
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            return None
        content = json.loads((checkpoint.path / "state.json").read_text(encoding="utf-8"))
        history = self.log.first(content["history"])
        if history is None:
            self.runtime.console.print(f"{self.log.path.name} does not contain the iterations of {checkpoint.path.name}; starting again")
            return None
        self.load_weights(checkpoint)
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, self.parameters[name], checkpoint.path / f"{name}-optimizer.safetensors")
        load_generators(checkpoint.path, self.runtime)
        rollout = load_rollout(checkpoint.path) if (checkpoint.path / "rollout.json").exists() else None
        content |= {"history": RunHistory(history), "rollout": rollout, "progress": UpdateProgress(**content["progress"])}
        return RunState(**content, sampled=SampledSoFar.load(checkpoint.path))

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's weights into the networks and the average."""
        for name, parameters in self.parameters.items():
            load_tensors(parameters, checkpoint.path / f"{name}.safetensors")
        if self.average is not None:
            load_tensors(self.average.weights, checkpoint.path / "average.safetensors")


class Mark(TypedDict):
    """The iterations that belong to a checkpoint: their number, and the digest of their lines."""

    iterations: int
    sha256: str


class HistoryLog:
    """Append-only file with the metrics and samples of all iterations. A checkpoint records how many lines belong to it."""

    def __init__(self, path: Path, *, is_main: bool = True) -> None:
        self.path, self.is_main = path, is_main
        self._written = 0
        self._hash = hashlib.sha256()

    def append(self, entries: list[Entry]) -> Mark:
        """Append iterations. Returns the mark with which ``first`` finds all iterations up to here."""
        lines = [json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries]
        with self.path.open("ab" if self._written else "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        for line in lines:
            self._hash.update(line)
        self._written += len(lines)
        return {"iterations": self._written, "sha256": self._hash.hexdigest()}

    def first(self, mark: Mark) -> list[Entry] | None:
        """The iterations up to a checkpoint's mark; None if the file does not contain them unchanged.

        Later lines of an interrupted run are removed, so that appending continues from there.
        """
        self._hash = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                lines = [line for _, line in zip(range(mark["iterations"]), file, strict=False)]
        except OSError:
            lines = []
        for line in lines:
            self._hash.update(line)
        if len(lines) < mark["iterations"] or self._hash.hexdigest() != mark["sha256"]:
            return None
        self._written = len(lines)
        if self.is_main and lines:
            os.truncate(self.path, sum(map(len, lines)))
        return [json.loads(line) for line in lines]


# The current rollout


def save_rollout(rollout: Rollout, folder: Path) -> None:
    """Save tensors as safetensors, and texts and numbers as JSON."""
    tensors = {name: getattr(rollout, name) for name in TENSORS}
    tensors |= {f"{group}.{name}": part for group in TENSOR_GROUPS for name, part in getattr(rollout, group).items()}
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "rollout.safetensors")  # some tensors share memory
    content = {item.name: getattr(rollout, item.name) for item in fields(Rollout) if item.name not in (*TENSORS, *TENSOR_GROUPS)}
    content |= {group: list(getattr(rollout, group)) for group in TENSOR_GROUPS}  # in order, because metrics are written in this order
    (folder / "rollout.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_rollout(folder: Path) -> Rollout:
    """Load what ``save_rollout`` saved."""
    tensors = load_file(folder / "rollout.safetensors")
    content = json.loads((folder / "rollout.json").read_text(encoding="utf-8"))
    for group in TENSOR_GROUPS:
        content[group] = {name: tensors[f"{group}.{name}"] for name in content[group]}
    kept: dict[str, Any] = {**content, **{name: tensors[name] for name in TENSORS}}
    return Rollout(**kept)
