"""The candidates' answers: sampled with the same random streams, best of n, or read from a file."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, TypeVar

from stages.corpora.completions import load_completions, prompt_key
from stages.corpora.encoding.blocks import encode_documents, overlapping_windows
from stages.corpora.templates import encode_prompt
from stages.engines.opening import step_sampler
from stages.errors import DataError
from stages.evaluation.config import BestOfN, EvaluationConfig, no_answers
from stages.evaluation.few_shot import FewShot, few_shot_prompts, few_shot_text, validation_prompts
from stages.evaluation.prompts import Exclusion
from stages.evaluation.scoring import every_score
from stages.evaluation.tasks import measure_task
from stages.models.loaded import LoadedModel
from stages.models.loading import config_of, load_tokenizer
from stages.models.passes.likelihood import measure_likelihood
from stages.process.console import in_progress, made_of_each
from stages.rewards.details import Details, columns_of
from stages.sampling.generation import decode_completions, episode_seed
from stages.stats.best_of_n import best_of_n_kl
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.conversations.messages import Prompt
    from stages.corpora.prompts import PromptRow
    from stages.engines.shared_server import SharedServer
    from stages.registry.references import ResolvedModel
    from stages.step import StepContext

Made = TypeVar("Made")


@dataclass(frozen=True)
class Question:
    """One row of the evaluation: a prompt and a sample index. ``prompt_number`` groups the samples of one prompt."""

    prompt: Prompt
    prompt_number: int
    sample: int
    columns: Mapping[str, object] = field(default_factory=dict)  # columns of its data row that reward functions request


class FewShotTry(TypedDict):
    """A few-shot text, and the mean score of the completions that it leads to; None if only one text was tried."""

    text: str
    score: float | None


@dataclass(frozen=True)
class Sample:
    """One completion. For a completion from a file only the text is known."""

    text: str
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of response_ids under the candidate, at the sampling temperature
    stopped: bool = True


@dataclass
class Answers:
    """One candidate's answers to the questions, in order. None: no completion for that question."""

    samples: list[Sample | None]
    draws: list[list[Sample]] | None = None  # for best-of-n: all samples of each question
    draw_rewards: list[list[float]] | None = None  # score of each draw by the selecting reward source
    draw_scores: dict[str, list[list[float]]] = field(default_factory=dict)  # score of each draw, by judge
    token_kl: list[list[float]] | None = None  # nats per response token to the reference
    kl: list[float] | None = None  # nats per completion to the reference
    expected_kl: float | None = None  # for best-of-n, whose samples have no log-probabilities under the candidate
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)  # by name, as TaskResult
    scores: dict[str, list[float | None]] = field(default_factory=dict)  # by judge

    @property
    def texts(self) -> list[str | None]:
        return [sample.text if sample is not None else None for sample in self.samples]


@dataclass
class Asked:
    """The input of the candidates: the questions, each model's token ids for them, and what was excluded."""

    questions: list[Question]
    prompt_ids: dict[str, list[list[int]]]
    exclusions: list[Exclusion]
    few_shot: dict[str, list[FewShotTry]]  # by candidate: the tried few-shot prompts with their scores, the chosen one first


def with_candidate(config: EvaluationConfig, context: StepContext, name: str, work: Callable[[LoadedModel], Made]) -> Made:
    """The result of ``work`` with a candidate's model, which is loaded only for it. So only one candidate is in memory at a time."""
    runtime, dtype = context.runtime, context.runtime.dtype(config.precision)
    candidate = LoadedModel.frozen(context.models[f"candidates.{name}"], dtype, runtime.device)
    runtime.say_model(f"{context.name}: {name}", candidate.model, dtype)
    try:
        return work(candidate)
    finally:
        del candidate
        gc.collect()


# Questions


def ask(
    config: EvaluationConfig,
    context: StepContext,
    prompts: list[Prompt],
    columns: Sequence[Mapping[str, object]] | None = None,
    server: SharedServer | None = None,
) -> Asked:
    """The questions that fit every model, and each model's token ids for them. All models answer the same prompts.

    ``columns``: the data columns that reward functions request, per prompt; None if there are none. ``server``: for few-shot tries. Raises
    DataError if no prompt fits the context length of a model.
    """
    encoded: dict[str, list[list[int]]] = {}
    few_shot: dict[str, list[FewShotTry]] = {}
    exclusions = []
    fits = [True] * len(prompts)
    for name, candidate in config.candidates.items():
        if candidate.model is None:
            continue
        model = context.models[f"candidates.{name}"]
        asked = prompts
        if candidate.few_shot is not None:
            tries = _few_shot_tries(config, context, name, prompts, server)
            few_shot[name] = tries
            asked = few_shot_prompts(candidate.few_shot, tries[0]["text"], prompts)
        encoded[name] = _encode_prompts(load_tokenizer(model), asked)
        longest = _positions_of(model) - config.generation.max_new_tokens
        own = [0 < len(ids) <= longest for ids in encoded[name]]
        if own.count(False):
            exclusions.append(Exclusion(f"prompts longer than the {longest} tokens that {name} can read", own.count(False), len(prompts)))
        fits = [fit and mine for fit, mine in zip(fits, own, strict=True)]
        if not any(fits):
            raise DataError(
                f"candidate {name!r}: no prompt has at most {longest} tokens, its context length minus "
                f"generation.max_new_tokens={config.generation.max_new_tokens}. Lower max_new_tokens, or use shorter prompts"
            )
    kept = [index for index, fit in enumerate(fits) if fit]
    rows = [(index, sample) for index in kept for sample in range(config.samples_per_prompt)]
    return Asked(
        [Question(prompts[index], index, sample, columns[index] if columns is not None else {}) for index, sample in rows],
        {name: [ids[index] for index, _ in rows] for name, ids in encoded.items()},
        exclusions,
        few_shot,
    )


def _few_shot_tries(
    config: EvaluationConfig, context: StepContext, name: str, prompts: list[Prompt], server: SharedServer | None
) -> list[FewShotTry]:
    """The few-shot texts tried for a candidate, best first; a single unscored one if there is no choice."""
    settings = config.candidates[name].few_shot
    assert settings is not None
    if settings.choose is None:
        return [{"text": few_shot_text(settings, context.seed), "score": None}]
    instructions = len(settings.instruction) if isinstance(settings.instruction, list) else 1
    texts = [
        few_shot_text(settings, context.seed, draw=draw, instruction=instruction)
        for instruction in range(instructions)
        for draw in range(settings.choose.tries)
    ]
    rows, tries = _sample_tries(config, context, name, texts, validation_prompts(settings, prompts), server)
    details = Details(
        columns_of([row.columns for row in rows] * len(tries)), [sample.response_ids for samples in tries for sample in samples]
    )
    field_path = f"candidates.{name}.few_shot.choose.reward"
    completions = [sample.text for samples in tries for sample in samples]
    scores = every_score(
        config, context, settings.choose.reward, field_path, [row.prompt for row in rows] * len(tries), completions, details
    )
    means = [sum(scores[start : start + len(rows)]) / len(rows) for start in range(0, len(scores), len(rows))]
    best_first = sorted(zip(means, texts, strict=True), key=lambda pair: -pair[0])
    return [{"text": text, "score": mean} for mean, text in best_first]


def _sample_tries(
    config: EvaluationConfig,
    context: StepContext,
    name: str,
    texts: Sequence[str],
    validation: list[PromptRow],
    server: SharedServer | None,
) -> tuple[list[PromptRow], list[list[Sample]]]:
    """(the rows of ``validation`` that fit with every few-shot text, the completions of these rows for each text)."""
    settings = config.candidates[name].few_shot
    assert settings is not None
    longest = _positions_of(context.models[f"candidates.{name}"]) - config.generation.max_new_tokens
    asked = [row.prompt for row in validation]

    def complete(candidate: LoadedModel) -> tuple[list[PromptRow], list[list[Sample]]]:
        encoded = [_encode_prompts(candidate.tokenizer, few_shot_prompts(settings, text, asked)) for text in texts]
        fits = [index for index in range(len(validation)) if all(len(rows[index]) <= longest for rows in encoded)]
        if not fits:
            raise DataError(f"candidate {name!r}: no prompt of few_shot.choose.data fits {longest} tokens in every try; use fewer examples")
        context.runtime.console.print(f"{context.name}: {name} tries {len(texts)} few-shot prompts on {len(fits)} validation prompts")
        seeds = [(-1, index) for index in fits]  # all tries share random streams, which differ from those of the evaluation
        tries = []
        for rows in encoded:
            samples = _sample(config, context, candidate, [rows[index] for index in fits], seeds, server)
            tries.append([cut(sample, settings) for sample in samples])
        return [validation[index] for index in fits], tries

    return with_candidate(config, context, name, complete)


def _encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, template included."""
    return made_of_each("encoding prompts", lambda prompt: encode_prompt(tokenizer, prompt), prompts)


def _positions_of(model: ResolvedModel) -> int:
    """The maximum sequence length of a model and its tokenizer, in tokens. Uses the config of the base weights."""
    return readable_length(config_of(model), load_tokenizer(model)) or 1_000_000


# Answers


def same_model(context: StepContext, one: str, other: str) -> bool:
    """Whether two candidates are the same model with different prompts."""
    models = [context.models.get(f"candidates.{name}") for name in (one, other)]
    settings = [model.input.model_dump(exclude={"ref"}) if model is not None else None for model in models]
    return None not in models and models[0].digest == models[1].digest and settings[0] == settings[1]  # type: ignore[union-attr]


def answer(
    config: EvaluationConfig,
    context: StepContext,
    asked: Asked,
    name: str,
    twin: Answers | None = None,
    server: SharedServer | None = None,
) -> Answers:
    """Sample and measure one model's answers while it is in memory.

    ``twin``: answers of the same model with different prompts. ``server``: the vLLM server that candidates on one base share.
    """
    candidate = config.candidates[name]
    prompt_ids = asked.prompt_ids[name]
    draws = candidate.best_of.n if candidate.best_of is not None else 1
    each = f", {draws} times each" if draws > 1 else ""
    context.runtime.console.print(f"{context.name}: {name} answers {len(prompt_ids)} prompts{each}")

    def measured(writer: LoadedModel) -> Answers:
        # The first draw has the stream of the plain answer, so that best-of-1 equals that answer.
        seeds = [(row,) if draw == 0 else (row, draw) for row in range(len(prompt_ids)) for draw in range(draws)]
        ids = [row for row in prompt_ids for _ in range(draws)]
        made = [cut(sample, candidate.few_shot) for sample in _sample(config, context, writer, ids, seeds, server)]
        answers = Answers([made[start] for start in range(0, len(made), draws)])
        if draws > 1:
            answers.draws = [made[start : start + draws] for start in range(0, len(made), draws)]
        if twin is not None:  # metrics on plain text do not depend on the prompts
            answers.perplexity, answers.bits_per_byte, answers.tasks = twin.perplexity, twin.bits_per_byte, twin.tasks
        else:
            if config.perplexity is not None:
                answers.perplexity, answers.bits_per_byte = _perplexity(config, context, writer)
            answers.tasks = _tasks(config, context, writer)
        return answers

    answers = with_candidate(config, context, name, measured)
    if candidate.best_of is not None:
        _pick_best(config, context, asked, name, answers, candidate.best_of)
    return answers


def read_answers(config: EvaluationConfig, asked: Asked, name: str) -> Answers:
    """The answers of a candidate with existing completions. A prompt's first completion is its first sample, and so on.

    Raises DataError if no prompt has a completion.
    """
    sources = config.candidates[name].completions
    assert sources is not None
    completions = load_completions(sources)
    samples = []
    for question in asked.questions:
        text = completions.get(prompt_key(question.prompt), {}).get(question.sample)
        samples.append(Sample(text) if text is not None else None)
    if samples.count(None) == len(samples):
        raise DataError(no_answers(name, len(samples)))
    return Answers(samples)


def missing_answers(config: EvaluationConfig, answers: dict[str, Answers]) -> list[Exclusion]:
    """Exclusions for missing completions of candidates."""
    what = "prompts" if config.samples_per_prompt == 1 else "samples"
    return [
        Exclusion(f"{what} that {name} has no completion for (left out of its comparisons)", missing, len(answer.samples))
        for name, answer in answers.items()
        if (missing := answer.samples.count(None))
    ]


def answered_by_someone(asked: Asked, answers: dict[str, Answers]) -> Asked:
    """Drop questions that no candidate has answered (e.g. samples beyond the first), also from ``answers``."""
    kept = [row for row in range(len(asked.questions)) if any(answer.samples[row] is not None for answer in answers.values())]
    for answer in answers.values():
        answer.samples = [answer.samples[row] for row in kept]
    return Asked([asked.questions[row] for row in kept], {}, asked.exclusions, asked.few_shot)


def _sample(
    config: EvaluationConfig,
    context: StepContext,
    candidate: LoadedModel,
    prompt_ids: list[list[int]],
    stream_keys: Sequence[tuple[int, ...]],
    server: SharedServer | None,
) -> list[Sample]:
    """Sample a candidate's completion of every prompt, with the random streams of ``stream_keys``.

    Prompts are distributed over the processes.
    """

    def work(own: list[int]) -> list[Sample]:
        seeds = [episode_seed(context.seed, *stream_keys[row]) for row in own]
        ids_of = [prompt_ids[row] for row in own]
        with in_progress(f"{context.name}: sampling", len(own)) as done:
            generated = sampler.sample(ids_of, config.generation, seeds, on_finished=lambda ended: done(len(ended))).cpu()
        mask = generated.response_mask
        return [
            Sample(text, prompt_ids[row], ids[kept].tolist(), values[kept].tolist(), stopped)
            for row, text, ids, values, kept, stopped in zip(
                own,
                decode_completions(candidate.tokenizer, generated),
                generated.response_ids,
                generated.logprobs,
                mask,
                generated.stopped.tolist(),
                strict=True,
            )
        ]

    with step_sampler(config.generation, candidate, context, shared=server) as sampler:
        return context.runtime.distribute(len(prompt_ids), work)


def cut(sample: Sample, few_shot: FewShot | None) -> Sample:
    """Cut a few-shot candidate's completion where the model would continue with another example."""
    if few_shot is None:
        return sample
    text, mark, _ = sample.text.partition(few_shot.stop)
    return Sample(text.strip(), sample.prompt_ids, sample.response_ids, sample.logprobs, sample.stopped or bool(mark))


def _pick_best(config: EvaluationConfig, context: StepContext, asked: Asked, name: str, answers: Answers, best_of: BestOfN) -> None:
    assert answers.draws is not None
    prompts = [question.prompt for question in asked.questions for _ in range(best_of.n)]
    drawn = [sample for draws in answers.draws for sample in draws]
    details = details_of([question for question in asked.questions for _ in range(best_of.n)], drawn)
    field_path = f"candidates.{name}.best_of.reward"
    scores = every_score(config, context, best_of.reward, field_path, prompts, [sample.text for sample in drawn], details)
    answers.draw_rewards = [scores[start : start + best_of.n] for start in range(0, len(scores), best_of.n)]
    best = [rewards.index(max(rewards)) for rewards in answers.draw_rewards]  # the first of equal ones
    answers.samples = [draws[index] for draws, index in zip(answers.draws, best, strict=True)]
    reference = config.kl_reference
    if reference is not None and config.candidates[name].few_shot is None:
        digests = [context.models[f"candidates.{candidate}"].digest for candidate in (name, reference)]
        answers.expected_kl = best_of_n_kl(best_of.n) if digests[0] == digests[1] else None


def details_of(questions: Sequence[Question], samples: Sequence[Sample]) -> Details:
    """Information about samples for reward sources besides the texts. Token ids are included if a model of this run wrote all of them."""
    sampled = all(sample.prompt_ids for sample in samples)
    return Details(columns_of([question.columns for question in questions]), [one.response_ids for one in samples] if sampled else None)


def _tasks(config: EvaluationConfig, context: StepContext, candidate: LoadedModel) -> dict[str, dict[str, float]]:
    size = config.generation.batch_size
    measured = {
        name: measure_task(candidate.model, candidate.tokenizer, task.load(), task, batch_size=size, runtime=context.runtime)
        for name, task in config.tasks.items()
    }
    return {name: result.as_json() for name, result in measured.items()}


def _perplexity(config: EvaluationConfig, context: StepContext, candidate: LoadedModel) -> tuple[float, float]:
    """Perplexity per token, and bits per byte, which is comparable across tokenizers."""
    texts = config.load_texts()
    likelihood = measure_likelihood(
        candidate.model,
        overlapping_windows(encode_documents(candidate.tokenizer, texts), config.perplexity_block_size),
        pad_token_id=int(candidate.tokenizer.pad_token_id),
        batch_size=config.generation.batch_size,
        device=context.runtime.device,
        dtype=candidate.dtype,
    )
    return likelihood.perplexity, likelihood.bits_per_byte(sum(len(text.encode()) for text in texts))
