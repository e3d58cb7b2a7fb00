"""One self-contained HTML file per run: the verdict, the chain, the curves, every completion side by side, and how to do it again.

Nothing is fetched, and the only script is the page's own: the policy in the page (CSP) names its hash. Whatever a model or a data set wrote
goes through Jinja's escaping.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from stages.process.gpus import gpu_name
from stages.report import curves, training
from stages.report.chain import ancestors, command, diagram, made_by, recipe_text, step_row
from stages.report.figures import Figure, number_text
from stages.report.reader import reader
from stages.report.remarks import remarks
from stages.report.run_folder import RunFolder, shown_memory
from stages.report.verdicts import verdict

Row = dict[str, Any]
HERE = Path(__file__).parent
COMPLETIONS_BYTES = 1_900_000  # of a page under 3 MB; what does not fit stays in completions.jsonl, and the page says so


def write_report(run: RunFolder, path: Path | None = None) -> Path:
    """Write the report of a run, by default beside its summary; returns where."""
    path = path or run.path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_run(run), encoding="utf-8")
    return path


def render_run(run: RunFolder) -> str:
    """The page of one run."""
    return render(
        "page.html.jinja",
        title=run.title,
        head=_head(run),
        verdicts=[verdict(step) for step in run.evaluations],
        notes=remarks(run),
        diagram=diagram(run),
        steps=[step_row(step) for step in run.steps],
        groups=_figure_groups(run),
        readers=[reader(step, COMPLETIONS_BYTES // len(run.evaluations)) for step in run.evaluations],
        recipe=recipe_text(run),
        command=command(run.summary),
        environment=run.summary.get("environment", {}),
        packages=run.summary.get("environment", {}).get("packages", {}),
    )


def render(template: str, **values: Any) -> str:
    """A template of this room with its style and script, and the policy that allows these and nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("stages", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number_text
    environment.filters["percent"] = lambda value: f"{100 * value:.0f} %"
    environment.filters["seconds"] = _seconds
    environment.filters["bytes"] = _bytes
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; style-src-elem {_hash(style)}; style-src-attr 'unsafe-inline'; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(style=Markup(style), script=Markup(script), policy=policy, **values)


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


# What the parts are given


def _head(run: RunFolder) -> Row:
    summary = run.summary
    environment = summary.get("environment", {})
    gpus = environment.get("gpus") or []
    where = f"{len(gpus)} x {gpu_name(gpus[0])}" if gpus else f"{environment.get('cpu_count', '?')} CPU cores"
    return {
        "recipe": summary["recipe"],
        "description": str(summary.get("description") or ""),
        "started": summary.get("started", "")[:16].replace("T", " "),
        "seconds": summary.get("wall_seconds", 0),
        "where": where,
        "memory": shown_memory(summary) or 0,
        "finished": summary.get("finished", False),
        "reused": sum(bool(step.entry.get("reused")) for step in run.steps),
        "steps": len(run.steps),
    }


def _figure_groups(run: RunFolder) -> list[Row]:
    """Figures under their headings; a heading without figures is left out."""
    outcome: list[Figure | None] = []
    trust: list[Figure | None] = []
    makers_of_models = made_by(run)
    for step in run.evaluations:
        evaluation = step.evaluation
        assert evaluation is not None
        colors = curves.series_of(list(evaluation["candidates"]))
        makers = {name: makers_of_models.get(row.get("model")) for name, row in evaluation["candidates"].items()}
        ways = {name: step for name, step in makers.items() if step is not None and step.stage == "ppo"}
        frontier = curves.frontier(evaluation, colors, ancestors(run, evaluation), ways)
        outcome += [frontier, curves.distributions(step, colors), curves.alignment_tax(evaluation, colors)]
    evaluation = run.evaluations[-1].evaluation if run.evaluations else None
    trust += [curves.over_optimisation(step, evaluation) for step in run.steps if step.stage == "ppo"]
    trust += [training.calibration(step) for step in run.steps]
    trained = [training.training(step) for step in run.steps]
    groups = [
        {"key": "results", "title": "What came out", "figures": outcome},
        {"key": "trust", "title": "Can the reward be trusted?", "figures": trust},
        {"key": "training", "title": "Training", "figures": [*trained, training.data_efficiency([run])]},
    ]
    made = []
    for group in groups:
        figures = [figure for figure in group["figures"] if figure is not None]
        if figures:
            made.append({**group, "figures": figures})
    return made


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:02d} s"


def _bytes(value: float | None) -> str:
    if not value:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
