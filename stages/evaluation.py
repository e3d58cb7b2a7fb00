"""The evaluation: candidates answer the same prompts with the same random streams, judges score the answers, a report shows both."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stages.config import DataField, DataSource, GenerationSettings, ModelField, ModelInput, StepConfig, Strict
from stages.errors import DataError, ModelError
from stages.rewards.config import RewardInput, check_names, reward_model_inputs
from stages.tasks import TaskField

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.messages import Prompt
    from stages.runtime import ResolvedModel, StepContext, StepResult


class FewShot(Strict):
    """Prompt engineering: worked examples are put before every prompt."""

    data: DataField = Field(description="Demonstrations to take the examples from.")
    num_examples: int = Field(3, ge=1, description="Examples before each prompt, drawn once by the step's seed.")
    instruction: str = Field("", description="Text before the first example.")
    template: str = Field("{prompt}\n{completion}\n\n", description="One example; the prompt to answer is shown up to {completion}.")
    stop: str = Field("\n", description="The completion is cut where this text begins: the model would go on with another example.")

    @model_validator(mode="after")
    def _fields(self) -> FewShot:
        if self.template.find("{prompt}") < 0 or self.template.find("{completion}") < self.template.find("{prompt}"):
            raise ValueError(f"template must hold {{prompt}} and then {{completion}}, got {self.template!r}")
        return self


class CandidateInput(Strict):
    """One model of the comparison; a bare string is its reference."""

    model: ModelField
    few_shot: FewShot | None = Field(None, description="Show the model examples before each prompt; null: the prompt alone.")


def _candidate(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) or (isinstance(value, dict) and "ref" in value) else value


class EvaluationConfig(StepConfig):
    """Compare ``candidates`` on held-out prompts."""

    stage: Literal["evaluation"] = "evaluation"
    candidates: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Annotated[CandidateInput, BeforeValidator(_candidate)]] = Field(
        min_length=1, description="What to compare, by name, from the least to the most trained: the verdict is about the last."
    )
    data: DataField = Field(description="Held-out prompts.")
    prompt_words: int | None = Field(None, ge=1, description="Make prompts of the first so many words of each text.")
    num_prompts: int | None = Field(256, ge=1, description="Use the first so many distinct prompts; null: all.")
    exclude: DataField | None = Field(None, description="Prompts that occur in these data (what PPO trained on) are left out.")
    samples_per_prompt: int = Field(1, ge=1, description="Completions of each prompt by each candidate.")
    generation: GenerationSettings = GenerationSettings()
    judges: list[RewardInput] = Field(min_length=1, description="Who scores the completions; the first decides the verdict.")
    kl_reference: str | None = Field(None, description="Candidate to which every other's KL per completion is measured.")
    perplexity: DataField | None = Field(None, description="Held-out texts on which each candidate's perplexity is measured.")
    perplexity_block_size: int = Field(128, ge=2, description="Tokens of context for the perplexity.")
    tasks: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], TaskField] = Field(
        {}, description="Small tasks by name, scored by the likelihood of each choice: {facts: world:tasks/facts/heldout}."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        check_names(self.judges, "judges")
        if self.kl_reference is not None and self.kl_reference not in self.candidates:
            raise ValueError(f"kl_reference={self.kl_reference!r} is no candidate; expected one of {', '.join(self.candidates)}")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {
            **{f"candidates.{name}": candidate.model for name, candidate in self.candidates.items()},
            **reward_model_inputs(self.judges, "judges"),
        }

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data": self.data}
        for name, candidate in self.candidates.items():
            if candidate.few_shot is not None:
                inputs[f"candidates.{name}.few_shot.data"] = candidate.few_shot.data
        if self.exclude is not None:
            inputs["exclude"] = self.exclude
        if self.perplexity is not None:
            inputs["perplexity"] = self.perplexity
        return {**inputs, **{f"tasks.{name}.data": task.data for name, task in self.tasks.items()}}

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        self.load_prompts()
        for candidate in self.candidates.values():
            if candidate.few_shot is not None:
                few_shot_examples(candidate.few_shot, 0)
        _texts(self)
        for task in self.tasks.values():
            task.load()

    def load_prompts(self) -> list[Prompt]:
        """The held-out prompts, each once. Raises DataError where ``exclude`` leaves none."""
        from stages.corpora.prompts import load_prompts

        excluded = load_prompts(self.exclude, prompt_words=self.prompt_words) if self.exclude is not None else []
        known = {repr(prompt) for prompt in excluded}
        prompts = load_prompts(self.data, prompt_words=self.prompt_words, split="test")
        apart = [prompt for prompt in prompts if repr(prompt) not in known]
        if not apart:
            raise DataError(f"all {len(prompts)} prompts of data occur in exclude; name data kept apart, or raise prompt_words")
        return apart[: self.num_prompts]


@dataclass
class Answers:
    """What one candidate made of the prompts, in their order."""

    completions: list[str]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    logprobs: list[list[float]]
    stopped: list[bool]
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tasks: dict[str, dict[str, float | int]] = field(default_factory=dict)  # by name, as TaskResult
    kl: list[float] | None = None  # nats per completion to the reference
    scores: dict[str, list[float]] = field(default_factory=dict)  # by judge


def run(config: EvaluationConfig, context: StepContext) -> StepResult:
    """Sample, measure, judge, compare; leaves completions.jsonl and report.html in the run folder."""
    from stages.report.page import write_page
    from stages.report.results import compare, evaluation_table, verdict
    from stages.runtime import StepResult
    from stages.tasks import task_table

    prompts = [prompt for prompt in config.load_prompts() for _ in range(config.samples_per_prompt)]
    prompts, shown = _rendered(config, context, prompts)
    answers: dict[str, Answers] = {}
    for name in config.candidates:
        context.runtime.console.print(f"{context.name}: {name} answers {len(prompts)} prompts")
        twin = next((answers[other] for other in answers if _same_model(context, name, other)), None)
        answers[name] = _answer(config, context, name, shown[name], twin)
    if config.kl_reference is not None:
        _measure_kl(config, context, answers)
    _judge(config, context, prompts, answers)

    judges = [judge.shown_name for judge in config.judges]
    models = {name: context.models[f"candidates.{name}"] for name in config.candidates}
    outcome = compare(answers, judges, models, samples_per_prompt=config.samples_per_prompt)
    for table in evaluation_table(outcome, judges):
        context.runtime.console.print(table)
    if (tasks := task_table(outcome.candidates)) is not None:
        context.runtime.console.print(tasks)
    context.runtime.console.print(verdict(outcome, judges), style="bold")
    if context.runtime.is_main:
        _write_completions(config, context, prompts, answers)
        write_page(context.folder / "report.html", context.name, prompts, answers, outcome, judges)
    metrics = {"prompts": len(prompts) // config.samples_per_prompt, "samples": len(prompts), "verdict": verdict(outcome, judges)}
    return StepResult(None, metrics, evaluation={"candidates": outcome.candidates, "win_rates": outcome.win_rates, "judges": judges})


# Prompts


def few_shot_examples(settings: FewShot, seed: int) -> str:
    """The text put before every prompt: the instruction and ``num_examples`` demonstrations. Raises DataError where there are too few."""
    import random

    from stages.corpora.demonstrations import demonstration
    from stages.corpora.files import read_rows
    from stages.corpora.prompts import plain_text

    rows = read_rows(settings.data)
    if len(rows) < settings.num_examples:
        raise DataError(f"few_shot.data has {len(rows)} rows, fewer than num_examples={settings.num_examples}")
    chosen = [demonstration(row) for row in random.Random(f"few shot {seed}").sample(rows, settings.num_examples)]
    # Not str.format: a text of a data set may hold braces.
    texts = [
        settings.template.replace("{prompt}", plain_text(row["prompt"])).replace("{completion}", row["completion"]) for row in chosen
    ]
    return settings.instruction + "".join(texts)


def _rendered(config: EvaluationConfig, context: StepContext, prompts: list[Prompt]) -> tuple[list[Prompt], dict[str, list[list[int]]]]:
    """The prompts that fit every candidate, and each candidate's token ids for them: all answer the same prompts, or none does."""
    from stages.corpora.prompts import plain_text
    from stages.corpora.templates import encode_prompt
    from stages.models.loading import load_tokenizer

    encoded: dict[str, list[list[int]]] = {}
    fits = [True] * len(prompts)
    for name, candidate in config.candidates.items():
        model = context.models[f"candidates.{name}"]
        tokenizer = load_tokenizer(model)
        asked = prompts
        if candidate.few_shot is not None:
            before = few_shot_examples(candidate.few_shot, context.seed)
            head = candidate.few_shot.template.partition("{completion}")[0]
            # White space at the end is the completion's: a tokenizer joins it to the first word.
            asked = [(before + head.replace("{prompt}", plain_text(prompt))).rstrip(" ") for prompt in prompts]
        encoded[name] = [encode_prompt(tokenizer, prompt) for prompt in asked]
        longest = _positions(model) - config.generation.max_new_tokens
        fits = [fit and 0 < len(ids) <= longest for fit, ids in zip(fits, encoded[name], strict=True)]
        if not any(fits):
            raise DataError(f"candidate {name!r}: no prompt has at most {longest} tokens, what its positions leave beside the completion")
    if not all(fits):
        context.runtime.console.print(f"{context.name}: left out {fits.count(False)} of {len(prompts)} prompts too long for a candidate")
    kept = {name: [ids for ids, fit in zip(rows, fits, strict=True) if fit] for name, rows in encoded.items()}
    return [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit], kept


def _positions(model: ResolvedModel) -> int:
    from transformers import AutoConfig

    from stages.models.adapters import find_base, is_adapter

    source = find_base(model) if is_adapter(model) else model
    config = AutoConfig.from_pretrained(source.path, revision=source.input.revision, trust_remote_code=source.input.trust_remote_code)
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1_000_000)


# Answers


@contextmanager
def _loaded(config: EvaluationConfig, context: StepContext, name: str) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
    """Model and tokenizer of a candidate; one at a time is in memory."""
    from stages.models.loading import load_language_model, load_tokenizer

    source = context.models[f"candidates.{name}"]
    tokenizer = load_tokenizer(source)
    dtype = context.runtime.dtype(config.precision)
    model = load_language_model(source, dtype=dtype, trainable=False, tokenizer=tokenizer).to(context.runtime.device)
    try:
        yield model.eval(), tokenizer
    finally:
        del model
        gc.collect()


def _same_model(context: StepContext, one: str, other: str) -> bool:
    """Whether two candidates are one model, asked in different ways."""
    models = [context.models[f"candidates.{name}"] for name in (one, other)]
    settings = [model.input.model_dump(exclude={"ref"}) for model in models]
    return models[0].digest == models[1].digest and settings[0] == settings[1]


def _answer(
    config: EvaluationConfig, context: StepContext, name: str, prompt_ids: list[list[int]], twin: Answers | None = None
) -> Answers:
    """Completions of one candidate; each process answers its share. ``twin``: answers of the same model, otherwise asked."""
    from accelerate.utils import gather_object

    from stages.generation import decode_completions, ending_tokens, episode_seed, generate

    runtime = context.runtime
    with _loaded(config, context, name) as (model, tokenizer):
        stop, late = ending_tokens(model, tokenizer, config.generation)
        own = list(range(runtime.process_index, len(prompt_ids), runtime.num_processes))
        generated = generate(
            model,
            [prompt_ids[row] for row in own],
            config.generation,
            seeds=[episode_seed(context.seed, row) for row in own],
            stop_ids=stop,
            late_stop_ids=late,
            pad_token_id=tokenizer.pad_token_id,
        )
        mask = generated.response_mask
        made = list(
            zip(
                own,
                decode_completions(tokenizer, generated),
                [ids[kept].tolist() for ids, kept in zip(generated.response_ids, mask, strict=True)],
                [values[kept].tolist() for values, kept in zip(generated.logprobs, mask, strict=True)],
                generated.stopped.tolist(),
                strict=True,
            )
        )
        gathered = sorted(made if runtime.num_processes == 1 else gather_object(made))
        few_shot = config.candidates[name].few_shot
        completions = [row[1] if few_shot is None else row[1].split(few_shot.stop)[0].strip() for row in gathered]
        answers = Answers(completions, prompt_ids, [row[2] for row in gathered], [row[3] for row in gathered], [row[4] for row in gathered])
        if twin is not None:  # what is measured on plain text does not depend on how the prompts are put
            answers.perplexity, answers.bits_per_byte, answers.tasks = twin.perplexity, twin.bits_per_byte, twin.tasks
            return answers
        if config.perplexity is not None:
            answers.perplexity, answers.bits_per_byte = _perplexity(config, context, model, tokenizer)
        answers.tasks = _tasks(config, context, model, tokenizer)
    return answers


def _tasks(config: EvaluationConfig, context: StepContext, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    from stages.tasks import measure_task

    runtime = context.runtime
    shares = {"process_index": runtime.process_index, "num_processes": runtime.num_processes, "batch_size": config.generation.batch_size}
    return {name: measure_task(model, tokenizer, task.load(), task, **shares).as_json() for name, task in config.tasks.items()}


def _texts(config: EvaluationConfig) -> list[str]:
    from stages.corpora.files import read_rows, text_of

    return [text_of(row, "text") for row in read_rows(config.perplexity, split="test")] if config.perplexity is not None else []


def _perplexity(config: EvaluationConfig, context: StepContext, model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Perplexity per token, and bits per byte, which models with different tokenizers can be compared by."""
    from stages.corpora.packing import encode_documents, overlapping_windows
    from stages.models.likelihood import measure_likelihood

    texts = _texts(config)
    likelihood = measure_likelihood(
        model,
        overlapping_windows(encode_documents(tokenizer, texts), config.perplexity_block_size),
        pad_token_id=int(tokenizer.pad_token_id),
        batch_size=config.generation.batch_size,
        device=context.runtime.device,
        dtype=context.runtime.dtype(config.precision),
    )
    return likelihood.perplexity, likelihood.bits_per_byte(sum(len(text.encode()) for text in texts))


def _measure_kl(config: EvaluationConfig, context: StepContext, answers: dict[str, Answers]) -> None:
    """KL per completion: log-probability by the candidate less that by the reference, summed over the tokens the candidate sampled."""
    import torch

    from stages.models.loading import load_tokenizer
    from stages.models.responses import Policy, sequence_batch

    assert config.kl_reference is not None
    with _loaded(config, context, config.kl_reference) as (model, tokenizer):
        reference = Policy(model, temperature=config.generation.temperature or 1.0, autocast=None)
        vocabulary = tokenizer.get_vocab()
        for name, answer in answers.items():
            if config.candidates[name].few_shot is not None:
                continue  # it was asked something else
            own_vocabulary = load_tokenizer(context.models[f"candidates.{name}"]).get_vocab()
            if any(vocabulary.get(token) != index for token, index in own_vocabulary.items()):
                raise ModelError(
                    f"candidate {name!r} and kl_reference {config.kl_reference!r} have different tokenizers, and a KL is between "
                    "distributions over the same tokens; choose a reference of the same family, or null"
                )
            answer.kl = []
            for start in range(0, len(answer.response_ids), config.generation.batch_size):
                rows = slice(start, start + config.generation.batch_size)
                with torch.inference_mode():
                    batch = sequence_batch(answer.prompt_ids[rows], answer.response_ids[rows], tokenizer.pad_token_id, reference.device)
                    flat = reference.logprobs(batch).cpu()
                lengths = [len(row) for row in answer.response_ids[rows]]
                for own, other in zip(answer.logprobs[rows], flat.split(lengths), strict=True):
                    answer.kl.append(sum(own) - float(other.sum()))


def _judge(config: EvaluationConfig, context: StepContext, prompts: Sequence[Prompt], answers: dict[str, Answers]) -> None:
    """Every judge's score of every completion; one judge at a time is in memory, and each process scores its share."""
    from accelerate.utils import gather_object

    from stages.rewards.source import build_source, checked

    runtime = context.runtime
    for index, judge in enumerate(config.judges):
        model = context.models.get(f"judges[{index}].model")
        source = build_source(judge, model, device=runtime.device, dtype=runtime.dtype(config.precision))
        own = list(range(runtime.process_index, len(prompts), runtime.num_processes))
        for answer in answers.values():
            completions = [answer.completions[row] for row in own]
            scores = checked(source.score([prompts[row] for row in own], completions), judge.shown_name, completions).tolist()
            made = list(zip(own, scores, strict=True))
            gathered = sorted(made if runtime.num_processes == 1 else gather_object(made))
            answer.scores[judge.shown_name] = [score for _, score in gathered]
        del source
        gc.collect()


def _write_completions(config: EvaluationConfig, context: StepContext, prompts: Sequence[Prompt], answers: dict[str, Answers]) -> None:
    context.folder.mkdir(parents=True, exist_ok=True)
    with (context.folder / "completions.jsonl").open("w", encoding="utf-8") as file:
        for row, prompt in enumerate(prompts):
            line = {
                "prompt": prompt,
                "completions": {name: answer.completions[row] for name, answer in answers.items()},
                "scores": {
                    judge.shown_name: {name: answer.scores[judge.shown_name][row] for name, answer in answers.items()}
                    for judge in config.judges
                },
                "tokens": {name: len(answer.response_ids[row]) for name, answer in answers.items()},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
