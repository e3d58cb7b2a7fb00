"""Remarks on a run for its page: alarms, exclusions, candidates that the prompts cannot distinguish, and judges that disagree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from stages.metric_names import NUM_ITERATIONS, RAISED_ALARMS
from stages.report import training
from stages.report.run_folder import Row, RunFolder, StepFolder
from stages.report.verdicts import listed, percent
from stages.run_summary import EvaluationFile

NOISE = 0.6  # two judges whose agreement is lower get a remark


def remarks(run: RunFolder) -> list[Row]:
    """All remarks on a run, as rows with ``kind`` (alarm, good or note) and ``text``."""
    notes = []
    for step in run.steps:
        for alarm in step.metrics.get(RAISED_ALARMS) or []:
            when = f"from iteration {alarm.get('first_iteration')} on, in {alarm.get('iterations')} iterations"
            notes.append({"kind": "alarm", "text": f"{step.name}: {alarm['name']} {when}: {alarm['message']}"})
        if step.stage == "ppo" and step.metrics.get(RAISED_ALARMS) == []:
            number = step.metrics.get(NUM_ITERATIONS, "?")
            notes.append({"kind": "good", "text": f"{step.name}: no health alarm was raised in {number} iterations of PPO."})
    for step in run.evaluations:
        notes += _evaluation_notes(step, f"{step.name}: " if len(run.evaluations) > 1 else "")
    missing = [step.name for step in run.steps if step.stage in training.STAGE_CURVES and not step.log]
    if missing:
        notes.append(
            {
                "kind": "note",
                "text": f"There is no training log of {listed(missing)}: these steps are reused from a run whose files no longer exist.",
            }
        )
    notes += [{"kind": "alarm", "text": text} for text in missing_evaluations(run)]
    if not run.summary.get("finished", False):
        notes.insert(0, {"kind": "alarm", "text": "The run did not finish. This page shows the steps that did."})
    return notes


def missing_evaluations(run: RunFolder) -> list[str]:
    """A sentence on each evaluation whose result or completions are not in the run folder, or only in part."""
    sentences = []
    for step in run.steps:
        if step.stage != "evaluation":
            continue
        if step.evaluation is None:
            sentences.append(f"{step.name}: the run folder has no {step.name}/evaluation.json, so this page shows no result of this step.")
            continue
        expected = max((row.get("completions") or 0 for row in step.evaluation["candidates"].values()), default=0)
        if (present := len(step.completions)) < expected:
            file = f"{step.name}/completions.jsonl"
            sentences.append(
                f"{step.name}: {file} has {present:,} of {expected:,} lines; it is missing or was cut off. Its other lines are not shown."
            )
    return sentences


def _evaluation_notes(step: StepFolder, about: str) -> list[Row]:
    """Remarks on one evaluation. ``about``: the beginning of each remark. It names the step if there are several evaluations."""
    evaluation = step.evaluation
    assert evaluation is not None
    notes = [
        *_left_out(evaluation),
        *_cut_texts(evaluation),
        *_undistinguished(evaluation),
        *_disagreements(evaluation),
        *_requests(evaluation),
        *_many_comparisons(evaluation),
    ]
    return [{"kind": kind, "text": f"{about}{text}"} for kind, text in notes]


def _kind_of_share(count: int, total: int) -> str:
    """More than a tenth of the items is an alarm."""
    return "alarm" if count > 0.1 * total else "note"


def _left_out(evaluation: EvaluationFile) -> Iterator[tuple[str, str]]:
    """(kind, text) for each group of prompts or completions that the evaluation left out."""
    for item in evaluation.get("exclusions", []):
        kind = "note" if item.get("expected") else _kind_of_share(item["count"], item["of"])
        yield kind, f"{item['count']:,} of {item['of']:,} {item['what']}."


def _cut_texts(evaluation: EvaluationFile) -> Iterator[tuple[str, str]]:
    """(kind, text) for each reader of texts that were too long for it."""
    for cut in evaluation.get("cut_texts", []):
        text = f"{cut['reader']} read {cut['count']:,} of {cut['of']:,} texts without their beginning: they were too long."
        yield _kind_of_share(cut["count"], cut["of"]), text


def _undistinguished(evaluation: EvaluationFile) -> Iterator[tuple[str, str]]:
    """A note on the pairs of candidates whose interval contains one half, by the first judge, and on the prompts that they would need."""
    judge = evaluation["judges"][0]["name"]
    rows = {(row["a"], row["b"]): row for row in evaluation["win_rates"] if row["judge"] == judge}
    unsure = []
    for a, b in combinations(evaluation["candidates"], 2):
        row = rows.get((b, a))
        if row is None or not row["n"] or row["ci_low"] > 0.5 or row["ci_high"] < 0.5:
            continue
        needed = row.get("prompts_needed")
        more = (
            f"about {needed:,.0f} prompts would be needed"
            if needed is not None
            else "no number of prompts would be enough at this win rate"
        )
        unsure.append(f"{b} from {a} ({percent(row['win_rate'])}; {more})")
    if unsure:
        finding = f"{evaluation['prompts']} prompts do not distinguish {'; '.join(unsure)}"
        yield "note", f"{finding}. The numbers assume a power of 80 % at the 5 % level, by {judge}."


def _disagreements(evaluation: EvaluationFile) -> Iterator[tuple[str, str]]:
    """A note on each pair of judges that often disagree."""
    for pair in evaluation.get("agreement", {}).get("pairs", []):
        share = pair.get("agreement_decided")
        if share is not None and pair["decided"] >= 20 and share < NOISE:
            where = f"on {percent(share)} of the {pair['decided']:,} comparisons without a tie"
            yield "note", f"{pair['a']} and {pair['b']} agree {where}: they judge different things."


def _requests(evaluation: EvaluationFile) -> Iterator[tuple[str, str]]:
    """A note on each judge behind an endpoint: its requests, failures and cost."""
    for entry in evaluation["judges"]:
        if entry["kind"] != "llm":
            continue
        cost = f", for {entry['cost']:.2f}" if entry.get("cost") is not None else ""
        consistent = entry.get("order_consistency")
        same = f"; for {percent(consistent)} its verdict was the same in both orders" if consistent is not None else ""
        yield (
            "note",
            f"{entry['name']} was asked {entry['requests']:,} times ({entry['from_cache']:,} replies from the cache, "
            f"{entry['retries']:,} retries, {entry['refused']:,} refusals, {entry['failed']:,} failures){cost}{same}.",
        )


def _many_comparisons(evaluation: EvaluationFile) -> Iterator[tuple[str, str]]:
    """A note if there are so many comparisons that some intervals miss the true value by chance."""
    compared = sum(row["a"] < row["b"] for row in evaluation["win_rates"])
    if compared > 5:
        yield (
            "note",
            f"Each interval covers one comparison. There are {compared} comparisons, and about one interval in twenty misses its true "
            "value by chance.",
        )
