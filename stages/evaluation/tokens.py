"""Per-token measurements of answers: KL to the reference, and value predictions."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from stages.errors import ModelError
from stages.evaluation.answers import Answers, Asked, Sample, with_candidate
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.prompts import Exclusion
from stages.json_types import JsonObject
from stages.models.heads import ValueModel
from stages.models.loaded import LoadedModel
from stages.models.loading import load_tokenizer
from stages.models.passes.budget import each_group
from stages.models.passes.responses import Policy, sequence_batch, sequence_values
from stages.registry.references import ResolvedModel
from stages.tokens.continuation import continuation_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from stages.step import StepContext


def measure_kl(config: EvaluationConfig, context: StepContext, answers: dict[str, Answers]) -> list[Exclusion]:
    """KL of every model to the reference, per token and per completion: log-probability under the candidate minus under the reference.

    Summed over the candidate's sampled tokens. Both log-probabilities come from equal passes over equal batches, so the KL of a model to
    itself is exactly 0 in any precision; log-probabilities from sampling come from single-token passes. A model with different prompts
    (few-shot) or a different vocabulary has no KL.
    """
    assert config.kl_reference is not None
    left_out, measured, own = [], {}, {}
    vocabulary = load_tokenizer(context.models[f"candidates.{config.kl_reference}"]).get_vocab()
    for name, answer in answers.items():
        candidate = config.candidates[name]
        if candidate.model is None or candidate.few_shot is not None:
            continue
        own_vocabulary = load_tokenizer(context.models[f"candidates.{name}"]).get_vocab()
        if any(vocabulary.get(token) != index for token, index in own_vocabulary.items()):
            what = f"completions of {name} without a KL: its tokenizer is not that of {config.kl_reference}"
            left_out.append(Exclusion(what, len(answer.samples), len(answer.samples)))
            continue
        measured[name] = [sample for sample in answer.samples if sample is not None]
        if name != config.kl_reference:
            own[name] = with_candidate(config, context, name, partial(_logprobs, config, samples=measured[name]))

    def by_reference(model: LoadedModel) -> dict[str, list[Tensor]]:
        return {name: _logprobs(config, model, samples) for name, samples in measured.items()}

    for name, reference in with_candidate(config, context, config.kl_reference, by_reference).items():
        pairs = zip(own.get(name, reference), reference, strict=True)
        answers[name].token_kl = token_kl = [torch.sub(candidates, references).tolist() for candidates, references in pairs]
        if config.candidates[name].best_of is None:
            answers[name].kl = [sum(row) for row in token_kl]
    return left_out


def _logprobs(config: EvaluationConfig, loaded: LoadedModel, samples: Sequence[Sample]) -> list[Tensor]:
    """Log-probabilities of each sample's tokens under a model, at the sampling temperature."""
    pad_token_id = int(loaded.tokenizer.pad_token_id)
    policy = Policy(loaded.model, temperature=config.generation.temperature or 1.0, autocast=None)
    logprobs: list[Tensor] = []

    def measure(indices: Sequence[int]) -> None:
        rows = [samples[index] for index in indices]
        batch = sequence_batch([row.prompt_ids for row in rows], [row.response_ids for row in rows], pad_token_id, policy.device)
        logprobs.extend(policy.logprobs(batch).cpu().split([len(row.response_ids) for row in rows]))

    size, order = config.generation.batch_size, range(len(samples))
    with torch.inference_mode():
        groups = [order[start : start + size] for start in range(0, len(samples), size)]
        each_group("log-probabilities of completions", groups, measure, known_by=loaded.model)
    return logprobs


def token_details(config: EvaluationConfig, context: StepContext, asked: Asked, answers: dict[str, Answers]) -> list[JsonObject]:
    """Tokens of the first prompts with their KL and value, one row per question and candidate, for colouring in the report."""
    settings = config.token_details
    if settings is None:
        return []

    rows = [row for row, question in enumerate(asked.questions) if question.prompt_number < settings.num_prompts and question.sample == 0]
    network = _load_value_network(config, context) if settings.value is not None else None
    details = []
    for name, answer in answers.items():
        if config.candidates[name].model is None:
            continue
        tokenizer = load_tokenizer(context.models[f"candidates.{name}"])
        values = None
        if network is not None and network.vocabulary == tokenizer.get_vocab():
            values = _values(network.model, config, tokenizer.pad_token_id, [answer.samples[row] for row in rows])
        for index, row in enumerate(rows):
            sample = answer.samples[row]
            if sample is None or (answer.token_kl is None and values is None):
                continue
            detail: JsonObject = {"row": row, "candidate": name, "tokens": _pieces(tokenizer, sample.prompt_ids, sample.response_ids)}
            if answer.token_kl is not None:
                detail["kl"] = [round(value, 4) for value in answer.token_kl[row]]
            if values is not None:
                detail["value"] = [round(value, 4) for value in values[index]]
            details.append(detail)
    del network
    gc.collect()
    return details


def _pieces(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text that each token adds; empty for special tokens. A character that takes several tokens belongs to the last of them."""
    texts = [continuation_text(tokenizer, prompt_ids, ids[: end + 1]) for end in range(len(ids))]
    texts[:-1] = [text.rstrip("\ufffd") for text in texts[:-1]]  # which stands for the beginning of a character
    pieces, before = [], ""
    for text in texts:
        pieces.append(text[len(before) :] if text.startswith(before) else "")
        before = text if text.startswith(before) else before
    return pieces


def value_network(context: StepContext) -> ResolvedModel:
    """The value network of token_details.value: the model itself, or the one that a ppo step published with its policy.

    Raises ModelError if the step published none.
    """
    source = context.models["token_details.value"]
    record = source.record
    if record is None or record.role != "language_model":
        return source
    parts = record.manifest["fingerprint_parts"]
    twins = [other for other in context.registry.versions(f"{record.name}-value") if other.manifest["fingerprint_parts"] == parts]
    if not twins:
        raise ModelError(f"token_details.value: {record.ref} published no value network; set publish_value: true in its ppo step")
    return ResolvedModel.of_record(twins[-1])


@dataclass(frozen=True)
class _ValueNetwork:
    model: ValueModel
    vocabulary: dict[str, int]


def _load_value_network(config: EvaluationConfig, context: StepContext) -> _ValueNetwork:
    source = value_network(context)
    model = ValueModel.from_pretrained(source, dtype=context.runtime.dtype(config.precision)).to(context.runtime.device)
    return _ValueNetwork(model, load_tokenizer(source).get_vocab())


def _values(model: ValueModel, config: EvaluationConfig, pad_token_id: int, samples: Sequence[Sample | None]) -> list[list[float]]:
    """The prediction of ``model`` before each response token of each sample; an empty list where the sample is None."""
    device = next(model.parameters()).device
    values: list[list[float]] = [[] for _ in samples]
    known = [(row, sample) for row, sample in enumerate(samples) if sample is not None]

    def measure(indices: Sequence[int]) -> None:
        chosen = [known[index] for index in indices]
        prompts, responses = [sample.prompt_ids for _, sample in chosen], [sample.response_ids for _, sample in chosen]
        batch = sequence_batch(prompts, responses, pad_token_id, device)
        parts = sequence_values(model, batch, nullcontext()).float().cpu().split([len(response) for response in responses])
        for (row, _), part in zip(chosen, parts, strict=True):
            values[row] = part.tolist()

    size = config.generation.batch_size
    with torch.inference_mode():
        groups = [range(start, min(start + size, len(known))) for start in range(0, len(known), size)]
        each_group("values of completions", groups, measure, known_by=model)
    return values
