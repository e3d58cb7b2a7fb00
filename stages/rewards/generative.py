"""Generative reward models: a language model answers a question about a completion. N completions.

The score is the log-odds of two possible answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.corpora.conversations.messages import Prompt, as_turns, transcript
from stages.corpora.templates import after_a_question, encode_prompt, render_prompt
from stages.errors import ModelError, TrainingError
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.parts import moved_to
from stages.models.passes.budget import each_group
from stages.models.passes.responses import sequence_batch
from stages.models.reward_question import RewardQuestion, read_question
from stages.registry.references import ResolvedModel
from stages.rewards.batching import similar_length_batches
from stages.rewards.config import RewardInput
from stages.rewards.details import NOTHING, Details, Judgement
from stages.rewards.source import RewardSource
from stages.tokens.continuation import continued, plain_ids
from stages.tokens.plain import is_plain
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel


def load_generative(source: RewardInput, model: ResolvedModel, *, device: torch.device, dtype: torch.dtype) -> GenerativeSource:
    """Load a generative reward source.

    The question and the answers come from ``source``, or from the files of a saved generative reward model. Raises ModelError if both
    define them and they differ, or if the tokenizer cannot distinguish the two answers.
    """
    own = read_question(model)
    asked = RewardQuestion(source.question, (source.answers[0], source.answers[1])) if source.answers is not None else own
    assert asked is not None
    if own is not None and asked != own:
        raise ModelError(
            f"{model.ref!r} is a generative reward model, which already has a question and the answers {own.answers[0]!r} and "
            f"{own.answers[1]!r}. Remove answers and question, or name the language model that it was made from"
        )
    tokenizer = load_tokenizer(model)
    made = moved_to(load_language_model(model, dtype=dtype, trainable=False, tokenizer=tokenizer), device).eval()
    longest = readable_length(made.config, tokenizer)
    return GenerativeSource(source.shown_name, made, tokenizer, asked, batch_size=source.batch_size, max_length=longest, ref=model.ref)


class GenerativeSource(RewardSource):
    """Scores completions by the log-odds of two answers to a question about prompt and completion: log P(first) - log P(second).

    The question is formatted by the model's chat template if there is one. If the text is too long, the beginning of the prompt is cut
    first, and then the beginning of the completion.
    """

    def __init__(
        self,
        name: str,
        model: TransformersModel,
        tokenizer: PreTrainedTokenizerBase,
        asked: RewardQuestion,
        *,
        batch_size: int,
        max_length: int | None,
        ref: str,
    ) -> None:
        self.name, self.model, self.tokenizer, self.asked = name, model, tokenizer, asked
        self.batch_size, self.max_length = batch_size, max_length
        self._answers: dict[str, list[int]] = {}
        self.check_answers(ref)

    def check_answers(self, ref: str) -> None:
        """Raise ModelError if the two answers have the same tokens, or one of them has none."""
        first, second = (self.answer_ids(answer) for answer in self.asked.answers)
        if first == second or not first or not second:
            raise ModelError(
                f"{ref!r} cannot distinguish the answers {self.asked.answers[0]!r} and {self.asked.answers[1]!r}: their tokens are equal"
            )

    @torch.no_grad()
    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """Log-odds [N], and which texts were cut. Raises TrainingError if the question alone is too long for the model."""
        answers = [self.answer_ids(answer) for answer in self.asked.answers]
        rows: list[tuple[list[int], int]] = []  # (tokens of question and answer, count of answer tokens)
        cut, completion_cut = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids, lost, lost_completion = self.encode(prompt, completion)
            rows += [([*ids, *answer], len(answer)) for answer in answers]
            cut.append(lost)
            completion_cut.append(lost_completion)
        logprobs = self._logprobs(rows).reshape(-1, 2)
        return Judgement(logprobs[:, 0] - logprobs[:, 1], cut=torch.tensor(cut), completion_cut=torch.tensor(completion_cut))

    def encode(self, prompt: Prompt, completion: str) -> tuple[list[int], bool, bool]:
        """Encode the question; returns (token ids, whether the text was cut, whether the completion was cut).

        The beginning of the prompt is cut, and then that of the completion, until question and answer fit. The question itself is never
        cut. Raises TrainingError if the question alone is too long.
        """
        before, text = transcript(prompt), completion
        room = None if self.max_length is None else self.max_length - max(len(self.answer_ids(answer)) for answer in self.asked.answers)
        ids = self._ids(before, text)
        cut = completion_cut = False
        while room is not None and (excess := len(ids) - room) > 0:
            if not before and not text:
                raise TrainingError(
                    f"reward {self.name!r}: its question without the texts is longer than the model's limit of {self.max_length} tokens"
                )
            cut, completion_cut = True, completion_cut or not before
            if before:
                before = self._shortened(before, excess)
            else:
                text = self._shortened(text, excess)
            ids = self._ids(before, text)
        return ids, cut, completion_cut

    def _shortened(self, text: str, excess: int) -> str:
        """``text`` without its first ``excess`` tokens (approximately), and without at least one character."""
        if not self.tokenizer.is_fast:  # it gives no offsets
            return text[max(1, len(text) * excess // max(1, len(plain_ids(self.tokenizer, text)))) :]
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        start = max(1, offsets[excess][0]) if excess < len(offsets) else len(text)
        return text[start:]

    def _ids(self, prompt: str, completion: str) -> list[int]:
        return list(encode_prompt(self.tokenizer, self.asked.filled(prompt, completion)))

    def answer_ids(self, answer: str) -> list[int]:
        """The token ids of an answer as a continuation of the question, after the space that a chat template writes before every reply."""
        if answer not in self._answers:
            shown = render_prompt(self.tokenizer, self.asked.filled("a", "a"))
            written = "" if is_plain(self.tokenizer) else after_a_question(self.tokenizer, as_turns(answer), {})
            text = f" {answer}" if written[:1] == " " != answer[:1] else answer
            self._answers[answer] = continued(self.tokenizer, shown, plain_ids(self.tokenizer, shown), text)
        return self._answers[answer]

    def _logprobs(self, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        """The log-probability of the answer in each row [rows]."""
        logprobs, device = torch.empty(len(rows)), next(self.model.parameters()).device

        def score(indices: Sequence[int]) -> None:
            texts = [(ids[: len(ids) - length], ids[len(ids) - length :]) for ids, length in (rows[index] for index in indices)]
            questions, answers = [question for question, _ in texts], [answer for _, answer in texts]
            batch = sequence_batch(questions, answers, self.tokenizer.pad_token_id, device)
            mask = (torch.arange(batch.input_ids.shape[1], device=device) < batch.lengths[:, None]).long()
            logits = self.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits[batch.rows, batch.columns]
            chosen = logits.float().log_softmax(dim=-1).gather(1, batch.tokens[:, None]).squeeze(1).cpu()  # the CPU waits once
            logprobs[list(indices)] = torch.stack([part.sum() for part in chosen.split([len(answer) for answer in answers])])

        each_group(
            f"scoring by {self.name}", similar_length_batches([len(ids) for ids, _ in rows], self.batch_size), score, model=self.model
        )
        return logprobs
