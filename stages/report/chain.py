"""The steps of a run for its page: the diagram, a row per step with its lineage, data, time and memory, and the recipe."""

from __future__ import annotations

from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO

from stages.metric_names import (
    HELDOUT_ACCURACY,
    HELDOUT_BESIDE,
    HELDOUT_LOSS_AFTER,
    HELDOUT_PERPLEXITY_AFTER,
    SCORE_MEAN,
    first_tenth,
    last_tenth,
)
from stages.report.diagram import Diagram, draw_chain
from stages.report.figures import number_text
from stages.report.run_folder import Row, RunFolder, StepFolder, shown_memory
from stages.run_summary import EvaluationFile


def diagram(run: RunFolder) -> Diagram:
    """The diagram of a run's steps, each with its stage and its main result."""
    lines, reads = {}, {}
    for step in run.steps:
        lines[step.name] = (step.stage, _key_result(step))
        reads[step.name] = _inputs(run, step)
    return draw_chain(lines, reads)


def _inputs(run: RunFolder, step: StepFolder) -> list[str]:
    """The models that a step reads: the name of the step that made each of them, or else the reference."""
    own = {ref: maker.name for ref, maker in steps_by_model(run).items()}
    inputs = []
    for ref in (step.entry.get("inputs") or {}).values():
        short = ref.rpartition("/")[2] if ref.startswith(("/", ".")) else ref
        inputs.append(own.get(ref, short))
    return list(dict.fromkeys(inputs))


def _key_result(step: StepFolder) -> str:
    metrics = step.metrics
    if step.stage == "ppo" and last_tenth(SCORE_MEAN) in metrics:
        return f"score {metrics[first_tenth(SCORE_MEAN)]:.2f} to {metrics[last_tenth(SCORE_MEAN)]:.2f}"
    if step.evaluation is not None:
        return f"{step.evaluation['prompts']} prompts"
    for key, form in (
        (HELDOUT_ACCURACY, "accuracy {:.3f}"),
        (HELDOUT_PERPLEXITY_AFTER, "perplexity {:.2f}"),
        (HELDOUT_LOSS_AFTER, "loss {:.3f}"),
    ):
        if isinstance(metrics.get(key), int | float):
            others = [f"{name} {other['accuracy']:.3f}" for name, other in (metrics.get(HELDOUT_BESIDE) or {}).items()]
            return "; ".join([form.format(metrics[key]), *others])
    return ""


def step_row(step: StepFolder) -> Row:
    """A row in the table of steps."""
    model = step.entry.get("model")
    numbers = {name: value for name, value in step.metrics.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {
        "name": step.name,
        "stage": step.stage,
        "ref": f"{model['ref']}@{step.entry['version']}" if model else None,
        "digest": model["digest"][:19] if model else "",
        "inputs": [f"{field_path}: {ref}" for field_path, ref in (step.entry.get("inputs") or {}).items()],
        "data": _data(step),
        "seconds": step.entry.get("wall_seconds"),
        "memory": None if step.entry.get("reused") else shown_memory(step.entry),
        "reused": bool(step.entry.get("reused")),
        "reason": step.entry.get("reason", ""),
        "result": _key_result(step),
        "numbers": {name: number_text(value) for name, value in numbers.items()},
    }


def _data(step: StepFolder) -> list[str]:
    """The data sources of a step by config field, with the first characters of their fingerprint."""
    marks = step.entry.get("data") or {}
    shown_data = []
    for field_path, mark in marks.items():
        value: object = step.config
        for key in field_path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        paths = [str(source.get("path")) for source in value if isinstance(source, dict)] if isinstance(value, list) else []
        shown = ", ".join(path.rpartition("/")[2] if path.startswith("/") else path for path in paths) or field_path
        shown_data.append(f"{field_path}: {shown} ({mark[:8]})")
    return shown_data


def steps_by_model(run: RunFolder) -> dict[str, StepFolder]:
    """Pinned model reference -> the step of this run that made the model."""
    models = [(step.entry.get("model"), step) for step in run.steps]
    return {f"{model['ref']}@{step.entry['version']}": step for model, step in models if model is not None}


def ancestors(run: RunFolder, evaluation: EvaluationFile) -> set[str]:
    """References of the models that the evaluation's KL reference was made from, directly or indirectly, by steps of this run."""
    reference = evaluation.get("kl_reference")
    own = steps_by_model(run)
    waiting = [evaluation["candidates"][reference].get("model")] if reference is not None else []
    refs: set[str] = set()
    while waiting:
        step = own.get(waiting.pop() or "")
        for ref in (step.entry.get("inputs") or {}).values() if step is not None else ():
            if ref not in refs:
                refs.add(ref)
                waiting.append(ref)
    return refs


def recipe_text(run: RunFolder) -> str:
    """The resolved recipe, with defaults and overrides, as YAML that `stages run` accepts."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    stream = StringIO()
    steps = [{"stage": step.stage, "name": step.name} | step.config for step in run.steps]
    yaml.dump({"name": run.summary["recipe"], "seed": run.summary.get("seed", 0), "steps": steps}, stream)
    return str(stream.getvalue())
