"""Checkpoints of a step under way: written aside and renamed whole, with the SHA-256 of every file, kept by a rule, checked when read.

    <folder>/checkpoint-000012/...                  tensors (safetensors) and JSON; no pickle
    <folder>/checkpoint-000012/checkpoint.json      what it is, and size and SHA-256 of the files; written last

Checkpoints do not depend on the number of processes, but for the random streams, which every process keeps for itself.
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

from stages.errors import ModelError
from stages.process.runtime import Runtime
from stages.process.storage import sync, write_json
from stages.registry.contents import file_sha256, files_of

FORMAT = 1
MANIFEST = "checkpoint.json"
COST_SHARE = 20  # at most about this part of the time goes into writing: the pause after a slow checkpoint grows


@dataclass(frozen=True)
class Checkpoint:
    """One that was written to its end."""

    path: Path
    number: int
    score: float | None  # the higher the better; None where it is not to be compared


class Checkpoints:
    """The checkpoints in ``folder``: the newest ``keep_last`` and the ``keep_best`` of the highest score are kept."""

    def __init__(self, folder: Path, runtime: Runtime, *, keep_last: int = 2, keep_best: int = 0, seconds: float = 0.0) -> None:
        self.folder, self.runtime = folder, runtime
        self.keep_last, self.keep_best, self.seconds = keep_last, keep_best, seconds
        self._saved_at, self._pause = time.monotonic(), seconds

    # Writing

    def is_due(self) -> bool:
        """Whether it is time for another one, by the clock of this process."""
        return time.monotonic() - self._saved_at >= self._pause

    def wants(self, score: float) -> bool:
        """Whether a checkpoint of this score would be among the best that are kept. Call on every process."""
        if self.keep_best == 0:
            return False
        scores = self.runtime.decide(lambda: sorted((found.score for found in self._all() if found.score is not None), reverse=True))
        return len(scores) < self.keep_best or score > scores[self.keep_best - 1]

    def write(self, fill: Callable[[Path], None], *, score: float | None = None) -> None:
        """Add a checkpoint of what ``fill(folder)`` writes. Call on every process; each may write files of its own into the folder."""
        began = time.monotonic()
        number = self.runtime.decide(lambda: max((found.number for found in self._all()), default=0) + 1)
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
            shutil.rmtree(staging, ignore_errors=True)  # a full disk is not left fuller
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
        best = sorted((found for found in kept if found.score is not None), key=lambda found: (-(found.score or 0.0), found.number))
        wanted = {found.number for found in [*kept[: self.keep_last], *best[: self.keep_best]]}
        for found in kept:
            if found.number not in wanted:
                # Renamed first: a checkpoint that is half removed must not look like one that is half written.
                removed = self.folder / f".removed-{found.number}"
                os.rename(found.path, removed)
                shutil.rmtree(removed, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for pattern in (".partial-*", ".removed-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    # Reading

    def newest(self) -> Checkpoint | None:
        """The newest one whose every byte is as written; damaged ones are told of and passed over. Call on every process."""
        return self.runtime.decide(lambda: self._first_whole(self._all()))

    def best(self) -> Checkpoint | None:
        """The whole one of the highest score; the earlier where two are equal."""
        scored = [found for found in self._all() if found.score is not None]
        ordered = sorted(scored, key=lambda found: (-(found.score or 0.0), found.number))
        return self.runtime.decide(lambda: self._first_whole(ordered))

    def _first_whole(self, found: Iterable[Checkpoint]) -> Checkpoint | None:
        for checkpoint in found:
            problem = problem_of(checkpoint.path)
            if problem is None:
                return checkpoint
            self.runtime.console.print(f"{checkpoint.path.name} is passed over: {problem}", markup=False)
        return None

    def _all(self) -> list[Checkpoint]:
        """Every one that has a manifest, the newest first."""
        found = []
        for path in self.folder.glob("checkpoint-*"):
            try:
                manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                score = manifest["score"]
                found.append(Checkpoint(path, int(manifest["number"]), None if score is None else float(score)))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # without its manifest it was never finished
        return sorted(found, key=lambda checkpoint: -checkpoint.number)


def problem_of(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where all are as written."""
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
                return f"{file['path']} was changed: its SHA-256 is not the one it was written with"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


# What goes into one


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, write: bool = True) -> None:
    """Named tensors as safetensors. Sharded ones are put together first, which every process has to take part in; ``write``: the main."""
    whole = {name: _whole(value) for name, value in tensors.items()}
    if write:
        save_file({name: value.detach().cpu().contiguous() for name, value in whole.items()}, path)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The named parameters that train: all that a checkpoint needs of a model whose other weights are in the registry."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put what ``save_tensors`` kept into ``tensors``. Raises ModelError where names or shapes are not those saved."""
    saved = load_file(path)
    if saved.keys() != tensors.keys():
        differ = sorted(saved.keys() ^ tensors.keys())
        raise ModelError(f"{path} holds the weights of another model ({', '.join(differ[:3])}); remove its folder to begin anew")
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise ModelError(f"{path}: {name} has shape {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}")
        tensor.copy_(_like(saved[name], tensor))


def _like(value: Tensor, old: Tensor) -> Tensor:
    """``value`` on the device of ``old``, and cut as it is where ``old`` is sharded."""
    if hasattr(old, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(old.device, old.dtype), old.device_mesh, old.placements)
    return value.to(old.device)


def save_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], path: Path, *, write: bool = True) -> None:
    """Moments and step counts by parameter as ``path`` (safetensors), the settings of the groups beside it as JSON.

    ``parameters`` are those of the optimizer, by name: their order, and how they are grouped, may be another when they are read.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    slots = {(names[parameter], slot): value for parameter, state in optimizer.state.items() for slot, value in state.items()}
    # All parameters of bitsandbytes' optimizers share one map of 8-bit codes; a file of tensors wants each by itself.
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


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], path: Path) -> None:
    """Put back what ``save_optimizer`` kept. Raises ModelError where it was of other parameters."""
    kept = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    settings = {name: group["settings"] for group in kept["groups"] for name in group["parameters"]}
    if settings.keys() != parameters.keys():
        raise ModelError(f"{path} is of an optimizer of other parameters; remove its folder to begin anew")
    names = {parameter: name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        for key, value in settings[names[group["params"][0]]].items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    # Fused kernels want the step counts beside the weights, others want them on the CPU.
    kinds = [(group.get("fused") or group.get("capturable"), group["params"]) for group in optimizer.param_groups]
    fused = {parameter for is_fused, members in kinds if is_fused for parameter in members}
    state: dict[Tensor, dict[str, Any]] = {}
    for key, value in {**load_file(path), **kept["scalars"]}.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = _like(value, parameter)
        elif isinstance(value, Tensor) and (slot != "step" or parameter in fused):
            value = value.to(parameter.device)
        if slot in ("state1", "state2") and hasattr(optimizer, "get_state_buffer"):  # bitsandbytes: its pages, where it has such
            value = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(parameter, {})[slot] = value
    optimizer.state.clear()
    optimizer.state.update(state)


def generator_states(runtime: Runtime) -> dict[str, Any]:
    """The random streams of this process (Python, numpy, torch, its GPU), as JSON takes them."""
    version, words, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(runtime.device).tolist()
    return state


def set_generator_states(state: Mapping[str, Any], runtime: Runtime) -> None:
    """Put the random streams of this process back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and runtime.device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), runtime.device)


def save_generators(folder: Path, runtime: Runtime) -> None:
    """Keep the random streams of this process in a file of its own."""
    (folder / _generators(runtime)).write_text(json.dumps(generator_states(runtime)), encoding="utf-8")


def load_generators(folder: Path, runtime: Runtime) -> bool:
    """Put back what ``save_generators`` kept; False where another number of processes wrote the checkpoint."""
    path = folder / _generators(runtime)
    if path.exists():
        set_generator_states(json.loads(path.read_text(encoding="utf-8")), runtime)
    return path.exists()


def _generators(runtime: Runtime) -> str:
    return f"generators-{runtime.process_index}-of-{runtime.num_processes}.json"
