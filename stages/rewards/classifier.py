"""A sequence classifier as a reward source: the score is the output for one of its labels. N texts, batches of B, T tokens, C labels.

Probabilities are computed as in transformers' text-classification pipeline: a softmax if the labels exclude each other, else
(several labels per text, or only one label) a sigmoid per label. A regression has no probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from stages.corpora.conversations.messages import Prompt
from stages.errors import ModelError
from stages.kernels.transfers import moved_together
from stages.models.classifiers.inputs import Row, arguments_of, padded_rows, padding_of, row_of, same_length_groups
from stages.models.loading import load_classifier, load_tokenizer
from stages.models.parts import moved_to
from stages.models.passes.budget import each_group
from stages.registry.references import ResolvedModel
from stages.rewards.batching import similar_length_batches
from stages.rewards.config import RewardInput
from stages.rewards.details import NOTHING, Details, Judgement
from stages.rewards.source import RewardSource
from stages.rewards.texts import full_text
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["softmax", "sigmoid", "regression"]


def probability_kind(config: PretrainedConfig) -> Kind:
    """The function that turns logits into probabilities, by the rule of transformers' pipeline."""
    if config.problem_type == "regression":
        return "regression"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def label_output(logits: Tensor, label: int, kind: Kind, output: Literal["logit", "probability", "logprob"]) -> Tensor:
    """The scores [B] of the class ``label``, computed from logits [B, C]."""
    if output == "logit":
        return logits[:, label]
    logprobs = functional.logsigmoid(logits) if kind == "sigmoid" else logits.log_softmax(dim=-1)
    return logprobs[:, label].exp() if output == "probability" else logprobs[:, label]


class ClassifierSource(RewardSource):
    """Scores texts by the output for one label.

    If a text is too long for the classifier, its beginning is cut: first the prompt, and then the completion.
    """

    def __init__(self, source: RewardInput, model: ResolvedModel, *, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.batch_size, self.output, self.reads = source.shown_name, source.batch_size, source.output, source.reads
        self.tokenizer = load_tokenizer(model)
        self.tokenizer.truncation_side = "left"
        self.model = moved_to(load_classifier(model, dtype=dtype, trainable=False, tokenizer=self.tokenizer), device)
        self.names = {int(number): str(name) for number, name in (self.model.config.id2label or {}).items()}
        self.label = _label_number(source.label, self.names, model.ref)
        self.kind = probability_kind(self.model.config)
        if self.kind == "regression" and self.output != "logit":
            raise ModelError(
                f"{model.ref!r} is a regression (problem_type in its config) and has no {self.output}. Set output: logit to use its raw "
                "value"
            )
        self.max_length = readable_length(self.model.config, self.tokenizer)
        self._arguments = arguments_of(self.model)
        self._padding = padding_of(self.model, self.tokenizer)

    @torch.no_grad()
    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """Scores [N], and which texts were cut."""
        pairs = list(zip(prompts, completions, strict=True))
        texts = [completion if self.reads == "completion" else full_text(prompt, completion) for prompt, completion in pairs]
        rows, cut, completion_cut = self._encode(texts, completions)
        return Judgement(self._score_rows(rows), cut=cut, completion_cut=completion_cut)

    @torch.no_grad()
    def judge_texts(self, texts: Sequence[str]) -> Judgement:
        """Scores [N] of full texts that are not split into prompt and completion, and which texts were cut."""
        rows, cut, _ = self._encode(texts, texts)
        return Judgement(self._score_rows(rows), cut=cut)

    def probabilities(self, texts: Sequence[str]) -> tuple[list[list[float]], Tensor]:
        """(probabilities of all labels for each full text, which texts [N] were cut).

        For a regression, the raw values replace the probabilities, as in transformers' pipeline.
        """
        probabilities = []
        rows, cut, _ = self._encode(texts, texts)
        with torch.no_grad():
            for row in rows:
                logits = self._logits([row])[0]
                probabilities.append(
                    {"softmax": logits.softmax(dim=-1), "sigmoid": logits.sigmoid(), "regression": logits}[self.kind].tolist()
                )
        return probabilities, cut

    def _encode(self, texts: Sequence[str], completions: Sequence[str]) -> tuple[list[Row], Tensor, Tensor]:
        """Tokenize texts; returns (rows, which texts [N] were cut, which completions [N] were cut). Special tokens are never cut."""
        rows = [self._tokenize(text) for text in texts]
        cut, completion_cut = torch.zeros(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.bool)
        for index, row in enumerate(rows):
            if self.max_length is None or len(row["input_ids"]) <= self.max_length:
                continue
            rows[index] = self._tokenize(texts[index], max_length=self.max_length)
            cut[index] = True
            room = self.max_length - self.tokenizer.num_special_tokens_to_add()
            completion_cut[index] = len(self._tokenize(completions[index], add_special_tokens=False)["input_ids"]) > room
        return rows, cut, completion_cut

    def _tokenize(self, text: str, *, max_length: int | None = None, add_special_tokens: bool = True) -> Row:
        # verbose=False: no warning about long texts, which this class cuts itself
        encoded = self.tokenizer(
            text, verbose=False, add_special_tokens=add_special_tokens, truncation=max_length is not None, max_length=max_length
        )
        row = row_of(encoded, self._arguments)
        return row if row["input_ids"] else {name: [self.tokenizer.pad_token_id if name == "input_ids" else 0] for name in row}

    def _score_rows(self, rows: Sequence[Row]) -> Tensor:
        scores = torch.empty(len(rows))

        def score(indices: Sequence[int]) -> None:
            logits = self._logits([rows[index] for index in indices])
            scores[list(indices)] = label_output(logits, self.label, self.kind, self.output).cpu()

        lengths = [len(row["input_ids"]) for row in rows]
        batches = (
            same_length_groups(lengths, self.batch_size) if self._padding == "none" else similar_length_batches(lengths, self.batch_size)
        )
        each_group(f"scoring by {self.name}", batches, score, model=self.model)
        return scores

    def _logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits [B, C] fp32 of rows, padded on the side that the model allows.

        A decoder model takes the last token that is not the config's pad token as the end of a text. If a text ends with the pad token,
        this method pads with a token that occurs in none of the rows.
        """
        pad = own = self.model.config.pad_token_id
        if any(row["input_ids"][-1] == own for row in rows):
            used = {number for row in rows for number in row["input_ids"]}
            pad = next((number for number in range(self.model.config.get_text_config().vocab_size) if number not in used), own)
        batch = padded_rows(rows, pad, self._padding)
        self.model.config.pad_token_id = pad
        try:
            moved = moved_together(list(batch.values()), self.model.device)
            # A decoder would otherwise keep keys and values, which nothing reads.
            options = {"use_cache": False} if "use_cache" in signature(self.model.forward).parameters else {}
            output: Tensor = self.model(**dict(zip(batch, moved, strict=True)), **options).logits
        finally:
            self.model.config.pad_token_id = own
        return output.float()


def _label_number(label: str | int | None, known: dict[int, str], ref: str) -> int:
    """The index of the class ``label``: an index, or a name. If no name is equal, names are compared without regard to case.

    Raises ModelError if the model has no such class, if several classes have the name, and for a number that is the index of one class
    and the name of another.
    """
    shown = ", ".join(f"{number} ({name})" for number, name in known.items())
    if isinstance(label, int):
        if any(number != label and name == str(label) for number, name in known.items()):
            raise ModelError(
                f"{ref!r}: label: {label} is the index of one class and the name of another ({shown}). Write the name in quotes: "
                f"label: '{label}'"
            )
        if label in known:
            return label
    elif label is not None:
        for same in (str.__eq__, lambda name, label: name.casefold() == label.casefold()):
            numbers = [number for number, name in known.items() if same(name, label)]
            if len(numbers) > 1:
                raise ModelError(f"{ref!r} has several classes with the name {label!r} ({shown}); set label to the index of one")
            if numbers:
                return numbers[0]
    raise ModelError(f"{ref!r} has no label {label!r}; expected one of {shown}")
