"""One self-contained HTML file per run: the verdict, the chain, the curves, every completion side by side, and how to do it again.

Nothing is fetched, and the only script is the page's own: the policy in the page (CSP) names its hash. Whatever a model or a data set wrote
goes through Jinja's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from stages.report import curves
from stages.report.diagram import Diagram, draw_chain
from stages.report.figures import Figure, number_text
from stages.report.run_folder import RunFolder, StepFolder

Row = dict[str, Any]
HERE = Path(__file__).parent
COMPLETIONS_BYTES = 1_900_000  # of a page under 3 MB; what does not fit stays in completions.jsonl, and the page says so
NOISE = 0.6  # agreement of two judges below this is worth a remark


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
        verdicts=[_verdict(run, step) for step in run.evaluations],
        notes=_notes(run),
        diagram=_diagram(run),
        steps=[_step(step) for step in run.steps],
        groups=_figure_groups(run),
        readers=[_reader(step, COMPLETIONS_BYTES // len(run.evaluations)) for step in run.evaluations],
        recipe=_recipe_text(run),
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


# The head


def _head(run: RunFolder) -> Row:
    summary = run.summary
    environment = summary.get("environment", {})
    gpus = environment.get("gpus") or []
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{environment.get('cpu_count', '?')} CPU cores"
    return {
        "recipe": summary["recipe"],
        "description": _description(run),
        "started": summary.get("started", "")[:16].replace("T", " "),
        "seconds": summary.get("wall_seconds", 0),
        "where": where,
        "memory": summary.get("peak_memory_bytes", 0),
        "finished": summary.get("finished", False),
        "reused": sum(bool(step.entry.get("reused")) for step in run.steps),
        "steps": len(run.steps),
    }


def _description(run: RunFolder) -> str:
    return str(run.summary.get("description") or "")


def command(summary: Mapping[str, Any]) -> str:
    """What to type to repeat the run."""
    import shlex

    return shlex.join(["./launch.sh", str(summary.get("recipe_file", "RECIPE")), *summary.get("overrides", [])])


# The verdict


def _verdict(run: RunFolder, step: StepFolder) -> Row:
    """The headline, the other comparisons of the last candidate, and the tables of every judge."""
    evaluation = step.evaluation
    assert evaluation is not None
    names = list(evaluation["candidates"])
    *others, last = names
    colors = curves.series_of(names)
    judge = evaluation["judges"][0]["name"]
    rates = {(row["a"], row["b"], row["judge"]): row for row in evaluation["win_rates"]}
    main = evaluation.get("kl_reference") if evaluation.get("kl_reference") in others else (others[0] if others else None)
    judges = [entry["name"] for entry in evaluation["judges"]]
    plots = []
    for name in judges:
        rows = [(other, rates[last, other, name]) for other in others if (last, other, name) in rates]
        if rows:
            plots.append({"judge": name, "rows": [_interval_row(other, rate, colors[other]) for other, rate in rows]})
    return {
        "step": step.name,
        "headline": _headline(last, main, judge, rates.get((last, main, judge)) if main else None, evaluation),
        "others": _others(last, [other for other in others if other != main], judge, rates),
        "last": last,
        "prompts": evaluation["prompts"],
        "samples": evaluation["samples_per_prompt"],
        "plots": plots,
        "candidates": [
            {"name": name, "color": colors[name], "model": row.get("model"), "best_of": row.get("best_of")}
            for name, row in evaluation["candidates"].items()
        ],
        "columns": _columns(evaluation, judges),
        "matrices": [_matrix(name, names, rates) for name in judges] if others else [],
        "agreement": {"pairs": [], "annotators": {}, **evaluation.get("agreement", {})},
        "judges": evaluation["judges"],
        "few_shot": evaluation.get("few_shot", {}),
    }


def _headline(last: str, other: str | None, judge: str, rate: Row | None, evaluation: Row) -> str:
    if rate is None or other is None or not rate["n"]:
        return str(evaluation["verdict"])
    interval = f"95 % interval {_percent(rate['ci_low'])} to {_percent(rate['ci_high'])}"
    share = f"{_percent(rate['win_rate'])} of {rate['n']} prompts against {other}, by {judge} ({interval})"
    if rate["ci_low"] > 0.5:
        return f"{last} wins {share}."
    if rate["ci_high"] < 0.5:
        return f"{last} loses: it wins {share}."
    return f"No difference was shown: {last} wins {share}."


def _others(last: str, others: Sequence[str], judge: str, rates: Mapping[tuple[str, str, str], Row]) -> str:
    """The remaining comparisons by the first judge, in one sentence."""
    groups: dict[str, list[str]] = {"beats": [], "loses to": [], "cannot be told from": [], "was not compared with": []}
    for other in others:
        rate = rates.get((last, other, judge))
        if rate is None or not rate["n"]:
            groups["was not compared with"].append(other)
        elif rate["ci_low"] > 0.5:
            groups["beats"].append(other)
        else:
            groups["loses to" if rate["ci_high"] < 0.5 else "cannot be told from"].append(other)
    said = [f"{verb} {_listed(names)}" for verb, names in groups.items() if names]
    return f"By the same judge {last} also {', '.join(said[:-1]) + ' and ' + said[-1] if len(said) > 1 else said[0]}." if said else ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _interval_row(name: str, rate: Row, color: int) -> Row:
    sure = rate["ci_low"] > 0.5 or rate["ci_high"] < 0.5
    controlled = rate.get("length_controlled") or {}
    return {
        "name": name,
        "color": color,
        "mid": rate["win_rate"],
        "low": rate["ci_low"],
        "high": rate["ci_high"],
        "n": rate["n"],
        "sure": sure,
        "controlled": controlled.get("win_rate"),
    }


def _columns(evaluation: Row, judges: Sequence[str]) -> Row:
    """Headings and cells of the table of candidates."""
    shown = {
        "length_words": ("words", "{:.1f}"), "stopped_share": ("ended by itself", "{:.0%}"), "distinct_2": ("distinct bigrams", "{:.3f}"),
        "perplexity": ("perplexity", "{:.4g}"), "bits_per_byte": ("bits per byte", "{:.3f}"), "kl": ("KL (nats)", "{:.2f}"),
    }  # fmt: skip
    rows = evaluation["candidates"]
    scoring = [judge for judge in judges if any(judge in row["scores"] for row in rows.values())]
    keys = [key for key in shown if any(row.get(key) is not None for row in rows.values())]
    cells = {}
    for name, row in rows.items():
        scores = [_score_cell(row, judge) for judge in scoring]
        others = [{"text": shown[key][1].format(row[key]) if row.get(key) is not None else "", "interval": ""} for key in keys]
        cells[name] = scores + others
    return {"headings": [*scoring, *(shown[key][0] for key in keys)], "cells": cells}


def _score_cell(row: Row, judge: str) -> Row:
    """A candidate's mean score by a judge, with its interval where there is one."""
    if row["scores"].get(judge) is None:
        return {"text": "", "interval": ""}
    low, high = row.get("score_intervals", {}).get(judge) or (None, None)
    interval = f"{low:.2f} to {high:.2f}" if low is not None and high is not None else ""
    return {"text": f"{row['scores'][judge]:.3f}", "interval": interval}


def _matrix(judge: str, names: Sequence[str], rates: Mapping[tuple[str, str, str], Row]) -> Row:
    """Win rates of row against column; ``strength`` in [-1, 1] colours the cell."""
    rows = []
    for a in names:
        cells: list[Row | None] = []
        for b in names:
            rate = rates.get((a, b, judge))
            if rate is None or not rate["n"]:
                cells.append(None)
                continue
            sure = rate["ci_low"] > 0.5 or rate["ci_high"] < 0.5
            controlled = (rate.get("length_controlled") or {}).get("win_rate")
            cells.append(
                {
                    "rate": f"{rate['win_rate']:.2f}",
                    "interval": f"{rate['ci_low']:.2f} to {rate['ci_high']:.2f}",
                    "controlled": f"{controlled:.2f}" if controlled is not None else "",
                    "strength": round(2 * rate["win_rate"] - 1, 3),
                    "sure": sure,
                }
            )
        rows.append({"name": a, "cells": cells})
    return {"judge": judge, "names": list(names), "rows": rows}


# What to keep in mind


def _notes(run: RunFolder) -> list[Row]:
    """Remarks a careful reader would make: alarms, exclusions, what the prompts can tell apart, judges that disagree, what is missing."""
    notes = []
    for step in run.steps:
        for alarm in step.metrics.get("alarms") or []:
            when = f"from iteration {alarm.get('first_iteration')} on, in {alarm.get('iterations')} iterations"
            notes.append({"kind": "alarm", "text": f"{step.name}: {alarm['name']} {when}: {alarm['message']}"})
        if step.stage == "ppo" and step.metrics.get("alarms") == []:
            number = step.metrics.get("iterations", "?")
            notes.append({"kind": "good", "text": f"{step.name}: no health alarm was raised in {number} iterations of PPO."})
    for step in run.evaluations:
        notes += _evaluation_notes(step, f"{step.name}: " if len(run.evaluations) > 1 else "")
    missing = [step.name for step in run.steps if step.stage in curves.STAGE_CURVES and not step.log]
    if missing:
        notes.append({"kind": "note", "text": f"No training log was kept of {_listed(missing)}: reused from a run whose files are gone."})
    if not run.summary.get("finished", False):
        notes.insert(0, {"kind": "alarm", "text": "The run did not come to its end; what is here is what was done."})
    return notes


def _evaluation_notes(step: StepFolder, about: str) -> list[Row]:
    """``about``: the beginning of each note where there are several evaluations."""
    evaluation = step.evaluation
    assert evaluation is not None
    notes = []
    for item in evaluation.get("exclusions", []):
        text = f"{about}{item['count']:,} of {item['of']:,} {item['what']}."
        notes.append({"kind": "alarm" if item["count"] > 0.1 * item["of"] else "note", "text": text})
    names = list(evaluation["candidates"])
    judge = evaluation["judges"][0]["name"]
    unsure = []
    for a, b in combinations(names, 2):
        row = next((row for row in evaluation["win_rates"] if (row["a"], row["b"], row["judge"]) == (b, a, judge)), None)
        if row is None or not row["n"] or row["ci_low"] > 0.5 or row["ci_high"] < 0.5:
            continue
        needed = row.get("prompts_needed")
        more = f"about {needed:,.0f} prompts would be needed" if needed is not None else "no number of prompts would, at this win rate"
        unsure.append(f"{b} from {a} ({_percent(row['win_rate'])}; {more})")
    if unsure:
        told = f"{evaluation['prompts']} prompts do not tell {'; '.join(unsure)}"
        notes.append({"kind": "note", "text": f"{about}{told}. Numbers are for a power of 80 % at the 5 % level, by {judge}."})
    for pair in evaluation.get("agreement", {}).get("pairs", []):
        share = pair.get("agreement_decided")
        if share is not None and pair["decided"] >= 20 and share < NOISE:
            where = f"on {_percent(share)} of the {pair['decided']:,} comparisons that neither ties"
            notes.append({"kind": "note", "text": f"{about}{pair['a']} and {pair['b']} agree {where}: they judge different things."})
    for entry in evaluation["judges"]:
        if entry["kind"] == "llm":
            cost = f", for {entry['cost']:.2f}" if entry.get("cost") is not None else ""
            consistent = entry.get("order_consistency")
            same = f"; in both orders it said the same of {_percent(consistent)}" if consistent is not None else ""
            text = (
                f"{about}{entry['name']} was asked {entry['requests']:,} times ({entry['from_cache']:,} replies from the cache, "
                f"{entry['retries']:,} retries, {entry['refused']:,} refusals, {entry['failed']:,} failures){cost}{same}."
            )
            notes.append({"kind": "note", "text": text})
    compared = sum(row["a"] < row["b"] for row in evaluation["win_rates"])
    if compared > 5:
        text = f"{about}each interval holds for its own comparison. {compared} were made, so one in twenty may miss by chance alone."
        notes.append({"kind": "note", "text": text})
    return notes


# The chain


def _diagram(run: RunFolder) -> Diagram:
    lines, reads = {}, {}
    for step in run.steps:
        lines[step.name] = (step.stage, _key_result(step))
        reads[step.name] = _inputs(run, step)
    return draw_chain(lines, reads)


def _inputs(run: RunFolder, step: StepFolder) -> list[str]:
    """The models a step reads, by the name of the step that made them, or as the recipe writes them."""
    own = {str(entry.entry["model"]["ref"]) + f"@{entry.entry['version']}": entry.name for entry in run.steps if entry.entry.get("model")}
    found = []
    for ref in (step.entry.get("inputs") or {}).values():
        short = ref.rpartition("/")[2] if ref.startswith(("/", ".")) else ref
        found.append(own.get(ref, short))
    return list(dict.fromkeys(found))


def _key_result(step: StepFolder) -> str:
    metrics = step.metrics
    if step.stage == "ppo" and "score_mean_last" in metrics:
        return f"score {metrics['score_mean_first']:.2f} to {metrics['score_mean_last']:.2f}"
    if step.evaluation is not None:
        return f"{step.evaluation['prompts']} prompts"
    for key, form in (
        ("heldout_accuracy", "accuracy {:.3f}"), ("heldout_perplexity_after", "perplexity {:.2f}"), ("heldout_loss_after", "loss {:.3f}"),
    ):  # fmt: skip
        if isinstance(metrics.get(key), int | float):
            return form.format(metrics[key])
    return ""


def _step(step: StepFolder) -> Row:
    """A row of the chain's table."""
    model = step.entry.get("model")
    numbers = {name: value for name, value in step.metrics.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {
        "name": step.name,
        "stage": step.stage,
        "ref": f"{model['ref']}@{step.entry['version']}" if model else None,
        "digest": model["digest"][:19] if model else "",
        "inputs": [f"{place}: {ref}" for place, ref in (step.entry.get("inputs") or {}).items()],
        "data": _data(step),
        "seconds": step.entry.get("wall_seconds"),
        "memory": step.entry.get("peak_memory_bytes"),
        "reused": bool(step.entry.get("reused")),
        "reason": step.entry.get("reason", ""),
        "result": _key_result(step),
        "numbers": {name: number_text(value) for name, value in numbers.items()},
    }


def _data(step: StepFolder) -> list[str]:
    """The sources of a step's data, by field, with the beginning of their fingerprint."""
    marks = step.entry.get("data") or {}
    found = []
    for place, mark in marks.items():
        value: Any = step.config
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        paths = [str(source.get("path")) for source in value if isinstance(source, dict)] if isinstance(value, list) else []
        shown = ", ".join(path.rpartition("/")[2] if path.startswith("/") else path for path in paths) or place
        found.append(f"{place}: {shown} ({mark[:8]})")
    return found


# Figures


def _figure_groups(run: RunFolder) -> list[Row]:
    """Figures under their headings; a heading without figures is left out."""
    outcome: list[Figure | None] = []
    trust: list[Figure | None] = []
    for step in run.evaluations:
        evaluation = step.evaluation
        assert evaluation is not None
        colors = curves.series_of(list(evaluation["candidates"]))
        frontier = curves.frontier(evaluation, colors, _ancestors(run, evaluation))
        outcome += [frontier, curves.distributions(step, colors), curves.alignment_tax(evaluation, colors)]
    evaluation = run.evaluations[-1].evaluation if run.evaluations else None
    trust += [curves.over_optimisation(step, evaluation) for step in run.steps if step.stage == "ppo"]
    trust += [curves.calibration(step) for step in run.steps]
    trained = [curves.training(step) for step in run.steps]
    groups = [
        {"key": "results", "title": "What came out", "figures": outcome},
        {"key": "trust", "title": "Can the reward be trusted?", "figures": trust},
        {"key": "training", "title": "Training", "figures": [*trained, curves.data_efficiency([run])]},
    ]
    made = []
    for group in groups:
        figures = [figure for figure in group["figures"] if figure is not None]
        if figures:
            made.append({**group, "figures": figures})
    return made


def _ancestors(run: RunFolder, evaluation: Row) -> set[str]:
    """References of the models that the evaluation's KL reference was made from, as far as this run made them."""
    reference = evaluation.get("kl_reference")
    own = {f"{step.entry['model']['ref']}@{step.entry['version']}": step for step in run.steps if step.entry.get("model")}
    waiting = [evaluation["candidates"][reference].get("model")] if reference is not None else []
    found: set[str] = set()
    while waiting:
        step = own.get(waiting.pop())
        for ref in (step.entry.get("inputs") or {}).values() if step is not None else ():
            if ref not in found:
                found.add(ref)
                waiting.append(ref)
    return found


# Completions


def _reader(step: StepFolder, room: int) -> Row:
    """The completions of an evaluation, as many as ``room`` bytes hold, and what the page's script needs to search and filter them."""
    evaluation = step.evaluation
    assert evaluation is not None
    names = list(evaluation["candidates"])
    judges = [entry["name"] for entry in evaluation["judges"]]
    colors = curves.series_of(names)
    tokens: dict[int, dict[str, Row]] = {}
    for row in step.tokens:
        tokens.setdefault(row["row"], {})[row["candidate"]] = row
    examples: list[Row] = []
    data: list[Row] = []
    used = 0
    for number, line in enumerate(step.completions):
        example, numbers = _example(number, line, names, judges), _example_data(line, names, judges, tokens.get(number, {}))
        used += _bytes_of(example, numbers)
        if used > room and examples:
            break
        examples.append(example)
        data.append(numbers)
    coloured = sorted({key for row in step.tokens for key in ("kl", "value") if key in row})
    return {
        "step": step.name,
        "names": names,
        "colors": [colors[name] for name in names],
        "judges": judges,
        "examples": examples,
        "total": len(step.completions),
        "coloured": coloured,
        "data": {"names": names, "judges": judges, "rows": data},
    }


def _example(number: int, line: Row, names: Sequence[str], judges: Sequence[str]) -> Row:
    sample = f", sample {line['sample'] + 1}" if line.get("sample") else ""
    scores = line.get("scores", {})
    return {
        "number": f"{line.get('prompt_number', number) + 1}{sample}",
        "prompt": _prompt_text(line["prompt"]),
        "completions": [
            {
                "place": place,
                "text": line["completions"].get(name),
                "stopped": line.get("stopped", {}).get(name, True),
                "scores": [f"{judge} {scores[judge][name]:.3f}" for judge in judges if name in scores.get(judge, {})],
            }
            for place, name in enumerate(names)
        ],
    }


def _bytes_of(example: Row, numbers: Row) -> int:
    """About what a question takes in the page: its texts as escaped, the elements around them, its numbers."""
    from markupsafe import escape

    texts = [example["prompt"], *(completion["text"] or "" for completion in example["completions"])]
    written = sum(len(escape(text).encode()) for text in texts)
    scores = sum(len(score) + 3 for completion in example["completions"] for score in completion["scores"])
    return written + scores + 220 * len(texts) + len(json.dumps(numbers))


def _prompt_text(prompt: Any) -> str:
    """A prompt as it is read; a conversation with who said what."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _example_data(line: Row, names: Sequence[str], judges: Sequence[str], tokens: Mapping[str, Row]) -> Row:
    """Scores by judge and candidate, preferences of judges that compare, and token details, as numbers."""
    scores = [[_short(line.get("scores", {}).get(judge, {}).get(name)) for name in names] for judge in judges]
    preferences = [
        [index, names.index(row["a"]), names.index(row["b"]), _short(row["preference"])]
        for index, judge in enumerate(judges)
        for row in line.get("preferences", {}).get(judge, [])
    ]
    row: Row = {"s": scores}
    if preferences:
        row["p"] = preferences
    if tokens:
        kept = ("tokens", "kl", "value")
        row["t"] = {names.index(name): {key: detail[key] for key in kept if key in detail} for name, detail in tokens.items()}
    return row


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


# The recipe


def _recipe_text(run: RunFolder) -> str:
    """The recipe as resolved, defaults and overrides included, as YAML that `stages run` takes."""
    from ruamel.yaml import YAML
    from ruamel.yaml.compat import StringIO

    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    stream = StringIO()
    steps = [{"stage": step.stage, "name": step.name} | step.config for step in run.steps]
    yaml.dump({"name": run.summary["recipe"], "seed": run.summary.get("seed", 0), "steps": steps}, stream)
    return str(stream.getvalue())


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
