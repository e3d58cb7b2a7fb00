"""The process a step runs in: devices, precision, seeds, printing, metrics, and what a stage is handed. The only reader of the environment.

torch, accelerate and transformers are imported when first needed, so that planning a recipe stays fast.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stages.config import ModelInput
from stages.errors import RecipeError
from stages.registry import ModelRecord, Registry

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator, PartialState
    from torch.utils.tensorboard import SummaryWriter


def default_home() -> Path:
    """The folder under which everything made is kept: ``STAGES_HOME``, else ``outputs``."""
    return Path(os.environ.get("STAGES_HOME") or "outputs")


def secret(variable: str) -> str:
    """The secret in an environment variable; it must never reach a log, a manifest or a report. Raises RecipeError where it is not set."""
    value = os.environ.get(variable, "")
    if not value:
        raise RecipeError(f"the environment variable {variable} is not set; export it, or remove api_key_variable where no key is needed")
    return value


def launched_processes() -> int:
    """How many processes the launcher started (1 without a launcher); known without importing torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number among those the launcher started; known without importing torch."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class ResolvedModel:
    """A model input after resolution: where ``from_pretrained`` finds it, and what the registry knows of it."""

    ref: str  # as the recipe writes it
    kind: str  # "registry" | "folder" | "hub"
    path: str  # folder, or hub id
    digest: str  # content digest; for a hub id, the id and revision
    input: ModelInput
    record: ModelRecord | None = None


@dataclass
class StepResult:
    """What a stage gives back to the chain."""

    model: ModelRecord | None
    metrics: dict[str, Any]
    evaluation: dict[str, Any] | None = None  # evaluation stage only: candidates, win_rates, judges


class ProgressBar:
    """A rank-zero progress bar; extra fields (reward, KL, speed) are shown behind it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        shown = "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items())
        self._progress.update(self._task, advance=amount, fields=shown)


class Runtime:
    """Process-wide services. One per ``stages`` command."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.is_main = launched_rank() == 0
        # It warns on import that an optional speed-up for 4-bit models on CPUs is not installed, whether or not one is used.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        # Wide enough for tables when the output is a file: rich would otherwise fold at 80 columns.
        width = None if sys.stdout.isatty() else 140
        self.console = Console(quiet=quiet or not self.is_main, width=width, highlight=False)

    @cached_property
    def state(self) -> PartialState:
        from accelerate import PartialState

        return PartialState()

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator of the step that is running (made on first use; ``begin_step`` forgets the last step's)."""
        if self._accelerator is None:
            from accelerate import Accelerator

            self._accelerator = Accelerator()
        return self._accelerator

    _accelerator: Accelerator | None = None

    def begin_step(self, seed: int) -> None:
        """Give a step a process that looks fresh: its seeds, and no precision left over from the step before."""
        from accelerate.state import AcceleratorState, GradientState

        # AcceleratorState is a process-wide singleton that pins the first precision it sees; PartialState (the process group) stays.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        self._accelerator = None
        self.seed_everything(seed)

    @property
    def device(self) -> torch.device:
        return self.state.device

    @property
    def num_processes(self) -> int:
        return self.state.num_processes

    @property
    def process_index(self) -> int:
        return self.state.process_index

    def dtype(self, precision: str) -> torch.dtype:
        """The compute dtype of a precision setting.

        ``auto`` is bf16 where the hardware is known to be faster at it (CUDA capability 8 and up, CPUs with AMX tiles), else fp32. It goes
        by what the hardware is and not by a timing, so that two runs on one machine make the same bits.
        """
        import torch

        named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if precision in named:
            return named[precision]
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(self.device)[0] >= 8 else torch.float32
        has_amx = self.device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_amx else torch.float32

    def seed_everything(self, seed: int) -> None:
        """Seed Python, numpy and torch alike on every process."""
        import numpy
        import torch

        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    @contextmanager
    def progress(self, description: str, total: float) -> Iterator[ProgressBar]:
        """A progress bar over ``total`` units, shown on rank zero and only in a terminal (a log file gets no bar)."""
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
        disable = self.console.quiet or not self.console.is_terminal
        with Progress(*columns, TextColumn("{task.fields[fields]}"), console=self.console, disable=disable, transient=False) as bar:
            yield ProgressBar(bar, bar.add_task(description, total=total, fields=""))

    def measure_peak_memory(self) -> int:
        """Peak memory of this process in bytes: resident memory, plus what CUDA allocated."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            peak += torch.cuda.max_memory_allocated()
        return peak

    def wait_for_everyone(self) -> None:
        if launched_processes() > 1:
            self.state.wait_for_everyone()


@dataclass
class StepContext:
    """What a stage is handed beside its config: the inputs as resolved, the folders to write to, and the way to publish."""

    name: str  # registry name of what the step makes, <recipe>/<step>
    seed: int
    runtime: Runtime
    registry: Registry
    models: dict[str, ResolvedModel]  # by the field path of config.model_inputs()
    folder: Path  # run folder of this step: metrics.jsonl, samples.jsonl, tensorboard/
    checkpoint_folder: Path  # survives a cut-off run; the chain removes it once the step is done
    fingerprint: str = ""
    fingerprint_parts: dict[str, Any] = field(default_factory=dict)
    recipe_step: dict[str, Any] = field(default_factory=dict)  # the step as resolved
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    _tensorboard: SummaryWriter | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics (named ``room/name``) to metrics.jsonl and TensorBoard; rank zero only."""
        if not self.runtime.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.folder / "tensorboard")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    @property
    def cache_folder(self) -> Path:
        """For what may be lost but is dear to make again; it belongs to the home, not to the step."""
        return self.registry.root.parent / "cache"

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def publish(
        self,
        save: Callable[[Path], None],
        *,
        role: str,
        metrics: dict[str, Any],
        base: ResolvedModel | None = None,
        extra: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> ModelRecord:
        """Publish what ``save(folder)`` writes; ``base`` is the model that an adapter stands on. Every process gets the record."""
        name = name or self.name
        if self.runtime.is_main:
            self.registry.publish(
                name,
                save,
                role=role,
                parents=list(self.models.values()),
                recipe_step=self.recipe_step,
                data=self.data_fingerprints,
                metrics=metrics,
                fingerprint=self.fingerprint if name == self.name else "",
                fingerprint_parts=self.fingerprint_parts,
                base=base,
                extra=extra,
            )
        self.runtime.wait_for_everyone()
        return self.registry.get(name)
