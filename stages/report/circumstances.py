"""How a run was computed, for its page: command, seeds, device, precision, memory and versions.

A reused step was computed by an earlier run, perhaps on another machine. Its facts are those of the earlier run.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from stages.process.gpus import gpu_name
from stages.report.run_folder import Row, RunFolder, StepFolder
from stages.run_summary import Environment, RunSummary, StepSummary

UNKNOWN = "not recorded"


def command(summary: RunSummary) -> str:
    """The command that started the run. If it was not recorded, a command that does the same."""
    if summary.get("command"):
        return str(summary["command"])
    return shlex.join(["./launch.sh", str(summary.get("recipe_file", "RECIPE")), *summary.get("overrides", [])])


def facts(run: RunFolder) -> dict[str, str]:
    """Facts about the entire run, by name."""
    summary, environment = run.summary, run.summary.get("environment", Environment())
    return {
        "seed": str(summary.get("seed", UNKNOWN)),
        "precision": _precision(run.steps),
        "device": device(summary),
        "processes": _processes(environment),
        "peak memory": memory(summary),
        "started": f"{summary.get('started', '')[:16].replace('T', ' ')} UTC",
        "system": f"Python {environment.get('python', '?')}, {environment.get('platform', UNKNOWN)}",
        "packages": packages(environment),
    }


def step_facts(run: RunFolder) -> list[Row]:
    """A row per step: its seed, precision, compiled layers, duration, memory and device, and the run that computed it."""
    rows = []
    for step in run.steps:
        made = _made(step)
        rows.append(
            {
                "name": step.name,
                "seed": step.entry.get("seed", step.config.get("seed") or run.summary.get("seed", UNKNOWN)),
                "precision": made.get("precision") or str(step.config.get("precision", UNKNOWN)),
                "layers": compiled_layers(made.get("compiled_layers")),
                "seconds": made.get("wall_seconds"),
                "memory": memory(made),
                "run": (made.get("run") or "an earlier run") if step.entry.get("reused") else "this run",
                "device": made.get("device", UNKNOWN),
            }
        )
    return rows


def compiled_layers(made: object) -> str:
    """Whether torch.compile computed the layers of a step, and why not. Empty for a step without training, and if it was not recorded.

    ``made``: the ``compiled_layers`` of the step's circumstances (``CompilationFacts``).
    """
    if not isinstance(made, dict):
        return ""
    reason = str(made.get("reason") or "")
    if not made.get("compiled"):
        return "no" if reason in ("", "training.torch_compile is false") else f"no: {reason}"
    graphs = made.get("graphs", 0)
    text = f"{made.get('layers')}, {graphs} {'graph' if graphs == 1 else 'graphs'} compiled in {float(made.get('seconds') or 0):.0f} s"
    return f"{text}; {reason}" if reason else text


def device(summary: RunSummary) -> str:
    """The GPUs of a run with their driver version, or its CPU."""
    environment = summary.get("environment", Environment())
    gpus = environment.get("gpus") or []
    if not gpus:
        name = environment.get("cpu")
        return f"{environment.get('cpu_count', '?')} CPU cores{f' ({name})' if name else ''}"
    driver = gpus[0].get("driver") if isinstance(gpus[0], dict) else None
    return f"{len(gpus)} x {gpu_name(gpus[0])}{f', driver {driver}' if driver else ''}"


def memory(entry: RunSummary | StepSummary | Row) -> str:
    """Peak memory of a run or a step: of the tensors on the GPU if there is one, and of the process."""
    shown = {"on the GPU": entry.get("peak_gpu_memory_bytes"), "of the process": entry.get("peak_memory_bytes")}
    return ", ".join(f"{bytes_text(value)} {what}" for what, value in shown.items() if value) or UNKNOWN


def packages(environment: Environment) -> str:
    """Names and versions of the packages that affect the results."""
    return ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()) or UNKNOWN


def bytes_text(value: float | None) -> str:
    """A number of bytes as MiB or GiB. Empty if it is unknown."""
    if not value:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _made(step: StepFolder) -> Row:
    """How a step was computed.

    Old summaries have no such record. For them, the values come from the step's own entry if it was not reused.
    """
    made = step.entry.get("circumstances")
    if made is not None or step.entry.get("reused"):
        return made or {}
    return {key: step.entry.get(key) for key in ("wall_seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")}


def _precision(steps: Sequence[StepFolder]) -> str:
    """The compute dtype of the steps. If it differs between steps, each dtype with its steps."""
    names: dict[str, list[str]] = {}
    for step in steps:
        asked = str(step.config.get("precision", UNKNOWN))
        used = _made(step).get("precision")
        names.setdefault(used or f"{asked} (the actual dtype was {UNKNOWN})" if asked == "auto" else used or asked, []).append(step.name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{precision}: {', '.join(steps)}" for precision, steps in names.items())


def _processes(environment: Environment) -> str:
    number = environment.get("num_processes")
    if number is None:
        return UNKNOWN
    return f"{number}{', weights sharded over them' if environment.get('sharded') else ''}"
