"""Generative reward models: the log-odds of two answers, by hand and by a plain forward pass."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.errors import ModelError
from stages.models.reward_question import RewardQuestion
from stages.rewards.config import RewardInput
from stages.rewards.generative import GenerativeSource, load_generative
from tests.rewards.conftest import TURNS

QUESTION = "{prompt} | {completion} | good?"


def generative(folder: Path, resolve: Any, **fields: Any) -> GenerativeSource:
    given = {"model": str(folder), "answers": [" yes", " no"], "question": QUESTION, **fields}
    return load_generative(RewardInput.model_validate(given), resolve(folder), device=torch.device("cpu"), dtype=torch.float32)


class Fixed(torch.nn.Module):
    """A model that gives each token of the vocabulary the same probability everywhere: those of ``probabilities``, and the rest evenly."""

    def __init__(self, size: int, probabilities: dict[int, float], *, most_rows: int = 1000) -> None:
        """A pass over more than ``most_rows`` rows runs out of memory."""
        super().__init__()
        self.most_rows, self.sizes = most_rows, list[int]()
        rest = (1 - sum(probabilities.values())) / (size - len(probabilities))
        self.logits = torch.nn.Parameter(torch.tensor([math.log(probabilities.get(token, rest)) + 3.0 for token in range(size)]))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_log_odds_by_hand(tiny_tokenizer) -> None:
    yes, no, very = (tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("y", "n", "q"))
    model = Fixed(len(tiny_tokenizer), {yes[0]: 0.6, no[0]: 0.15, very[0]: 0.1})
    assert len(yes) == len(no) == len(very) == 1
    named = {"batch_size": 2, "max_length": None, "ref": "x"}
    one = GenerativeSource("g", model, tiny_tokenizer, RewardQuestion("{completion}?", ("y", "n")), **named)
    assert one.score(["p", "q", "r"], ["a", "the film", "b"]).tolist() == pytest.approx([math.log(4)] * 3)  # 0.6 / 0.15
    two = GenerativeSource("g", model, tiny_tokenizer, RewardQuestion("{completion}?", ("y", "qn")), **named)
    assert two.score(["p"], ["a"]).tolist() == pytest.approx([math.log(40)])  # 0.6 / (0.1 * 0.15)


def test_a_pass_that_runs_out_of_memory_is_repeated_in_halves(tiny_tokenizer, caplog) -> None:
    yes, no = (tiny_tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("y", "n"))
    model = Fixed(len(tiny_tokenizer), {yes: 0.6, no: 0.15}, most_rows=2)
    source = GenerativeSource(
        "g", model, tiny_tokenizer, RewardQuestion("{completion}?", ("y", "n")), batch_size=4, max_length=None, ref="x"
    )
    assert source.score(["p", "q"], ["a", "b"]).tolist() == pytest.approx([math.log(4)] * 2)
    assert model.sizes == [4, 2, 2] and "scoring by g: memory ran out in a pass over 4 sequences" in caplog.text


LINES = "{% for m in messages %}{{ m.role + '\n' + m.content + eos_token }}{% endfor %}{{ 'assistant\n' if add_generation_prompt }}"
MARKS = "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "answers", "expected"),
    [
        (None, ("no", "\n"), (["no"], ["\n"])),
        (None, (" no", " a"), (["▁no"], ["▁a"])),
        (LINES, ("no", " no"), (["no"], ["▁no"])),
        (MARKS, ("no", " a"), (["no"], ["▁a"])),
        (MARKS.replace("else m", "else ' ' + m"), ("no", " a"), (["▁no"], ["▁a"])),
    ],
    ids=["no template", "with a space", "after a line end", "after a mark", "the template writes a space"],
)
def test_answers_are_encoded_as_a_continuation_of_the_question(tokenizer_of, template, answers, expected) -> None:
    """SentencePiece puts a space before every text that is encoded alone."""
    tokenizer = tokenizer_of("metaspace")
    tokenizer.chat_template = template
    asked = RewardQuestion("{completion}: is it good?", answers)
    source = GenerativeSource("g", Fixed(900, {}), tokenizer, asked, batch_size=2, max_length=None, ref="x")
    assert tuple(tokenizer.convert_ids_to_tokens(source.answer_ids(answer)) for answer in answers) == expected


def test_placeholders_inside_a_text_are_not_replaced() -> None:
    asked = RewardQuestion("{prompt} / {completion} / {prompt}", ("a", "b"))
    assert asked.filled("say {completion}", "no {prompt}") == "say {completion} / no {prompt} / say {completion}"


def test_log_odds_equal_those_of_a_plain_forward_pass(tiny_llama_folder, tiny_tokenizer, resolve_folder) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, attn_implementation="eager").eval()
    prompts, completions = ["the film", TURNS, "p"], ["a joy", "dull and weak and dull", "x"]
    shown = ["the film | a joy | good?", "system: be kind\n\nuser: hello | dull and weak and dull | good?", "p | x | good?"]

    def logprob(text: str, answer: str) -> float:
        ids = tiny_tokenizer(text)["input_ids"]
        answer_ids = tiny_tokenizer(answer)["input_ids"]
        with torch.no_grad():
            steps = model(torch.tensor([ids + answer_ids])).logits[0].log_softmax(dim=-1)
        return sum(float(steps[len(ids) - 1 + step, token]) for step, token in enumerate(answer_ids))

    expected = [logprob(text, " yes") - logprob(text, " no") for text in shown]
    judged = generative(tiny_llama_folder, resolve_folder).judge(prompts, completions)
    torch.testing.assert_close(judged.scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert not judged.cut.any()
    with pytest.raises(ModelError, match="cannot distinguish the answers .*: their tokens are equal"):
        source = generative(tiny_llama_folder, resolve_folder)
        source.answer_ids = lambda answer: [1]  # type: ignore[method-assign]
        source.check_answers("x")


def test_a_question_that_is_too_long_keeps_its_completion(tiny_llama_folder, resolve_folder) -> None:
    source = generative(tiny_llama_folder, resolve_folder)  # 128 positions
    judged = source.judge(["the film " * 100, "the film " * 100, "p"], ["a joy", "dull", "weak " * 200])
    assert judged.cut.tolist() == [True, True, True] and judged.completion_cut.tolist() == [False, False, True]
    assert len(set(judged.scores.tolist())) == 3
    ids, _, _ = source.encode("the film " * 100, "a joy")
    assert 120 < len(ids) + max(len(source.answer_ids(answer)) for answer in (" yes", " no")) <= 128
    assert source.tokenizer.decode(ids).endswith("the film  | a joy | good?")


def test_a_text_that_is_too_long_for_a_tokenizer_without_offsets() -> None:
    from transformers import ByT5Tokenizer

    named = {"batch_size": 2, "max_length": 40, "ref": "x"}
    source = GenerativeSource("g", Fixed(400, {}), ByT5Tokenizer(), RewardQuestion("{prompt} | {completion}", ("y", "n")), **named)
    ids, cut, completion_cut = source.encode("the film " * 100, "a joy")  # one token for each byte; one is left for the answer
    assert source.tokenizer.decode(ids).endswith("the film  | a joy") and 35 < len(ids) <= 39
    assert cut and not completion_cut
