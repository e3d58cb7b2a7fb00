"""Run the judges on the answers of every pair of candidates to every question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config import DataSource
from stages.corpora.completions import prompt_key
from stages.corpora.files import fingerprint
from stages.corpora.judgements import load_judgements
from stages.corpora.labels import TASKS, read_tasks
from stages.evaluation.answers import Answers, Question, details_of
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.prompts import Exclusion
from stages.evaluation.scoring import score_texts
from stages.json_types import JsonObject
from stages.judges.config import EndpointJudge, JudgementsFile
from stages.judges.endpoint import Comparison, EndpointClient
from stages.labelling.config import PeopleJudge
from stages.labelling.publishing import publish_tasks, step_folder
from stages.labelling.tasks import task_of
from stages.labelling.waiting import QUALITY, ask_people, home_of, keep_quality
from stages.process.environment import secret
from stages.process.remote import AnswerCache

if TYPE_CHECKING:
    from stages.corpora.judgements import Judgements, Rating, Vote
    from stages.corpora.labels import LabelTask
    from stages.rewards.config import RewardInput
    from stages.step import StepContext

Pair = tuple[str, str]


@dataclass
class Judged:
    """One judge's results. A preference is 1 if the pair's first candidate is better, 0 if the second is; None without a verdict.

    ``preferences``: one value per question for each judged pair, in the order of the candidates. ``scores``: only for judges that score
    single completions. ``annotators``: the preferences of each item that several people judged.
    """

    name: str
    kind: str  # reward | llm | people
    preferences: dict[Pair, list[float | None]]
    scores: dict[str, list[float | None]] | None = None
    annotators: list[list[float]] = field(default_factory=list)
    details: JsonObject = field(default_factory=dict)
    exclusions: list[Exclusion] = field(default_factory=list)


def judge_all(config: EvaluationConfig, context: StepContext, questions: Sequence[Question], answers: dict[str, Answers]) -> list[Judged]:
    """Run every judge on every answer, one judge at a time. Scores are also stored with the answers."""
    made = []
    for index, judge in enumerate(config.judges):
        if isinstance(judge, EndpointJudge):
            judged = _ask_endpoint(judge, context, questions, answers)
        elif isinstance(judge, JudgementsFile):
            judged = _judged_by_people(judge.name, load_judgements(judge.judgements), questions, answers)
        elif isinstance(judge, PeopleJudge):
            judged = _ask_people(judge, config, context, questions, answers)
        else:
            judged = _score(judge, f"judges[{index}]", config, context, questions, answers)
        for name, scores in (judged.scores or {}).items():
            answers[name].scores[judged.name] = scores
        made.append(judged)
    return made


# Reward sources


def _score(
    judge: RewardInput,
    field_path: str,
    config: EvaluationConfig,
    context: StepContext,
    questions: Sequence[Question],
    answers: dict[str, Answers],
) -> Judged:
    rows = [(name, row, sample) for name, answer in answers.items() for row, sample in enumerate(answer.samples) if sample is not None]
    asked = [questions[row] for _, row, _ in rows]
    details = details_of(asked, [sample for _, _, sample in rows])
    texts = [sample.text for _, _, sample in rows]
    given = score_texts(config, context, judge, field_path, [question.prompt for question in asked], texts, details)
    scores: dict[str, list[float | None]] = {name: [None] * len(questions) for name in answers}
    for (name, row, _), score in zip(rows, given, strict=True):
        scores[name][row] = score
    left_out = [Exclusion(f"completions that {judge.shown_name} does not apply to (it returned None)", given.count(None), len(given))]
    for name, answer in answers.items():
        if answer.draws is not None:
            width = len(answer.draws[0])
            repeated = [question for question in questions for _ in range(width)]
            samples = [sample for draws in answer.draws for sample in draws]
            prompts, texts = [question.prompt for question in repeated], [sample.text for sample in samples]
            drawn = score_texts(config, context, judge, field_path, prompts, texts, details_of(repeated, samples))
            known = [score for score in drawn if score is not None]
            if len(known) == len(drawn):
                answer.draw_scores[judge.shown_name] = [known[start : start + width] for start in range(0, len(known), width)]
            what = f"samples of {name} that {judge.shown_name} does not apply to (its best-of-n curve is left out)"
            left_out.append(Exclusion(what, len(drawn) - len(known), len(drawn)))
    return Judged(judge.shown_name, "reward", _compared(scores), scores, exclusions=[item for item in left_out if item.count])


def _compared(scores: dict[str, list[float | None]]) -> dict[Pair, list[float | None]]:
    """Preferences derived from scores. A question counts for a pair if both have a score."""
    return {
        (a, b): [None if x is None or y is None else _preference(x, y) for x, y in zip(scores[a], scores[b], strict=True)]
        for a, b in combinations(scores, 2)
    }


# A language model behind an endpoint


def _ask_endpoint(judge: EndpointJudge, context: StepContext, questions: Sequence[Question], answers: dict[str, Answers]) -> Judged:
    pairs = list(combinations(answers, 2))
    if judge.against == "last":
        last = list(answers)[-1]
        pairs = [pair for pair in pairs if last in pair]
    prompts = set(sorted({question.prompt_number for question in questions})[: judge.num_prompts])
    rows = [row for row, question in enumerate(questions) if question.prompt_number in prompts]
    texts = {name: answer.texts for name, answer in answers.items()}
    asked = [(pair, row) for pair in pairs for row in rows if texts[pair[0]][row] is not None and texts[pair[1]][row] is not None]
    context.runtime.console.print(f"{context.name}: {judge.name} compares {len(asked)} pairs of completions, in both orders")

    def make() -> tuple[list[float | None], JsonObject]:
        key = secret(judge.api_key_variable) if judge.api_key_variable is not None else None
        comparisons = [Comparison(questions[row].prompt, texts[a][row] or "", texts[b][row] or "") for (a, b), row in asked]
        cache = AnswerCache(context.cache_folder / "judgements.sqlite3")
        try:
            with (
                EndpointClient(judge, key=key, cache=cache) as client,
                context.runtime.progress(f"{context.name}: {judge.name}", len(comparisons)) as bar,
            ):
                return client.compare(comparisons, bar.advance), client.tally.as_json(judge)
        finally:
            cache.close()

    verdicts, details = context.runtime.decide(make)  # rank zero asks and broadcasts
    preferences: dict[Pair, list[float | None]] = {pair: [None] * len(questions) for pair in pairs}
    for (pair, row), verdict in zip(asked, verdicts, strict=True):
        preferences[pair][row] = verdict
    left_out = Exclusion(f"comparisons that {judge.name} gave no verdict on", verdicts.count(None), len(verdicts))
    return Judged(judge.name, "llm", preferences, details=details, exclusions=[left_out] if left_out.count else [])


# People


def _ask_people(
    judge: PeopleJudge, config: EvaluationConfig, context: StepContext, questions: Sequence[Question], answers: dict[str, Answers]
) -> Judged:
    """Publish the candidates' completions side by side without names. Once there are enough rankings, read them as votes."""
    folder = _labelling_folder(judge, config, context)
    asked = _tasks_of(judge, context, questions, answers)
    if not context.runtime.decide((folder / TASKS).exists):
        context.runtime.decide(lambda: publish_tasks(folder, list(asked.values())))
    published = context.runtime.decide(lambda: read_tasks(folder / TASKS))
    ask_people(folder, judge.people, context)
    judged = _judged_by_people(judge.name, load_judgements([DataSource(path=str(folder))]), questions, answers)
    shown = {(repr(task.asked), task.sample): set(task.texts) for task in published.values()}
    changed = sum(shown.get(key) != set(task.texts) for key, task in asked.items())
    if changed:
        judged.exclusions.append(Exclusion(f"questions whose completions changed after {judge.name} saw them", changed, len(asked)))
    chosen = _asked_prompts(judge, questions)
    num_questions = sum(question.prompt_number in chosen for question in questions)
    if num_questions > len(asked):
        what = f"questions that {judge.name} were not asked, because the candidates gave fewer than two different answers"
        judged.exclusions.append(Exclusion(what, num_questions - len(asked), num_questions))
    context.runtime.decide(lambda: keep_quality(folder, context.folder / QUALITY))
    judged.details["labels"] = str(folder)
    return judged


def _labelling_folder(judge: PeopleJudge, config: EvaluationConfig, context: StepContext) -> Path:
    """The folder of the tasks. It depends on the questions and the models, so that a later run finds the same annotations."""
    names = judge.candidates or list(config.candidates)
    candidates = {}
    for name in names:
        candidate, model = config.candidates[name], context.models.get(f"candidates.{name}")
        made = None if candidate.completions is None else fingerprint(candidate.completions)
        rest = candidate.model_dump(mode="json", exclude={"model", "completions"})
        candidates[name] = [model.digest if model is not None else None, made, rest]
    kept = {"prompt_words", "num_prompts", "samples_per_prompt", "generation"}
    key = {
        **config.model_dump(mode="json", include=kept),
        "candidates": candidates,
        "data": fingerprint(config.data),
        "asked": judge.num_prompts,
        "judge": judge.name,
        "seed": context.seed,
    }
    return step_folder(home_of(context), context.name, key)


def _asked_prompts(judge: PeopleJudge, questions: Sequence[Question]) -> set[int]:
    """Indices of the prompts that annotators judge."""
    return set(sorted({question.prompt_number for question in questions})[: judge.num_prompts])


def _tasks_of(
    judge: PeopleJudge, context: StepContext, questions: Sequence[Question], answers: dict[str, Answers]
) -> dict[tuple[str, int], LabelTask]:
    """One task per question with at least two different answers, by prompt and sample. Equal texts are shown once."""
    names = judge.candidates or list(answers)
    kept = _asked_prompts(judge, questions)
    tasks = {}
    for row, question in enumerate(questions):
        if question.prompt_number not in kept:
            continue
        texts: dict[str, list[str]] = {}
        for name in names:
            if answers[name].samples[row] is not None:
                texts.setdefault(answers[name].texts[row] or "", []).append(name)
        if len(texts) > 1:
            digests = [[model.digest for name in group if (model := context.models.get(f"candidates.{name}"))] for group in texts.values()]
            task = task_of(question.prompt, list(texts), list(texts.values()), digests, question.sample)
            tasks[repr(question.prompt), question.sample] = task
    return tasks


# A file of judgements


def _judged_by_people(name: str, judgements: Judgements, questions: Sequence[Question], answers: dict[str, Answers]) -> Judged:
    """Preferences from votes and ratings; averaged over annotators if several judged the same item."""
    row_of = {(prompt_key(question.prompt), question.sample): row for row, question in enumerate(questions)}
    ratings = [
        (rating, row)
        for rating in judgements.ratings
        if (row := row_of.get((rating.prompt, rating.sample))) is not None
        and rating.candidate in answers
        and answers[rating.candidate].samples[row] is not None
    ]
    votes = [
        (vote, row)
        for vote in judgements.votes
        if (row := row_of.get((vote.prompt, vote.sample))) is not None and vote.a in answers and vote.b in answers
    ]
    given = _by_candidate(ratings)
    said = _by_pair(votes, list(answers))
    _add_compared_ratings(said, given, list(answers), len(questions))
    preferences: dict[Pair, list[float | None]] = {}
    for (pair, row), of_annotators in said.items():
        preferences.setdefault(pair, [None] * len(questions))[row] = _mean(of_annotators)
    scores: dict[str, list[float | None]] | None = None
    if given:
        scores = {name: [_mean(given[name, row]) if (name, row) in given else None for row in range(len(questions))] for name in answers}
    used, total = len(votes) + len(ratings), len(judgements.votes) + len(judgements.ratings)
    left_out = Exclusion(f"judgements of {name} about other prompts or candidates", total - used, total)
    return Judged(
        name,
        "people",
        {pair: preferences[pair] for pair in combinations(answers, 2) if pair in preferences},
        scores,
        annotators=[list(of_annotators.values()) for of_annotators in said.values() if len(of_annotators) > 1],
        details={"judgements": used, "annotators": len({annotator for of_annotators in said.values() for annotator in of_annotators})},
        exclusions=[left_out] if left_out.count else [],
    )


def _by_candidate(ratings: Sequence[tuple[Rating, int]]) -> dict[tuple[str, int], dict[str, float]]:
    """The scores of each annotator, by candidate and question."""
    given: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for rating, row in ratings:
        given[rating.candidate, row][rating.annotator] = rating.score
    return given


def _by_pair(votes: Sequence[tuple[Vote, int]], candidates: list[str]) -> dict[tuple[Pair, int], dict[str, float]]:
    """The preferences of each annotator, by pair of candidates (in the order of ``candidates``) and question."""
    said: dict[tuple[Pair, int], dict[str, float]] = defaultdict(dict)
    for vote, row in votes:
        straight = candidates.index(vote.a) < candidates.index(vote.b)
        pair = (vote.a, vote.b) if straight else (vote.b, vote.a)
        said[pair, row][vote.annotator] = vote.preference if straight else 1 - vote.preference
    return said


def _add_compared_ratings(
    said: dict[tuple[Pair, int], dict[str, float]],
    given: Mapping[tuple[str, int], Mapping[str, float]],
    candidates: list[str],
    num_questions: int,
) -> None:
    """Add a preference of each annotator who rated both candidates of a pair and did not vote on it."""
    for a, b in combinations(candidates, 2):
        for row in range(num_questions):
            mine, theirs = given.get((a, row), {}), given.get((b, row), {})
            for annotator in mine.keys() & theirs.keys():
                said[(a, b), row].setdefault(annotator, _preference(mine[annotator], theirs[annotator]))


def _preference(first: float, second: float) -> float:
    """1 if the first score is higher, 0 if the second is, 1/2 if they are equal."""
    return (first > second) + 0.5 * (first == second)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
