"""The process that a step runs in: device, precision, seeds, console, and communication between processes.

torch, accelerate and transformers are imported when first needed, so that planning stays fast.
"""

from __future__ import annotations

import importlib
import random
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Generic, NotRequired, TypedDict, TypeVar

from stages.errors import LaunchError, StagesError
from stages.process import logs
from stages.process.console import ProgressBar, TextConsole, progress_bar
from stages.process.environment import (
    launched_processes,
    launched_rank,
    limit_onednn_caches,
    takes_sharding_over,
    uses_deepspeed,
    wants_cpu,
)
from stages.process.gpus import describe_model, gpu_name, set_up_gpu, visible_gpus
from stages.process.hardware import cpu_name
from stages.process.stopping import StopRequest
from stages.process.threads import describe_threads, set_up_threads

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator, PartialState
    from torch import nn

T = TypeVar("T")


class Compute(TypedDict, total=False):
    """The device and dtype of a step, as summaries record them; empty if no step used a device."""

    device: str
    processes: int
    precision: str
    precision_reason: NotRequired[str]  # of ``auto``
    threads: NotRequired[str]  # of a CPU: how many, on which cores, and how they wait


@dataclass(frozen=True)
class AutoPrecision:
    """The dtype of ``precision: auto``, fp32 or bf16, and the reason for the log and the summary."""

    precision: str
    reason: str


NAMED_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class _Outcome(Generic[T]):
    """What rank zero sends to the other processes: one result, or an error."""

    results: list[T] = field(default_factory=list)
    error: StagesError | None = None


class Runtime:
    """Process-wide services. One per ``stages`` command."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.is_main = launched_rank() == 0
        logs.silence()
        limit_onednn_caches()
        set_up_threads()
        # Wide enough for tables if the output is a file; rich would otherwise wrap at 80 columns.
        width = None if sys.stdout.isatty() else 140
        self.shards = takes_sharding_over()
        self.uses_deepspeed = uses_deepspeed()
        self.console = TextConsole(quiet=quiet or not self.is_main, width=width, highlight=False)
        self.stop = StopRequest()
        self.listeners: list[Callable[[str, int, dict[str, float]], None]] = []  # called with all logged metrics; only on rank zero
        self.waits_for_people = False  # wait for annotators instead of ending with status 75
        self.auto: AutoPrecision | None = None  # the meaning of precision: auto in the current step; only on a CPU
        self._in_step = False
        self._said: set[str] = set()  # lines about the CPU that were printed

    @cached_property
    def state(self) -> PartialState:
        """Device and process group, joined on first use. Raises LaunchError if fewer processes joined than the launcher started."""
        import torch
        from accelerate import PartialState

        # Without cpu=True accelerate joins no process group on a CPU, and each launched process would train alone. The timeout is long
        # because rank zero may write for a long time; the launcher detects processes that have ended.
        state = PartialState(cpu=wants_cpu() or not torch.accelerator.is_available(), timeout=timedelta(hours=3))
        if state.num_processes != launched_processes():
            raise LaunchError(
                f"the launcher started {launched_processes()} processes, but {state.num_processes} joined; start them with ./launch.sh "
                "RECIPE --num_processes N, torchrun or accelerate launch"
            )
        if state.device.type == "cuda":
            settings = set_up_gpu()
            self.console.print(f"GPU: {', '.join(gpu_name(gpu) for gpu in visible_gpus()) or state.device}; {settings}")
        return state

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator of the current step. Created on first use and reset by ``begin_step``."""
        if self._accelerator is None:
            from accelerate import Accelerator

            self._accelerator = Accelerator()
        return self._accelerator

    _accelerator: Accelerator | None = None

    def begin_step(self, seed: int, auto: AutoPrecision | None = None) -> None:
        """Reset process-wide state for a new step: seeds, and the previous step's precision.

        ``auto``: the meaning of ``precision: auto`` in this step, if its device is a CPU (None: fp32).
        """
        from accelerate.state import AcceleratorState, GradientState

        # AcceleratorState is a process-wide singleton that keeps the first precision; PartialState (the process group) stays.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        self._accelerator = None
        self.auto, self._in_step = auto, True
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
        """The compute dtype of a precision setting. On a CPU, a step's first call prints the processor, its threads and the dtype.

        ``auto`` is bf16 on a GPU with CUDA capability 8 or higher. On a CPU it is what was decided for the step (``begin_step``).
        """
        import torch

        name, reason = self._resolved(precision)
        if self.device.type == "cpu" and self._in_step:
            self._say_cpu(f"computes in {name} ({reason})")
        dtype: torch.dtype = getattr(torch, NAMED_DTYPES[name])
        return dtype

    def _resolved(self, precision: str) -> tuple[str, str]:
        """The name of the dtype, and the reason for it."""
        import torch

        if precision != "auto":
            return precision, f"precision: {precision}"
        if self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)[0]
            return "bf16" if capability >= 8 else "fp32", f"precision: auto; CUDA capability {capability}"
        if self.device.type == "cpu" and self.auto is not None:
            return self.auto.precision, f"precision: auto; {self.auto.reason}"
        return "fp32", "precision: auto"

    def _say_cpu(self, dtype: str) -> None:
        """Print how this process computes on its CPU: one line, and a short line whenever the dtype changes."""
        if dtype not in self._said:
            machine = "" if self._said else f"{cpu_name()}; {describe_threads()}; "
            self.console.print(f"CPU: {machine}{dtype}", soft_wrap=True)
            self._said.add(dtype)

    def describe_compute(self, precision: str) -> Compute:
        """``device``, ``processes`` and the dtype of ``precision``; empty if no step has used a device yet."""
        if "state" not in self.__dict__:
            return {}
        gpus = visible_gpus() if self.device.type == "cuda" else []
        is_cpu = self.device.type == "cpu"
        name, reason = self._resolved(precision)
        made: Compute = {
            "device": gpu_name(gpus[0]) if gpus else cpu_name() if is_cpu else str(self.device),
            "processes": self.num_processes,
            "precision": name,
        }
        if is_cpu:
            made["threads"] = describe_threads()
        if precision == "auto":
            made["precision_reason"] = reason
        return made

    def seed_everything(self, seed: int) -> None:
        """Seed Python, numpy and torch equally on every process."""
        import numpy
        import torch

        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    @contextmanager
    def progress(self, description: str, total: float, done: int = 0) -> Iterator[ProgressBar]:
        """A progress bar over ``total`` units, ``done`` of them at the start, on rank zero; lines in a log file."""
        with progress_bar(self.console, description, total, done=done) as bar:
            yield bar

    def say_model(self, name: str, model: nn.Module, dtype: torch.dtype) -> None:
        """On a GPU, log one line about a model that a step uses: dtype, attention and kernels."""
        if self.device.type == "cuda":
            self.console.print(f"{name}: {describe_model(model, dtype)}")

    def measure_peak_memory(self) -> int:
        """Peak resident memory of this process in bytes. ``peak_gpu_memory`` gives that of its GPU."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def wait_for_everyone(self) -> None:
        if launched_processes() > 1:
            self.state.wait_for_everyone()

    def decide(self, make: Callable[[], T]) -> T:
        """Run ``make`` on rank zero and return its result on every process. An error is raised on all, so that no process waits forever."""
        if launched_processes() == 1:
            return make()
        outcome: list[_Outcome[T]] = [_Outcome()]
        if self.is_main:
            try:
                outcome[0].results.append(make())
            except StagesError as error:
                outcome[0].error = error
        from accelerate.utils import broadcast_object_list

        _ = self.state  # joins the process group
        broadcast_object_list(outcome, from_process=0)
        if outcome[0].error is not None:
            raise outcome[0].error
        return outcome[0].results[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of the processes, on every process."""
        if launched_processes() == 1:
            return [value]
        from accelerate.utils import gather_object

        _ = self.state  # joins the process group
        gathered: list[T] = gather_object([value])
        return gathered

    def distribute(self, count: int, work: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Apply ``work`` to the indices 0 to ``count`` - 1, divided among the processes. Every process gets all results, in order.

        A process without an index does not call ``work``.
        """
        own = list(range(self.process_index, count, self.num_processes))
        shares = self.gather(list(zip(own, work(own), strict=True)) if own else [])
        return [result for _, result in sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])]

    def leave(self) -> None:
        """Shut down the communication between processes in order; otherwise its threads outlive the interpreter and abort it."""
        if launched_processes() > 1 and "state" in vars(self):
            import torch.distributed as distributed

            self.state.wait_for_everyone()
            distributed.destroy_process_group()

    def largest(self, *values: float) -> list[float]:
        """The maximum of each value over all processes, on every process."""
        if launched_processes() == 1:
            return list(values)
        import torch
        import torch.distributed as distributed

        gathered = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(gathered, op=distributed.ReduceOp.MAX)
        return gathered.tolist()


FORMER_ADDRESSES = {"ResolvedModel": "stages.registry.references", "StepContext": "stages.step", "StepResult": "stages.step"}
"""Former names of this module, for scripts outside this repository."""


def __getattr__(name: str) -> object:
    if name in FORMER_ADDRESSES:
        return getattr(importlib.import_module(FORMER_ADDRESSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
