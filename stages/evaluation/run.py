"""The evaluation stage: ask, answer, measure, judge, compare, and write the files for the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stages.corpora.prompts import check_readers, compare_template_arguments
from stages.engines.shared_server import shared_server
from stages.evaluation.agreement import agreement
from stages.evaluation.answers import answer, answered_by_someone, ask, missing_answers, read_answers, same_model
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.judging import judge_all
from stages.evaluation.outcome import compare, evaluation_tables, verdict
from stages.evaluation.record import finite, write_alpaca_eval, write_completions, write_evaluation, write_lines
from stages.evaluation.tasks import task_table
from stages.evaluation.tokens import measure_kl, token_details
from stages.run_summary import EvaluationResult
from stages.step import StepResult

if TYPE_CHECKING:
    from stages.corpora.prompts import PromptRow
    from stages.evaluation.answers import Answers, Asked
    from stages.evaluation.outcome import Outcome
    from stages.evaluation.prompts import Exclusion
    from stages.step import StepContext


def run(config: EvaluationConfig, context: StepContext) -> StepResult:
    """Evaluate the candidates. Its output files are listed in ``record``."""
    heldout, exclusions = config.load_heldout()
    asked, answers, left_out = _answers(config, context, heldout)
    exclusions += left_out
    if config.kl_reference is not None:
        exclusions += measure_kl(config, context, answers)
    details = token_details(config, context, asked, answers)
    judged = judge_all(config, context, asked.questions, answers)
    exclusions += [item for judge in judged for item in judge.exclusions]

    models = {name: context.models.get(f"candidates.{name}") for name in config.candidates}
    outcome = compare(asked.questions, answers, judged, models)
    _show(context, outcome, exclusions)
    num_prompts = len({question.prompt_number for question in asked.questions})
    cut_texts = [item for item in context.cut_texts.values() if item["count"]]
    if context.runtime.is_main:
        write_completions(context.folder, asked.questions, answers, judged)
        write_alpaca_eval(context.folder, asked.questions, answers)
        if details:
            write_lines(context.folder / "tokens.jsonl", details)
        content = {
            "verdict": verdict(outcome),
            "prompts": num_prompts,
            "samples_per_prompt": config.samples_per_prompt,
            "kl_reference": config.kl_reference,
            "candidates": outcome.candidates,
            "win_rates": outcome.win_rates,
            "judges": [{"name": judge.name, "kind": judge.kind, **judge.details} for judge in judged],
            "agreement": agreement(judged, asked.questions),
            "best_of_n": outcome.best_of_n,
            "few_shot": asked.few_shot,
            "exclusions": [item.as_json() for item in exclusions],
            "cut_texts": cut_texts,
        }
        write_evaluation(context.folder, content)
    metrics = {
        "prompts": num_prompts,
        "samples": len(asked.questions),
        "left_out": sum(item.count for item in exclusions),
        "cut_texts": cut_texts,
        "verdict": verdict(outcome),
    }
    result: EvaluationResult = {"candidates": outcome.candidates, "win_rates": outcome.win_rates, "judges": outcome.judges}
    return StepResult(None, metrics, evaluation=finite(result))


def _answers(
    config: EvaluationConfig, context: StepContext, heldout: Sequence[PromptRow]
) -> tuple[Asked, dict[str, Answers], list[Exclusion]]:
    """(questions, answers of each candidate, what was left out): sampled by its model, or read from a file."""
    prompts = [row.prompt for row in heldout]
    compare_template_arguments(context.models.values())
    check_readers([model for name, model in context.models.items() if not name.startswith("candidates.")], prompts)
    answers: dict[str, Answers] = {}
    with ExitStack() as stack:
        server = None
        if config.generation.vllm is not None and config.generation.vllm.start is not None:
            models = [model for name, model in context.models.items() if name.startswith("candidates.")]
            server = stack.enter_context(shared_server(models))
        asked = ask(config, context, prompts, [row.columns for row in heldout], server)
        for name, candidate in config.candidates.items():
            if candidate.model is None:
                answers[name] = read_answers(config, asked, name)
                continue
            twin = next((answers[other] for other in answers if same_model(context, name, other)), None)
            answers[name] = answer(config, context, asked, name, twin, server)
    if not asked.prompt_ids:  # no model answers here
        asked = answered_by_someone(asked, answers)
    return asked, answers, [*asked.exclusions, *missing_answers(config, answers)]


def _show(context: StepContext, outcome: Outcome, exclusions: Sequence[Exclusion]) -> None:
    """Print the tables, what was left out, and the verdict."""
    console = context.runtime.console
    for table in evaluation_tables(outcome):
        console.print(table)
    if (tasks := task_table(outcome.candidates)) is not None:
        console.print(tasks)
    for item in exclusions:
        console.print(f"{context.name}: left out: {item.count} of {item.of} {item.what}")
    console.print(verdict(outcome), style="bold")
