"""The measurements of the GPU table. Each function takes a task (a dict) and returns a dict that can be written as JSON.

``table.py`` runs each task in a separate process, so that one measurement does not affect the memory of the next.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workloads import FULL, TINY, Scale, prepare, random_model, random_prompts, settings_of, shortened

BENCHMARKS = Path(__file__).resolve().parents[1]


def scale_of(task: dict[str, Any]) -> Scale:
    return TINY if task["tiny"] else FULL


# One step of a recipe: speed, planned and measured memory, share of the matmul peak, idle share


def step(task: dict[str, Any]) -> dict[str, Any]:
    """Plan and run one recipe step. ``task``: shape, stage, quantization, learned_reward, fields, profile, short.

    The peak is the maximum during the step. Making the files of random weights may take more; it does not count.
    """
    from stages.chain.run import run_function
    from stages.memory.estimate import Machine
    from stages.memory_plan.plan import plan_memory
    from stages.process.gpus import own_peak
    from stages.process.packages import missing_quantization_package
    from stages.recipe.schema import load_recipe
    from stages.registry.ledger import Registry

    scale, on_gpu = scale_of(task), task["device"] == "cuda"
    scale = shortened(scale) if task["short"] else scale
    fields = task["fields"]
    if missing := missing_quantization_package(task["quantization"], fields.get("training", {}).get("optimizer", "adamw")):
        return {"skipped": missing}
    workdir = prepare(scale, task["shape"], Path(task["work"]), task["device"])
    sys.path.insert(0, str(workdir))  # counting_reward
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        settings = settings_of(
            scale, workdir, stage=task["stage"], quantization=task["quantization"], learned_reward=task["learned_reward"], fields=fields
        )
        (home / "recipe.yaml").write_text(json.dumps({"name": "table", "steps": [settings]}))  # JSON is YAML
        registry = Registry(home / "registry")
        recipe = load_recipe(home / "recipe.yaml", [], registry)
        machine = Machine("cuda" if on_gpu else "cpu", device_bytes(task["device"]), 2, task["device"])
        memory = plan_memory(recipe, registry, machine)[0].memory
        context, clock = _context(recipe.steps[0], home, registry)
        with own_peak() as peak, _profiled(clock, scale.iterations - 1, on_gpu) if task["profile"] else _plain() as idle:
            run_function(task["stage"])(recipe.steps[0].config, context)
    measured = {
        "planned_bytes": None if memory is None else round(memory.total),
        "peak_bytes": peak.total if on_gpu else None,
        "idle_share": idle.get("share"),
        "idle_why": idle.get("why", ""),
        "allocator_retries": allocator_retries() if on_gpu else None,
    }
    return {**measured, **(_speed(clock, scale) if task["stage"] == "ppo" else {})}


class Clock:
    """The time and the metrics of each iteration of a run."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.lines: list[dict[str, float]] = []

    def note(self, metrics: dict[str, float]) -> None:
        synchronize()
        self.times.append(time.perf_counter())
        self.lines.append(metrics)


def step_context(step: Any, home: Path, registry: Any) -> Any:
    """The context of a recipe step that runs without a chain. Makes its folders in ``home``."""
    from stages.process.runtime import Runtime
    from stages.registry.references import ResolvedModel
    from stages.step import StepContext

    runtime = Runtime(quiet=True)
    runtime.begin_step(0)
    models = {
        path: ResolvedModel(reference.input.ref, "folder", reference.target, reference.target, reference.input)
        for path, reference in step.models.items()
    }
    folders = {"folder": home / "run", "checkpoint_folder": home / "work"}
    for folder in folders.values():
        folder.mkdir()
    return StepContext("test/step", 0, runtime, registry, models, trackers=(), **folders)


def _context(step: Any, home: Path, registry: Any) -> tuple[Any, Clock]:
    """A step context whose log also goes to a clock."""
    context = step_context(step, home, registry)
    clock, log = Clock(), context.log

    def noted(number: int, metrics: dict[str, float]) -> None:
        log(number, metrics)
        clock.note(metrics)

    context.log = noted  # type: ignore[method-assign]
    return context, clock


def _speed(clock: Clock, scale: Scale) -> dict[str, Any]:
    """Speed of PPO without the first iteration, which warms up, and without the last one, which may be profiled."""
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    lines = clock.lines[1:-1] or clock.lines

    def mean(name: str) -> float:
        return statistics.mean(line[name] for line in lines)

    return {
        "episodes_per_second": scale.batch * len(seconds[1:-1]) / sum(seconds[1:-1]),
        "seconds": seconds,
        "update_matmul_share": mean("time/update_matmul_share"),
        "recomputed_share": mean("time/update_recomputed_share") if "time/update_recomputed_share" in lines[0] else None,
        "generation_tokens_per_second": mean("time/generation_tokens_per_second"),
        "update_tokens_per_second": mean("time/update_tokens_per_second"),
        "pass_tokens": mean("time/update_pass_tokens"),
        "retreats": sum(line["passes/retreats"] for line in clock.lines),
    }


@contextmanager
def _plain() -> Iterator[dict[str, Any]]:
    yield {}


@contextmanager
def _profiled(clock: Clock, iteration: int, on_gpu: bool) -> Iterator[dict[str, Any]]:
    """Profile the update of one iteration (counted from 0). Sets ``share`` of the yielded dict: the time without a kernel on the GPU.

    If there is no share, ``why`` says why, and the run continues. On a CPU the profiler runs as well, so that this code is tested.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from stages.ppo.update.updater import Updater

    usual, idle = Updater.update, dict[str, Any]()

    def update(self: Any, *arguments: Any, **named: Any) -> Any:
        if len(clock.lines) != iteration:
            return usual(self, *arguments, **named)
        synchronize()
        profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
        try:
            profiler.start()
        except (AssertionError, RuntimeError) as error:  # a PyTorch or a machine without CUPTI
            idle["why"] = f"the profiler does not start ({type(error).__name__}: {str(error)[:120]})"
            return usual(self, *arguments, **named)
        try:
            began = time.perf_counter()
            result = usual(self, *arguments, **named)
            synchronize()
            microseconds = 1e6 * (time.perf_counter() - began)
        finally:
            profiler.stop()
        on_device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        events = [event.time_range for event in profiler.events() if event.device_type == on_device]
        busy = covered((event.start, event.end) for event in events)
        if on_gpu and events:
            idle["share"] = max(0.0, 1 - busy / microseconds)
        else:
            idle["why"] = "the profiler sees no kernels" if on_gpu else "no GPU"
        return result

    Updater.update = update  # type: ignore[method-assign]
    try:
        yield idle
    finally:
        Updater.update = usual  # type: ignore[method-assign]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# Files


def files(task: dict[str, Any]) -> dict[str, Any]:
    """Make the files of a shape. Returns their folder and the settings of the workload, which TRL's process reads. ``task``: shape."""
    scale = scale_of(task)
    workdir = prepare(scale, task["shape"], Path(task["work"]), task["device"])
    workload = {"batch": scale.batch, "epochs": scale.epochs, "iterations": scale.iterations, "new_tokens": scale.new_tokens}
    return {"workdir": str(workdir), **workload}


# Decoding


def decoding(task: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second here and by ``model.generate``; they take turns. ``task``: shape, ragged (one token in 64 ends a row)."""
    import torch

    from stages.config import GenerationSettings
    from stages.sampling.generation import generate, left_pad

    scale, device = scale_of(task), task["device"]
    model = random_model(scale.shapes[task["shape"]], device, torch.bfloat16)
    vocabulary = model.config.vocab_size
    prompts = random_prompts(scale, scale.batch, vocabulary)
    stops = list(range(1, 1 + max(1, vocabulary // 64))) if task["ragged"] else []
    settings = GenerationSettings(max_new_tokens=scale.decoded_tokens, batch_size=scale.batch)
    ids, mask = left_pad(prompts, 0, device)

    def here(turn: int) -> int:
        seeds = [1000 * turn + row for row in range(len(prompts))]
        return int(generate(model, prompts, settings, seeds=seeds, stop_ids=stops, pad_token_id=0).lengths.sum())

    def theirs(turn: int) -> int:
        torch.manual_seed(turn)
        options = {"max_new_tokens": scale.decoded_tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        made = model.generate(ids, attention_mask=mask, eos_token_id=stops or None, pad_token_id=0, **options)[:, ids.shape[1] :]
        ends = torch.isin(made, torch.tensor(stops, device=made.device)).long()
        return int((ends.cumsum(1) - ends == 0).sum())  # tokens up to and including the first end

    speeds = in_turn({"here": here, "generate": theirs}, scale.rounds)
    return {**speeds, "ratio": speeds["here"] / speeds["generate"]}


def continuous(task: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of continuous batching and of batch after batch. ``task``: shape."""
    import torch

    sys.path.insert(0, str(BENCHMARKS))
    from continuous_batching import sample

    scale, device = scale_of(task), task["device"]
    model = random_model(scale.shapes[task["shape"]], device, torch.bfloat16)
    prompts = random_prompts(scale, scale.waiting_prompts, model.config.vocab_size)

    def way(name: str) -> Callable[[int], int]:
        return lambda turn: int(sample(model, prompts, name, turn, scale.decoding_slots, scale.longest_completion).lengths.sum())

    speeds = in_turn({name: way(name) for name in ("continuous", "batch after batch")}, scale.rounds)
    return {**speeds, "ratio": speeds["continuous"] / speeds["batch after batch"]}


def in_turn(ways: dict[str, Callable[[int], int]], rounds: int) -> dict[str, float]:
    """Median of tokens per second of each way. The ways take turns. One more round at the start is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            synchronize()
            began = time.perf_counter()
            tokens = way(turn)
            synchronize()
            if turn:
                speeds[name].append(tokens / (time.perf_counter() - began))
    return {name: statistics.median(measured) for name, measured in speeds.items()}


# KL of a model to itself


def self_kl(task: dict[str, Any]) -> dict[str, Any]:
    """Mean KL in nats per completion of a model to itself in an evaluation. ``task``: shape, precision."""
    from stages.chain.run import run_function
    from stages.recipe.schema import load_recipe
    from stages.registry.ledger import Registry

    scale = scale_of(task)
    workdir = prepare(scale, task["shape"], Path(task["work"]), task["device"])
    sys.path.insert(0, str(workdir))
    model = str(workdir / "policy")
    settings = {
        "stage": "evaluation",
        "name": "step",
        "precision": task["precision"],
        "candidates": {"before": model, "after": model},
        "kl_reference": "before",
        "data": str(workdir / "prompts.jsonl"),
        "num_prompts": scale.batch,
        "generation": {"max_new_tokens": scale.new_tokens},
        "judges": [{"function": "counting_reward:words"}],
    }
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "recipe.yaml").write_text(json.dumps({"name": "table", "steps": [settings]}))
        registry = Registry(home / "registry")
        recipe = load_recipe(home / "recipe.yaml", [], registry)
        context, _ = _context(recipe.steps[0], home, registry)
        result = run_function("evaluation")(recipe.steps[0].config, context)
    return {"kl": result.evaluation["candidates"]["after"]["kl"]}


# The machine


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocator_retries() -> int:
    """How often PyTorch freed all cached blocks because none was large enough for a tensor. Each time costs milliseconds."""
    import torch

    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def device_bytes(device: str) -> int:
    """Memory of the device that the measurements run on, in bytes."""
    import torch

    from stages.process.hardware import cpu_memory

    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else cpu_memory()


MEASURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "step": step,
    "files": files,
    "decoding": decoding,
    "continuous": continuous,
    "self_kl": self_kl,
}


def measured(task: dict[str, Any]) -> dict[str, Any]:
    """The result of a task.

    If memory ran out or a package is missing, the result has the reason as ``skipped``. Other errors are raised.
    """
    from stages.errors import is_out_of_memory

    try:
        if task["device"] == "cuda":
            import torch

            torch.backends.cuda.enable_cudnn_sdp(False)  # as the program does for its own runs
        return MEASURES[task["measure"]](task)
    except ImportError as error:
        return {"skipped": f"a package is missing: {error}"}
    except Exception as error:
        if any(is_out_of_memory(one) for one in causes(error)):
            return {"skipped": f"does not fit: {str(error).strip().splitlines()[0][:200]}"}
        raise


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and the errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
