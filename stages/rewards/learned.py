"""Reward models as reward sources, and the choice of the learned source that a recipe names.

Each source has its own tokenizer. Sources receive texts, not token ids. N completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.corpora.conversations.messages import Prompt
from stages.corpora.templates import encode_pair, token_starts
from stages.errors import ModelError
from stages.models.heads import RewardModel
from stages.models.passes.budget import each_group
from stages.models.reward_question import is_generative
from stages.registry.references import ResolvedModel
from stages.rewards.batching import padded, similar_length_batches
from stages.rewards.classifier import ClassifierSource
from stages.rewards.config import RewardInput
from stages.rewards.details import NOTHING, Details, Judgement, Spans
from stages.rewards.generative import load_generative
from stages.rewards.source import RewardSource
from stages.tokens.continuation import beginning_ids
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardModelLoader = Callable[[ResolvedModel], RewardModel]


def load_source(
    source: RewardInput, model: ResolvedModel, *, device: torch.device, dtype: torch.dtype, load: RewardModelLoader | None = None
) -> RewardSource:
    """Load the reward source for a recipe's ``model``: a reward model, a generative reward model, or a classifier (if ``label`` is set).

    ``load``: a function that loads reward models, for example to share weights; None: the reward model is loaded with its own weights.

    Raises ModelError if the model cannot be used as a reward source with these settings.
    """
    role = model.record.role if model.record is not None else None
    if source.answers is not None or is_generative(model):
        if role not in (None, "language_model", "generative_reward_model"):
            raise ModelError(f"{model.ref!r} is a {role.replace('_', ' ')}; answers needs a language model")
        if source.label is not None or source.level == "token":
            given = "label" if source.label is not None else "level: token"
            raise ModelError(f"{model.ref!r} is a generative reward model, which only scores complete completions. Remove {given}")
        return load_generative(source, model, device=device, dtype=dtype)
    if source.label is not None:
        return ClassifierSource(source, model, device=device, dtype=dtype)
    if role == "classifier":
        raise ModelError(f"{model.ref!r} is a classifier; set label to the class whose score is the reward")
    if role in ("language_model", "value_model"):
        raise ModelError(
            f"{model.ref!r} is a {role.replace('_', ' ')}; a reward needs a reward model, a classifier with a label, or a "
            "language model with answers"
        )
    kind = RewardModelSpans if source.level == "token" else RewardModelSource
    if load is not None:
        return kind(source, load(model))
    return kind(source, RewardModel.from_pretrained(model, dtype=dtype).to(device).requires_grad_(False))


class RewardModelSource(RewardSource):
    """The scalar that a reward model predicts at the end token after prompt and completion, including its bias."""

    def __init__(self, source: RewardInput, model: RewardModel) -> None:
        self.name, self.batch_size, self.model = source.shown_name, source.batch_size, model
        assert model.tokenizer is not None
        self.tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self.max_length = readable_length(self.model.config, self.tokenizer)

    @torch.no_grad()
    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """Scores [N], and which rows were cut. If a row is too long for the model, its beginning is cut."""
        pairs = self._encode(prompts, completions)
        rows = [self._kept(ids) for ids, _ in pairs]
        cut, completion_cut = self._cuts(pairs)
        scores = score_rows(rows, self.model, self.tokenizer.pad_token_id, self.batch_size, name=self.name)
        return Judgement(scores, cut=cut, completion_cut=completion_cut)

    @torch.no_grad()
    def judge_texts(self, texts: Sequence[str]) -> Judgement:
        """Scores [N] of full texts, and which of them were cut. No chat template is applied.

        A text gets the tokens that begin every text, such as ``<s>``, and the end token, unless it has them already.
        """
        begin, end = beginning_ids(self.tokenizer), self.tokenizer.eos_token_id
        rows = [list(self.tokenizer(text, verbose=False)["input_ids"]) for text in texts]
        rows = [ids[len(begin) :] if begin and ids[: 2 * len(begin)] == begin * 2 else ids for ids in rows]
        rows = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in rows]
        kept = [self._kept(ids) for ids in rows]
        cut = torch.tensor([len(ids) > len(short) for ids, short in zip(rows, kept, strict=True)], dtype=torch.bool)
        return Judgement(score_rows(kept, self.model, self.tokenizer.pad_token_id, self.batch_size, name=self.name), cut=cut)

    def _encode(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[tuple[list[int], int]]:
        """(token ids of prompt and completion, prompt length in tokens) of every pair, not yet cut."""
        return [encode_pair(self.tokenizer, *pair, sampled=True) for pair in zip(prompts, completions, strict=True)]

    def _kept(self, ids: list[int]) -> list[int]:
        return ids if self.max_length is None else ids[-self.max_length :]

    def _cuts(self, pairs: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Which rows [N] are cut, and in which of them a part of the completion is cut."""
        most = self.max_length if self.max_length is not None else float("inf")
        cut = torch.tensor([len(ids) > most for ids, _ in pairs], dtype=torch.bool)
        return cut, torch.tensor([len(ids) - prompt_length > most for ids, prompt_length in pairs], dtype=torch.bool)


class RewardModelSpans(RewardModelSource):
    """Scores each token of a completion by its change of the reward model's score: score up to this token - score up to the one before.

    The token scores sum to the score of the full text. So, without discounting, the optimal policy stays the same; only the credit is
    distributed over the tokens (potential-based shaping, Ng et al. 1999). A reward model is trained on full texts, so its scores of
    prefixes are less reliable.
    """

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """The sum of the spans of each completion, the spans, and which rows were cut."""
        pairs = self._encode(prompts, completions)
        spans = self._spans(prompts, completions, pairs)
        cut, completion_cut = self._cuts(pairs)
        totals = torch.tensor([sum(score for _, score in row) for row in spans])
        return Judgement(totals, spans, cut=cut, completion_cut=completion_cut)

    @torch.no_grad()
    def _spans(self, prompts: Sequence[Prompt], completions: Sequence[str], encoded: Sequence[tuple[list[int], int]]) -> Spans:
        """For each completion a list of (character position of a token's first character, score of the token).

        The score of the first token includes the score of the prompt.
        """
        spans: Spans = [[] for _ in completions]
        device = next(self.model.parameters()).device
        rows = [self._kept(ids) for ids, _ in encoded]

        def score(indices: Sequence[int]) -> None:
            scores = self.model.score_tokens(*padded([rows[index] for index in indices], self.tokenizer.pad_token_id, device)).cpu()
            for row, index in enumerate(indices):
                (tokens, prompt_length), length = encoded[index], len(rows[index])
                kept = min(len(tokens) - prompt_length, length)  # completion tokens that fit into the model's context
                own = scores[row, length - kept : length]
                added = torch.cat([own[:1], own.diff()]).tolist()
                positions = self._token_positions(prompts[index], completions[index])[-kept:]
                spans[index] = [(position, float(value)) for position, value in zip(positions, added, strict=True)]

        order = range(len(completions))
        each_group(
            f"scoring by {self.name}",
            [order[start : start + self.batch_size] for start in order[:: self.batch_size]],
            score,
            model=self.model,
        )
        return spans

    def _token_positions(self, prompt: Prompt, completion: str) -> list[int]:
        """The character position of each completion token in the completion. The end token is at the end of the text."""
        return token_starts(self.tokenizer, prompt, completion)


def score_rows(
    rows: Sequence[list[int]],
    scorer: Callable[[Tensor, Tensor], Tensor],
    pad_token_id: int,
    batch_size: int,
    device: torch.device | None = None,
    *,
    name: str = "",
    known_by: torch.nn.Module | None = None,
) -> Tensor:
    """Apply ``scorer(input_ids, attention_mask) -> [B]`` to N token rows in batches of similar length; returns [N] fp32 on the CPU.

    ``name``: of the reward, for messages. ``known_by``: as in ``each_group``; ``scorer`` itself if it is a module.
    """
    if device is None:
        assert isinstance(scorer, torch.nn.Module)
        device = next(scorer.parameters()).device
    scores, model = torch.empty(len(rows)), scorer if isinstance(scorer, torch.nn.Module) else None

    def score(indices: Sequence[int]) -> None:
        scores[list(indices)] = scorer(*padded([rows[index] for index in indices], pad_token_id, device)).float().cpu()

    what = f"scoring by {name}" if name else "scoring"
    each_group(what, similar_length_batches([len(row) for row in rows], batch_size), score, model=model, known_by=known_by)
    return scores
