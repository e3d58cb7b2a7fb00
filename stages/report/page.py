"""One self-contained HTML file per run: the verdict, the steps, the curves, every completion side by side, and how the run was computed.

The page loads nothing, and its only script is its own: the content security policy (CSP) allows only the hash of this script. Text from a
model or a data set is always shown as text, because Jinja escapes it or the script reads it as JSON. Figures and completions that do not
fit into ``LIMIT`` bytes are left out, and the page says how many.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stages.report import curves, training
from stages.report.chain import ancestors, diagram, recipe_text, step_row, steps_by_model
from stages.report.circumstances import bytes_text, command, device, facts, step_facts
from stages.report.figures import Figure, number_text
from stages.report.output import GENERATOR, write_page
from stages.report.reader import LONGEST_TEXT, Reader, fitted, read_completions
from stages.report.remarks import missing_evaluations, remarks
from stages.report.run_folder import Row, RunFolder, shown_memory
from stages.report.verdicts import verdict

HERE = Path(__file__).parent
LIMIT = 2_000_000
"""Maximum size of a page in bytes."""
LEAST_FOR_COMPLETIONS = 500_000
"""Bytes that are reserved for completions, if they need so many. Figures are left out to keep this space."""


@dataclass(frozen=True)
class Page:
    """The HTML of a page, and sentences about what it leaves out."""

    html: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """A page on disk: its path, its size in bytes, and sentences about what it leaves out."""

    path: Path
    size: int
    notes: list[str]


def write_report(run: RunFolder, path: Path | None = None) -> Written:
    """Write the report of a run, by default next to its summary. Raises StorageError if it cannot be written."""
    return write(render_run(run), path or run.path / "report.html")


def write(page: Page, path: Path) -> Written:
    """Write a page atomically. Raises StorageError if it cannot be written."""
    return Written(path, write_page(page.html, path), page.notes)


def render_run(run: RunFolder) -> Page:
    """The page of one run."""
    readers, groups = [read_completions(step) for step in run.evaluations], _figure_groups(run)
    values: Row = {
        "title": run.title,
        "head": _head(run),
        "verdicts": [verdict(step) for step in run.evaluations],
        "notes": remarks(run),
        "diagram": diagram(run),
        "steps": [step_row(step) for step in run.steps],
        "recipe": recipe_text(run),
        "command": command(run.summary),
        "facts": facts(run),
        "step_facts": step_facts(run),
    }

    needed = min(LEAST_FOR_COMPLETIONS, sum(reader.size for reader in readers))
    empty = [""] * len(readers)

    def draw(groups: list[Row], left_out: str) -> str:
        values.update(groups=groups, left_out=left_out)
        return render("page.html.jinja", **values, readers=readers, data=empty)

    frame, note = fit_figures(groups, draw, LIMIT - needed)
    html, shown = _fit_completions(values, readers, LIMIT - byte_count(frame))
    notes = [note, *(reader.note for reader in shown), *missing_evaluations(run)]
    if byte_count(html) > LIMIT:
        notes.append(f"The page takes {megabytes(byte_count(html))}: its tables alone are larger than {megabytes(LIMIT)}.")
    return Page(html, [note for note in notes if note])


def fit_figures(groups: list[Row], draw: Callable[[list[Row], str], str], limit: int = LIMIT) -> tuple[str, str]:
    """Make a page of at most ``limit`` bytes with as many figures as fit. Returns (HTML, note).

    ``draw(groups, note)`` makes the HTML. The last figures are left out first. The note says how many are missing; it is empty if none is.
    """
    total, note = _number_of_figures(groups), ""
    while byte_count(html := draw(groups, note)) > limit and _number_of_figures(groups):
        *others, last = groups
        groups = [*others, {**last, "figures": last["figures"][:-1]}] if len(last["figures"]) > 1 else others
        number = total - _number_of_figures(groups)
        note = f"{number:,} of {total:,} figures (the last ones) are left out: they do not fit on a page of {megabytes(LIMIT)}."
    return html, note


def _number_of_figures(groups: list[Row]) -> int:
    return sum(len(group["figures"]) for group in groups)


def _fit_completions(values: Row, readers: list[Reader], room: int) -> tuple[str, list[Reader]]:
    """The page with as many completions as fit, and the readers with these completions. ``room``: bytes for the completions."""
    room = max(0, room)
    while True:
        shown = fitted(readers, room)
        html = render("page.html.jinja", **values, readers=shown, data=[reader.json for reader in shown])
        excess = byte_count(html) - LIMIT
        if excess <= 0 or room == 0:
            return html, shown
        room = max(0, room - excess)


def byte_count(html: str) -> int:
    """Size of a page on disk in bytes."""
    return len(html.encode())


def megabytes(size: int) -> str:
    """A size in bytes as MB (10^6 bytes)."""
    return f"{size / 1e6:.2f} MB"


def render(template: str, **values: object) -> str:
    """Render a template of this package with its style, its script, and a policy that allows only these."""
    environment = Environment(
        loader=PackageLoader("stages", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number_text
    environment.filters["percent"] = lambda value: f"{100 * value:.0f} %"
    environment.filters["seconds"] = _seconds
    environment.filters["bytes"] = bytes_text
    environment.filters["shortened"] = shortened
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; style-src-elem {_hash(style)}; style-src-attr 'unsafe-inline'; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    values |= {"style": Markup(style), "script": Markup(script), "policy": policy, "generator": GENERATOR}
    # UTF-8 cannot encode an unpaired surrogate.
    return re.sub("[\ud800-\udfff]", "\ufffd", environment.get_template(template).render(**values))


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


# Values for the templates


def _head(run: RunFolder) -> Row:
    summary = run.summary
    return {
        "recipe": summary["recipe"],
        "description": str(summary.get("description") or ""),
        "started": summary.get("started", "")[:16].replace("T", " "),
        "seconds": summary.get("wall_seconds", 0),
        "where": device(summary),
        "memory": shown_memory(summary) or 0,
        "finished": summary.get("finished", False),
        "reused": sum(bool(step.entry.get("reused")) for step in run.steps),
        "steps": len(run.steps),
    }


def _figure_groups(run: RunFolder) -> list[Row]:
    """Figures by heading. Headings without figures are left out."""
    outcome: list[Figure | None] = []
    trust: list[Figure | None] = []
    makers_of_models = steps_by_model(run)
    for step in run.evaluations:
        evaluation = step.evaluation
        assert evaluation is not None
        colors = curves.series_of(list(evaluation["candidates"]))
        makers = {name: makers_of_models.get(row.get("model") or "") for name, row in evaluation["candidates"].items()}
        ways = {name: step for name, step in makers.items() if step is not None and step.stage == "ppo"}
        frontier = curves.frontier(evaluation, colors, ancestors(run, evaluation), ways)
        outcome += [frontier, curves.distributions(step, colors), curves.alignment_tax(evaluation, colors)]
    evaluation = run.evaluations[-1].evaluation if run.evaluations else None
    trust += [curves.over_optimisation(step, evaluation) for step in run.steps if step.stage == "ppo"]
    trust += [training.calibration(step) for step in run.steps]
    trained = [training.training(step) for step in run.steps]
    groups = [
        {"key": "results", "title": "Results", "figures": outcome},
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


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """The first ``longest`` characters of a text, and the number of missing characters."""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"
