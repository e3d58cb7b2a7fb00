"""Learned reward sources: a reward model, or one label of a classifier. Each has its own tokenizer; text crosses, not token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.corpora.messages import Prompt
from stages.corpora.prompts import plain_text
from stages.corpora.templates import completion_places, encode_pair
from stages.errors import ModelError
from stages.models.heads import RewardModel
from stages.models.loading import load_classifier, load_tokenizer
from stages.process.runtime import ResolvedModel
from stages.rewards.config import RewardInput
from stages.rewards.source import RewardSource
from stages.sampling.generation import right_pad

RewardModelLoader = Callable[[ResolvedModel], RewardModel]


def load_source(
    source: RewardInput, model: ResolvedModel, *, device: torch.device, dtype: torch.dtype, load: RewardModelLoader | None = None
) -> RewardSource:
    """A reward model (from ``load``, where it is not to have weights of its own), or a classifier where ``label`` is set."""
    role = model.record.role if model.record is not None else None
    if source.label is not None:
        return ClassifierSource(source, model, device=device, dtype=dtype)
    if role == "classifier":
        raise ModelError(f"{model.ref!r} is a classifier; set label to the class whose score is the reward")
    if role in ("language_model", "value_model"):
        raise ModelError(f"{model.ref!r} is a {role.replace('_', ' ')}; a reward needs a reward_model, or a classifier with a label")
    kind = RewardModelSpans if source.level == "token" else RewardModelSource
    if load is not None:
        return kind(source, load(model))
    return kind(source, RewardModel.from_pretrained(model, dtype=dtype).to(device).requires_grad_(False))


class RewardModelSource:
    """The scalar of a reward model at the end of prompt and completion, closed by the end token, its bias included."""

    def __init__(self, source: RewardInput, model: RewardModel) -> None:
        self.name, self.batch_size, self.model = source.shown_name, source.batch_size, model
        assert model.tokenizer is not None
        self.tokenizer: Any = model.tokenizer
        self.max_length = _max_positions(self.model.config)

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Scores [N]. What is longer than the model's context loses its beginning: the end is what was written last."""
        rows = [encode_pair(self.tokenizer, *pair, sampled=True)[0][-self.max_length :] for pair in zip(prompts, completions, strict=True)]
        return score_rows(rows, self.model, self.tokenizer.pad_token_id, self.batch_size)


class RewardModelSpans(RewardModelSource):
    """What each token of a completion adds to the reward model's score: the scores of all its beginnings, one after another.

    The sum is the score of the whole text, so that (without discount) the best policy stays the same; only the credit is spread (potential-
    based shaping, Ng et al. 1999). A reward model was trained on whole texts, and what it thinks of a beginning is a guess.
    """

    @torch.inference_mode()
    def score_spans(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[tuple[int, float]]]:
        """(character position, what the token that begins there adds) of each completion; the first token has the prompt's share."""
        spans: list[list[tuple[int, float]]] = []
        device = next(self.model.parameters()).device
        for start in range(0, len(completions), self.batch_size):
            part = slice(start, start + self.batch_size)
            pairs = [encode_pair(self.tokenizer, *pair, sampled=True) for pair in zip(prompts[part], completions[part], strict=True)]
            rows = [ids[-self.max_length :] for ids, _ in pairs]
            scores = self.model.score_tokens(*_padded(rows, self.tokenizer.pad_token_id, device)).cpu()
            for row, (whole, prompt_length) in enumerate(pairs):
                text, length = completions[start + row], len(rows[row])
                kept = min(len(whole) - prompt_length, length)  # tokens of the completion that the model's context holds
                own = scores[row, length - kept : length]
                added = torch.cat([own[:1], own.diff()]).tolist()
                places = self._places(prompts[start + row], text)[-kept:]
                spans.append(list(zip(places, added, strict=True)))
        return spans

    def _places(self, prompt: Prompt, completion: str) -> list[int]:
        """Where each token of the completion begins in it; the end token stands at its end."""
        return completion_places(self.tokenizer, prompt, completion)


class ClassifierSource:
    """What a sequence classifier gives one of its labels."""

    def __init__(self, source: RewardInput, model: ResolvedModel, *, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.batch_size, self.output, self.reads = source.shown_name, source.batch_size, source.output, source.reads
        self.tokenizer = load_tokenizer(model)
        self.model = load_classifier(model, dtype=dtype, trainable=False, tokenizer=self.tokenizer).to(device)
        self.label = _label_number(source.label, self.model.config.id2label, model.ref)
        self.max_length = min(_max_positions(self.model.config), self.tokenizer.model_max_length)

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Scores [N]. Texts are cut at the classifier's context."""
        texts = list(completions)
        if self.reads == "prompt_and_completion":
            texts = [f"{plain_text(prompt)} {completion}" for prompt, completion in zip(prompts, completions, strict=True)]
        rows = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        rows = [row or [self.tokenizer.pad_token_id] for row in rows]
        return score_rows(rows, self._of_label, self.tokenizer.pad_token_id, self.batch_size, device=self.model.device)

    def _of_label(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        if self.output == "logit":
            return logits[:, self.label]
        logprobs = logits.log_softmax(dim=-1)[:, self.label]
        return logprobs.exp() if self.output == "probability" else logprobs


def score_rows(
    rows: Sequence[list[int]],
    scorer: Callable[[Tensor, Tensor], Tensor],
    pad_token_id: int,
    batch_size: int,
    device: torch.device | None = None,
) -> Tensor:
    """Apply ``scorer(input_ids, attention_mask) -> [B]`` to token rows in batches of like length; returns [N] on the CPU."""
    if device is None:
        assert isinstance(scorer, torch.nn.Module)
        device = next(scorer.parameters()).device
    scores = torch.empty(len(rows))
    for places in like_length_batches([len(row) for row in rows], batch_size):
        scores[places] = scorer(*_padded([rows[place] for place in places], pad_token_id, device)).float().cpu()
    return scores


def _padded(rows: Sequence[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows as right-padded ids and attention mask, both [B, T]."""
    ids = right_pad([torch.tensor(row) for row in rows], pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)


def like_length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The rows in batches of at most ``batch_size``, from short to long; one of a quarter of that ends where rows get a fifth longer."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        last = batches[-1] if batches else []
        longer = last and len(last) >= batch_size / 4 and lengths[row] > 1.2 * lengths[last[0]]
        if not last or len(last) == batch_size or longer:
            batches.append([])
        batches[-1].append(row)
    return batches


def _label_number(label: str | int | None, names: dict[int, str], ref: str) -> int:
    """The class that ``label`` names; names are compared without regard to case."""
    known = {int(number): str(name) for number, name in names.items()}
    if isinstance(label, int) and label in known:
        return label
    for number, name in known.items():
        if isinstance(label, str) and name.lower() == label.lower():
            return number
    shown = ", ".join(f"{number} ({name})" for number, name in known.items())
    raise ModelError(f"{ref!r} has no label {label!r}; expected one of {shown}")


def _max_positions(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1_000_000)
