"""The label quality report as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from stages.labelling.report import Quality, Share
from stages.process.tables import Table


def report_tables(content: Quality) -> RenderableType:
    """Tables for the result of ``report.quality``."""
    parts: list[RenderableType] = [_summary(content), _annotators(content)]
    if content["checks"] or content["ratings"]:
        parts.append(_questions(content))
    return Group(*parts)


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash if there is no data."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _interval(share: Share | None) -> str:
    if share is None or share["share"] is None:
        return "-"
    return f"{percent(share['share'])} (95 % {percent(share['ci_low'])} to {percent(share['ci_high'])}, {share['pairs']} pairs)"


def _summary(content: Quality) -> Table:
    table = Table(title=f"{content['name']}: labels", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    paper, rate, seconds, agreement = content["paper_agreement"], content["rate"], content["seconds"], content["agreement"]
    rows = [
        ("tasks ranked", f"{content['ranked_tasks']} of {content['target']} wanted ({content['tasks']} published)"),
        ("answers", f"{content['answers']}: {content['skipped']['count']} skipped, {content['flagged']['count']} flagged"),
        ("rate", f"{rate['last_hour']} in the last hour; {_number(rate['per_hour_of_work'], '.0f')} per hour of work"),
        ("time per task", f"median {_number(seconds['median'], '.0f')} s, 90 % below {_number(seconds['p90'], '.0f')} s"),
        (
            "agreement on pairs",
            f"{_interval(agreement['pairwise'])}; the paper's: {percent(paper['training'])} and {percent(paper['held-out'])}",
        ),
        ("with ties", _interval(agreement["with_ties"])),
        ("Krippendorff's alpha", f"{_number(agreement['alpha'])} (ordinal, on ranks; {agreement['overlap_tasks']} overlap tasks)"),
        ("shown earlier wins", f"{_interval(content['position']['earlier_wins'])}; 50 % without a position bias"),
    ]
    if content["reward_model"] is not None:
        rows.append((f"reward model {content['reward_model']['model']}", f"agrees on {_interval(content['reward_model'])}"))
    for label, value in rows:
        table.add_row(label, value)
    return table


def _annotators(content: Quality) -> Table:
    table = Table("annotator", "answers", "skipped", "flagged", "corrected", "median s", "ties", "agrees with the others", "screening")
    for row in content["annotators"]:
        screening = row["screening"]
        state = "-"
        if screening is not None:
            verdict = {None: f"{screening['answered']} of {screening['of']}", True: "passed", False: "not passed"}[screening["passed"]]
            state = f"{verdict}, {percent(screening['ranking_agreement'])}"
        table.add_row(
            Text(row["name"]),
            str(row["answers"]),
            str(row["skipped"]),
            str(row["flagged"]),
            str(row["corrected"]),
            _number(row["median_seconds"], ".0f"),
            percent(row["ties"]),
            _interval(row["against_the_rest"]),
            state,
        )
    return table


def _questions(content: Quality) -> Table:
    table = Table("question", "answer", "agreement")
    for rating in content["ratings"].values():
        table.add_row(Text(rating["text"]), f"mean {_number(rating['mean'])}", f"alpha {_number(rating['alpha'])}")
    for check in content["checks"].values():
        kappa = f"kappa {_number(check['kappa'])} ({check['compared']} compared)"
        table.add_row(Text(check["text"]), f"ticked {percent(check['share'])}", kappa)
    return table
