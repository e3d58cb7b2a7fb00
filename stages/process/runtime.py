"""The process a step runs in: devices, precision, seeds, printing, metrics, and what a stage is handed. The only reader of the environment.

torch, accelerate and transformers are imported when first needed, so that planning a recipe stays fast.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stages.config import ModelInput
from stages.errors import LaunchError, RecipeError, StagesError, doing
from stages.process import noise, redaction
from stages.process.gpus import describe_model, gpu_name, set_up_gpu, visible_gpus
from stages.process.stopping import StopRequest
from stages.registry.ledger import ModelRecord, Registry

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator, PartialState

    from stages.process.trackers import StepTrackers

T = TypeVar("T")


def default_home() -> Path:
    """The folder under which everything made is kept: ``STAGES_HOME``, else ``outputs``."""
    return Path(os.environ.get("STAGES_HOME") or "outputs")


def secret(variable: str) -> str:
    """The secret in an environment variable; it must never reach a log, a manifest or a report. Raises RecipeError where it is not set."""
    value = os.environ.get(variable, "")
    if not value:
        raise RecipeError(f"the environment variable {variable} is not set; export it, or remove api_key_variable where no key is needed")
    return value


def secret_if_set(variable: str) -> str | None:
    """The secret in an environment variable, or None."""
    return os.environ.get(variable) or None


def launched_processes() -> int:
    """How many processes the launcher started (1 without a launcher); known without importing torch."""
    return _first_number("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", default=1)


def launched_rank() -> int:
    """This process's number among those the launcher started; known without importing torch."""
    return _first_number("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", default=0)


def _first_number(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def is_short_of_processes() -> bool:
    """Whether ``accelerate launch`` was asked for several processes and started this one alone: it then sets MASTER_ADDR and no size."""
    by_accelerate = "ACCELERATE_DYNAMO_MODE" in os.environ and "MASTER_ADDR" in os.environ
    return by_accelerate and launched_processes() == 1 and not any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE"))


def environment_without_launcher() -> dict[str, str]:
    """The environment less what a launcher set, for another launcher to begin from."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_", "KMP_"))}


def _takes_sharding_over() -> bool:
    """Whether an accelerate config asked for FSDP2. It is then our own affair (models/sharding.py), on CPUs as well as on GPUs.

    Raises LaunchError for what is not offered.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise LaunchError("FSDP of version 1 was asked for; write fsdp_version: 2 into the accelerate config")
    for option, advice in (
        ("FSDP_OFFLOAD_PARAMS", "leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "write training: {gradient_checkpointing: true} into the step instead"),
    ):
        if os.environ.get(option, "").lower() == "true":
            raise LaunchError(f"{option.lower()} in the accelerate config is not offered here; {advice}")
    del os.environ["ACCELERATE_USE_FSDP"]
    return launched_processes() > 1


def has_launcher() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process and waits for it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_MODE" in os.environ


def protect_secrets() -> None:
    """Blot the environment's secrets out of what this process prints from now on."""
    redaction.protect(os.environ)
    sys.stdout, sys.stderr = redaction.Blotted(sys.stdout), redaction.Blotted(sys.stderr)


def command_to_go_on() -> str:
    """What the user typed, to be typed again: as launch.sh tells (STAGES_COMMAND), else this process's own arguments."""
    given = os.environ.get("STAGES_COMMAND")
    program = Path(sys.argv[0]).name
    return given or shlex.join(["stages" if program in ("stages", "__main__.py") else program, *sys.argv[1:]])


def print_error(text: str) -> None:
    """One message on stderr, whole even where several processes write at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def leave_at_once(status: int) -> None:
    """End a process among several that met an error: the exchange with the others is broken off, and may not be taken down in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lost_the_others(error: BaseException) -> bool:
    """Whether ``error`` says that another process of this run is gone (gloo and NCCL notice it at their next exchange)."""
    if launched_processes() == 1:
        return False
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "closed by peer", "reset by peer"))


def cpu_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_memory() -> tuple[str, int] | None:
    """Name and bytes of the first GPU, asked of nvidia-smi and so without torch; None where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        first = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
        name, size = first.rsplit(",", 1)
        return name.strip(), int(size) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def has_amx() -> bool:
    """Whether the CPU has matrix tiles for bf16; known without torch."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


@dataclass(frozen=True)
class ResolvedModel:
    """A model input after resolution: where ``from_pretrained`` finds it, and what the registry knows of it."""

    ref: str  # as the recipe writes it
    kind: str  # "registry" | "folder" | "hub"
    path: str  # folder, or hub id
    digest: str  # content digest; for a hub id, the id and revision
    input: ModelInput
    record: ModelRecord | None = None
    base: ResolvedModel | None = None  # of an adapter whose own files do not say it, such as one that is about to be published

    def with_quantization(self, other: ModelInput) -> ResolvedModel:
        """The same model, loaded as ``other`` says: quantized or not, and with its attention."""
        fields = {"quantization": other.quantization, "double_quantization": other.double_quantization, "attention": other.attention}
        return replace(self, input=self.input.model_copy(update=fields))


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
        noise.silence()
        # oneDNN keeps the code of its last 1024 shapes, and PyTorch keeps as many over again (for each thread). Ragged batches hardly ever
        # repeat one: a long run would fill hundreds of MiB for nothing.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
        os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
        # Wide enough for tables when the output is a file: rich would otherwise fold at 80 columns.
        width = None if sys.stdout.isatty() else 140
        self.shards = _takes_sharding_over()
        self.uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        self.console = Console(quiet=quiet or not self.is_main, width=width, highlight=False)
        self.stop = StopRequest()
        self.listeners: list[Callable[[str, int, dict[str, float]], None]] = []  # called with every line of metrics; rank zero only
        self.waits_for_people = False  # wait until people have answered, instead of ending with status 75

    @cached_property
    def state(self) -> PartialState:
        """Device and process group; joined on first use. Raises LaunchError where fewer processes joined than the launcher started."""
        import torch
        from accelerate import PartialState

        wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        # Without cpu=True accelerate joins no process group on a CPU: each of the launched processes would train alone. The time limit is
        # for a process that is at work and not for one that is gone, which the launcher notices: rank zero may write for long.
        state = PartialState(cpu=wants_cpu or not torch.accelerator.is_available(), timeout=timedelta(hours=3))
        if state.num_processes != launched_processes():
            raise LaunchError(
                f"the launcher started {launched_processes()} processes, and {state.num_processes} joined; start them with ./launch.sh "
                "RECIPE --num_processes N, torchrun or accelerate launch"
            )
        if state.device.type == "cuda":
            settings = set_up_gpu()
            self.console.print(f"GPU: {', '.join(gpu_name(gpu) for gpu in visible_gpus()) or state.device}; {settings}", markup=False)
        return state

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
        description_and_bar = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns = [*description_and_bar, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[fields]}")]
        disable = self.console.quiet or not self.console.is_terminal
        with doing(description), Progress(*columns, console=self.console, disable=disable, transient=False) as bar:
            yield ProgressBar(bar, bar.add_task(description, total=total, fields=""))

    def say_model(self, name: str, model: Any, dtype: torch.dtype) -> None:
        """On a GPU, one line about a model that a step begins to compute with: dtype, attention and kernels."""
        if self.device.type == "cuda":
            self.console.print(f"{name}: {describe_model(model, dtype)}", markup=False)

    def measure_peak_memory(self) -> int:
        """Peak resident memory of this process in bytes; ``peak_gpu_memory`` is that of its GPU."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def wait_for_everyone(self) -> None:
        if launched_processes() > 1:
            self.state.wait_for_everyone()

    def decide(self, make: Callable[[], T]) -> T:
        """What rank zero makes of it, on every process; an error of rank zero's is raised on all, so that none waits for ever."""
        if launched_processes() == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except StagesError as error:
                outcome[1] = error
        from accelerate.utils import broadcast_object_list

        _ = self.state  # joins the process group
        broadcast_object_list(outcome, from_process=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def leave(self) -> None:
        """Take the exchange between the processes down in order; its threads outlive the interpreter otherwise, and abort it."""
        if launched_processes() > 1 and "state" in vars(self):
            import torch.distributed as distributed

            self.state.wait_for_everyone()
            distributed.destroy_process_group()

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes, on every process."""
        if launched_processes() == 1:
            return list(values)
        import torch
        import torch.distributed as distributed

        gathered = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(gathered, op=distributed.ReduceOp.MAX)
        return gathered.tolist()

    def stop_asked(self) -> bool:
        """Whether any process was asked to end; all processes call this at the same places and get the same answer."""
        number = int(self.largest(self.stop.number or 0)[0])
        if number:
            self.stop.ask(number)
        return number > 0


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
    run: str = ""  # name of the run folder: what trackers call the run
    trackers: Sequence[str] = ("tensorboard",)
    recorded: list[tuple[int, dict[str, float]]] | None = None  # where a training notes what it logs, for a run that goes on after a cut
    _trackers: StepTrackers | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics (named ``room/name``) to metrics.jsonl and to the trackers; rank zero only."""
        if self.recorded is not None:
            self.recorded.append((step, metrics))
        if not self.runtime.is_main:
            return
        for listener in self.runtime.listeners:
            listener(self.name, step, metrics)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._trackers is None:
            from stages.process.trackers import StepTrackers

            _ = self.runtime.state  # accelerate's trackers ask it which process they are in
            recipe, _, own = self.name.rpartition("/")
            names = {"recipe": recipe or own, "run": self.run, "step": own}
            self._trackers = StepTrackers(self.trackers, **names, folder=self.folder, settings=self.recipe_step)
        self._trackers.log(step, metrics)

    @property
    def cache_folder(self) -> Path:
        """For what may be lost but is dear to make again; it belongs to the home, not to the step."""
        return self.registry.root.parent / "cache"

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None

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
        fingerprint = self.fingerprint if name == self.name else f"{self.fingerprint}:{name}"
        # A model beside the step's own is published before it: a run cut off in between must not publish it again.
        is_there = name != self.name and bool(self.fingerprint) and self.registry.find_fingerprint(fingerprint, name) is not None
        if self.runtime.is_main and not is_there:
            with doing(f"saving {name}"):
                self.registry.publish(
                    name,
                    save,
                    role=role,
                    parents=list(self.models.values()),
                    recipe_step=self.recipe_step,
                    data=self.data_fingerprints,
                    metrics=metrics,
                    fingerprint=fingerprint,
                    fingerprint_parts=self.fingerprint_parts,
                    base=base,
                    extra=extra,
                )
        self.runtime.wait_for_everyone()
        return self.registry.get(name)
