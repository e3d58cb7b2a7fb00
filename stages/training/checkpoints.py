"""Checkpoints of a running step: written atomically with the SHA-256 of every file, pruned by a rule, verified when they are read.

    <folder>/checkpoint-000012/...                  tensors (safetensors) and JSON; no pickle
    <folder>/checkpoint-000012/checkpoint.json      the manifest with the sizes and SHA-256 of the files; written last

Checkpoints do not depend on the number of processes. Only the random generator states do: each process saves its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.errors import ModelError
from stages.json_types import JsonObject
from stages.process.runtime import Runtime
from stages.process.storage import sync, write_json
from stages.registry.contents import file_sha256, files_of

FORMAT = 1
MANIFEST = "checkpoint.json"
KERNELS = ("foreach", "fused", "capturable")
"""Settings of torch's optimizers that depend on the device. A resumed run keeps its own."""
COST_SHARE = 20  # minimum pause as a multiple of the write time, so that writing takes at most 5 % of the time


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    number: int
    score: float | None  # higher is better; None if it is not scored


class Checkpoints:
    """The checkpoints in ``folder``. The newest ``keep_last`` and the ``keep_best`` with the highest scores are kept."""

    def __init__(self, folder: Path, runtime: Runtime, *, keep_last: int = 2, keep_best: int = 0, seconds: float = 0.0) -> None:
        self.folder, self.runtime = folder, runtime
        self.keep_last, self.keep_best, self.seconds = keep_last, keep_best, seconds
        self._saved_at, self._pause = time.monotonic(), seconds

    # Writing

    def is_due(self) -> bool:
        """Whether the next checkpoint is due, by this process's clock."""
        return time.monotonic() - self._saved_at >= self._pause

    def wants(self, score: float) -> bool:
        """Whether a checkpoint with this score would be among the best. Call on every process."""
        if self.keep_best == 0:
            return False
        scores = self.runtime.decide(
            lambda: sorted((checkpoint.score for checkpoint in self._all() if checkpoint.score is not None), reverse=True)
        )
        return len(scores) < self.keep_best or score > scores[self.keep_best - 1]

    def write(self, fill: Callable[[Path], None], *, score: float | None = None) -> None:
        """Add a checkpoint with the files that ``fill(folder)`` writes. Call on every process; each one may write its own files."""
        began = time.monotonic()
        number = self.runtime.decide(lambda: max((checkpoint.number for checkpoint in self._all()), default=0) + 1)
        staging = self.folder / f".partial-{number}"
        if self.runtime.is_main:
            self._clear_leftovers()
            staging.mkdir(parents=True)
        self.runtime.wait_for_everyone()
        try:
            fill(staging)
            self.runtime.wait_for_everyone()
            if self.runtime.is_main:
                self._finish(staging, number, score)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)  # free the space, in case the disk is full
            raise
        self.runtime.wait_for_everyone()
        self._saved_at = time.monotonic()
        self._pause = max(self.seconds, COST_SHARE * (self._saved_at - began)) if self.seconds else 0.0

    def _finish(self, staging: Path, number: int, score: float | None) -> None:
        listed = list(files_of(staging))
        files = [{"path": name, "size": path.stat().st_size, "sha256": file_sha256(path)} for name, path in listed]
        for _, path in listed:
            sync(path)
        write_json(staging / MANIFEST, {"format": FORMAT, "number": number, "score": score, "files": files})
        os.rename(staging, self.folder / f"checkpoint-{number:06d}")
        sync(self.folder)
        kept = self._all()
        wanted = {checkpoint.number for checkpoint in [*kept[: self.keep_last], *_best_first(kept)[: self.keep_best]]}
        for checkpoint in kept:
            if checkpoint.number not in wanted:
                # Rename it first, so that a partly removed checkpoint does not look like a partly written one.
                removed = self.folder / f".removed-{checkpoint.number}"
                os.rename(checkpoint.path, removed)
                shutil.rmtree(removed, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for pattern in (".partial-*", ".removed-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    # Reading

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint. Damaged ones are skipped with a message. Call on every process."""
        return self.runtime.decide(lambda: self._first_intact(self._all()))

    def best(self) -> Checkpoint | None:
        """The intact checkpoint with the highest score. If scores are equal, the earliest. Call on every process."""
        return self.runtime.decide(lambda: self._first_intact(_best_first(self._all())))

    def _first_intact(self, checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
        for checkpoint in checkpoints:
            problem = problem_of(checkpoint.path)
            if problem is None:
                return checkpoint
            self.runtime.console.print(f"{checkpoint.path.name} is skipped: {problem}")
        return None

    def _all(self) -> list[Checkpoint]:
        """All checkpoints with a manifest, newest first."""
        checkpoints = []
        for path in self.folder.glob("checkpoint-*"):
            try:
                manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                score = manifest["score"]
                checkpoints.append(Checkpoint(path, int(manifest["number"]), None if score is None else float(score)))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # without a manifest it is incomplete
        return sorted(checkpoints, key=lambda entry: -entry.number)


def _best_first(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints that have a score, from the highest score to the lowest. Of equal scores the earlier checkpoint comes first."""
    scored = (checkpoint for checkpoint in checkpoints if checkpoint.score is not None)
    return sorted(scored, key=lambda checkpoint: (-(checkpoint.score or 0.0), checkpoint.number))


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are intact."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            return f"written as checkpoint format {manifest['format']} by a newer tristage (this one reads {FORMAT})"
        for file in manifest["files"]:
            content = path / file["path"]
            if not content.is_file():
                return f"{file['path']} is missing"
            if content.stat().st_size != file["size"]:
                return f"{file['path']} has {content.stat().st_size} bytes instead of {file['size']}"
            if file_sha256(content) != file["sha256"]:
                return f"{file['path']} was changed: its SHA-256 differs from the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


# Contents


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, write: bool = True) -> None:
    """Save named tensors as safetensors.

    Sharded tensors are gathered first, so call this on every process. ``write`` is True only on the main process.
    """
    gathered = {name: _unsharded(value) for name, value in tensors.items()}
    if write:
        save_file({name: value.detach().cpu().contiguous() for name, value in gathered.items()}, path)


def _unsharded(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The named trainable parameters. A checkpoint needs no others, because frozen weights are in the registry."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors saved by ``save_tensors`` into ``tensors``. Raises ModelError if names or shapes differ."""
    saved = load_file(path)
    if saved.keys() != tensors.keys():
        differ = sorted(saved.keys() ^ tensors.keys())
        raise ModelError(f"{path} contains the weights of a different model ({', '.join(differ[:3])}); remove its folder to start again")
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise ModelError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}; remove its folder to start again"
            )
        tensor.copy_(_like(saved[name], tensor))


def _like(value: Tensor, old: Tensor) -> Tensor:
    """``value`` on the device of ``old``, sharded in the same way."""
    if hasattr(old, "device_mesh"):
        assert isinstance(old, DTensor)
        return distribute_tensor(value.to(old.device, old.dtype), old.device_mesh, old.placements)
    return value.to(old.device)


def save_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], path: Path, *, write: bool = True) -> None:
    """Save moments and step counts by parameter as ``path`` (safetensors), and the group settings next to it as JSON.

    ``parameters`` are the optimizer's parameters by name. Their order and grouping may differ when they are loaded.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    slots = {(names[parameter], slot): value for parameter, state in optimizer.state.items() for slot, value in state.items()}
    # The parameters of bitsandbytes' optimizers share one map of 8-bit codes; safetensors needs a separate tensor for each.
    tensors = {
        f"{name}/{slot}": value.clone() if slot.startswith("qmap") else value
        for (name, slot), value in slots.items()
        if isinstance(value, Tensor)
    }
    save_tensors(tensors, path, write=write)
    if write:
        groups = [
            {"parameters": [names[parameter] for parameter in group["params"]], "settings": _settings(group)}
            for group in optimizer.param_groups
        ]
        scalars = {f"{name}/{slot}": value for (name, slot), value in slots.items() if not isinstance(value, Tensor)}
        path.with_suffix(".json").write_text(json.dumps({"groups": groups, "scalars": scalars}), encoding="utf-8")


def _settings(group: Mapping[str, object]) -> JsonObject:
    return {key: value for key, value in group.items() if key != "params"}


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], path: Path) -> None:
    """Load what ``save_optimizer`` saved. The kernels of ``optimizer`` (fused or foreach) do not change.

    Raises ModelError if the parameters differ.
    """
    kept = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    settings = {name: group["settings"] for group in kept["groups"] for name in group["parameters"]}
    if settings.keys() != parameters.keys():
        raise ModelError(f"{path} belongs to an optimizer of different parameters; remove its folder to start again")
    names = {parameter: name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        for key, value in settings[names[group["params"][0]]].items():
            if key in KERNELS:
                continue
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    # Fused kernels need step counts on the weights' device, others need them on the CPU.
    kinds = [(group.get("fused") or group.get("capturable"), group["params"]) for group in optimizer.param_groups]
    fused = {parameter for is_fused, members in kinds if is_fused for parameter in members}
    state: dict[Tensor, dict[str, Tensor | float]] = {}
    for key, value in {**load_file(path), **kept["scalars"]}.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = _like(value, parameter)
        elif isinstance(value, Tensor) and (slot != "step" or parameter in fused):
            value = value.to(parameter.device)
        if slot in ("state1", "state2") and hasattr(optimizer, "get_state_buffer"):  # bitsandbytes may use paged memory
            value = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(parameter, {})[slot] = value
    optimizer.state.clear()
    optimizer.state.update(state)


def generator_states(runtime: Runtime) -> JsonObject:
    """The random generator states of this process (Python, numpy, torch, its GPU), in JSON types."""
    version, words, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    state: JsonObject = {
        "python": [version, list(words), gauss],
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(runtime.device).tolist()
    return state


def set_generator_states(state: Mapping[str, Any], runtime: Runtime) -> None:
    """Restore this process's random generator states."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and runtime.device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), runtime.device)


def save_generators(folder: Path, runtime: Runtime) -> None:
    """Save this process's random generator states in its own file."""
    (folder / _generators(runtime)).write_text(json.dumps(generator_states(runtime)), encoding="utf-8")


def load_generators(folder: Path, runtime: Runtime) -> bool:
    """Restore what ``save_generators`` saved. Returns False if a different number of processes wrote the checkpoint."""
    path = folder / _generators(runtime)
    if path.exists():
        set_generator_states(json.loads(path.read_text(encoding="utf-8")), runtime)
    return path.exists()


def _generators(runtime: Runtime) -> str:
    return f"generators-{runtime.process_index}-of-{runtime.num_processes}.json"
