"""Multiple-choice tasks scored by likelihood: which continuation of a context is the most likely under a language model?

Contexts are plain text without the model's template. This measures the abilities retained from pretraining (their loss is the alignment tax
of Ouyang et al. 2022). K choices per question, N tokens of a batch's choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from stages.corpora.templates import encode_plain_pair
from stages.evaluation.config import TaskInput
from stages.models.passes.budget import each_group
from stages.models.passes.responses import Policy, sequence_batch
from stages.process.tables import Table
from stages.run_summary import Candidate
from stages.stats.intervals import wilson_interval
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.choices import Question
    from stages.model_types import TransformersModel
    from stages.process.runtime import Runtime


@dataclass(frozen=True)
class TaskResult:
    """Accuracy over ``n`` questions with its 95 % interval, the chance level, and the mean probability of the right choice.

    The probability is relative to the choices (softmax of their scores). It changes earlier than the accuracy.
    """

    accuracy: float
    ci_low: float
    ci_high: float
    n: int
    chance: float
    probability: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def measure_task(
    model: TransformersModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    task: TaskInput,
    *,
    batch_size: int,
    runtime: Runtime,
) -> TaskResult:
    """Score ``questions``, distributed over the processes. Every process returns the same result."""

    def work(own: list[int]) -> list[list[float]]:
        return score_choices(model, tokenizer, [questions[row] for row in own], task.normalize, batch_size=batch_size)

    return task_result(runtime.distribute(len(questions), work), [question.answer for question in questions])


def task_result(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> TaskResult:
    """Compute the result from the scores (one per choice) and right choices of all questions. Tied best scores share the point."""
    points = [(row[answer] == max(row)) / row.count(max(row)) for row, answer in zip(map(list, scores), answers, strict=True)]
    right = [float(torch.tensor(row, dtype=torch.float64).softmax(0)[answer]) for row, answer in zip(scores, answers, strict=True)]
    num_questions = len(points)
    low, high = wilson_interval(sum(points), num_questions)
    chance = sum(1 / len(row) for row in scores) / num_questions
    return TaskResult(sum(points) / num_questions, low, high, num_questions, chance, sum(right) / num_questions)


def score_choices(
    model: TransformersModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], normalize: str, *, batch_size: int
) -> list[list[float]]:
    """Log-likelihood of every choice given its context. Batches contain sequences of similar length."""
    policy = Policy(model, temperature=1.0, autocast=None)
    longest = readable_length(model.config, tokenizer)
    rows = [(index, choice_index) for index, question in enumerate(questions) for choice_index in range(len(question.choices))]
    encoded = [
        encode_choice(tokenizer, questions[index].context, questions[index].choices[choice_index], longest) for index, choice_index in rows
    ]
    scores = [[0.0] * len(question.choices) for question in questions]
    order = sorted(range(len(rows)), key=lambda row: len(encoded[row][0]) + len(encoded[row][1]))

    def score(chosen: Sequence[int]) -> None:
        batch = sequence_batch([encoded[row][0] for row in chosen], [encoded[row][1] for row in chosen], _pad(tokenizer), policy.device)
        flat = policy.logprobs(batch).double().cpu()
        for row, part in zip(chosen, flat.split([len(encoded[row][1]) for row in chosen]), strict=True):
            index, choice_index = rows[row]
            choice = questions[index].choices[choice_index]
            size = {"none": 1, "tokens": len(encoded[row][1]), "bytes": len(choice.encode())}[normalize]
            scores[index][choice_index] = float(part.sum()) / size

    with torch.inference_mode():
        groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        each_group("scoring the choices of tasks", groups, score, known_by=model)
    return scores


def encode_choice(tokenizer: PreTrainedTokenizerBase, context: str, choice: str, longest: int | None = None) -> tuple[list[int], list[int]]:
    """Return (context ids, choice ids). White space between the two belongs to the choice, because tokenizers join it to the first word.

    The two are encoded as one text. A context that is too long loses its beginning; an empty one becomes the start token.
    """
    ids, choice_ids = encode_plain_pair(tokenizer, context.rstrip(" "), choice)
    if longest is not None:
        ids = ids[-max(1, longest - len(choice_ids)) :]
    return ids, choice_ids


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def task_table(candidates: Mapping[str, Candidate]) -> Table | None:
    """Terminal table of the tasks: accuracy with its interval, one row per candidate; None without tasks."""
    names = list(dict.fromkeys(name for row in candidates.values() for name in row.get("tasks", {})))
    if not names:
        return None
    first = next(row["tasks"] for row in candidates.values() if row.get("tasks"))
    headings = [f"{name} (chance {first[name]['chance']:.2f})" for name in names]
    table = Table("candidate", *headings, title="Tasks: accuracy (95 % interval)", title_justify="left")
    for candidate, row in candidates.items():
        tasks = row.get("tasks", {})
        cells = [f"{tasks[name]['accuracy']:.3f} ({tasks[name]['ci_low']:.3f}-{tasks[name]['ci_high']:.3f})" for name in tasks]
        table.add_row(candidate, *(cells or ["-"] * len(names)))
    return table
