"""What a sequence classifier gives one of its labels. N texts, B of them in a batch, T tokens, C labels.

The probability is that of transformers' text-classification pipeline: a softmax over labels that exclude each other, a sigmoid for each
label of several that may hold together, or for a single one. A regression has no probability.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from stages.corpora.messages import Prompt
from stages.errors import ModelError
from stages.models.budget import each_group
from stages.models.loading import load_classifier, load_tokenizer
from stages.registry.references import ResolvedModel
from stages.rewards.config import RewardInput
from stages.rewards.details import NOTHING, Details, Judgement
from stages.rewards.texts import whole_text
from stages.tokens.positions import readable_length

Kind = Literal["softmax", "sigmoid", "regression"]
Row = dict[str, list[int]]
"""What the model reads of one text: input_ids, and token_type_ids where the tokenizer makes them."""


def probability_kind(config: Any) -> Kind:
    """How logits become probabilities, by the rule of transformers' pipeline."""
    if config.problem_type == "regression":
        return "regression"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def label_output(logits: Tensor, label: int, kind: Kind, output: Literal["logit", "probability", "logprob"]) -> Tensor:
    """The score [B] of ``label`` from logits [B, C]."""
    if output == "logit":
        return logits[:, label]
    logprobs = functional.logsigmoid(logits) if kind == "sigmoid" else logits.log_softmax(dim=-1)
    return logprobs[:, label].exp() if output == "probability" else logprobs[:, label]


class ClassifierSource:
    """The score of one label. A text that the classifier cannot read whole loses its beginning: the prompt's, as long as there is one."""

    def __init__(self, source: RewardInput, model: ResolvedModel, *, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.batch_size, self.output, self.reads = source.shown_name, source.batch_size, source.output, source.reads
        self.tokenizer = load_tokenizer(model)
        self.tokenizer.truncation_side = "left"
        self.model = load_classifier(model, dtype=dtype, trainable=False, tokenizer=self.tokenizer).to(device)
        self.label = _label_number(source.label, self.model.config.id2label, model.ref)
        self.kind = probability_kind(self.model.config)
        if self.kind == "regression" and self.output != "logit":
            raise ModelError(
                f"{model.ref!r} is a regression (problem_type in its config), which has no {self.output}; set output: logit to use its "
                "value as it is"
            )
        self.max_length = readable_length(self.model.config, self.tokenizer)
        self._accepted = set(inspect.signature(self.model.forward).parameters)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Tensor:
        """The scores [N] of ``judge``."""
        return self.judge(prompts, completions, details).scores

    @torch.inference_mode()
    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """Scores, and which texts were cut."""
        pairs = list(zip(prompts, completions, strict=True))
        texts = [completion if self.reads == "completion" else whole_text(prompt, completion) for prompt, completion in pairs]
        rows, cut, completion_cut = self._encode(texts, completions)
        return Judgement(self._score_rows(rows), cut=cut, completion_cut=completion_cut)

    def score_texts(self, texts: Sequence[str]) -> Tensor:
        """Scores [N] of whole texts, without a prompt apart."""
        with torch.inference_mode():
            return self._score_rows(self._encode(texts, texts)[0])

    def probabilities(self, texts: Sequence[str]) -> list[list[float]]:
        """The probabilities of all labels for each whole text; a regression's are its values, as the pipeline has them."""
        found = []
        with torch.inference_mode():
            for row in self._encode(texts, texts)[0]:
                logits = self._logits([row])[0]
                found.append({"softmax": logits.softmax(dim=-1), "sigmoid": logits.sigmoid(), "regression": logits}[self.kind].tolist())
        return found

    def _encode(self, texts: Sequence[str], completions: Sequence[str]) -> tuple[list[Row], Tensor, Tensor]:
        """(rows, which texts [N] were cut, which completions [N] were). Special tokens stay where they are when a text is cut."""
        rows = [self._tokenize(text) for text in texts]
        cut, completion_cut = torch.zeros(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.bool)
        for place, row in enumerate(rows):
            if self.max_length is None or len(row["input_ids"]) <= self.max_length:
                continue
            rows[place] = self._tokenize(texts[place], truncation=True, max_length=self.max_length)
            cut[place] = True
            room = self.max_length - self.tokenizer.num_special_tokens_to_add()
            completion_cut[place] = len(self._tokenize(completions[place], add_special_tokens=False)["input_ids"]) > room
        return rows, cut, completion_cut

    def _tokenize(self, text: str, **options: Any) -> Row:
        encoded = self.tokenizer(text, verbose=False, **options)  # verbose: a warning about the length, which is dealt with here
        row = {name: list(values) for name, values in encoded.items() if name != "attention_mask" and name in self._accepted}
        return row if row["input_ids"] else {name: [self.tokenizer.pad_token_id if name == "input_ids" else 0] for name in row}

    def _score_rows(self, rows: Sequence[Row]) -> Tensor:
        from stages.rewards.batching import like_length_batches

        scores = torch.empty(len(rows))

        def score(places: Sequence[int]) -> None:
            logits = self._logits([rows[place] for place in places])
            scores[list(places)] = label_output(logits, self.label, self.kind, self.output).cpu()

        each_group(f"scoring by {self.name}", like_length_batches([len(row["input_ids"]) for row in rows], self.batch_size), score)
        return scores

    def _logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits [B, C] fp32 of rows, padded on the right.

        A decoder finds the end of a text as the last token that is not the config's pad token; where a text ends with that token, a token
        that is in none of the rows pads instead.
        """
        pad = own = self.model.config.pad_token_id
        if any(row["input_ids"][-1] == own for row in rows):
            used = {number for row in rows for number in row["input_ids"]}
            pad = next((number for number in range(self.model.config.get_text_config().vocab_size) if number not in used), own)
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor([row[name] + [pad if name == "input_ids" else 0] * (width - len(row[name])) for row in rows])
            for name in rows[0]
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        self.model.config.pad_token_id = pad
        try:
            output: Tensor = self.model(**{name: value.to(self.model.device) for name, value in batch.items()}).logits
        finally:
            self.model.config.pad_token_id = own
        return output.float()


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
